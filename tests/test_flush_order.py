"""A power cut after a rename loses nothing: every file is on the disk before it gets its name."""

from pathlib import Path

import pytest
import torch

from minillama.checkpoint import train_state
from minillama.checkpoint.hf_writer import save_model
from minillama.comm import Mesh
from minillama.files import write_text
from minillama.output_directory import new_directory
from minillama.parallel.sharded_optimizer import SavedSlice
from tests.conftest import random_model
from tests.test_files import record_calls


def assert_flushed_around_rename(calls: list[str], partial: str, directory: Path) -> None:
    """Each file of `directory` is flushed before the rename from `partial`, its parent after it.

    Files that were renamed inside were flushed under their temporary name; a second flush, under
    their own, is for the name.
    """
    renames = [f"{call} {partial}" for call in ("replace", "rename")]
    position = next(number for number, call in enumerate(calls) if call in renames)
    before = calls[:position]
    after = calls[position + 1 :]
    for file in directory.rglob("*"):
        assert f"fsync {file.name}" in before, file
    assert f"fsync {directory.parent.name}" in after


def test_a_checkpoint_is_flushed_before_its_rename_and_its_parent_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slices = [SavedSlice([], {name: torch.ones(3) for name in ("master", "m", "v")})]

    def write_model(directory: Path) -> None:
        save_model(random_model(), directory)
        (directory / "more.txt").write_text("a file that nothing else flushes")

    calls = record_calls(monkeypatch)
    problem = train_state.save_state(tmp_path, 1, Mesh(), slices, {}, write_model, keep=0)
    assert problem is None
    [directory] = (tmp_path / "checkpoints").iterdir()
    assert (directory / "more.txt").is_file()
    names = {path.name for path in directory.iterdir()}
    assert "manifest.json" in names
    partial = f"{directory.name}.partial"
    calls = [call.replace(".manifest.json.partial", "manifest.json") for call in calls]
    assert_flushed_around_rename(calls, partial, directory)


@pytest.mark.parametrize("exists", [False, True], ids=["new", "replaced"])
def test_an_output_is_flushed_before_its_rename_and_its_parent_after_it(
    exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "output"
    if exists:
        output.mkdir()
        write_text(output / "config.json", "old")
    calls = record_calls(monkeypatch)
    with new_directory(output, True, 0, "test") as partial:
        (partial / "model.safetensors").write_bytes(b"weights")
        (partial / "inner").mkdir()
        (partial / "inner" / "part").write_bytes(b"part")
    assert_flushed_around_rename(calls, ".output.partial", output)
