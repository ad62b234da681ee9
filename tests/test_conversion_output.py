"""Chapter: output is complete or absent. Conversions are killed, starved of disk, and run twice; the old state survives."""

import fcntl
import os
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import convert
from minillama.checkpoint.hf_format import copy_tokenizer, load_model, open_weights
from minillama.conversion import writer as output_module
from minillama.conversion.writer import LazyTensor, Output, complete_or_absent, write_checkpoint
from minillama.errors import UserError


def contents(directory: Path) -> dict[str, bytes]:
    return (
        {path.name: path.read_bytes() for path in directory.iterdir()} if directory.exists() else {}
    )


def in_child(action) -> int:
    """Run `action` in a forked process; its wait status."""
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


def dying_at(recipes: dict[str, LazyTensor], number: int) -> dict[str, LazyTensor]:
    """The recipes, with the one of this number killing the process instead."""
    name = list(recipes)[number]
    return recipes | {
        name: LazyTensor(
            recipes[name].dtype, recipes[name].shape, lambda: os.kill(os.getpid(), signal.SIGKILL)
        )
    }


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("killed_at", [0, 7, -1])
def test_a_killed_conversion_leaves_the_old_state(tmp_path, tiny_checkpoint, killed_at, existing):
    recipes = open_weights(tiny_checkpoint("source"))
    target = tiny_checkpoint("old", seed=5) if existing else tmp_path / "new"
    before = contents(target)
    output = Output(target, overwrite=existing, max_shard_bytes=2000)

    def convert_and_die() -> None:
        write_checkpoint(
            replace(output, bin=True), dying_at(recipes, killed_at), lambda directory: None
        )

    assert os.WTERMSIG(in_child(convert_and_die)) == signal.SIGKILL
    assert contents(target) == before
    write_checkpoint(
        output,
        recipes,
        lambda directory: shutil.copy(tmp_path / "source" / "config.json", directory),
    )
    assert torch.equal(
        load_model(target).lm_head.weight, load_model(tmp_path / "source").lm_head.weight
    )
    assert not [*tmp_path.glob(".*"), *target.glob("*.bin")], (
        "the remains of the killed conversion are cleared"
    )


def test_killed_between_writing_and_renaming_the_old_output_is_there(
    tmp_path, tiny_checkpoint, monkeypatch
):
    recipes, old = open_weights(tiny_checkpoint("source")), tiny_checkpoint("old", seed=5)
    before = contents(old)
    monkeypatch.setattr(output_module, "_publish", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    in_child(lambda: write_checkpoint(Output(old, overwrite=True), recipes, lambda directory: None))
    assert contents(old) == before


@pytest.mark.parametrize("bin", [False, True])
@pytest.mark.parametrize("limit", [100, 9000, 30000])
def test_a_full_disk_is_one_line_and_leaves_the_old_state(tmp_path, tiny_checkpoint, limit, bin):
    recipes, old = open_weights(tiny_checkpoint("source")), tiny_checkpoint("old", seed=5)
    before = contents(old)

    def with_little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        write_checkpoint(Output(old, overwrite=True, bin=bin), recipes, lambda directory: None)

    assert os.WEXITSTATUS(in_child(with_little_room)) == 2
    assert contents(old) == before and not list(tmp_path.glob(".*"))


def test_termination_removes_what_is_unfinished(tmp_path, tiny_checkpoint):
    recipes = open_weights(tiny_checkpoint("source"))
    name = list(recipes)[3]
    stopping = recipes | {
        name: LazyTensor(
            recipes[name].dtype, recipes[name].shape, lambda: os.kill(os.getpid(), signal.SIGTERM)
        )
    }

    def terminated() -> None:
        convert.main(["--help"])  # installs the handler, as every run does
        write_checkpoint(Output(tmp_path / "new"), stopping, lambda directory: None)

    in_child(terminated)
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*"))


def test_free_disk_is_checked_before_the_first_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 10**9)
    )
    huge = {"w": LazyTensor(torch.float16, (10**6, 10**4), lambda: pytest.fail("work began"))}
    with pytest.raises(UserError, match=r"needs 20\.00 GB, and 1\.00 GB are free"):
        write_checkpoint(Output(tmp_path / "new"), huge, lambda directory: None)
    assert not list(tmp_path.iterdir())


