"""One table of ops and one lookup.

`ops.rms_norm(x, weight, eps)` computes what `ops.reference` specifies, by the fastest
implementation on the device of x. Each op has a list of implementations in order of preference: a
vendor's kernel, then `fused` (backward derived by hand), then `reference` (the formula), which
takes all arguments. A call runs the first implementation that

    is for the device of x, and is available        asked once: is the kernel installed?
    supports the arguments                          asked at every call, by shapes and dtypes alone,
                                                    so all ranks choose the same

A kernel that fails is an error, never a reason to try the next one.

`--ops NAME`, or the variable MINILLAMA_OPS, chooses an implementation for all ops that have it
(`reference`, `fused`, `npu`, …), or for some (`rms_norm=reference,attention=fused`). `auto` is the
order of the table. A chosen implementation that cannot be used is an error.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minillama.errors import UserError, closest
from minillama.ops import (
    cpu_linear,
    cuda,
    fused_attention,
    fused_elementwise,
    fused_loss,
    mlu,
    npu,
    reference,
    rotary,
    tpu,
)
from minillama.ops.packing import Documents
from minillama.ops.reference import IGNORE
from minillama.ops.rotary import RotaryTables, rope_tables

__all__ = ["IGNORE", "Documents", "RotaryTables", "rope_tables", "rotary"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Implementation:
    """One implementation of an op."""

    name: str
    function: Callable[..., Any]
    device: str = ""  # the only device type it runs on; "": any
    available: Callable[[], bool] = lambda: True
    supports: Callable[..., bool] | None = None  # takes a call's arguments; None: supports all


class Op:
    """An op with its implementations in order. Calling it runs the first that can."""

    def __init__(self, name: str, *implementations: Implementation) -> None:
        self.name = name
        self.implementations = implementations
        self.choose("")  # at the first call: as MINILLAMA_OPS says

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        function = self._chosen_functions.get(x.device)
        if function is None:
            function = self.select(x, *args, **kwargs).function
        return function(x, *args, **kwargs)

    def select(self, x: Tensor, *args: Any, **kwargs: Any) -> Implementation:
        """The implementation that a call with these arguments runs."""
        usable = self.usable(x.device.type)
        if usable[0].supports is None:
            self._chosen_functions[x.device] = usable[0].function
        for implementation in usable:
            if implementation.supports is None or implementation.supports(x, *args, **kwargs):
                self._log(x.device.type, implementation)
                return implementation
        tensors = [arg for arg in (x, *args) if isinstance(arg, Tensor)]
        shapes = ", ".join(f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in tensors)
        raise UserError(
            f"--ops, MINILLAMA_OPS: {self.name}={self.choice} does not take {shapes}; use auto"
        )

    def choose(self, name: str) -> None:
        """Use only the implementation of this name.

        "auto", or a name that this op does not have, means the order of the table.
        """
        self.choice = name
        self._usable: dict[str, list[Implementation]] = {}  # by device type
        # By device, if the first implementation takes all arguments: then no call selects again.
        self._chosen_functions: dict[torch.device, Callable[..., Any]] = {}
        self._logged: dict[str, list[str]] = {}  # names of those used so far, by device type

    def usable(self, device_type: str) -> list[Implementation]:
        """The implementations to select from on a type of device."""
        if device_type not in self._usable:
            self._usable[device_type] = self._find_usable(device_type)
        return self._usable[device_type]

    def _find_usable(self, device_type: str) -> list[Implementation]:
        if not self.choice:
            choose("")
        usable = [
            implementation
            for implementation in self.implementations
            if implementation.device in ("", device_type) and implementation.available()
        ]
        if self.choice not in [implementation.name for implementation in self.implementations]:
            return usable
        chosen = [implementation for implementation in usable if implementation.name == self.choice]
        if not chosen:
            raise UserError(
                f"--ops, MINILLAMA_OPS: {self.name}={self.choice} cannot be used on {device_type}: "
                "no such kernel; use auto"
            )
        return chosen

    def _log(self, device_type: str, implementation: Implementation) -> None:
        """Log the first choice for a device, and warn when a call needs another implementation."""
        names = self._logged.setdefault(device_type, [])
        if implementation.name in names:
            return
        message = f"op {self.name} on {device_type}: {implementation.name}"
        if names:
            log.warning(f"{message} takes a call that {names[-1]} does not")
        else:
            log.info(message)
        names.append(implementation.name)


# In each line: name, function, then for a vendor's kernel its device, available() and supports().
# fmt: off
rms_norm = Op(
    "rms_norm",
    Implementation("npu", npu.rms_norm, "npu", npu.has("npu_rms_norm"), npu.supports_rms_norm),
    Implementation("mlu", mlu.rms_norm, "mlu", mlu.has_rms_norm, mlu.supports_rms_norm),
    Implementation("tpu", tpu.rms_norm, "tpu", tpu.has_rms_norm, tpu.supports_rms_norm),
    Implementation("triton", cuda.rms_norm, "cuda", cuda.has_triton, cuda.supports_rms_norm),
    Implementation("fused", fused_elementwise.rms_norm),
    Implementation("reference", reference.rms_norm),
)
rope = Op(
    "rope",
    Implementation("npu", npu.rope, "npu", npu.has("npu_rotary_mul"), npu.supports_rope),
    Implementation("fused", fused_elementwise.rope),
    Implementation("reference", reference.rope),
)
swiglu = Op(
    "swiglu",
    Implementation("npu", npu.swiglu, "npu", npu.has("npu_swiglu"), npu.supports_swiglu),
    Implementation("mlu", mlu.swiglu, "mlu", mlu.has_swiglu, mlu.supports_swiglu),
    Implementation("triton", cuda.swiglu, "cuda", cuda.has_triton, cuda.supports_swiglu),
    Implementation("fused", fused_elementwise.swiglu),
    Implementation("reference", reference.swiglu),
)
scaled_masked_softmax = Op(
    "scaled_masked_softmax",
    Implementation("npu", npu.scaled_masked_softmax, "npu",
                   npu.has("npu_scaled_masked_softmax"), npu.supports_scaled_masked_softmax),
    Implementation("fused", fused_elementwise.scaled_masked_softmax),
    Implementation("reference", reference.scaled_masked_softmax),
)
linear = Op(
    "linear",
    Implementation("fused", cpu_linear.linear),
    Implementation("reference", reference.linear),
)
attention = Op(
    "attention",
    Implementation("npu", npu.attention, "npu", npu.has(*npu.ATTENTION), npu.supports_attention),
    Implementation("fused", fused_attention.attention),
    Implementation("reference", reference.attention),
)
linear_cross_entropy = Op(
    "linear_cross_entropy",
    Implementation("fused", fused_loss.linear_cross_entropy),
    Implementation("reference", reference.linear_cross_entropy),
)
adamw = Op(
    "adamw",
    Implementation("npu", npu.adamw, "npu", npu.has("npu_apply_adam_w"), npu.supports_adamw),
    Implementation("mlu", mlu.adamw, "mlu", mlu.has_adamw, mlu.supports_adamw),
    Implementation("fused", fused_elementwise.adamw),
    Implementation("reference", reference.adamw),
)
OPS = (
    rms_norm, rope, swiglu, scaled_masked_softmax, linear, attention, linear_cross_entropy, adamw,
)
# fmt: on
TABLE = {op.name: op for op in OPS}


def choose(spec: str) -> None:
    """Choose implementations from here on; "" means as MINILLAMA_OPS says.

    Raises UserError for an op or an implementation that does not exist.
    """
    choices = _parse(spec or os.environ.get("MINILLAMA_OPS") or "auto")
    for op in TABLE.values():
        op.choose(choices.get(op.name, "auto"))


def _parse(spec: str) -> dict[str, str]:
    """`fused`, or `rms_norm=reference,attention=fused`, as {op: implementation}."""
    if "=" not in spec:
        names = [implementation.name for op in OPS for implementation in op.implementations]
        _check_choice(repr(spec), spec, names)
        return dict.fromkeys(TABLE, spec)
    choices = {}
    for part in spec.split(","):
        op, _, name = part.partition("=")
        if op not in TABLE:
            hint = closest(op, TABLE)
            raise UserError(f"--ops, MINILLAMA_OPS: no op {op!r}{hint}; ops: {', '.join(TABLE)}")
        names = [implementation.name for implementation in TABLE[op].implementations]
        _check_choice(f"{op}={name!r}", name, names)
        choices[op] = name
    return choices


def _check_choice(text: str, name: str, names: list[str]) -> None:
    allowed = list(dict.fromkeys(["auto", *names]))
    if name not in allowed:
        raise UserError(f"--ops, MINILLAMA_OPS: {text}; choose one of: {', '.join(allowed)}")


def pack_weights(model: nn.Module, num_rows: int) -> None:
    """Pack the weights to decode `num_rows` sequences at a time, if the fused linear is used.

    See `cpu_linear.pack_weights`. To do it again costs nothing.
    """
    if linear.usable("cpu")[0].function is cpu_linear.linear:
        cpu_linear.pack_weights(model, num_rows)
