"""Files that are damaged, of another kind, or made to do harm: each is refused in one line."""

import io
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from minillama.errors import UserError
from minillama.tensor_files import read_safetensors, read_torch


class Mischief:
    """Pickles as a call that creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def forged(path: Path, data: bytes, storage: bytes = b"", **entries: bytes) -> Path:
    """A torch archive with this pickle, and one storage "0"."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {
            "data.pkl": data,
            "version": b"3",
            "data/0": storage,
            **entries,
        }.items():
            archive.writestr(f"w/{name}", content)
    return path


def test_nothing_in_a_pickle_is_executed(tmp_path):
    path = forged(
        tmp_path / "w.bin", pickle.dumps({"w": Mischief(tmp_path / "created")}, protocol=2)
    )
    with pytest.raises(UserError, match=r"asks for (io|__builtin__|builtins|_io)\.open"):
        read_torch(path)
    assert not (tmp_path / "created").exists()


@pytest.mark.parametrize(
    "opcode",
    [
        b"c__builtin__\neval\n(Vprint(1)\ntR.",
        b"cposix\nsystem\n(Vtrue\ntR.",
        b"ctorch\nload\n.",
        b"cbuiltins\nbytearray\n(I1000000000000\ntR.",  # torch allows it, and its memory
        b"ctorch\nTensor\n(I1000000000000\nt\x81.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(tR.",
        b"(lp0\n0g0\ng0\na.",
        b"\x80\x04\x8c\x02os\x8c\x04exit\x93.",
    ],
)
def test_hostile_pickles_end_in_one_line(tmp_path, opcode):
    with pytest.raises(UserError, match=r"w\.bin"):
        read_torch(forged(tmp_path / "w.bin", opcode))


class Storage:
    def __init__(self, count: int) -> None:
        self.pid = "storage", torch.FloatStorage, "0", "cpu", count


class Claim:
    """A tensor that claims this start, shape and stride of a storage of `count` elements."""

    def __init__(self, count, start, shape, stride) -> None:
        self.arguments = Storage(count), start, shape, stride, False, OrderedDict()

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


def claiming(path: Path, **claim) -> Path:
    data = io.BytesIO()
    pickler = pickle.Pickler(data, protocol=2)
    pickler.persistent_id = lambda value: value.pid if isinstance(value, Storage) else None
    pickler.dump({"w": Claim(**claim)})
    return forged(path, data.getvalue(), storage=bytes(16))


@pytest.mark.parametrize(
    "claim",
    [
        {"count": 4, "start": 0, "shape": (5,), "stride": (1,)},  # longer than the storage
        {"count": 4, "start": 3, "shape": (2,), "stride": (1,)},  # begins too late
        {"count": 4, "start": -1, "shape": (2,), "stride": (1,)},
        {"count": 4, "start": 0, "shape": (2, 2), "stride": (-1, 1)},
        {"count": 4, "start": 0, "shape": (2, 2), "stride": (4, 1)},  # strides lead outside
        {
            "count": 4,
            "start": 0,
            "shape": (1000, 1000),
            "stride": (0, 0),
        },  # four bytes that unfold into a million elements
        {
            "count": 5,
            "start": 0,
            "shape": (4,),
            "stride": (1,),
        },  # the storage itself is shorter than it says
    ],
)
def test_a_tensor_must_lie_inside_its_storage(tmp_path, claim):
    assert (
        read_torch(claiming(tmp_path / "fine.bin", count=4, start=1, shape=(3,), stride=(1,)))[
            "w"
        ].nbytes
        == 12
    )
    with pytest.raises(UserError, match="damaged"):
        read_torch(claiming(tmp_path / "w.bin", **claim))


def test_what_is_not_weights_is_told_by_its_first_bytes(tmp_path):
    path = tmp_path / "f"
    for content, message in [
        (b"<!DOCTYPE html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "git-lfs pointer"),
        (b"", "empty"),
    ]:
        path.write_bytes(content)
        for reader in (read_torch, read_safetensors):
            with pytest.raises(UserError, match=message):
                reader(path)
    for content, message in [
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "before torch 1.6"),
        (b"GGUF", "not a file written"),
    ]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_torch(path)


def test_archives_that_torch_did_not_write_are_refused(tmp_path):
    tensors = {"w": torch.zeros(100)}
    torch.save(tensors, tmp_path / "w.bin")
    whole = (tmp_path / "w.bin").read_bytes()
    for cut in (10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.bin").write_bytes(whole[:cut])
        with pytest.raises(UserError, match="cut short or damaged"):
            read_torch(tmp_path / "cut.bin")
    with (
        zipfile.ZipFile(tmp_path / "w.bin") as source,
        zipfile.ZipFile(tmp_path / "z.bin", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in source.namelist():
            packed.writestr(name, source.read(name))
    with pytest.raises(UserError, match="compressed"):
        read_torch(tmp_path / "z.bin")
    with pytest.raises(UserError, match="big-endian"):
        read_torch(forged(tmp_path / "b.bin", pickle.dumps({}), byteorder=b"big"))
    with zipfile.ZipFile(tmp_path / "other.bin", "w") as other:
        other.writestr("readme", "hello")
    with pytest.raises(UserError, match=r"no NAME/data\.pkl"):
        read_torch(tmp_path / "other.bin")
    for content, message in [
        ([torch.zeros(1)], "holds a list"),
        ({"step": 3}, "'step' is a int"),
        ({1: torch.zeros(1)}, "1 is a"),
    ]:
        torch.save(content, tmp_path / "w.bin")
        with pytest.raises(UserError, match=message):
            read_torch(tmp_path / "w.bin")


@pytest.mark.parametrize(
    "header",
    [
        {"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 16]}},
        {"w": {"dtype": "F32", "shape": [4], "data_offsets": [16, 32]}},
        {"w": {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}},
        {"w": {"dtype": "F32", "shape": [4], "data_offsets": [-8, 8]}},
        {"w": {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}},
        {"w": 3},
        [],
    ],
)
def test_a_safetensors_header_must_fit_its_file(tmp_path, header):
    text = json.dumps(header).encode()
    (tmp_path / "w").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with pytest.raises(UserError, match="w: "):
        read_safetensors(tmp_path / "w")
