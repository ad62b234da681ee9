"""Files of tensors, one tensor at a time.

A safetensors file is a length, a JSON header {name: dtype, shape, offsets} and the bytes. Reading the header and then each tensor
by its offset keeps the peak at one tensor, whatever the size of the file; memory-mapping would count every page it touches.
`TensorRef` is where a tensor lies, in any kind of file; a `TensorSpecs` is what a file will hold, so that its header can be written first.

A download that went wrong is usually a file of another kind under the right name, so the first bytes are looked at.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minillama.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
TensorSpecs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # name -> dtype, shape
Append = Callable[[str, Tensor], None]  # writes the next tensor of a plan, converted to its dtype


@dataclass(frozen=True)
class TensorRef:
    """Where a tensor lies: in the `nbytes` from `offset` of `file`, elements `stride` apart (empty: row after row)."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    stride: tuple[int, ...] = ()

    def read(self) -> Tensor:
        """The tensor, on the host, in memory of its own."""
        flat = torch.empty(self.nbytes // self.dtype.itemsize, dtype=self.dtype)
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            if self.nbytes and file.readinto(bytes_of(flat)) != self.nbytes:
                raise UserError(
                    f"{self.file}: ends before byte {self.offset + self.nbytes}; the file is truncated"
                )
        return (
            flat.as_strided(self.shape, self.stride).contiguous()
            if self.stride
            else flat.view(self.shape)
        )

    def transposed(self) -> "TensorRef":
        """The same elements with rows for columns."""
        rows, columns = self.stride or (self.shape[1], 1)
        return replace(self, shape=self.shape[::-1], stride=(columns, rows))


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the host, not copied."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def specs_of(tensors: Mapping[str, Tensor]) -> TensorSpecs:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def refuse_foreign_bytes(path: Path, first: bytes) -> None:
    """UserError where `first`, a file's first bytes, show that it holds no weights at all."""
    if not first:
        raise UserError(f"{path}: the file is empty; download it again")
    if first.startswith(b"version "):
        raise UserError(
            f"{path}: a git-lfs pointer, not the weights; run `git lfs pull` or download the file itself"
        )
    if first.lstrip()[:1] == b"<":
        raise UserError(
            f"{path}: a web page, not the weights; download the file itself (…/resolve/…, not …/blob/…)"
        )


def read_safetensors(path: Path) -> dict[str, TensorRef]:
    """The entries of a safetensors file, by name. Raises UserError for a file that is not one, or is cut short."""
    with open(path, "rb") as file:
        refuse_foreign_bytes(path, file.read(16))
        try:
            with safe_open(
                path, "pt"
            ):  # the library checks that the header describes this file, to its last byte
                file.seek(0)
            start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start - 8))
            header.pop("__metadata__", None)
            return {
                name: TensorRef(
                    path,
                    DTYPES[spec["dtype"]],
                    tuple(spec["shape"]),
                    start + spec["data_offsets"][0],
                    spec["data_offsets"][1] - spec["data_offsets"][0],
                )
                for name, spec in header.items()
            }
        except (SafetensorError, KeyError) as error:
            raise UserError(
                f"{path}: not a safetensors file, or cut short, or of an unknown dtype ({error}); download it again"
            ) from None


def appending(plan: TensorSpecs, write: Callable[[memoryview], object]) -> Iterator[Append]:
    """Yield the function that takes the tensors of `plan`, in its order, and hands their bytes to `write`."""
    waiting = iter(plan.items())

    def append(name: str, tensor: Tensor) -> None:
        planned, (dtype, shape) = next(waiting)
        assert name == planned and tuple(tensor.shape) == shape, (
            name,
            tuple(tensor.shape),
            planned,
            shape,
        )
        write(bytes_of(tensor.detach().to("cpu", dtype).contiguous()))

    yield append
    assert next(waiting, None) is None, "tensors of the plan are missing"


@contextmanager
def safetensors_writer(path: Path, plan: TensorSpecs) -> Iterator[Append]:
    """A safetensors file that is on the disk when the `with` block ends: the header from the plan, then the bytes as they come."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in plan.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        yield from appending(plan, file.write)
    to_disk(path)


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors that are all at hand, and wait until they are on the disk."""
    with safetensors_writer(path, specs_of(tensors)) as append:
        for name, tensor in tensors.items():
            append(name, tensor)


def to_disk(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
