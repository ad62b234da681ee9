"""Chapter: files of tensors. What we write others open, what others write we open, and nothing in a file is ever executed."""

import gc
import io
import json
import pickle
import re
import struct
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minillama.checkpoint.hf_format import load_model, open_weights, write_weights
from minillama.errors import UserError
from minillama.tensor_files import read_safetensors, read_tensors, read_torch
from minillama.tensor_writers import ALIGNMENT, safetensors_writer, specs_of, torch_writer
from minillama.torch_files import map_torch

few = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
dtypes = st.sampled_from(
    [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


def random_tensors(specs: list[tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, torch.Tensor]:
    return {
        f"layer.{i}.weight": (100 * torch.rand(shape)).to(dtype)
        for i, (dtype, shape) in enumerate(specs)
    }


def write(writer, path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with writer(path, specs_of(tensors)) as append:
        for name, tensor in tensors.items():
            append(name, tensor)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def read(reader, path: Path) -> dict[str, torch.Tensor]:
    return {name: entry.read() for name, entry in reader(path).items()}


@few
@given(st.lists(st.tuples(dtypes, shapes), min_size=1, max_size=4))
def test_torch_opens_what_we_write_and_so_do_we(tmp_path, specs):
    tensors = random_tensors(specs)
    write(torch_writer, tmp_path / "w.bin", tensors)
    assert_same(torch.load(tmp_path / "w.bin", weights_only=True), tensors)
    assert_same(torch.load(tmp_path / "w.bin", weights_only=True, mmap=True), tensors)
    assert_same(read(read_torch, tmp_path / "w.bin"), tensors)


@few
@given(st.lists(st.tuples(dtypes, shapes), min_size=1, max_size=4))
def test_safetensors_opens_what_we_write_and_we_what_it_writes(tmp_path, specs):
    tensors = random_tensors(specs)
    write(safetensors_writer, tmp_path / "ours", tensors)
    assert_same(dict(sorted(safetensors.torch.load_file(tmp_path / "ours").items())), tensors)
    safetensors.torch.save_file(tensors, tmp_path / "theirs")
    assert_same(dict(sorted(read(read_safetensors, tmp_path / "theirs").items())), tensors)


@few
@given(dtypes, st.integers(1, 5), st.integers(1, 5), st.data())
def test_views_of_a_shared_storage_read_as_torch_reads_them(tmp_path, dtype, rows, columns, data):
    whole = (100 * torch.rand(rows, columns)).to(dtype)
    top, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    views = {
        "whole": whole,
        "transposed": whole.T,
        "part": whole[top:, left:],
        "column": whole[:, left],
        "scalar": whole[top, left],
        "parameter": torch.nn.Parameter(whole, requires_grad=False),
    }
    torch.save(OrderedDict(views), tmp_path / "w.bin")
    assert_same(read(read_torch, tmp_path / "w.bin"), views)


def test_storages_we_write_are_aligned_as_torch_aligns_them(tmp_path):
    write(
        torch_writer,
        tmp_path / "w.bin",
        random_tensors([(torch.float16, (3,)), (torch.float32, (5, 5)), (torch.float32, (1,))]),
    )
    tensors = map_torch(tmp_path / "w.bin").values()  # a mapping begins at a page
    assert all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in tensors)


def test_equal_tensors_make_equal_files(tmp_path):
    write(torch_writer, tmp_path / "w.bin", tensors := random_tensors([(torch.float16, (3, 4))]))
    write(torch_writer, tmp_path / "w.pth", tensors)
    assert (tmp_path / "w.bin").read_bytes() == (tmp_path / "w.pth").read_bytes()


def test_a_file_given_up_half_way_is_let_go_of_silently(tmp_path, monkeypatch):
    complaints = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    with (
        pytest.raises(RuntimeError),
        torch_writer(tmp_path / "w.bin", {"w": (torch.float32, (2,))}),
    ):
        raise RuntimeError
    gc.collect()
    assert not complaints


def test_a_training_state_gives_the_weights_inside(tmp_path):
    torch.save({"module": {"w": torch.ones(2)}, "step": 3}, tmp_path / "state.pt")
    assert_same(read(read_torch, tmp_path / "state.pt"), {"w": torch.ones(2)})


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


def sharded(directory: Path, bin: bool) -> dict[str, torch.Tensor]:
    tensors = random_tensors([(torch.float16, (8, 8))] * 4)
    directory.mkdir()
    write_weights(directory, iter(tensors.items()), specs_of(tensors), 200, bin)
    return tensors


@pytest.mark.parametrize("bin", [False, True])
def test_sharded_weights_come_back_whatever_the_kind(tmp_path, bin):
    tensors = sharded(tmp_path / "c", bin)
    assert len(list((tmp_path / "c").glob("*-of-00004.*"))) == 4
    assert_same(
        {name: entry.read() for name, entry in open_weights(tmp_path / "c").items()}, tensors
    )


@pytest.mark.parametrize("bin", [False, True])
def test_all_bad_shards_are_listed_at_once(tmp_path, bin):
    sharded(tmp_path / "c", bin)
    shards = sorted((tmp_path / "c").glob("*-of-*"))
    shards[0].write_bytes(b"<html>")
    shards[1].write_bytes(shards[1].read_bytes()[:-80])
    shards[2].unlink()
    write(torch_writer if bin else safetensors_writer, shards[3], {"another": torch.zeros(1)})
    with pytest.raises(UserError) as caught:
        open_weights(tmp_path / "c")
    for part in (
        f"{shards[0].name}: a web page",
        shards[1].name,
        f"{shards[2].name}: the index names this file, but it is not",
        f"{shards[3].name}: lacks layer.3.weight, which the index promises",
    ):
        assert part in str(caught.value)


def test_an_index_may_not_lead_out_of_its_directory(tmp_path):
    sharded(tmp_path / "c", bin=True)
    index = tmp_path / "c" / "pytorch_model.bin.index.json"
    for name in ("../secret.bin", "/etc/passwd", "sub/w.bin"):
        index.write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(UserError, match="only plain file names"):
            open_weights(tmp_path / "c")
    index.unlink()
    with pytest.raises(UserError, match="without their index"):
        open_weights(tmp_path / "c")


def test_a_tensor_in_two_shards_is_an_error(tmp_path):
    sharded(tmp_path / "c", bin=True)
    first, second, *_ = sorted((tmp_path / "c").glob("*-of-*"))
    write(
        torch_writer, second, {"layer.0.weight": torch.zeros(1), "layer.1.weight": torch.zeros(1)}
    )
    with pytest.raises(UserError, match=rf"layer\.0\.weight is in {first.name} too"):
        open_weights(tmp_path / "c")


def test_stray_rotary_buffers_of_old_files_are_ignored(tmp_path, tiny_checkpoint):
    base = tiny_checkpoint()
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(
        tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)},
        base / "pytorch_model.bin",
    )
    assert open_weights(base).keys() == tensors.keys()
    raw = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps({key: raw[key] for key in raw if key not in ("rope_theta", "head_dim")})
    )
    assert torch.equal(load_model(base).lm_head.weight, tensors["lm_head.weight"])


