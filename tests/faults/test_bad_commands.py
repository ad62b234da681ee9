"""Every bad command line and every bad file ends with code 2 and one line, and leaves nothing."""

import os
import shutil
from pathlib import Path

import pytest

from minillama.errors import UserError
from minillama.files import append_file
from tests.faults.bad_commands import COMMANDS
from tests.faults.bad_files import FILES, GENERATE, BadFile
from tests.faults.commands import Outcome, run_command
from tests.faults.scenarios import write_world

State = dict[str, tuple[int, int, str]]  # mode, size and time of each path; where a link leads


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad") / "world"
    write_world(folder)
    return folder


def state_of(folder: Path) -> State:
    state = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        link = os.readlink(path) if path.is_symlink() else ""
        size_and_time = 0 if path.is_dir() else hash((status.st_size, status.st_mtime_ns))
        state[path.relative_to(folder).as_posix()] = (status.st_mode, size_and_time, link)
    return state


def refused(command: str, world: Path) -> Outcome:
    """Run a command that must be refused, and check how it ends."""

    def use_other_cache() -> None:
        os.environ["XDG_CACHE_HOME"] = str(world.parent / "cache")

    before = state_of(world)
    outcome = run_command(command, world, world.parent / "report", before=use_other_cache)
    ending = f"code {outcome.code}\n{outcome.stdout[-500:]}\n{outcome.stderr[-1500:]}"
    assert outcome.code == 2, ending
    assert "Traceback" not in outcome.stderr, ending
    lines = outcome.stderr.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and lines[-1] == errors[0], ending
    assert len(errors[0]) > len("error: ") + 10, ending
    assert state_of(world) == before, f"something is left\n{ending}"
    return outcome


@pytest.mark.parametrize(("command", "words"), COMMANDS, ids=[row[0] for row in COMMANDS])
def test_a_bad_command_line_ends_in_one_line(command: str, words: str, world: Path) -> None:
    assert words in refused(command, world).stderr


@pytest.mark.parametrize("bad", FILES, ids=[bad.name for bad in FILES])
def test_a_bad_file_ends_in_one_line(bad: BadFile, world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "world"
    shutil.copytree(world, folder)
    bad.write(folder)
    assert bad.words in refused(bad.command, folder).stderr


def test_a_link_for_the_unfinished_completions_is_replaced_and_not_followed(
    world: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "world"
    shutil.copytree(world, folder)
    (folder / "out.jsonl.partial").symlink_to("text.txt")
    before = (folder / "text.txt").read_bytes()
    command = f"{GENERATE} --output out.jsonl"
    assert run_command(command, folder, tmp_path / "report").code == 0
    assert (folder / "text.txt").read_bytes() == before
    assert not (folder / "out.jsonl.partial").is_symlink()


def test_nothing_is_appended_through_a_link(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("kept")
    (tmp_path / "metrics.jsonl").symlink_to(target)
    with pytest.raises(UserError, match=r"metrics\.jsonl: a symbolic link"):
        append_file(tmp_path / "metrics.jsonl")
    assert target.read_text() == "kept"


def test_the_tables_are_long_enough_and_hold_nothing_twice() -> None:
    assert len(COMMANDS) + len(FILES) >= 200
    assert len({command for command, _ in COMMANDS}) == len(COMMANDS)
    assert len({bad.name for bad in FILES}) == len(FILES)
