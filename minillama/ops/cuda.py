"""CUDA: the kernels of `ops.triton`, and which arguments they support.

The other ops are torch's own kernels or `fused`. `ops.triton` is imported at the first call:
importing Triton is slow, and it may not be installed.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 1 << 14  # elements of a row that one program holds in registers


def has_triton() -> bool:
    return find_spec("triton") is not None


def supports_rms_norm(x: Tensor, weight: Tensor, eps: float) -> bool:
    has_rows = x.numel() > 0 and x.shape[-1] <= MAX_WIDTH
    same_dtype = x.dtype in FLOATS and weight.dtype == x.dtype
    return has_rows and same_dtype and weight.is_contiguous()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from minillama.ops import triton

    return triton.rms_norm(x, weight, eps)


def supports_swiglu(gate: Tensor, up: Tensor) -> bool:
    same_dtype = gate.dtype in FLOATS and gate.dtype == up.dtype
    return same_dtype and gate.shape == up.shape and gate.numel() > 0


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    from minillama.ops import triton

    return triton.swiglu(gate, up)
