"""Real full disks: a small tmpfs, where root may mount one.

The kernel refuses what does not fit, at whatever call that happens, so nothing is simulated here.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.commands import run_command
from tests.faults.scenarios import EVAL, GENERATE, TRAIN, content_of, write_world
from tests.faults.test_kill_points import differences

SMALL = {  # command -> kilobytes that are free
    "train": (TRAIN, (8, 100)),
    "generate": (GENERATE, (0,)),
    "eval": (EVAL, (0, 4)),
    "meta": ("convert.py meta --input meta --output hf", (0, 8, 100)),
    "merge-lora": ("convert.py merge-lora --base base --lora adapter --output out", (8, 100)),
    "data": (
        "convert.py data --input alpaca.json --tokenizer tokenizer.model --output set",
        (8, 60),
    ),
    "tokenizer": (
        "convert.py tokenizer --base tokenizer.model --add other.model --output joined.model",
        (0, 4),
    ),
    "sha256": ("convert.py sha256 base", (0,)),
}
CASES = [(name, free) for name, (_, sizes) in SMALL.items() for free in sizes]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tmpfs of 48 MiB, conversions leave 16 of them free, with the inputs of every command."""
    place = tmp_path_factory.mktemp("disk")
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root may mount a small disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(place)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        write_world(place / "world")
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(folder: Path, free: int) -> Path:
    """Fill a disk up to `free` kilobytes with a file, and return the file."""
    path = folder / "ballast"
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    os.truncate(path, max(0, path.stat().st_size - 1024 * free))
    return path


@pytest.mark.parametrize(("name", "free"), CASES)
def test_a_full_disk_loses_nothing_and_the_command_ends_once_there_is_room(
    name: str, free: int, disk: Path, tmp_path: Path
) -> None:
    command, _ = SMALL[name]
    work = disk / "work"
    shutil.copytree(disk / "world", work)
    assert run_command(command, work, tmp_path / "report").code == 0
    undisturbed = content_of(work)
    shutil.rmtree(work)
    shutil.copytree(disk / "world", work)
    before = content_of(work)
    ballast = fill(disk, free)
    try:
        outcome = run_command(command, work, tmp_path / "report")
        assert outcome.code == 2, outcome.stderr
        assert "Traceback" not in outcome.stderr
        error = outcome.stderr.splitlines()[-1]
        assert error.startswith("error: ")
        assert "No space left" in error or "are free" in error
        now = content_of(work)
        assert {path: now.get(path) for path in before} == before
        ballast.unlink()
        assert run_command(command, work, tmp_path / "report").code == 0
        assert not list(differences(undisturbed, content_of(work)))
    finally:
        ballast.unlink(missing_ok=True)
        shutil.rmtree(work)
