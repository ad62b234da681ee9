"""The devices of one process: one, or several that hold consecutive layers of one model.

    --devices 2               two, from the one on that --device alone would take
    --devices npu:0,npu:1     these
    --devices 0,1             these, of the kind that --device says
    --devices cpu,cpu         a device may repeat, so the division can be tried on one

Sophgo's variables say the same: SOPHGO_SPLIT=2 CHIPS=4 is tpu:4,tpu:5. `parallel.placement` divides
the model.
"""

import torch

from minillama.device import (
    VENDORS,
    device_count,
    make_current,
    pick,
    sophgo_split,
    visible_devices,
)
from minillama.errors import UserError, closest
from minillama.launch import ranks_on_machine


def pick_devices(kind: str = "auto", names: str = "", local_rank: int = 0) -> list[torch.device]:
    """The devices that `names` lists, the first of them made current; "": one.

    kind: what --device says: "auto", "cpu", "npu", …
    local_rank: which of the machine's devices a process takes that names none.
    Raises UserError for devices that are not there, and for several in each of several processes.
    """
    parts = _parts(names)
    count = _count(parts)
    if parts and count == 0:
        return _pick_named(kind, parts, names)
    first = pick(kind, local_rank)
    if not parts:
        count = _sophgo_count(first)
        names = f"{count} (SOPHGO_SPLIT)"
    devices = [first]
    if count > 1:
        start = first.index or 0
        devices = [torch.device(first.type, start + i) for i in range(count)]
        _refuse_several_processes(names)
        _refuse_missing(devices, names)
    return devices


def count_devices(names: str) -> int:
    """How many devices `names` lists, whether they are on this machine or not; "": one.

    Where nothing is listed, SOPHGO_SPLIT counts.
    """
    parts = _parts(names)
    if not parts:
        return sophgo_split()
    return _count(parts) or len(parts)


def refuse_too_many(count: int, n_layers: int) -> None:
    """Raise UserError if each of `count` devices cannot have a layer."""
    if count > n_layers:
        raise UserError(
            f"{count} devices, but the model has {n_layers} layers; name at most {n_layers} devices"
        )


def _parts(names: str) -> list[str]:
    return [part.strip() for part in names.split(",") if part.strip()]


def _count(parts: list[str]) -> int:
    """The number of devices, if that is all that --devices says; else 0."""
    if len(parts) != 1 or not parts[0].isdecimal():
        return 0
    if int(parts[0]) == 0:
        raise UserError("devices = 0: name at least one device, such as --devices 1")
    return int(parts[0])


def _sophgo_count(device: torch.device) -> int:
    """The number of devices by SOPHGO_SPLIT."""
    count = sophgo_split()
    if count > 1 and device.type != "tpu":
        raise UserError(
            f"SOPHGO_SPLIT={count} is about Sophgo's chips, but the device is {device.type}; "
            "unset it, or use --device tpu"
        )
    return count


def _pick_named(kind: str, parts: list[str], names: str) -> list[torch.device]:
    """The devices that are named one by one."""
    _refuse_several_processes(names)
    named_kind = _common_kind(parts, names)
    if kind != "auto" and named_kind not in ("auto", kind):
        raise UserError(f"devices = {names}, but device = {kind}; leave one of them out")
    picked = pick(kind if named_kind == "auto" else named_kind)
    if named_kind not in ("auto", picked.type):
        raise UserError(f"devices = {names}, but MINILLAMA_DEVICE = {picked.type}; unset it")
    devices = [_device(part, picked.type, names) for part in parts]
    _refuse_missing(devices, names)
    make_current(devices[0])
    return devices


def _common_kind(parts: list[str], names: str) -> str:
    """The kind of all devices. "auto": the one that --device says."""
    kinds = {_kind_of(part) for part in parts}
    if len(kinds) > 1:
        raise UserError(f"devices = {names}: name devices of one kind, such as npu:0,npu:1")
    kind = kinds.pop()
    known = ("cpu", *VENDORS)
    if kind not in ("auto", *known):
        hint = closest(kind, known)
        choices = ", ".join(known)
        raise UserError(f"devices = {names}: no device {kind!r}{hint}; choose from {choices}")
    return kind


def _kind_of(part: str) -> str:
    """npu in npu:0; auto in 0."""
    return "auto" if part.isdecimal() else part.partition(":")[0]


def _device(part: str, kind: str, names: str) -> torch.device:
    """npu:0, auto:0 or 0 as a device of this kind."""
    number = part if part.isdecimal() else part.partition(":")[2]
    if kind == "cpu" and number in ("", "0"):
        return torch.device("cpu")
    if not number.isdecimal():
        raise UserError(f"devices = {names}: {part!r} has no number; write {kind}:0")
    return torch.device(kind, int(number))


def _refuse_several_processes(names: str) -> None:
    """Raise UserError if torchrun started several processes on this machine."""
    ranks = ranks_on_machine()
    if ranks > 1:
        raise UserError(
            f"devices = {names} is for one process, and torchrun started {ranks} on this machine; "
            "start one, or leave it out: each process has a device, and "
            f"--tensor_parallel {ranks} divides the model among them"
        )


def _refuse_missing(devices: list[torch.device], names: str) -> None:
    """Raise UserError if this process does not see one of the devices."""
    kind = devices[0].type
    available = device_count(kind)
    largest = max(device.index or 0 for device in devices)
    if largest < available:
        return
    if kind == "cpu":
        raise UserError(
            f"devices = {names}: this machine has one {kind}; name an accelerator, or try the "
            "division with --devices cpu,cpu"
        )
    visible = visible_devices(kind)
    raise UserError(
        f"devices = {names}: {kind}:{largest} is not there, {available} to be seen ({visible}); "
        f"name devices from {kind}:0 to {kind}:{available - 1}"
    )
