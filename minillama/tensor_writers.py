"""Files of tensors, written one tensor at a time.

The header of a file comes before its bytes. So a writer first takes `TensorSpecs`, what the file
will hold, and then one tensor after the other; memory holds one of them:

    with safetensors_writer(path, specs) as append:
        append(name, tensor)      # for each of specs, in its order

When the block ends the file is on the disk. It may be cut short after a failure, so it belongs in a
directory that is complete or absent.
"""

import io
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillama.files import create_file, flush_to_disk
from minillama.tensor_files import DTYPES
from minillama.torch_files import STORAGES

TensorSpecs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # name -> dtype, shape
Append = Callable[
    [str, Tensor], None
]  # writes the next tensor, converted to its dtype in the specs

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items()}
ALIGNMENT = 64  # bytes; torch puts the beginning of a storage at a multiple of it
LOCAL_HEADER = 30  # bytes of a zip entry's header, without its name and extra fields
ZIP64_FIELD = 20  # bytes of the extra field of an entry that may exceed 4 GB


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, not copied."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def specs_of(tensors: Mapping[str, Tensor]) -> TensorSpecs:
    """The specs of tensors that are all in memory."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


@contextmanager
def safetensors_writer(
    path: Path, specs: TensorSpecs, metadata: Mapping[str, str] | None = None
) -> Iterator[Append]:
    """Write a safetensors file; see the module's docstring. metadata: text for its header."""
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    start = 0
    for name, (dtype, shape) in specs.items():
        end = start + prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with create_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        yield from _appending(specs, file.write)
    flush_to_disk(path)


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors that are all in memory, and wait until they are on the disk."""
    with safetensors_writer(path, specs_of(tensors), metadata) as append:
        for name, tensor in tensors.items():
            append(name, tensor)


@contextmanager
def torch_writer(
    path: Path, specs: TensorSpecs, arrange: Callable[[dict[str, Any]], object] = dict
) -> Iterator[Append]:
    """Write a file that torch.load(weights_only=True) opens: a stored zip entry per tensor.

    arrange: what the file holds, of a dictionary of its tensors; by default, that dictionary. It is
    called with placeholders.
    """
    folder = path.stem
    next_key = 0

    def write_storage(data: memoryview) -> None:
        nonlocal next_key
        _write_entry(archive, f"{folder}/data/{next_key}", data)
        next_key += 1

    with create_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _write_entry(archive, f"{folder}/data.pkl", memoryview(_pickle_of(specs, arrange)))
        _write_entry(archive, f"{folder}/byteorder", memoryview(b"little"))
        _write_entry(archive, f"{folder}/version", memoryview(b"3\n"))
        yield from _appending(specs, write_storage)
    flush_to_disk(path)


def _appending(specs: TensorSpecs, write: Callable[[memoryview], object]) -> Iterator[Append]:
    """Yield the function that takes the tensors of `specs`, and hands their bytes to `write`."""
    remaining = iter(specs.items())

    def append(name: str, tensor: Tensor) -> None:
        expected_name, (dtype, shape) = next(remaining)
        assert name == expected_name, f"{name} in place of {expected_name}"
        assert tuple(tensor.shape) == shape, f"{name} is {tuple(tensor.shape)}, not {shape}"
        write(bytes_of(tensor.detach().to("cpu", dtype).contiguous()))

    yield append
    missing = next(remaining, None)
    assert missing is None, f"{missing} was not written"


class _Pickler(pickle.Pickler):
    """Pickle a `partial` as the call that it is, and a storage by its id, as torch does."""

    def reducer_override(self, value: Any) -> Any:
        return (value.func, value.args) if isinstance(value, partial) else NotImplemented

    def persistent_id(self, value: Any) -> tuple[Any, ...] | None:
        is_storage = isinstance(value, tuple) and value[:1] == ("storage",)
        return value if is_storage else None


def _pickle_of(specs: TensorSpecs, arrange: Callable[[dict[str, Any]], object]) -> bytes:
    """The pickle of tensors, arranged, of which the i-th lies contiguous in storage i."""
    calls: dict[str, Any] = {}
    for key, (name, (dtype, shape)) in enumerate(specs.items()):
        storage_type = getattr(torch, STORAGE_NAMES[dtype])
        storage = ("storage", storage_type, str(key), "cpu", prod(shape))
        stride = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
        hooks: OrderedDict[str, Any] = OrderedDict()  # of backward; none
        calls[name] = partial(
            torch._utils._rebuild_tensor_v2, storage, 0, shape, stride, False, hooks
        )
    data = io.BytesIO()
    _Pickler(data, protocol=2).dump(arrange(calls))
    return data.getvalue()


def _write_entry(archive: zipfile.ZipFile, name: str, data: memoryview) -> None:
    """Write a zip entry whose bytes begin at a multiple of ALIGNMENT."""
    info = zipfile.ZipInfo(name)  # its date is constant, so equal tensors make equal files
    info.file_size = data.nbytes
    is_large = data.nbytes * 1.05 > zipfile.ZIP64_LIMIT  # zipfile's own rule
    padding_header = 4
    header = LOCAL_HEADER + len(name.encode()) + padding_header
    if is_large:
        header += ZIP64_FIELD
    assert archive.fp is not None
    padding = -(archive.fp.tell() + header) % ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding  # as torch pads
    with archive.open(info, "w") as entry:
        entry.write(data)
