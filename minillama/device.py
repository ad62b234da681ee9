"""The machine: one device picked by name, and the handful of things that differ between makes.

Everything is loaded on the host first and moved; nothing else in the package names a vendor.
"""

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
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kind = found.type if found else "cpu"
    if name == "auto":
        name = kind
    if name == "cpu":
        return torch.device("cpu")
    if name != kind:
        raise UserError(f"device {name!r} is not here (found: {kind}); it needs {INSTALL[name]}")
    device = torch.device(name, local_rank)
    torch.accelerator.set_device_index(local_rank)
    return device


def process_group_backend(device: torch.device) -> str:
    """The name of the collectives library for this device: gloo, nccl, hccl, cncl, sccl."""
    return torch.distributed.get_default_backend_for_device(device)


def synchronize(device: torch.device) -> None:
    """Wait for the device to finish what was asked of it."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def allow_tf32(allowed: bool) -> None:
    """Whether cuda may round the inputs of fp32 products to TF32; other devices have no such mode."""
    torch.backends.cuda.matmul.allow_tf32 = allowed


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory used so far: the device's own count, or the process's resident set on the processor."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.get_device_module(device).max_memory_allocated()


def compute_dtype(precision: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype to compute in, and a warning where it is not the one asked for."""
    if precision in ("fp16", "float16") and device.type == "cpu":
        return torch.float32, "fp16 is not computed on the processor; using fp32 instead"
    return DTYPES[precision], ""


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of the random generators that dropout and sampling draw from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def set_rng_state(device: torch.device, states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type in states and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[device.type])
