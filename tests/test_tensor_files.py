"""Files of tensors: others open what we write, and we open what others write."""

import gc
import re
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minillama.errors import UserError
from minillama.tensor_files import read_safetensors, read_tensors, read_torch
from minillama.tensor_writers import ALIGNMENT, safetensors_writer, torch_writer
from minillama.torch_files import map_torch
from tests.tensors import assert_same, random_tensors, read, write

few = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


dtypes = st.sampled_from(
    [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
)


shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


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
