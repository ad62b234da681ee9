"""torch.save's files (.bin, .pth, .pt), mapped into memory and never executed.

Since torch 1.6 such a file is a zip archive, stored without compression:

    NAME/data.pkl     a pickle of the dictionary; a tensor is a call, _rebuild_tensor_v2(storage, …)
    NAME/data/0       the bytes of storage 0
    NAME/byteorder    "little"

A pickle is a program: it may name any function and call it. torch.load(weights_only=True) calls
only functions that rebuild tensors, and with mmap=True it copies nothing: the system reads a page
of the file when a tensor's values are used, and may drop it again. The checks here are those that
torch.load leaves out, so that no file, however made, gives wrong values or takes much memory:

    its names       torch also allows, for example, bytearray(n) and torch.Tensor(n) for any n
    its entries     mapped as they are, compressed entries would be read as weights
    its tensors     each lies in its own storage, and has no more elements than that

A training checkpoint, of Megatron for example, also holds objects of its program: settings, states
of random generators. `map_state` reads such a file. An `Unknown`, which does nothing, stands in the
place of every object whose class torch does not know. So nothing of that program is imported.

Left out: the format before torch 1.6, other containers than dictionaries, tensor subclasses.
"""

import pickle
import pickletools
import struct
import zipfile
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillama.errors import UserError

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
NAMES = {
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "collections OrderedDict",
    *(f"torch {storage}" for storage in STORAGES),
}
# What torch itself reads, and training checkpoints need: bytes, sets, sizes, devices, dtypes.
STATE_NAMES = {
    "_codecs.encode",
    "builtins.set",
    "torch.Size",
    "torch.device",
    *(str(dtype) for dtype in STORAGES.values()),
}
NPU_TENSOR = "torch_npu.utils.storage._rebuild_npu_tensor"
SYSTEM_MODULES = ("os", "posix", "nt", "sys")  # their names are an attack, and refused
OTHER_NAME_OPCODES = ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4")  # torch.save writes GLOBAL
WRAPPERS = ("module", "model", "state_dict")  # keys under which a training state has its weights
LARGEST_PICKLE = 4 * 2**20  # bytes; a 70B model's is 0.1 MB
MAPPED_FILES = 8  # as many as Meta's largest model has; a conversion reads them in turn
DAMAGE = (
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    struct.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


class Unknown:
    """Stands for an object of a class that is not known. It does nothing.

    state: what the file says about the object, such as the attributes of a namespace.
    """

    state: object = None

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state


@dataclass(frozen=True)
class MappedState:
    """The content of a training checkpoint. Tensors are views of the file."""

    weights: dict[str, Tensor]  # by name; the keys of nested dictionaries are joined by dots
    others: dict[str, Any]  # what the file holds beside its weights, by key


def map_torch(path: Path) -> dict[str, Tensor]:
    """Map the tensors of a torch.save file into memory, by name.

    Of a training state {"module" | "model" | "state_dict": {…}}, those inside. The tensors are
    views of the file: copy one before you change it. The last MAPPED_FILES files stay mapped.
    Raises UserError for a file of another kind, a cut or compressed one, and one whose pickle asks
    for anything but tensors.
    """
    return _load(path, False, *_version_of(path)).weights


def map_state(path: Path) -> MappedState:
    """Map a training checkpoint into memory, as `map_torch` does.

    Its weights may be in nested dictionaries, and it may hold objects of unknown classes.
    """
    return _load(path, True, *_version_of(path))


def refuse_foreign_bytes(path: Path, first_bytes: bytes) -> None:
    """Raise UserError if a file's first bytes show that it holds no weights at all."""
    if not first_bytes:
        raise UserError(f"{path}: the file is empty; download it again")
    if first_bytes.startswith(b"version "):
        raise UserError(
            f"{path}: a git-lfs pointer, not the weights; "
            "run `git lfs pull` or download the file itself"
        )
    if first_bytes.lstrip()[:1] == b"<":
        raise UserError(
            f"{path}: a web page, not the weights; "
            "download the file itself (…/resolve/…, not …/blob/…)"
        )


def _version_of(path: Path) -> tuple[int, int, int]:
    """What changes when a file does, so that it is mapped again."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


@lru_cache(maxsize=MAPPED_FILES)
def _load(path: Path, is_state: bool, *version: int) -> MappedState:
    with open(path, "rb") as file:
        first_bytes = file.read(16)
    refuse_foreign_bytes(path, first_bytes)
    if first_bytes[:1] == b"\x80":
        raise UserError(
            f"{path}: torch.save's format from before torch 1.6; "
            "load and save it once with a newer torch"
        )
    if first_bytes[:4] != b"PK\x03\x04":
        raise UserError(
            f"{path}: not a file written by torch.save (it begins with {first_bytes[:4]!r})"
        )
    try:
        stand_ins = _stand_ins(path) if is_state else {}
        others = {*stand_ins, *STATE_NAMES} if is_state else set()
        storage_sizes = _check_archive(path, others)
        allowed: list[Any] = [(value, name) for name, value in stand_ins.items()]
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state = _state_of(path, content, is_state)
        _check_tensors(state.weights, storage_sizes)
    except DAMAGE as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"{path}: cut short or damaged ({type(error).__name__}: {reason}); download it again"
        ) from None
    return state


def _stand_ins(path: Path) -> dict[str, Any]:
    """Return what is called in place of each class or function that torch does not know.

    torch_npu pickles a tensor as a call of its own: torch's arguments, and a format behind them.
    """
    stand_ins: dict[str, Any] = {}
    for name in torch.serialization.get_unsafe_globals_in_checkpoint(path):
        if name.split(".")[0] not in SYSTEM_MODULES:
            stand_ins[name] = _rebuild_npu_tensor if name == NPU_TENSOR else Unknown
    return stand_ins


def _rebuild_npu_tensor(*arguments: Any) -> Tensor:
    return torch._utils._rebuild_tensor_v2(*arguments[:6])


def _check_archive(path: Path, others: Collection[str]) -> Counter[int]:
    """Check the zip archive around the tensors. Returns the number of storages of each size.

    others: names that its pickle may have beside those of a dictionary of tensors.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        pickles = []
        for entry in entries:
            folder, _, name = entry.filename.partition("/")
            if name == "data.pkl" and folder:
                pickles.append(entry)
        if len(pickles) != 1 or pickles[0].file_size > LARGEST_PICKLE:
            raise UserError(f"{path}: a zip archive, but not torch.save's: no NAME/data.pkl")
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED:
                raise UserError(f"{path}: {entry.filename} is compressed; download the file again")
        prefix = pickles[0].filename.removesuffix("data.pkl")
        byteorder = f"{prefix}byteorder"
        if byteorder in archive.namelist() and archive.read(byteorder) != b"little":
            raise UserError(
                f"{path}: written on a big-endian machine; save it again on a little-endian one"
            )
        _check_names(path, archive.read(pickles[0]), others)
    data = f"{prefix}data/"
    return Counter(entry.file_size for entry in entries if entry.filename.startswith(data))


def _check_names(path: Path, data: bytes, others: Collection[str]) -> None:
    """Raise UserError if a pickle names anything that a dictionary of tensors does not need.

    others: names that it may have nevertheless.
    """
    for opcode, argument, _ in pickletools.genops(data):
        is_unknown = opcode.name == "GLOBAL" and argument not in NAMES
        if is_unknown and _python_name(argument) in others:
            continue
        if is_unknown or opcode.name in OTHER_NAME_OPCODES:
            name = str(argument or opcode.name).replace(" ", ".")
            raise UserError(
                f"{path}: its pickle asks for {name}, which a file of weights does not need; "
                "nothing was executed. Do not trust this file; look for a safetensors version"
            )


def _python_name(argument: Any) -> str:
    """Return module.name of a name in a pickle of protocol 2, which has Python 2's builtins."""
    return str(argument).replace("__builtin__ ", "builtins ").replace(" ", ".")


def _state_of(path: Path, content: Any, is_state: bool) -> MappedState:
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a dictionary of tensors")
    weights = content
    others = {}
    for key in WRAPPERS:
        if isinstance(content.get(key), dict):
            weights = content[key]
            others = {other: value for other, value in content.items() if other != key}
            break
    if is_state:
        return MappedState(_flatten(weights), others)
    tensors = {}
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(f"{path}: {name!r} is a {type(value).__name__}, not a tensor")
        tensors[name] = value.detach()
    return MappedState(tensors, others)


def _flatten(nested: dict[Any, Any], prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors in nested dictionaries; what is neither is left out."""
    tensors = {}
    for key, value in nested.items():
        if isinstance(value, Tensor):
            tensors[f"{prefix}{key}"] = value.detach()
        elif isinstance(value, dict):
            tensors |= _flatten(value, f"{prefix}{key}.")
    return tensors


def _check_tensors(tensors: dict[str, Tensor], storage_sizes: Counter[int]) -> None:
    """Raise ValueError for elements that overlap, and for a storage that is not in the archive.

    torch cuts each storage out of the whole file, and takes its size from the pickle. A size that
    is too large would reach into the next entry.
    """
    sizes: dict[int, int] = {}  # by the address of the storage
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        if tensor.numel() * tensor.itemsize > storage.nbytes():
            raise ValueError(f"{name}, of shape {tuple(tensor.shape)}, has elements that overlap")
        if storage.nbytes() > 0:
            sizes[storage.data_ptr()] = storage.nbytes()
    unknown = Counter(sizes.values()) - storage_sizes
    if unknown:
        raise ValueError(f"a storage of {next(iter(unknown))} bytes is not in the archive")
