"""Rules about the code itself: layers, size, what a file may import, what it never does."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minillama.threads import WAITING

ROOT = Path(__file__).parents[1]
SCRIPTS = [ROOT / f"{name}.py" for name in ("train", "generate", "eval", "convert")]
PACKAGE = sorted((ROOT / "minillama").rglob("*.py"))
SOURCES = PACKAGE + SCRIPTS
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}

# Lowest layer first. A file imports from lower layers or from its own group of files. Two groups of
# one layer do not import each other.
LAYERS: list[list[set[str]]] = [
    [{"errors", "json_values"}],
    [{"files", "output_directory"}, {"options"}, {"launch", "threads"}, {"hub"}, {"requirements"}],
    [{"llama_config", "hf_config"}, {"device", "device_list"}, {"memory"}, {"loss_curves"}],
    [{"train_config", "cli", "ignored_keys", "presets", "yaml_recipes"}],
    [{"compat"}],
    [
        {"ops"},
        {"tokenizer", "sentencepiece_tokenizer", "json_tokenizer", "added_tokens"},
        {"chat", "chat_template", "chat_marks", "jinja_renderer", "jinja_program"},
        {"comm", "grid", "point_to_point"},
        {"tensor_files", "torch_files", "tensor_writers"},
    ],
    [{"model"}, {"parallel"}, {"data"}],
    [
        {"checkpoint"},
        {"int8_layers"},
        {
            "lora",
            "lora_layers",
            "adapter_checks",
            "adapter_modules",
            "peft_adapters",
            "peft_config",
            "peft_targets",
            "name_patterns",
        },
    ],
    [{"generation"}],
    [{"training"}, {"conversion"}, {"evaluation"}, {"doctor", "self_test"}],
]
RUN_TIME = {"torch", "sentencepiece", "numpy", "safetensors", "tqdm"}
OPTIONAL = {
    "jinja2",  # torch needs it
    "tokenizers",
    "matplotlib",
    "pyarrow",
    "gradio",
    "triton",
    "torch_npu",
    "torch_mlu",
    "torch_tpu",
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def layer_and_group(part: str) -> tuple[int, set[str]]:
    """Return the layer of a module or folder of the package, and the group it belongs to."""
    for layer, groups in enumerate(LAYERS):
        for group in groups:
            if part in group:
                return layer, group
    raise AssertionError(f"{part} has no layer: give it one in LAYERS")


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the full names of all that is imported, anywhere in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (
        node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    )


def ours(tree: ast.AST) -> set[str]:
    """The parts of the package that a file imports: `ops`, `data`, …"""
    return {name.split(".")[1] for name in imports(tree) if name.startswith("minillama.")}


each_source = pytest.mark.parametrize("path", SOURCES, ids=name_of)
each_module = pytest.mark.parametrize(
    "path", [path for path in PACKAGE if path != ROOT / "minillama/__init__.py"], ids=name_of
)


@each_module
def test_a_file_imports_only_from_lower_layers_or_from_its_own_group(path: Path) -> None:
    part = path.relative_to(ROOT / "minillama").parts[0].removesuffix(".py")
    layer, group = layer_and_group(part)
    for other in ours(TREES[path]) - {"__version__"}:
        is_lower = layer_and_group(other)[0] < layer
        assert other in group or is_lower, f"{name_of(path)} imports {other}"


def test_contributing_lists_every_module_of_the_layers() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## Layers")[2].partition("## Rules")[0]
    modules = {path.relative_to(ROOT / "minillama").parts[0] for path in PACKAGE}
    for name in modules - {"__init__.py"}:
        assert re.search(rf"\b{name.removesuffix('.py')}\b", section), name


# Longer than the rule allows, until they are split. These lists may only shrink.
LONG_FILES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()


@each_source
def test_files_functions_and_nesting_stay_small(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert (lines > 300) == (name_of(path) in LONG_FILES), f"{lines} lines"
    for function in functions(TREES[path]):
        is_long = function.end_lineno - function.lineno >= 60
        assert is_long == (f"{name_of(path)}:{function.name}" in LONG_FUNCTIONS), function.name
        assert nesting(function.body) <= 3, function.name


def nesting(body: list[ast.stmt]) -> int:
    """How deep blocks lie in blocks; an `elif` is no deeper than its `if`."""
    deepest = 0
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            continue
        blocks = [getattr(statement, field, []) for field in ("body", "orelse", "finalbody")]
        blocks += [
            part.body for field in ("handlers", "cases") for part in getattr(statement, field, [])
        ]
        for block in filter(None, blocks):
            is_else = isinstance(statement, ast.If) and block is statement.orelse
            is_elif = is_else and len(block) == 1 and isinstance(block[0], ast.If)
            deepest = max(deepest, nesting(block) + (not is_elif))
    return deepest


def test_nesting_is_counted_as_one_reads_it() -> None:
    code = "for a in b:\n  if c:\n    d\n  elif e:\n    with f:\n      g\n"
    assert nesting(ast.parse(code).body) == 3
    assert nesting(ast.parse("x = 1").body) == 0


@each_source
def test_only_the_five_packages_are_imported_and_optional_ones_where_they_are_used(
    path: Path,
) -> None:
    tree = TREES[path]
    outside = (
        {name.split(".")[0] for name in imports(tree)}
        - set(sys.stdlib_module_names)
        - {"minillama"}
    )
    assert outside <= RUN_TIME | OPTIONAL
    at_top = {
        name.split(".")[0]
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in imports(node)
    }
    assert not at_top & OPTIONAL or path.parent.name == "ops", (
        "an optional package is imported inside the function that needs it"
    )


@each_source
def test_a_module_opens_with_its_chapter_and_does_nothing_at_import(path: Path) -> None:
    tree = TREES[path]
    assert ast.get_docstring(tree)
    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.FunctionDef, ast.ClassDef)
    for node in tree.body[1:]:
        is_entry = isinstance(node, ast.If) and ast.unparse(node.test) in (
            "__name__ == '__main__'",
            "TYPE_CHECKING",
            "sys.version_info < (3, 11)",  # says that this Python is too old
        )
        assert isinstance(node, allowed) or is_entry, ast.unparse(node)


@each_source
def test_files_are_unpickled_only_as_weights(path: Path) -> None:
    for node in ast.walk(TREES[path]):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in ("pickle.load", "pickle.loads", "eval", "exec")
        if called == "torch.load":
            assert any(
                k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords
            ), ast.unparse(node)


@each_source
def test_only_launch_reads_the_ranks_environment(path: Path) -> None:
    read = {
        node.value
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    if path.name != "launch.py":
        assert not read & {
            "RANK",
            "LOCAL_RANK",
            "WORLD_SIZE",
            "LOCAL_WORLD_SIZE",
            "MASTER_ADDR",
            "MASTER_PORT",
        }


@each_source
def test_vendors_are_called_only_by_device_and_ops(path: Path) -> None:
    if path.name == "device.py" or path.parent.name == "ops":
        return
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in (
                "torch.cuda",
                "torch.npu",
                "torch.mlu",
                "torch.tpu",
                "torch.backends.cuda",
            )
            assert node.attr != "cuda"


@each_source
def test_nothing_is_left_to_do_and_no_name_is_a_drawer(path: Path) -> None:
    assert path.stem not in ("utils", "util", "common", "helpers", "misc")
    text = path.read_text(encoding="utf-8")
    assert not any(word in text for word in ("TODO", "FIXME", "XXX"))


@each_source
def test_functions_that_others_call_state_their_types(path: Path) -> None:
    for function in functions(TREES[path]):
        if function.name.startswith("_") or path in SCRIPTS:
            continue
        arguments = function.args.args + function.args.kwonlyargs
        untyped = [
            a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls", "ctx")
        ]
        assert not untyped, f"{function.name}: {untyped}"


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_help_is_shown_without_loading_torch_and_threads_are_told_how_to_wait(
    script: Path,
) -> None:
    program = f"""
import atexit, os, runpy, sys

def report():
    print("torch" in sys.modules, os.environ.get("OMP_WAIT_POLICY"), file=sys.stderr)

atexit.register(report)
sys.argv = [{script.name!r}, "--help"]
runpy.run_path({script.name!r}, run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name not in WAITING},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "False passive"
    assert f"python {script.name}" in done.stdout
