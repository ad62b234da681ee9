"""docs/examples: each program is short, and prints what the page of the examples says."""

import runpy
import shlex
import sys
from pathlib import Path

import pytest

from docs.check import Block, read_blocks
from docs.compare_output import first_difference

ROOT = Path(__file__).parents[1]
PAGE = "docs/examples/README.md"
BLOCKS = read_blocks(PAGE)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: Path(block.command.split()[1]).stem)
def test_an_example_is_short_and_prints_what_its_page_says(
    block: Block, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python, script, *arguments = shlex.split(block.command)
    assert python == "python"
    lines = (ROOT / script).read_text(encoding="utf-8").splitlines()
    assert 10 <= len([line for line in lines if line]) <= 30
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(script, run_name="__main__")
    assert not first_difference(block.output.removeprefix("…\n"), capsys.readouterr().out)


def test_every_example_stands_on_the_page() -> None:
    shown = {Path(shlex.split(block.command)[1]).name for block in BLOCKS}
    programs = {path.name for path in (ROOT / "docs/examples").glob("*.py")}
    assert shown == programs - {"tour.py", "notebook.py"}
