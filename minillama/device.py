"""The device: one picked by name, and the few things in which the vendors differ.

Plug-ins are imported here and nowhere else, and only the one that is used: torch has room for one.
Tensors are loaded on the host first and then moved, and moved back before they are printed or
saved. Sophgo's plug-in lists int64 as unsupported. Token ids and labels are int64 here; the plug-in
has to handle them."""

import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from minillama import requirements
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
    """What differs between vendors."""

    device: str  # torch's name
    package: str  # the plug-in; "": built into torch
    visible: str  # the variable that says which chips a process sees
    install: str  # what a machine without it needs


# In the order in which "auto" looks for them.
VENDORS = {
    "npu": Vendor(
        device="npu",
        package="torch_npu",
        visible="ASCEND_RT_VISIBLE_DEVICES",
        install="CANN, its set_env.sh sourced, and `pip install torch-npu==VERSION` "
        "with the version of your torch",
    ),
    "mlu": Vendor(
        device="mlu",
        package="torch_mlu",
        visible="MLU_VISIBLE_DEVICES",
        install="Cambricon's driver and its torch_mlu wheel for torch 2.7 or later",
    ),
    "tpu": Vendor(
        device="tpu",
        package="torch_tpu",
        visible="CHIPS",
        install="Sophgo's driver and its torch_tpu wheel (github.com/sophgo/torch-tpu; "
        "what `pip install torch-tpu` brings is Google's)",
    ),
    "cuda": Vendor(
        device="cuda",
        package="",
        visible="CUDA_VISIBLE_DEVICES",
        install="a CUDA build of torch and an NVIDIA driver",
    ),
}


def pick(name: str = "auto", local_rank: int = 0) -> torch.device:
    """The device called `name`, made current; the variable MINILLAMA_DEVICE overrides the name.

    "auto" is the accelerator that torch has loaded, else the first of npu, mlu, tpu and cuda whose
    plug-in finds a device, else the CPU.

    Args:
        local_rank: which of the machine's devices.

    Raises UserError if the device cannot be used.
    """
    forced = os.environ.get("MINILLAMA_DEVICE", "")
    name = forced or name
    if name not in ("auto", "cpu", *VENDORS):
        raise UserError(
            f"MINILLAMA_DEVICE={name}{closest(name, VENDORS)}: "
            f"choose auto, cpu, {', '.join(VENDORS)}"
        )
    if name == "auto" and os.environ.get("USE_SOPHGO", "") not in ("", "0"):
        name = "tpu"
    if name == "auto":
        name = _first_usable()
    elif name != "cpu":
        _require_usable(name, is_forced=bool(forced))
    if name == "cpu":
        return torch.device("cpu")
    return _make_current(name, local_rank)


def _first_usable() -> str:
    """What "auto" means on this machine."""
    candidates = list(VENDORS)
    loaded = torch.accelerator.current_accelerator()
    if loaded is not None and loaded.type in candidates:
        candidates.remove(loaded.type)
        candidates.insert(0, loaded.type)
    for candidate in candidates:
        problem = _find_problem(candidate)
        if not problem:
            return candidate
        if _is_installed(candidate):
            log.warning("%s skipped: %s", candidate, problem)
    return "cpu"


def _require_usable(name: str, is_forced: bool) -> None:
    problem = _find_problem(name)
    if problem:
        hint = "MINILLAMA_DEVICE asks for it" if is_forced else "take another with --device"
        raise UserError(
            f"device {name!r} cannot be used: {problem} ({hint}); it needs {VENDORS[name].install}"
        )


def _make_current(name: str, local_rank: int) -> torch.device:
    """Device number `local_rank` of type `name`, as the process's current device."""
    backend = getattr(torch, name)
    chips = sophgo_chips() if name == "tpu" else []
    if not chips:
        chips = list(range(backend.device_count()))
    if local_rank >= len(chips):
        raise UserError(
            f"local rank {local_rank} has no chip: {len(chips)} to be seen "
            f"({visible_devices(name)}); start {len(chips)} processes with --nproc_per_node"
        )
    device = torch.device(name, chips[local_rank])
    make_current(device)
    return device


def make_current(device: torch.device) -> None:
    """Make kernels that name no device run on this one."""
    if device.type != "cpu":
        getattr(torch, device.type).set_device(device.index)


def device_count(kind: str) -> int:
    """How many devices of a type this process sees."""
    return 1 if kind == "cpu" else getattr(torch, kind).device_count()


def _is_installed(name: str) -> bool:
    """Whether a device type has a plug-in, and it is on this machine."""
    package = VENDORS[name].package
    if not package:
        return False
    return importlib.util.find_spec(package) is not None or hasattr(torch, name)


