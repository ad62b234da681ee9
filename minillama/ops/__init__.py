"""One table of ops, one lookup: `ops.rms_norm(x, weight, eps)` computes what `ops.reference` specifies, by the first form that can.

A form is one implementation: the vendor's kernel, the hand-derived one (`fused`), or the formula (`reference`), which takes everything
and stands last. Whether a form is *available* is asked once; whether it *supports* the arguments at every call, by shapes and dtypes
alone, so all ranks choose alike. A kernel that fails is an error, never a reason to try the next one.

`MINILLAMA_OPS`, or `--ops`, takes a form for all ops that have it (`reference`, `fused`, `npu`, …; `auto` is the table's order), or
for some (`rms_norm=reference,attention=fused`). A form that was asked for and cannot be used is an error.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minillama.errors import UserError, closest
from minillama.ops import cuda, fused, mlu, npu, packed_weights, reference, tpu
from minillama.ops.packing import Documents
from minillama.ops.reference import IGNORE, rope_tables

__all__ = ["IGNORE", "Documents", "rope_tables"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Form:
    """One implementation of an op."""

    name: str
    function: Callable[..., Any]
    device: str = ""  # the only type of device it runs on; "": all
    available: Callable[[], bool] = lambda: True
    supports: Callable[..., bool] | None = None  # of a call's arguments; None: all


class Op:
    """An op: called, it calls the first of its forms that can."""

    def __init__(self, name: str, *forms: Form) -> None:
        self.name, self.forms = name, forms
        self.want("")

    def __call__(self, x: Tensor, *rest: Any, **named: Any) -> Any:
        function = self._only.get(x.device) or self.pick(x, *rest, **named).function
        return function(x, *rest, **named)

    def want(self, name: str) -> None:
        """Use the form of this name alone; "auto", or a name that this op has no form of: the table's order."""
        self.wanted = name
        self._usable: dict[str, list[Form]] = {}  # by type of device
        self._only: dict[
            torch.device, Callable
        ] = {}  # where there is nothing to ask: the common case costs one look
        self._said: dict[str, list[str]] = {}  # forms used so far

    def usable(self, device: str) -> list[Form]:
        """The forms to choose from on a type of device. Raises UserError where the one asked for is not among them."""
        if device not in self._usable:
            if not self.wanted:
                choose("")
            forms = [
                form for form in self.forms if form.device in ("", device) and form.available()
            ]
            if self.wanted in [form.name for form in self.forms]:
                forms = [form for form in forms if form.name == self.wanted]
                if not forms:
                    raise UserError(
                        f"--ops, MINILLAMA_OPS: {self.name}={self.wanted} cannot be used on {device}: no such kernel; use auto"
                    )
            self._usable[device] = forms
        return self._usable[device]

    def pick(self, x: Tensor, *rest: Any, **named: Any) -> Form:
        """The form for a call with these arguments."""
        device = x.device.type
        for i, form in enumerate(self.usable(device)):
            if form.supports is None or form.supports(x, *rest, **named):
                self._say(device, form)
                if i == 0 and form.supports is None:
                    self._only[x.device] = form.function
                return form
        shapes = ", ".join(
            f"{tuple(a.shape)} {a.dtype}" for a in (x, *rest) if isinstance(a, Tensor)
        )
        raise UserError(
            f"--ops, MINILLAMA_OPS: {self.name}={self.wanted} does not take {shapes}; use auto"
        )

    def _say(self, device: str, form: Form) -> None:
        """One line when the choice for a device is made, and one when it changes."""
        said = self._said.setdefault(device, [])
        if form.name not in said:
            log.log(
                logging.WARNING if said else logging.INFO,
                "op %s on %s: %s%s",
                self.name,
                device,
                form.name,
                f" takes a call that {said[-1]} does not" if said else "",
            )
            said.append(form.name)


