"""Output is complete or absent: conversions are killed, starved of disk, and run twice."""

import os
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import convert
from minillama.checkpoint.hf_reader import load_model, open_weights
from minillama.checkpoint.tokenizer_files import copy_tokenizer
from minillama.conversion.writer import LazyTensor, LazyTensors, Output, write_checkpoint
from minillama.errors import UserError
from minillama.output_directory import new_directory
from minillama.tokenizer import train_tokenizer
from tests.memory import peak_growth


def no_other_files(directory: Path) -> None:
    """Write nothing beside the tensors."""


def contents(directory: Path) -> dict[str, bytes]:
    if not directory.exists():
        return {}
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def run_in_child(action: Callable[[], object]) -> int:
    """Run `action` in a forked process; return its wait status."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except UserError as error:
            os._exit(2 if "untouched" in str(error) else 3)
        except BaseException:
            os._exit(4)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def kill_at(tensors: LazyTensors, number: int, sent: signal.Signals) -> LazyTensors:
    """The same tensors, but reading the one of this number sends a signal to the process."""
    name = list(tensors)[number]
    old = tensors[name]

    def read() -> Tensor:
        os.kill(os.getpid(), sent)
        return old.read()

    return {**tensors, name: LazyTensor(old.dtype, old.shape, read)}


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("killed_at", [0, 7, -1])
def test_a_killed_conversion_leaves_the_old_state(tmp_path, tiny_checkpoint, killed_at, existing):
    source = tiny_checkpoint("source")
    tensors = open_weights(source)
    target = tiny_checkpoint("old", seed=5) if existing else tmp_path / "new"
    before = contents(target)
    output = Output(target, overwrite=existing, max_shard_bytes=2000)

    def convert_and_die() -> None:
        dying = kill_at(tensors, killed_at, signal.SIGKILL)
        write_checkpoint(replace(output, bin=True), [], dying, no_other_files)

    assert os.WTERMSIG(run_in_child(convert_and_die)) == signal.SIGKILL
    assert contents(target) == before

    write_checkpoint(output, [], tensors, lambda path: shutil.copy(source / "config.json", path))
    weight = load_model(target).lm_head.weight
    assert torch.equal(weight, load_model(source).lm_head.weight)
    remains = [*tmp_path.glob(".*"), *target.glob("*.bin")]
    assert not remains, "the next conversion clears what the killed one left"


def test_killed_between_writing_and_renaming_the_old_output_is_there(tmp_path, tiny_checkpoint):
    tensors = open_weights(tiny_checkpoint("source"))
    old = tiny_checkpoint("old", seed=5)
    before = contents(old)

    def convert_and_die() -> None:
        output = Output(old, overwrite=True)
        write_checkpoint(output, [], tensors, lambda _: os.kill(os.getpid(), signal.SIGKILL))

    assert os.WTERMSIG(run_in_child(convert_and_die)) == signal.SIGKILL
    assert contents(old) == before


@pytest.mark.parametrize("bin", [False, True])
@pytest.mark.parametrize("limit", [100, 9000, 30000])
def test_a_full_disk_is_one_line_and_leaves_the_old_state(tmp_path, tiny_checkpoint, limit, bin):
    tensors = open_weights(tiny_checkpoint("source"))
    old = tiny_checkpoint("old", seed=5)
    before = contents(old)

    def convert_with_little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        write_checkpoint(Output(old, overwrite=True, bin=bin), [], tensors, no_other_files)

    assert os.WEXITSTATUS(run_in_child(convert_with_little_room)) == 2
    assert contents(old) == before
    assert not list(tmp_path.glob(".*"))


def test_termination_removes_what_is_unfinished(tmp_path, tiny_checkpoint):
    tensors = open_weights(tiny_checkpoint("source"))
    stopping = kill_at(tensors, 3, signal.SIGTERM)

    def convert_until_terminated() -> None:
        with convert.exit_on_sigterm():
            write_checkpoint(Output(tmp_path / "new"), [], stopping, no_other_files)

    assert os.WEXITSTATUS(run_in_child(convert_until_terminated)) == 4
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(".*"))


def test_free_disk_is_checked_before_the_first_byte(tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(total=10**12, used=10**12, free=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    huge = {"w": LazyTensor(torch.float16, (10**6, 10**4), lambda: pytest.fail("work began"))}
    with pytest.raises(UserError, match=r"needs 20\.00 GB, and 1\.00 GB are free"):
        write_checkpoint(Output(tmp_path / "new"), [], huge, no_other_files)
    assert not list(tmp_path.iterdir())


def test_existing_output_is_refused_and_only_checkpoints_are_overwritten(tmp_path, tiny_checkpoint):
    tensors = open_weights(tiny_checkpoint("source"))
    old = tiny_checkpoint("old")
    with pytest.raises(UserError, match="already exists; --overwrite"):
        write_checkpoint(Output(old), [], tensors, no_other_files)
    (tmp_path / "home" / "photos").mkdir(parents=True)
    (tmp_path / "home" / "config.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for name in ("home", "notes", "file"):
        with pytest.raises(UserError, match="not a plain checkpoint directory"):
            write_checkpoint(Output(tmp_path / name, overwrite=True), [], tensors, no_other_files)
    with pytest.raises(UserError, match="no output was written"):
        write_checkpoint(Output(tmp_path / "file" / "below"), [], tensors, no_other_files)
    assert (tmp_path / "notes" / "a.txt").read_text() == "keep"
    assert (tmp_path / "file").read_text() == "keep"


def test_an_output_that_would_replace_an_input_is_refused_under_every_name(
    tmp_path, tiny_checkpoint
):
    base = tiny_checkpoint("base")
    before = contents(base)
    (tmp_path / "link").symlink_to(base)
    for path in (base, tmp_path / "link", tmp_path / "other" / ".." / "base", tmp_path):
        output = Output(path, overwrite=True, dtype=torch.float16)
        with pytest.raises(UserError, match="the output would replace the input"):
            write_checkpoint(output, [base], open_weights(base), no_other_files)
        assert contents(base) == before


def test_killed_between_the_two_renames_the_old_output_comes_back(
    tmp_path, tiny_checkpoint, monkeypatch
):
    tensors = open_weights(tiny_checkpoint("source", seed=3))
    old = tiny_checkpoint("old")
    before = contents(old)
    rename = Path.rename

    def die_at_the_second(source: Path, target: Path) -> Path:
        if source != old:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(source, target)

    def convert_and_die() -> None:
        monkeypatch.setattr(Path, "rename", die_at_the_second)
        write_checkpoint(Output(old, overwrite=True), [], tensors, no_other_files)

    run_in_child(convert_and_die)
    assert contents(tmp_path / ".old.old") == before
    assert not old.exists()
    with pytest.raises(UserError, match="already exists"):
        write_checkpoint(Output(old), [], tensors, no_other_files)
    assert contents(old) == before
    assert not list(tmp_path.glob(".*"))


def test_a_rename_that_fails_puts_the_old_output_back(tmp_path, tiny_checkpoint, monkeypatch):
    tensors = open_weights(tiny_checkpoint("source", seed=3))
    old = tiny_checkpoint("old")
    before = contents(old)
    rename = Path.rename

    def refuse(source: Path, target: Path) -> Path:
        if source.name.endswith(".partial"):
            raise PermissionError(13, "Permission denied", str(source))
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError, match="untouched"):
        write_checkpoint(Output(old, overwrite=True), [], tensors, no_other_files)
    assert contents(old) == before
    assert not list(tmp_path.glob(".*"))


def test_two_conversions_to_one_output_do_not_mix(tmp_path, tiny_checkpoint):
    tensors = open_weights(tiny_checkpoint("source"))
    output = Output(tmp_path / "new")
    with new_directory(output.path) as directory:
        with pytest.raises(UserError, match="another conversion is writing"):
            write_checkpoint(output, [], tensors, no_other_files)
        (directory / "w").write_text("complete")
    assert (tmp_path / "new" / "w").read_text() == "complete"


def test_anonymous_memory_does_not_grow_with_the_number_of_tensors(tmp_path):
    """Both models' largest tensor has 4 MiB; one has 4 tensors, the other 24. Memory is sampled.
    A busy machine may miss the peak of a short conversion, so the largest of three counts."""
    MiB = 2**20
    peaks = {}
    for count in (4, 24):
        tensor = LazyTensor(torch.float32, (MiB,), lambda: torch.ones(MiB))
        source = Output(tmp_path / f"source{count}")
        write_checkpoint(source, [], {f"w{i}": tensor for i in range(count)}, no_other_files)
        tensors = open_weights(source.path)
        outputs = [Output(tmp_path / f"copy{count}_{i}", dtype=torch.float16) for i in range(3)]
        peaks[count] = max(
            peak_growth(
                lambda output=output, tensors=tensors: write_checkpoint(
                    output, [], tensors, no_other_files
                )
            )
            for output in outputs
        )
    assert peaks[24] < peaks[4] + 8 * MiB
    assert peaks[24] < 32 * MiB


def test_a_tokenizer_of_any_name_comes_under_the_name_that_checkpoints_use(
    tmp_path, small_tokenizer
):
    source = tmp_path / "source"
    from_other_name = tmp_path / "other"
    from_usual_name = tmp_path / "usual"
    for directory in (source, from_other_name, from_usual_name):
        directory.mkdir()
    chinese, usual = train_tokenizer(["天地玄黄"], 290), small_tokenizer.path.read_bytes()
    (source / "chinese.model").write_bytes(chinese)
    (source / "tokenizer.model").write_bytes(usual)
    for name in ("tokenizer.json", "added_tokens.json"):
        (source / name).write_text("{}")
    copy_tokenizer(source / "chinese.model", from_other_name)
    assert (from_other_name / "tokenizer.model").read_bytes() == chinese
    names = {path.name for path in from_other_name.iterdir()}
    assert names == {"tokenizer.model", "tokenizer_config.json"}, "the others describe another one"
    copy_tokenizer(source / "tokenizer.model", from_usual_name)
    assert (from_usual_name / "added_tokens.json").is_file()
    assert (from_usual_name / "tokenizer.model").read_bytes() == usual
