"""The machine: one device picked by name, and the handful of things in which the makes differ.

Plug-ins are imported here and nowhere else, and only the one that is used: torch has room for one. Everything is loaded on the
host first and then moved, and moved back before it is printed or saved. int64, which Sophgo's plug-in lists as unsupported, carries
token ids and labels here: it is left to the plug-in.
"""

import ctypes
import importlib
import importlib.util
import logging
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any, NamedTuple

import torch

from minillama.errors import UserError, closest

log = logging.getLogger(__name__)

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Vendor:
    """What differs between makes."""

    device: str  # torch's name
    package: str  # the plug-in; "": built into torch
    visible: str  # the variable that says which chips a process sees
    install: str  # what a machine without it needs


VENDORS = {
    vendor.device: vendor
    for vendor in (
        Vendor(
            "npu",
            "torch_npu",
            "ASCEND_RT_VISIBLE_DEVICES",
            "CANN, its set_env.sh sourced, and `pip install torch-npu==VERSION` with the version of your torch",
        ),
        Vendor(
            "mlu",
            "torch_mlu",
            "MLU_VISIBLE_DEVICES",
            "Cambricon's driver and its torch_mlu wheel for torch 2.6 or later",
        ),
        Vendor(
            "tpu",
            "torch_tpu",
            "CHIPS",
            "Sophgo's driver and its torch_tpu wheel (github.com/sophgo/torch-tpu; what `pip install torch-tpu` brings is Google's)",
        ),
        Vendor("cuda", "", "CUDA_VISIBLE_DEVICES", "a CUDA build of torch and an NVIDIA driver"),
    )
}


def pick(name: str = "auto", local_rank: int = 0) -> torch.device:
    """The device called `name`, made current; `MINILLAMA_DEVICE` overrides it. "auto": the accelerator torch has loaded, else npu, mlu,
    tpu or cuda where its plug-in finds a chip, else the processor. local_rank: which chip. Raises UserError where it is not here."""
    if os.environ.get("SOPHGO_SPLIT", "") not in ("", "0", "1"):
        raise UserError(
            f"SOPHGO_SPLIT={os.environ['SOPHGO_SPLIT']}: layers are not placed on several chips here yet; unset it"
        )
    forced = os.environ.get("MINILLAMA_DEVICE", "")
    name = forced or name
    if name not in ("auto", "cpu", *VENDORS):
        raise UserError(
            f"MINILLAMA_DEVICE={name}{closest(name, VENDORS)}: choose auto, cpu, {', '.join(VENDORS)}"
        )
    if name == "auto" and os.environ.get("USE_SOPHGO", "") not in ("", "0"):
        name = "tpu"
    if name == "auto":
        loaded = torch.accelerator.current_accelerator()
        in_order = sorted(
            VENDORS, key=lambda device: not (loaded and loaded.type == device)
        )  # stable: the loaded one, then the table
        name = next((device for device in in_order if not _problem(device, quiet=False)), "cpu")
    elif name != "cpu" and (problem := _problem(name)):
        asked = "MINILLAMA_DEVICE asks for it" if forced else "take another with --device"
        raise UserError(
            f"device {name!r} cannot be used: {problem} ({asked}); it needs {VENDORS[name].install}"
        )
    if name == "cpu":
        return torch.device("cpu")
    chips = (sophgo_chips() if name == "tpu" else []) or list(
        range(getattr(torch, name).device_count())
    )
    if local_rank >= len(chips):
        raise UserError(
            f"local rank {local_rank} has no chip: {len(chips)} to be seen ({_visible(name)}); "
            f"start {len(chips)} processes with --nproc_per_node"
        )
    getattr(torch, name).set_device(chips[local_rank])
    return torch.device(name, chips[local_rank])


