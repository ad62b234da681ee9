"""torch.save's files (.bin, .pth, .pt), read and written one tensor at a time, with nothing in them ever executed.

Since torch 1.6 such a file is a zip archive, stored without compression: NAME/data.pkl is a pickle of the dictionary in which
each tensor is a call, _rebuild_tensor_v2(storage key, offset, shape, stride, …), and NAME/data/KEY holds a storage's bytes.

A pickle is a program: it may name any function and call it. So torch.load is not used. The unpickler below knows the few names
that a dictionary of tensors needs and refuses every other; a tensor's "call" only notes where its bytes lie, after checking
that they lie inside their storage. What comes out is the same table of `TensorRef` that a safetensors header gives.

Left out on purpose: the format before torch 1.6, other containers than dictionaries, tensor subclasses.
"""

import io
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import torch

from minillama.errors import UserError
from minillama.tensor_files import (
    Append,
    TensorRef,
    TensorSpecs,
    appending,
    read_safetensors,
    refuse_foreign_bytes,
    to_disk,
)

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items()}
Storage = tuple[torch.dtype, int, int]  # dtype, offset in the file, bytes
DAMAGE = (
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    struct.error,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    TypeError,
    ValueError,
)
LARGEST_PICKLE = 64 * 2**20  # bytes; a 70B model's is 0.1 MB
# Positions are computed, whatever an old file carries.
POSITIONS = re.compile(r"rotary_emb\.inv_freq$|^rope\.freqs$")
ALIGNMENT = 64  # bytes; where torch puts the beginning of a storage


class _Unpickler(pickle.Unpickler):
    """Builds dictionaries of `TensorRef` from an open archive's NAME/data.pkl. Everything a pickle may name is in `find_class`."""

    def __init__(self, path: Path, file: io.BufferedReader) -> None:
        self.path, self.file, self.archive = path, file, zipfile.ZipFile(file)
        pickles = [
            info
            for info in self.archive.infolist()
            if info.filename.endswith("/data.pkl") and info.filename.count("/") == 1
        ]
        if len(pickles) != 1 or pickles[0].file_size > LARGEST_PICKLE:
            raise UserError(f"{path}: a zip archive, but not torch.save's: no NAME/data.pkl")
        self.prefix = pickles[0].filename.removesuffix("data.pkl")
        if (
            f"{self.prefix}byteorder" in self.archive.namelist()
            and self.archive.read(f"{self.prefix}byteorder") != b"little"
        ):
            raise UserError(
                f"{path}: written on a big-endian machine; save it again on a little-endian one"
            )
        super().__init__(io.BytesIO(self.archive.read(pickles[0])))

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            "collections.OrderedDict": OrderedDict,
            **{f"torch.{storage}": dtype for storage, dtype in STORAGES.items()},
        }
        if f"{module}.{name}" not in allowed:
            raise UserError(
                f"{self.path}: its pickle asks for {module}.{name}, which a file of weights does not need; "
                "nothing was executed. Do not trust this file; look for a safetensors version"
            )
        return allowed[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> Storage:
        _, dtype, key, _, count = pid
        info = self.archive.getinfo(f"{self.prefix}data/{key}")
        self.file.seek(
            info.header_offset + 26
        )  # the local header's own name and extra lengths; its fixed part has 30 bytes
        offset = info.header_offset + 30 + sum(struct.unpack("<HH", self.file.read(4)))
        if (
            info.compress_type != zipfile.ZIP_STORED
            or offset + info.file_size > self.path.stat().st_size
        ):
            raise UserError(
                f"{self.path}: {info.filename} is compressed or cut short; download the file again"
            )
        if not isinstance(dtype, torch.dtype) or count * dtype.itemsize > info.file_size:
            raise ValueError(
                f"storage {key} claims {count} elements of {dtype} in {info.file_size} bytes"
            )
        return dtype, offset, info.file_size

    def _tensor(
        self, storage: Storage, start: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any
    ) -> TensorRef:
        dtype, offset, nbytes = storage
        if len(shape) != len(stride) or not all(
            type(number) is int and 0 <= number < 2**48 for number in (start, *shape, *stride)
        ):
            raise ValueError(f"a tensor of shape {shape}, stride {stride}, from {start}")
        # From the first to the last element: with shape (2, 3) and stride (8, 1), 1·8 + 2·1 + 1 = 11 elements.
        span = (
            1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
            if prod(shape)
            else 0
        )
        if (start + span) * dtype.itemsize > nbytes:
            raise ValueError(
                f"a tensor of shape {shape} reaches beyond its storage of {nbytes} bytes"
            )
        if span < prod(shape):
            raise ValueError(f"a tensor of shape {shape}, stride {stride} whose elements overlap")
        return TensorRef(
            self.path,
            dtype,
            tuple(shape),
            offset + start * dtype.itemsize,
            span * dtype.itemsize,
            tuple(stride),
        )


def read_torch(path: Path) -> dict[str, TensorRef]:
    """The entries of a torch.save file, by name; of a training state {"module" | "model" | "state_dict": {…}}, those inside.
    Raises UserError for a file of another kind, a cut one, or one whose pickle asks for anything but tensors."""
    with open(path, "rb") as file:
        first = file.read(16)
        refuse_foreign_bytes(path, first)
        if first[:1] == b"\x80":
            raise UserError(
                f"{path}: torch.save's format from before torch 1.6; load and save it once with a newer torch"
            )
        if first[:4] != b"PK\x03\x04":
            raise UserError(
                f"{path}: not a file written by torch.save (it begins with {first[:4]!r})"
            )
        try:
            content = _Unpickler(path, file).load()
        except DAMAGE as error:
            raise UserError(
                f"{path}: cut short or damaged ({type(error).__name__}: {error}); download it again"
            ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a dictionary of tensors")
    content = next(
        (
            content[key]
            for key in ("module", "model", "state_dict")
            if isinstance(content.get(key), dict)
        ),
        content,
    )
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, TensorRef):
            raise UserError(f"{path}: {name!r} is a {type(value).__name__}, not a tensor")
    return dict(content)


def read_tensors(path: Path) -> dict[str, TensorRef]:
    """The entries of a file of either kind, told by its name. Raises UserError for what is not there, or is something else."""
    if not path.is_file():
        raise UserError(f"{path}: the index names this file, but it is not there; download it")
    return read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)


