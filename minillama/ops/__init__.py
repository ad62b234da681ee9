"""One table of ops, one lookup: `ops.rms_norm(x, weight, eps)` calls the implementation in use of what `ops.reference` specifies.

Each op has its formula (`reference`) and a faster form (`fused`). `MINILLAMA_OPS=reference|fused`, or per op
(`MINILLAMA_OPS=rms_norm=reference,attention=fused`), chooses; the default is what measuring says.
"""

import os
from collections.abc import Callable
from functools import cache

from minillama.errors import UserError, closest
from minillama.ops import fused, reference
from minillama.ops.documents import Documents
from minillama.ops.reference import IGNORE, rope_tables

__all__ = ["IGNORE", "Documents", "rope_tables"]

# op: implementation by name, the default first
TABLE: dict[str, dict[str, Callable]] = {
    "rms_norm": {"fused": fused.rms_norm, "reference": reference.rms_norm},
    "rope": {"fused": fused.rope, "reference": reference.rope},
    "swiglu": {"fused": fused.swiglu, "reference": reference.swiglu},
    "scaled_masked_softmax": {"fused": fused.scaled_masked_softmax, "reference": reference.scaled_masked_softmax},
    "linear": {"fused": fused.linear, "reference": reference.linear},
    "attention": {"fused": fused.attention, "reference": reference.attention},
    "linear_cross_entropy": {"fused": fused.linear_cross_entropy, "reference": reference.linear_cross_entropy},
    "adamw": {"fused": fused.adamw, "reference": reference.adamw},
}


def __getattr__(op: str) -> Callable:
    """`ops.NAME` for a name of the table."""
    if op not in TABLE:
        raise AttributeError(f"module {__name__!r} has no op {op!r}")
    return implementation(op)


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
