"""benchmarks/all.py runs commands that exist, and benchmarks/README.md names every script."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"
PARTS = {"all.py", "cuda_7b.py", "cuda_legs.py", "cuda_sides.py"}  # not benchmarks by themselves


def listed(*flags: str) -> dict[str, list[str]]:
    """Name -> words of the command, as `--list` prints them."""
    done = subprocess.run(
        [sys.executable, "benchmarks/all.py", "--list", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    commands = {}
    for line in done.stdout.splitlines():
        name, *words = shlex.split(line)
        commands[name] = words
    return commands


def test_every_command_names_a_script_and_flags_that_it_has() -> None:
    commands = listed("--data", "a b.json", "--tokenizer", "t.model")
    assert "a b.json" in commands["finetuning"]
    assert "finetuning" not in listed()
    for _, script, *arguments in commands.values():
        source = (ROOT / script).read_text(encoding="utf-8")
        for word in arguments:
            assert not word.startswith("--") or f'"{word}"' in source, f"{script} {word}"


def test_an_unknown_name_is_refused_with_those_that_exist() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/all.py", "--only", "training,speed"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("--only speed: there are waiting, ")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_the_readme_names_every_benchmark(path: Path) -> None:
    named = f"[{path.name}]({path.name})" in (FOLDER / "README.md").read_text(encoding="utf-8")
    assert named or path.name in PARTS
