"""Files of tensors, read one tensor at a time.

A safetensors file is a length, a JSON header {name: dtype, shape, offsets} and the bytes. A file
of torch.save has the same in a zip archive (torch_files.py). Both libraries map a file into memory,
so opening one reads its header alone, and reading a tensor copies its bytes alone. Anonymous
memory, which the system cannot drop, then grows by one tensor, whatever the size of the file.

    read_tensors(path)          {name: TensorRef}, from the header
    TensorRef.read()            the tensor

A download that went wrong is often a file of another kind under the right name, so the first bytes
are looked at. tensor_writers.py has the other direction.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minillama.errors import UserError
from minillama.torch_files import map_torch, refuse_foreign_bytes

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
# Old files hold rotary positions; they are computed here, and never read.
POSITIONS = re.compile(r"rotary_emb\.inv_freq$|^rope\.freqs$")


class HasValues(Protocol):
    """A tensor that has not been read yet, of a file or to be computed."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def read(self) -> Tensor: ...


@dataclass(frozen=True)
class TensorRef:
    """A tensor of a file that has not been read yet."""

    file: Path
    name: str  # in the file
    dtype: torch.dtype
    shape: tuple[int, ...]
    is_safetensors: bool
    is_transposed: bool = False  # the file has rows for columns

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """Return the tensor, on the CPU, in contiguous memory of its own."""
        if self.is_safetensors:
            with _open_safetensors(self.file) as file:
                return self._copy(file.get_tensor(self.name))
        return self._copy(map_torch(self.file)[self.name])

    def read_finite(self) -> Tensor:
        """Return the tensor as `read` does. Raises UserError if it holds NaN or infinity."""
        return self.refuse_non_finite(self.read())

    def refuse_non_finite(self, values: Tensor) -> Tensor:
        """Return values that were read. Raises UserError if they hold NaN or infinity."""
        if not all_finite(values):
            raise UserError(
                f"{self.file}: {self.name} holds NaN or infinity; the file is damaged, or training "
                "diverged"
            )
        return values

    def equals(self, other: "HasValues") -> bool:
        """Tell whether another tensor has the same shape and, in its dtype, the same values."""
        if self.shape != other.shape:
            return False
        return torch.equal(self.read().to(other.dtype), other.read())

    def read_part(self, start: int, stop: int, axis: int = 0) -> Tensor:
        """Return elements `start` to `stop` along an axis, as `read` does. Reads no others."""
        axis_in_file = 1 - axis if self.is_transposed else axis
        index = (slice(None),) * axis_in_file + (slice(start, stop),)
        if self.is_safetensors:
            with _open_safetensors(self.file) as file:
                return self._copy(file.get_slice(self.name)[index])
        return self._copy(map_torch(self.file)[self.name][index])

    def transposed(self) -> "TensorRef":
        """The same elements with rows for columns."""
        return replace(self, shape=self.shape[::-1], is_transposed=not self.is_transposed)

    def _copy(self, mapped: Tensor) -> Tensor:
        if self.is_transposed:
            mapped = mapped.T
        return mapped.clone(memory_format=torch.contiguous_format)


def all_finite(tensor: Tensor) -> bool:
    """Tell whether a tensor holds neither NaN nor infinity, without a mask of its size."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)  # NaN if one element is NaN
    return bool(torch.isfinite(low) and torch.isfinite(high))


def read_tensors(path: Path) -> dict[str, TensorRef]:
    """Return the tensors of a file of either kind, which its name tells, by name.

    Raises UserError for a file that is missing, damaged, or of another kind.
    """
    if not path.is_file():
        raise UserError(f"{path}: the index names this file, but it is not there; download it")
    return read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)


def read_torch(path: Path) -> dict[str, TensorRef]:
    """Return the tensors of a torch.save file, by name. Raises UserError as `map_torch` does."""
    refs = {}
    for name, tensor in map_torch(path).items():
        refs[name] = TensorRef(path, name, tensor.dtype, tuple(tensor.shape), False)
    return refs


def read_safetensors(path: Path) -> dict[str, TensorRef]:
    """Return the tensors of a safetensors file, by name.

    safetensors itself checks that the header agrees with the file. Raises UserError for a file of
    another kind, a cut one, or a damaged one.
    """
    with open(path, "rb") as file:
        refuse_foreign_bytes(path, file.read(16))
    refs = {}
    with _open_safetensors(path) as tensors:
        for name in tensors.offset_keys():  # in the order of the file
            header = tensors.get_slice(name)
            dtype = DTYPES[header.get_dtype()]
            refs[name] = TensorRef(path, name, dtype, tuple(header.get_shape()), True)
    return refs


def read_metadata(path: Path) -> dict[str, str]:
    """Return the texts in the header of a safetensors file, by name."""
    with _open_safetensors(path) as file:
        return file.metadata() or {}


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, KeyError) as error:
        raise UserError(
            f"{path}: not a safetensors file, or cut short, or of an unknown dtype ({error}); "
            "download it again"
        ) from None
