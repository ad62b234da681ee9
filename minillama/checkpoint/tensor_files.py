"""Files of tensors, one tensor at a time.

A safetensors file is a length, a JSON header {name: dtype, shape, offsets} and the bytes. Reading the header and then each tensor
by its offset keeps the peak at one tensor, whatever the size of the file; memory-mapping would count every page it touches.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from minillama.errors import UserError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: `nbytes` from `offset` of `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def read(self) -> Tensor:
        """The tensor, on the host, in memory of its own."""
        buffer = bytearray(self.nbytes)
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            if file.readinto(buffer) != self.nbytes:
                raise UserError(f"{self.file}: ends before byte {self.offset + self.nbytes}; the file is truncated")
        return torch.frombuffer(buffer, dtype=self.dtype).view(self.shape) if self.nbytes else torch.empty(self.shape, dtype=self.dtype)


def read_safetensors(path: Path) -> dict[str, Entry]:
    """The entries of a safetensors file, by name. Raises UserError for a file that is not one, or is cut short."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        first = file.read(8)
        if first.startswith(b"version "):
            raise UserError(f"{path}: a git-lfs pointer, not the weights; run `git lfs pull` or download the file itself")
        if first.lstrip()[:1] == b"<":
            raise UserError(f"{path}: a web page, not the weights; download the file itself (…/resolve/…, not …/blob/…)")
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
        if 8 + length > size:
            raise UserError(f"{path}: not a safetensors file, or cut short ({size} bytes)")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            start = 8 + length
            entries = {name: Entry(path, DTYPES[spec["dtype"]], tuple(spec["shape"]), start + spec["data_offsets"][0],
                                   spec["data_offsets"][1] - spec["data_offsets"][0]) for name, spec in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: damaged safetensors header ({type(error).__name__}: {error})") from None
    for name, entry in entries.items():
        if entry.nbytes != prod(entry.shape) * entry.dtype.itemsize:
            raise UserError(f"{path}: {name}: {entry.nbytes} bytes for shape {entry.shape} of {entry.dtype}; the header is damaged")
        if entry.offset + entry.nbytes > size:
            raise UserError(f"{path}: {name} ends at byte {entry.offset + entry.nbytes}, the file at {size}: download it again")
    return entries


def write_safetensors(path: Path, tensors: Iterator[tuple[str, Tensor]], plan: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    """Write tensors in the order of `plan` (name -> dtype, shape), one at a time; `tensors` must yield them in that order."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in plan.items():
        end = offset + prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for (name, tensor), planned in zip(tensors, plan, strict=True):
            assert name == planned and tuple(tensor.shape) == plan[name][1], name
            data = tensor.detach().to("cpu", plan[name][0]).contiguous()
            file.write(data.view(-1).view(torch.uint8).numpy().data)
