"""The machine: one device picked by name, and the handful of things that differ between makes.

Everything is loaded on the host first and moved; nothing else in the package names a vendor.
"""

import ctypes
import os
import resource

import torch

from minillama.errors import UserError

INSTALL = {
    "cuda": "a CUDA build of torch and an NVIDIA driver",
    "npu": "torch_npu and CANN (pip install torch-npu)",
    "mlu": "torch_mlu, from Cambricon",
    "tpu": "torch_tpu, from Sophgo",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
          "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick(name: str = "auto", local_rank: int = 0) -> torch.device:
    """The device called `name`; "auto" takes torch's accelerator where there is one, else the processor."""
    if int(os.environ.get("SOPHGO_SPLIT") or 1) > 1:
        raise UserError(f"SOPHGO_SPLIT={os.environ['SOPHGO_SPLIT']}: layers are not placed on several chips here yet; unset it")
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kind = found.type if found else "cpu"
    name = kind if name == "auto" else name
    if name == "cpu":
        return torch.device("cpu")
    if name != kind:
        raise UserError(f"device {name!r} is not here (found: {kind}); it needs {INSTALL[name]}")
    device = torch.device(name, local_rank)
    torch.accelerator.set_device_index(local_rank)
    return device


def allow_tf32(allowed: bool) -> None:
    """Whether cuda may round the inputs of fp32 products to TF32; other devices have no such mode."""
    torch.backends.cuda.matmul.allow_tf32 = allowed


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory used so far: the device's own count, or the process's resident set on the processor."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.get_device_module(device).max_memory_allocated()


def release_freed(device: torch.device) -> None:
    """Give the system back what glibc keeps of freed tensors, holes between live ones: a third of the heap during backward."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if device.type == "cpu" else None
    if trim:
        trim(0)


def compute_dtype(precision: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype to compute in, and a warning where it is not the one asked for."""
    if precision in ("fp16", "float16") and device.type == "cpu":
        return torch.float32, "fp16 is not computed on the processor; using fp32 instead"
    return DTYPES[precision], ""
