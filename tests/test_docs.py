"""The pages of docs/: their commands, their parts, and the tests that they name.

`python -m docs.check` runs every command. Here are the quick ones, and what needs no run.
"""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from docs.check import (
    INSTALLATION,
    ROOT,
    WORDS,
    Block,
    copy_tree,
    pages,
    read_blocks,
    run_block,
    without_progress_bars,
)
from docs.compare_output import first_difference
from docs.understand import why_not_understood

BLOCKS = [block for page in pages() for block in read_blocks(page)]
QUICK_PAGES = sorted({block.page for block in BLOCKS if "quick" in block.words})
YOURS = [block for block in BLOCKS if "yours" in block.words]
CHAPTERS = re.findall(
    r"^\| \d+ \| \[.*?\]\((\w+\.md)\)", (ROOT / "docs/README.md").read_text(), re.M
)
NAME = re.compile(r"`(test_\w+)`")
LINK = re.compile(r"\]\(([^)#:]+)\)")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@cache
def names_in(path: Path) -> set[str]:
    """The names of the functions that a file defines, tests among them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the working tree, in which commands can write."""
    return copy_tree(tmp_path_factory.mktemp("clone"))


@pytest.mark.parametrize("page", QUICK_PAGES)
def test_the_quick_commands_of_a_page_print_what_the_page_says(page: str, clone: Path) -> None:
    for block in read_blocks(page):
        if "quick" in block.words:
            assert not run_block(block, clone), block.place


@pytest.mark.parametrize("block", YOURS, ids=lambda block: block.place)
def test_a_command_with_files_of_the_reader_is_understood(block: Block) -> None:
    assert not why_not_understood(block.command)


def test_a_command_that_is_not_understood_is_found() -> None:
    assert "--lora_rnak" in why_not_understood("python train.py --lora_rnak 8")
    assert "--cheque" in why_not_understood("python convert.py sha256 DIR --cheque SHA256.md")
    assert "3 tensor" in why_not_understood("python train.py --model 7b --tensor_parallel 3")


@pytest.mark.parametrize("page", pages())
def test_commands_are_in_blocks_whose_words_are_known(page: str) -> None:
    for block in read_blocks(page):
        assert block.words <= WORDS, block.place
    assert not re.search(r"^ {4}\$ ", text_of(page), re.MULTILINE)


@pytest.mark.parametrize("page", CHAPTERS)
def test_a_chapter_has_its_parts(page: str) -> None:
    text = text_of(f"docs/{page}")
    for part in ("**The problem.**", "**The idea.**", "**Exercise.**", "**Next**"):
        assert part in text, part
    has_picture = "(figures/" in text or re.search(r"^ {4}.*[─▶|│]", text, re.MULTILINE)
    assert has_picture
    assert "](../minillama/" in text
    assert any(block.page == f"docs/{page}" for block in BLOCKS)


@pytest.mark.parametrize("page", CHAPTERS)
def test_an_exercise_names_tests_of_the_files_that_it_links(page: str) -> None:
    """Each is the name of a test in one of the files, so a reader finds the answer."""
    exercise = text_of(f"docs/{page}").partition("**Exercise.**")[2].partition("\n\n")[0]
    defined: set[str] = set()
    for link in LINK.findall(exercise):
        if link.endswith(".py"):
            defined |= names_in(ROOT / "docs" / link)
    names = set(NAME.findall(exercise))
    assert names
    assert names <= defined


@pytest.mark.parametrize("page", pages())
def test_tests_that_a_page_names_exist(page: str) -> None:
    defined: set[str] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        defined |= names_in(path) | {path.stem}
    assert set(NAME.findall(text_of(page))) <= defined


@pytest.mark.parametrize("page", [*pages(), "docs/examples/tour.ipynb"])
def test_every_relative_link_leads_to_a_file(page: str) -> None:
    links = LINK.findall(text_of(page))
    missing = [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    assert not missing


def test_every_page_is_in_the_index() -> None:
    """Or in a page that the index names, as those of the published documents are."""
    index = text_of("docs/README.md")
    reached = set(LINK.findall(index)) | set(LINK.findall(text_of("docs/commands.md")))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"} <= reached


@pytest.mark.parametrize(
    ("expected", "printed"),
    [
        ("loss 1.4908", "loss 1.4909"),
        ("3 steps, 0.41 s, 1,250 tokens/s", "3 steps, 12 s, 9 tokens/s"),
        ("a    b", "a b"),
        ("peak memory … GB", "peak memory 0.24 GB"),
        ("a\n…\nd", "a\nb\nc\nd"),
        ("a\n…", "a"),
        ("error 5.0e-08", "error 5.1e-08"),
    ],
)
def test_what_differs_from_machine_to_machine_is_no_difference(expected: str, printed: str) -> None:
    assert not first_difference(expected, printed)


@pytest.mark.parametrize(
    ("expected", "printed"),
    [
        ("loss 1.4908", "loss 1.4910"),
        ("4 steps, 0.41 s", "3 steps, 0.41 s"),
        ("a\nb", "a\nc"),
        ("a\n…\nd", "a\nb"),
        ("a", "a\nb"),
        ("a\nb", "a"),
    ],
)
def test_what_a_reader_would_wonder_about_is_a_difference(expected: str, printed: str) -> None:
    assert first_difference(expected, printed)


def test_a_block_knows_its_command_its_words_and_its_output(tmp_path: Path) -> None:
    (block,) = [block for block in read_blocks("docs/model.md") if "quick" in block.words]
    assert block.command == "python train.py --model 7b --dry_run\n"
    assert block.output.startswith("model       32 layers")


def test_installation_is_left_out_of_a_command() -> None:
    command = "python -m pip install -e . -c constraints.txt && python train.py && python eval.py"
    assert INSTALLATION.sub("", command) == "python train.py && python eval.py"
    assert INSTALLATION.sub("", "python -m pip install torch\npython a.py") == "\npython a.py"


def test_progress_bars_leave_what_a_terminal_shows() -> None:
    printed = "a\n 10%|#  | 3/4\r 20%|## |\r       \rquestions\n 5%|\r 100%|###|\nb"
    assert without_progress_bars(printed) == "a\nquestions\nb"


def test_a_copy_is_what_a_clone_has(clone: Path) -> None:
    assert (clone / "train.py").is_file()
    assert (clone / "tests/golden/model/model.safetensors").is_file()
    assert not (clone / ".git").exists()