def test_existing_output_is_refused_and_only_checkpoints_are_overwritten(tmp_path, tiny_checkpoint):
    recipes, old = open_weights(tiny_checkpoint("source")), tiny_checkpoint("old")
    with pytest.raises(UserError, match="already exists; --overwrite"):
        write_checkpoint(Output(old), recipes, lambda directory: None)
    (tmp_path / "home" / "photos").mkdir(parents=True)
    (tmp_path / "home" / "config.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for precious in ("home", "notes", "file"):
        with pytest.raises(UserError, match="not a plain checkpoint directory"):
            write_checkpoint(
                Output(tmp_path / precious, overwrite=True), recipes, lambda directory: None
            )
    with pytest.raises(UserError, match="no output was written"):
        write_checkpoint(Output(tmp_path / "file" / "below"), recipes, lambda directory: None)
    assert (tmp_path / "notes" / "a.txt").read_text() == (tmp_path / "file").read_text() == "keep"


def test_an_input_may_be_overwritten_by_what_is_made_of_it(tiny_checkpoint):
    base = tiny_checkpoint()
    recipes = open_weights(base)
    write_checkpoint(
        Output(base, overwrite=True, dtype=torch.float16), recipes, lambda directory: None
    )
    assert {entry.dtype for entry in open_weights(base).values()} == {torch.float16}


def test_killed_between_the_two_renames_the_old_output_comes_back(
    tmp_path, tiny_checkpoint, monkeypatch
):
    recipes, old = open_weights(tiny_checkpoint("source", seed=3)), tiny_checkpoint("old")
    before = contents(old)

    def die_instead_of_the_second_rename() -> None:
        rename = Path.rename
        monkeypatch.setattr(
            Path,
            "rename",
            lambda source, target: (
                rename(source, target) if source == old else os.kill(os.getpid(), 9)
            ),
        )
        write_checkpoint(Output(old, overwrite=True), recipes, lambda directory: None)

    in_child(die_instead_of_the_second_rename)
    assert contents(tmp_path / ".old.old") == before and not old.exists()
    with pytest.raises(UserError, match="already exists"):
        write_checkpoint(Output(old), recipes, lambda directory: None)
    assert contents(old) == before and not list(tmp_path.glob(".*"))


def test_a_rename_that_fails_puts_the_old_output_back(tmp_path, tiny_checkpoint, monkeypatch):
    recipes, old = open_weights(tiny_checkpoint("source", seed=3)), tiny_checkpoint("old")
    before, rename = contents(old), Path.rename

    def refuse(source: Path, target: Path) -> Path:
        if source.name.endswith(".partial"):
            raise PermissionError(13, "Permission denied", str(source))
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError, match="untouched"):
        write_checkpoint(Output(old, overwrite=True), recipes, lambda directory: None)
    assert contents(old) == before and not list(tmp_path.glob(".*"))


def test_two_conversions_to_one_output_do_not_mix(tmp_path):
    (tmp_path / ".new.partial").mkdir()
    other = os.open(tmp_path / ".new.partial", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with (
        pytest.raises(UserError, match="another conversion is writing"),
        complete_or_absent(tmp_path / "new", 0, overwrite=False),
    ):
        pass
    os.close(other)
    with complete_or_absent(tmp_path / "new", 0, overwrite=False) as directory:
        (directory / "w").write_text("complete")
    assert (tmp_path / "new" / "w").read_text() == "complete"


def test_a_tokenizer_of_any_name_comes_under_the_name_that_checkpoints_use(tmp_path):
    source, made, whole = (tmp_path / name for name in ("source", "made", "whole"))
    for directory in (source, made, whole):
        directory.mkdir()
    for name in ("chinese.model", "tokenizer.model", "tokenizer.json", "added_tokens.json"):
        (source / name).write_text(name)
    copy_tokenizer(source / "chinese.model", made)
    assert (made / "tokenizer.model").read_text() == "chinese.model"
    assert {path.name for path in made.iterdir()} == {"tokenizer.model", "tokenizer_config.json"}, (
        "the others describe another one"
    )
    copy_tokenizer(source / "tokenizer.model", whole)
    assert (whole / "added_tokens.json").is_file() and (
        whole / "tokenizer.model"
    ).read_text() == "tokenizer.model"