def _problem(name: str, quiet: bool = True) -> str:
    """Why a type of device cannot be used, or an empty string; imports its plug-in. quiet: do not warn where a plug-in is here in vain."""
    package, problem = VENDORS[name].package, ""
    if package and importlib.util.find_spec(package) is None and not hasattr(torch, name):
        return f"{package} is not installed"
    if package and is_googles(package):
        problem = f"the {package} installed here is Google's, and {name!r} here means Sophgo's"
    elif package and not hasattr(torch, name):
        try:
            importlib.import_module(package)
        except (ImportError, OSError, RuntimeError) as error:
            problem = f"{package} does not load ({str(error).partition(chr(10))[0]})"
    if not problem and not (hasattr(torch, name) and getattr(torch, name).is_available()):
        problem = f"{package or 'torch'} finds no chip ({_visible(name)})"
    if problem and package and not quiet:
        log.warning("%s passed over: %s", name, problem)
    return problem


def is_googles(package: str) -> bool:
    """Whether the distribution that brings `package` is Google's, by its metadata alone: importing it can end the process."""
    try:
        found = metadata.metadata(package)
    except metadata.PackageNotFoundError:
        return False  # a source tree
    return "google" in (found.get("Home-page") or "") or any(
        r.startswith("libtpu") for r in found.get_all("Requires-Dist") or ()
    )


def _visible(name: str) -> str:
    return f"{VENDORS[name].visible} is {os.environ.get(VENDORS[name].visible, 'unset')}"


def sophgo_chips() -> list[int]:
    """The chip of each local rank, as CHIP_MAP (or CHIPS) lists them; empty where neither is set."""
    listed = os.environ.get("CHIP_MAP") or os.environ.get("CHIPS") or ""
    try:
        return [int(chip) for chip in listed.split(",") if chip.strip()]
    except ValueError:
        raise UserError(
            f"CHIP_MAP or CHIPS is {listed!r}; expected numbers of chips, such as 0,1"
        ) from None


def group_options(device: torch.device, size: int) -> Any:
    """What a process group of `size` ranks needs besides its name: Sophgo's wants the ring of chips, the others nothing (None)."""
    if device.type != "tpu":
        return None
    options = importlib.import_module("torch_tpu").ProcessGroupSCCLOptions()
    options.chip_map = sophgo_chips() or list(range(size))
    return options


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """What is drawn in the body, on the host and on the device, follows from `seed`; the generators' state is put back after it."""
    chips = [] if device.type == "cpu" else [device.index]
    with torch.random.fork_rng(chips, device_type=device.type if chips else "cuda"):
        torch.manual_seed(seed)
        yield


def allow_tf32(allowed: bool) -> None:
    """Whether cuda may round the inputs of fp32 products to TF32; other devices have no such mode."""
    torch.backends.cuda.matmul.allow_tf32 = allowed


class Memory(NamedTuple):
    """Bytes. None: not told."""

    peak: int | None  # the most held so far
    free: int | None


def memory(device: torch.device) -> Memory:
    """The device's own count; of the processor, the process's largest resident set and the machine's free memory."""
    if device.type == "cpu":
        free = (
            os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            if "SC_AVPHYS_PAGES" in os.sysconf_names
            else None
        )
        return Memory(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, free)
    peak, free = (
        getattr(getattr(torch, device.type), name, lambda _: None)(device)
        for name in ("max_memory_allocated", "mem_get_info")
    )
    return Memory(peak, free and free[0])


def supports_bf16(device: torch.device) -> bool:
    return (
        device.type == "cpu"
        or getattr(getattr(torch, device.type), "is_bf16_supported", lambda: True)()
    )


def release_freed(device: torch.device) -> None:
    """Give the system back what glibc keeps of freed tensors, holes between live ones: a third of the heap during backward."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if device.type == "cpu" else None
    if trim:
        trim(0)


def compute_dtype(precision: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype to compute in, and a warning where it is not the one asked for."""
    wanted = DTYPES[precision]
    if wanted == torch.float16 and device.type == "cpu":
        return torch.float32, "fp16 is not computed on the processor; using fp32 instead"
    if wanted == torch.bfloat16 and not supports_bf16(device):
        return torch.float32, f"{device.type} has no bf16; using fp32 instead, at twice the memory"
    return wanted, ""