class _Pickler(pickle.Pickler):
    """Pickles a `partial` as that call, and a storage by its id alone, as torch does with tensors."""

    dispatch_table: ClassVar = {partial: lambda call: (call.func, call.args)}

    def persistent_id(self, value: Any) -> tuple | None:
        return value if isinstance(value, tuple) and value[:1] == ("storage",) else None


@contextmanager
def torch_writer(path: Path, plan: TensorSpecs) -> Iterator[Append]:
    """What torch.load(weights_only=True) opens, on the disk when the `with` block ends: a stored zip entry per tensor."""
    table, keys, tensors = io.BytesIO(), count(), {}
    for key, (name, (dtype, shape)) in enumerate(plan.items()):
        storage = ("storage", getattr(torch, STORAGE_NAMES[dtype]), str(key), "cpu", prod(shape))
        stride = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))  # row after row
        tensors[name] = partial(
            torch._utils._rebuild_tensor_v2, storage, 0, shape, stride, False, OrderedDict()
        )
    _Pickler(table, protocol=2).dump(tensors)
    with open(path, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in {
            "data.pkl": table.getbuffer(),
            "byteorder": b"little",
            "version": b"3\n",
        }.items():
            _write_entry(archive, f"{path.stem}/{name}", memoryview(data))
        yield from appending(
            plan, lambda data: _write_entry(archive, f"{path.stem}/data/{next(keys)}", data)
        )
    to_disk(path)


def _write_entry(archive: zipfile.ZipFile, name: str, data: memoryview) -> None:
    info = zipfile.ZipInfo(name)  # its date is constant: equal tensors make equal files
    info.file_size = data.nbytes
    before = (
        archive.fp.tell()
        + 30
        + len(name.encode())
        + 4
        + (20 if data.nbytes * 1.05 > zipfile.ZIP64_LIMIT else 0)
    )
    padding = -before % ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding  # torch's own padding field
    with archive.open(info, "w") as entry:
        entry.write(data)
