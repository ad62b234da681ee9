"""README's commands are understood, its links exist, and its Chinese edition says the same."""

import ast
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from docs.check import read_blocks
from docs.understand import why_not_understood

ROOT = Path(__file__).resolve().parent.parent
ENGLISH = "README.md"
CHINESE = "README.zh-CN.md"
PAGES = (ENGLISH, CHINESE, "docs/howto.md")
SPAN = re.compile(r"`((?:python|torchrun) [^`\n]+)`")
CODE = re.compile(r"`([^`]+)`")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def commands(page: str) -> list[str]:
    """Every command of a page: lines of bash blocks and code spans."""
    found = SPAN.findall(text_of(page))
    for block in read_blocks(page):
        found += block.command.splitlines()
    return sorted(set(found))


def commands_of_all_pages() -> list[str]:
    found: set[str] = set()
    for page in PAGES:
        found.update(commands(page))
    return sorted(found)


COMMANDS = commands_of_all_pages()


def test_readme_has_the_two_commands_that_a_new_environment_runs() -> None:
    """.ci/run takes the first line with each of these words."""
    lines = text_of(ENGLISH).splitlines()
    tests = next(line for line in lines if "python -m pytest" in line)
    demo = next(line for line in lines if "python train.py &&" in line)
    assert tests == "python -m pip install -e '.[test]' -c constraints.txt && python -m pytest"
    start = "python -m pip install -e . -c constraints.txt && python train.py && "
    assert demo == start + "python eval.py --task demo --ckpt runs/demo"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command: str) -> None:
    """Flags parse, training runs can be planned, conversions miss only the reader's files."""
    assert not why_not_understood(command)


@pytest.mark.parametrize("command", [c for c in COMMANDS if "pip install" in c])
def test_every_installation_names_what_exists(command: str) -> None:
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    extras = project["optional-dependencies"]
    pins = text_of("constraints.txt").splitlines()
    for word in shlex.split(command):
        if word.startswith(".["):
            assert set(word[2:-1].split(",")) <= set(extras)
        if "==" in word:
            assert word in pins


@pytest.mark.parametrize("page", PAGES)
def test_a_file_that_a_clone_lacks_is_introduced_before_its_command(page: str) -> None:
    """LLAMA_DIR and alpaca_data.json: the text above a block says what they are."""
    text = text_of(page)
    for block in read_blocks(page):
        above = text[: text.index(block.command)]
        for name in re.findall(r"[A-Z]+_DIR|[\w/]+\.json|mmlu/data", block.command):
            made_here = f"--output {name}" in block.command
            assert made_here or f"`{name}`" in above, name


def tables(page: str) -> list[list[str]]:
    """The rows of each table of a page."""
    found = re.findall(r"(?:^\|.*\|$\n?)+", text_of(page), re.MULTILINE)
    return [table.splitlines() for table in found]


def links_of(text: str) -> list[str]:
    return re.findall(r"\]\(([^)]+)\)", text)


def language_free(row: str) -> list[str]:
    """What of a row has no language: links, code, numbers, marks."""
    numbers_and_marks = re.findall(r"✓|–|\d+(?:[.,]\d+)*", row)
    return sorted(links_of(row) + CODE.findall(row) + numbers_and_marks)


def test_the_chinese_readme_has_the_same_commands_and_outputs() -> None:
    ours = read_blocks(ENGLISH)
    theirs = read_blocks(CHINESE)
    for block, other in zip(ours, theirs, strict=True):
        assert block.command == other.command
        assert block.output == other.output
        assert block.words == other.words
    assert commands(ENGLISH) == commands(CHINESE)


def test_the_chinese_readme_has_the_same_tables() -> None:
    for table, other in zip(tables(ENGLISH), tables(CHINESE), strict=True):
        for row, translated in zip(table, other, strict=True):
            assert row.count("|") == translated.count("|"), translated
            assert language_free(row) == language_free(translated), translated


def test_the_chinese_readme_has_the_same_sections_links_and_marks() -> None:
    text = text_of(ENGLISH)
    translated = text_of(CHINESE)
    assert text.count("\n## ") == translated.count("\n## ")
    links = set(links_of(text)) - {CHINESE}
    assert links == set(links_of(translated)) - {ENGLISH}
    comment = re.compile(r"<!-- (.*?) -->")
    assert comment.findall(text) == comment.findall(translated)


@pytest.mark.parametrize(
    "page",
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("tests/*.md")],
    ids=lambda p: p.name,
)
def test_files_that_a_page_links_to_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_the_course_of_the_tests_names_fifteen_tests_that_have_docstrings() -> None:
    page = (ROOT / "tests/README.md").read_text(encoding="utf-8")
    course = re.findall(r"\]\((\S+\.py)\) `(test_\w+)`", page)
    assert len(course) == 15
    for file, name in course:
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        tests = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert ast.get_docstring(tests[name]), name


def test_the_tests_that_the_page_of_faults_names_exist() -> None:
    page = (ROOT / "docs/faults.md").read_text(encoding="utf-8")
    names = re.findall(r"`(test_\w+)`", page)
    sources = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/*.py"))
    assert len(names) >= 10
    missing = [name for name in names if f"def {name}(" not in sources]
    assert not missing
