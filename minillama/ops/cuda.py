"""CUDA: the kernels of `ops.triton`, and which arguments they support.

The other ops are torch's own kernels or `fused`. `ops.triton` is imported at the first call:
importing Triton is slow, and it may not be installed. Triton starts a kernel on the current device,
which is made that of x: the layers of a model may be on several devices. In backward, autograd has
made it so.
"""

import logging
import os
import shutil
import sysconfig
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 1 << 14  # elements of a row that one program holds in registers


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Whether Triton is installed, with what it needs to compile the launcher of a kernel."""
    if find_spec("triton") is None:
        return False
    missing = []
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        missing.append("a C compiler (gcc)")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        missing.append("Python's header files (python3-dev)")
    if missing:
        log.warning("Triton's kernels are not used: it needs %s", " and ".join(missing))
    return not missing


def supports_rms_norm(x: Tensor, weight: Tensor, eps: float) -> bool:
    has_rows = x.numel() > 0 and x.shape[-1] <= MAX_WIDTH
    same_dtype = x.dtype in FLOATS and weight.dtype == x.dtype
    return has_rows and same_dtype and weight.is_contiguous()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from minillama.ops import triton

    with torch.cuda.device_of(x):
        return triton.rms_norm(x, weight, eps)


def supports_swiglu(gate: Tensor, up: Tensor) -> bool:
    same_dtype = gate.dtype in FLOATS and gate.dtype == up.dtype
    return same_dtype and gate.shape == up.shape and gate.numel() > 0


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    from minillama.ops import triton

    with torch.cuda.device_of(gate):
        return triton.swiglu(gate, up)
