"""CUDA: Triton's kernels (`ops.triton`), imported at the first call, and what they take. The rest is torch's own or `fused`."""

from importlib.util import find_spec

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 1 << 14  # elements of a row that a program holds in registers


def available() -> bool:
    return find_spec("triton") is not None


def can_rms_norm(x: Tensor, weight: Tensor, eps: float) -> bool:
    return (
        x.dtype in FLOATS
        and weight.dtype == x.dtype
        and weight.is_contiguous()
        and x.numel() > 0
        and x.shape[-1] <= WIDEST
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from minillama.ops import triton

    return triton.rms_norm(x, weight, eps)


def can_swiglu(gate: Tensor, up: Tensor) -> bool:
    return (
        gate.dtype in FLOATS
        and gate.dtype == up.dtype
        and gate.shape == up.shape
        and gate.numel() > 0
    )


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    from minillama.ops import triton

    return triton.swiglu(gate, up)