def test_real_bin_checkpoints_load_like_their_safetensors(shared):
    models = shared / "models"
    expected = {name: entry.read() for name, entry in open_weights(models / "stories260K").items()}
    for name in (
        "stories260K_fp16_bin",
        "stories260K_untied_fp16_sharded_bin",
        "stories260K_untied_sharded",
    ):
        found = open_weights(models / name)
        dtype = next(iter(found.values())).dtype
        assert all(
            torch.equal(found[key].read(), tensor.to(dtype)) for key, tensor in expected.items()
        )


@pytest.mark.parametrize("writer", [torch_writer, safetensors_writer])
def test_a_file_cut_short_after_its_header_was_read_is_noticed(tmp_path, writer):
    path = tmp_path / ("w.bin" if writer is torch_writer else "w.safetensors")
    write(writer, path, {"w": torch.zeros(1000)})
    ref = read_tensors(path)["w"]
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match=r"w\..*: .*cut short"):
        ref.read()


def anonymous_bytes() -> int:
    """The memory of this process that the system cannot drop and read again from a file."""
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("RssAnon is Linux's")
    match = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
    return int(match[1]) * 1024


@pytest.mark.parametrize("writer", [torch_writer, safetensors_writer])
def test_reading_a_file_takes_the_memory_of_a_tensor_not_of_the_file(tmp_path, writer):
    """The files are mapped, and mapped pages are the system's to drop; so RssAnon is measured.

    Five tensors of 36 MB, of which two may be in memory: one is read while the one before it is
    still there. Smaller ones would not do: malloc keeps up to 64 MB of blocks below 32 MB.
    """
    path = tmp_path / ("w.bin" if writer is torch_writer else "w.safetensors")
    specs = {f"layer.{i}.weight": (torch.float32, (9, 2**20)) for i in range(5)}
    with writer(path, specs) as append:
        for name in specs:
            append(name, torch.ones(9, 2**20))
    before = anonymous_bytes()
    for ref in read_tensors(path).values():
        tensor = ref.read()
        assert anonymous_bytes() - before < 2.5 * tensor.nbytes
    path.unlink()


def test_a_part_and_a_transposed_tensor_are_read_alike_from_both_kinds(tmp_path):
    tensors = {"w": torch.arange(12.0).view(4, 3)}
    write(torch_writer, tmp_path / "w.bin", tensors)
    write(safetensors_writer, tmp_path / "w.safetensors", tensors)
    for name in ("w.bin", "w.safetensors"):
        ref = read_tensors(tmp_path / name)["w"]
        assert torch.equal(ref.read_part(1, 3), tensors["w"][1:3])
        assert ref.transposed().shape == (3, 4)
        assert torch.equal(ref.transposed().read(), tensors["w"].T)
        assert ref.transposed().read().is_contiguous()
        assert torch.equal(ref.transposed().transposed().read(), tensors["w"])


def test_what_is_read_is_a_copy_and_changing_it_changes_nothing_else(tmp_path):
    for writer, name in ((torch_writer, "w.bin"), (safetensors_writer, "w.safetensors")):
        write(writer, tmp_path / name, {"w": torch.zeros(3)})
        ref = read_tensors(tmp_path / name)["w"]
        ref.read().add_(1)
        assert torch.equal(ref.read(), torch.zeros(3))
