"""Memory: how much a device or this process has used, and giving back what is free."""

import ctypes
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch


class Memory(NamedTuple):
    """Bytes. None: unknown."""

    peak: int | None  # the most used so far
    free: int | None


def device_memory(device: torch.device) -> Memory:
    """Memory as the device counts it; for the CPU, the process's peak resident set and the
    machine's free memory.
    """
    if device.type == "cpu":
        return Memory(peak_resident_bytes(), _free_host_bytes())
    backend = getattr(torch, device.type)
    max_allocated = getattr(backend, "max_memory_allocated", None)
    mem_get_info = getattr(backend, "mem_get_info", None)
    peak = max_allocated(device) if max_allocated else None
    info = mem_get_info(device) if mem_get_info else None
    return Memory(peak, info[0] if info else None)


def peak_bytes(devices: Iterable[torch.device]) -> int | None:
    """The most that any of the devices has used so far. None: unknown."""
    peaks = [device_memory(device).peak for device in devices]
    return max((peak for peak in peaks if peak is not None), default=None)


def peak_resident_bytes() -> int | None:
    """The largest resident set of this process so far."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _free_host_bytes() -> int | None:
    if "SC_AVPHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def most_usable_bytes(device: torch.device) -> int | None:
    """More bytes than this cannot be allocated; None: unknown.

    On the CPU that is what Linux can free for this process. On an accelerator it is all memory,
    since torch's allocator keeps freed memory for itself.
    """
    if device.type != "cpu":
        mem_get_info = getattr(getattr(torch, device.type), "mem_get_info", None)
        return mem_get_info(device)[1] if mem_get_info else None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def release_freed(device: torch.device) -> None:
    """Return to the system what glibc keeps of freed tensors: up to a third of the heap during
    backward.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim:
        malloc_trim(0)