rms_norm = Op(
    "rms_norm",
    Form("npu", npu.rms_norm, "npu", npu.has("npu_rms_norm"), npu.can_rms_norm),
    Form("mlu", mlu.rms_norm, "mlu", mlu.has_rms_norm, mlu.can_infer),
    Form("tpu", tpu.rms_norm, "tpu", tpu.has_rms_norm, tpu.can_rms_norm),
    Form("triton", cuda.rms_norm, "cuda", cuda.available, cuda.can_rms_norm),
    Form("fused", fused.rms_norm),
    Form("reference", reference.rms_norm),
)
rope = Op(
    "rope",
    Form("npu", npu.rope, "npu", npu.has("npu_rotary_mul"), npu.can_rope),
    Form("fused", fused.rope),
    Form("reference", reference.rope),
)
swiglu = Op(
    "swiglu",
    Form("npu", npu.swiglu, "npu", npu.has("npu_swiglu"), npu.can_swiglu),
    Form("mlu", mlu.swiglu, "mlu", mlu.has_active, mlu.can_infer),
    Form("triton", cuda.swiglu, "cuda", cuda.available, cuda.can_swiglu),
    Form("fused", fused.swiglu),
    Form("reference", reference.swiglu),
)
scaled_masked_softmax = Op(
    "scaled_masked_softmax",
    Form(
        "npu",
        npu.scaled_masked_softmax,
        "npu",
        npu.has("npu_scaled_masked_softmax"),
        npu.can_scaled_masked_softmax,
    ),
    Form("fused", fused.scaled_masked_softmax),
    Form("reference", reference.scaled_masked_softmax),
)
linear = Op("linear", Form("fused", fused.linear), Form("reference", reference.linear))
attention = Op(
    "attention",
    Form("npu", npu.attention, "npu", npu.has(*npu.ATTENTION), npu.can_attention),
    Form("fused", fused.attention),
    Form("reference", reference.attention),
)
linear_cross_entropy = Op(
    "linear_cross_entropy",
    Form("fused", fused.linear_cross_entropy),
    Form("reference", reference.linear_cross_entropy),
)
adamw = Op(
    "adamw",
    Form("npu", npu.adamw, "npu", npu.has("npu_apply_adam_w"), npu.can_adamw),
    Form("mlu", mlu.adamw, "mlu", mlu.has_fused_adam, mlu.can_adamw),
    Form("fused", fused.adamw),
    Form("reference", reference.adamw),
)
TABLE = {
    op.name: op
    for op in (
        rms_norm,
        rope,
        swiglu,
        scaled_masked_softmax,
        linear,
        attention,
        linear_cross_entropy,
        adamw,
    )
}


def pack(model: nn.Module, rows: int) -> None:
    """Before decoding `rows` texts at a time: `packed_weights.pack`, where the fused linear is in use. Doing it again costs nothing."""
    if linear.usable("cpu")[0].name == "fused":
        packed_weights.pack(model, rows)


def choose(spec: str) -> None:
    """Let `spec` say which forms to use from here on; "": what `MINILLAMA_OPS` says. Raises UserError for a name that does not exist."""
    spec = spec or os.environ.get("MINILLAMA_OPS") or "auto"
    names = ["auto", *dict.fromkeys(form.name for op in TABLE.values() for form in op.forms)]
    pairs = (
        [part.partition("=")[::2] for part in spec.split(",")]
        if "=" in spec
        else [(op, spec) for op in TABLE]
    )  # (op, form)
    for op, name in pairs:
        if op not in TABLE:
            raise UserError(
                f"--ops, MINILLAMA_OPS: no op {op!r}{closest(op, TABLE)}; ops: {', '.join(TABLE)}"
            )
        allowed = ["auto", *(form.name for form in TABLE[op].forms)] if "=" in spec else names
        if name not in allowed:
            raise UserError(
                f"--ops, MINILLAMA_OPS: {op}={name!r}; choose one of: {', '.join(allowed)}"
            )
    for op in TABLE.values():
        op.want(dict(pairs).get(op.name, "auto"))
