"""README's commands: the script that each names parses it; training commands are planned too."""

import ast
import re
import runpy
import shlex
import tomllib
from pathlib import Path

import pytest

from minillama.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """Every command of README: lines of bash blocks and code spans, `&&` taken apart."""
    blocks = [
        line
        for block in re.findall(r"```bash[^\n]*\n(.*?)```", TEXT, re.S)
        for line in block.splitlines()
    ]
    spans = [
        span for span in re.findall(r"`((?:python|torchrun) [^`]+)`", TEXT) if "\n" not in span
    ]
    return sorted({part.strip() for line in blocks + spans for part in line.split("&&")})


def script_and_arguments(command: str) -> tuple[str, list[str]]:
    words = shlex.split(command)
    place = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    return ("", words) if place is None else (words[place], words[place + 1 :])


def test_readme_has_the_commands_this_test_is_about():
    found = commands()
    assert any("pytest" in command for command in found) and any(
        command == "python train.py" for command in found
    )
    assert len(found) >= 10


@pytest.mark.parametrize(
    "command", [c for c in commands() if script_and_arguments(c)[0] == "train.py"]
)
def test_every_training_command_resolves_and_can_be_planned(command):
    from minillama.training import dry_run

    script = runpy.run_path(str(ROOT / "train.py"))
    settings, _ = script["parse"](script_and_arguments(command)[1])
    if not settings.ckpt:  # a named checkpoint is the reader's own
        assert "parameters" in dry_run.describe(settings, world_size=8)


@pytest.mark.parametrize(
    "command", [c for c in commands() if script_and_arguments(c)[0] in ("generate.py", "eval.py")]
)
def test_every_other_command_is_understood_by_its_script(command):
    name, arguments = script_and_arguments(command)
    options = runpy.run_path(str(ROOT / name))["parse"](arguments)
    assert options.ckpt or options.task == "loss"


@pytest.mark.parametrize(
    "command", [c for c in commands() if script_and_arguments(c)[0] == "convert.py"]
)
def test_every_conversion_is_understood_and_misses_only_the_readers_files(
    command, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(ROOT / "convert.py"))["main"]
    file = r"(_DIR|alpaca_data\.json|tokenizer\.model)"
    with pytest.raises(
        UserError, match=f"{file}.*(no such|not there|missing|does not exist|holds no)"
    ):
        main(script_and_arguments(command)[1])


@pytest.mark.parametrize("command", [c for c in commands() if " pip install" in c])
def test_every_installation_names_what_exists(command):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    for word in shlex.split(command):
        if word.startswith(".["):
            assert set(word[2:-1].split(",")) <= set(extras)
        if "==" in word:
            assert word in pins


@pytest.mark.parametrize(
    "page",
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("tests/*.md")],
    ids=lambda p: p.name,
)
def test_files_that_a_page_links_to_exist(page):
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_the_course_of_the_tests_names_fifteen_tests_that_have_docstrings():
    page = (ROOT / "tests/README.md").read_text(encoding="utf-8")
    course = re.findall(r"\]\((\S+\.py)\) `(test_\w+)`", page)
    assert len(course) == 15
    for file, name in course:
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        tests = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert ast.get_docstring(tests[name]), name


def test_the_tests_that_the_page_of_faults_names_exist():
    page = (ROOT / "docs/faults.md").read_text(encoding="utf-8")
    names = re.findall(r"`(test_\w+)`", page)
    sources = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/*.py"))
    assert len(names) >= 10
    missing = [name for name in names if f"def {name}(" not in sources]
    assert not missing