def _find_problem(name: str) -> str:
    """Why a type of device cannot be used, or an empty string. Imports its plug-in."""
    package = VENDORS[name].package
    if package and not _is_installed(name):
        return f"{package} is not installed"
    if package and is_googles(package):
        return f"the {package} installed here is Google's, and {name!r} here means Sophgo's"
    if package and not hasattr(torch, name):
        try:
            importlib.import_module(package)
        except (ImportError, OSError, RuntimeError) as error:
            first_line = str(error).partition("\n")[0]
            return f"{package} does not load ({first_line})"
    backend = getattr(torch, name, None)
    if backend is None or not backend.is_available():
        return f"{package or 'torch'} finds no chip ({visible_devices(name)})"
    return ""


def is_googles(package: str) -> bool:
    """Whether the distribution that brings `package` is Google's.

    Looks at its metadata alone: importing it can end the process.
    """
    try:
        package_metadata = metadata.metadata(package)
    except metadata.PackageNotFoundError:
        return False  # a source tree
    requirements = package_metadata.get_all("Requires-Dist") or ()
    needs_libtpu = any(requirement.startswith("libtpu") for requirement in requirements)
    home_pages = package_metadata.get_all("Home-page") or ()
    return needs_libtpu or any("google" in page for page in home_pages)


def visible_devices(name: str) -> str:
    """What limits the devices of a type, for messages."""
    variable = VENDORS[name].visible
    return f"{variable} is {os.environ.get(variable, 'unset')}"


def sophgo_split() -> int:
    """Over how many chips a model is spread, as SOPHGO_SPLIT says; 1 if it is not set."""
    text = os.environ.get("SOPHGO_SPLIT") or "1"
    if not text.isdecimal():
        raise UserError(f"SOPHGO_SPLIT={text}: expected a number of chips, such as 2")
    return max(1, int(text))


def sophgo_chips() -> list[int]:
    """The chip of each local rank, as CHIP_MAP (or CHIPS) lists them; empty if neither is set."""
    listed = os.environ.get("CHIP_MAP") or os.environ.get("CHIPS") or ""
    try:
        return [int(chip) for chip in listed.split(",") if chip.strip()]
    except ValueError:
        raise UserError(
            f"CHIP_MAP or CHIPS is {listed!r}; expected numbers of chips, such as 0,1"
        ) from None


def group_options(device: torch.device, size: int) -> Any:
    """What a process group of `size` ranks needs besides the name of its backend.

    Sophgo's needs the ring of chips. The others need nothing: None. Raises UserError for ranks of
    the CPU on a torch on which they can hang.
    """
    if device.type == "cpu":
        requirements.refuse_gloo_that_hangs()
    if device.type != "tpu":
        return None
    options = importlib.import_module("torch_tpu").ProcessGroupSCCLOptions()
    options.chip_map = sophgo_chips() or list(range(size))
    return options


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the random numbers of the host and the device in the body; restore the generators
    after it.
    """
    if device.type == "cpu":
        context = torch.random.fork_rng([])
    else:
        context = torch.random.fork_rng([device.index], device_type=device.type)
    with context:
        torch.manual_seed(seed)
        yield


def random_state(device: torch.device) -> torch.Tensor:
    """The state of a device's random generator, uint8 on the host."""
    if device.type == "cpu":
        return torch.get_rng_state()
    return getattr(torch, device.type).get_rng_state(device)


def set_random_state(state: torch.Tensor, device: torch.device) -> None:
    """Continue a device's random numbers from a state of `random_state`."""
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        getattr(torch, device.type).set_rng_state(state, device)


def allow_tf32(allowed: bool) -> None:
    """Whether CUDA may round the inputs of fp32 products to TF32; other devices have no such
    mode.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed


def supports_bf16(device: torch.device) -> bool:
    if device.type == "cpu":
        return True
    if device.type == "cuda":  # an older card emulates bf16, many times slower than fp32
        return torch.cuda.is_bf16_supported(including_emulation=False)
    is_supported = getattr(getattr(torch, device.type), "is_bf16_supported", None)
    return is_supported is None or is_supported()


def compute_dtype(precision: str, device: torch.device) -> tuple[torch.dtype, str]:
    """(the dtype to compute in, a warning if it is not the one asked for)."""
    dtype = DTYPES[precision]
    if dtype == torch.float16 and device.type == "cpu":
        return torch.float32, "fp16 is not computed on the CPU; using fp32 instead"
    if dtype == torch.bfloat16 and not supports_bf16(device):
        return torch.float32, f"{device.type} has no bf16; using fp32 instead, at twice the memory"
    return dtype, ""
