"""One table of ops, one lookup: what the rest of the package calls.

Each op has its formula (`reference`) and a faster form (`fused`). `MINILLAMA_OPS=reference|fused`, or per op
(`MINILLAMA_OPS=rms_norm=reference,attention=fused`), chooses; the default is what measuring says.
"""

import os
from collections.abc import Callable
from functools import cache

from torch import Tensor

from minillama.errors import UserError, closest
from minillama.ops import fused, reference
from minillama.ops.documents import Documents
from minillama.ops.reference import IGNORE, rope_tables

__all__ = ["IGNORE", "Documents", "adamw", "attention", "exact_adamw", "linear", "linear_cross_entropy", "rms_norm", "rope",
           "rope_tables", "swiglu"]

# op: implementation by name, the default first
TABLE: dict[str, dict[str, Callable]] = {
    "rms_norm": {"fused": fused.rms_norm, "reference": reference.rms_norm},
    "rope": {"reference": reference.rope},
    "swiglu": {"reference": reference.swiglu},
    "linear": {"fused": fused.linear, "reference": reference.linear},
    "attention": {"fused": fused.attention, "reference": reference.attention},
    "linear_cross_entropy": {"fused": fused.linear_cross_entropy, "reference": reference.linear_cross_entropy},
    "adamw": {"fused": fused.adamw, "reference": reference.adamw},
}


@cache
def implementation(op: str) -> Callable:
    """The function in use for `op`, chosen once per process from the table and `MINILLAMA_OPS`."""
    choices = TABLE[op]
    wanted = _requests(os.environ.get("MINILLAMA_OPS", "auto")).get(op, "auto")
    if wanted == "auto" or wanted not in choices:
        return next(iter(choices.values()))
    return choices[wanted]


def _requests(spec: str) -> dict[str, str]:
    """`"reference"` or `"rms_norm=reference,attention=fused"` as {op: name}."""
    pairs = (part.partition("=")[::2] for part in spec.split(","))  # (op, name); a part without "=" names nothing
    requests = dict(pairs) if "=" in spec else dict.fromkeys(TABLE, spec)
    for op, name in requests.items():
        if op not in TABLE:
            raise UserError(f"MINILLAMA_OPS: no op {op!r}{closest(op, TABLE)}; ops: {', '.join(TABLE)}")
        if name not in ("auto", "fused", "reference"):
            raise UserError(f"MINILLAMA_OPS: {op}={name!r}; choose auto, fused or reference")
    return requests


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return implementation("rms_norm")(x, weight, eps)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return implementation("rope")(x, cos, sin)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return implementation("swiglu")(gate, up)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if x.device.type != "cpu":
        return reference.linear(x, weight, bias)
    return implementation("linear")(x, weight, bias)


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    return implementation("attention")(q, k, v, documents)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return implementation("linear_cross_entropy")(hidden, weight, labels)


def adamw(weight: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: int, **settings: float) -> None:
    implementation("adamw")(weight, grad, m, v, step, **settings)


def exact_adamw(weight: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: int, **settings: float) -> None:
    """AdamW whose result does not depend on how the vector is cut: fused kernels round the ends of a stretch otherwise."""
    reference.adamw(weight, grad, m, v, step, **settings)
