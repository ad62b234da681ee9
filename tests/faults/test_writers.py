"""Only files.py and output_directory.py write: what is complete or absent is decided there."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_architecture import SOURCES, TREES, name_of

WRITERS = ("minillama/files.py", "minillama/output_directory.py")
# Methods and functions that write, create, rename or remove, by their last name.
WRITING_NAMES = {
    "write_bytes",
    "write_text",
    "touch",
    "copy",
    "copy2",
    "copyfile",
    "copyfileobj",
    "copytree",
    "move",
    "rmtree",
    "replace",
    "rename",
    "renames",
    "remove",
    "unlink",
    "truncate",
    "save",
    "save_file",
    "savefig",
    "tofile",
    "memmap",
    "NamedTemporaryFile",
    "mkstemp",
    "mkdtemp",
    "symlink_to",
    "hardlink_to",
}
# Modules whose functions of these names are meant; of other objects (a string, a tensor, a bar,
# a dataclass) they write nothing.
MODULES = {"os", "shutil", "torch", "np", "numpy", "tempfile", "safetensors"}
ON_PATHS = {"touch", "rename", "unlink", "write_bytes", "write_text", "symlink_to", "hardlink_to"}
ON_PATHS |= {"save_file", "savefig", "tofile"}

# Functions of these names are from files.py, copy and dataclasses.
OURS = {"write_bytes", "write_text", "copy", "replace"}

# What stands elsewhere, and why nothing can be half-written by it.
EXCEPTIONS = {
    ("minillama/checkpoint/train_state.py", "os.replace"): "publishes a complete checkpoint",
    ("minillama/checkpoint/train_state.py", "path.unlink"): "removes an old checkpoint",
    ("minillama/checkpoint/train_state.py", "shutil.rmtree"): "removes an old checkpoint",
    ("minillama/checkpoint/train_state.py", "directory.rename"): "sets a checkpoint aside",
    ("minillama/training/run_directory.py", "shutil.rmtree"): "--overwrite_output_dir",
    ("minillama/training/run_directory.py", "path.unlink"): "--overwrite_output_dir",
    ("minillama/training/metrics.py", "os.truncate"): "takes back a record that was cut short",
    ("minillama/data/renames.py", "os.replace"): "publishes a complete data set",
    ("minillama/data/renames.py", "unlink"): "removes what a complete data set replaces",
    ("minillama/data/memmap.py", "unlink"): "removes what a refused data set left",
    ("minillama/data/memmap.py", "np.memmap"): "opened for reading",
    ("minillama/data/megatron.py", "np.memmap"): "opened for reading",
    ("minillama/generation/output_file.py", "self.partial.unlink"): "its content is published",
    ("minillama/evaluation/predictions.py", "file.unlink"): "its content is published",
    ("minillama/tensor_writers.py", "archive.open"): "an entry of a zip in a file of create_file",
    ("minillama/loss_curves.py", "figure.savefig"): "into a file of new_file",
}


def writing_calls(tree: ast.AST) -> Iterator[str]:
    """Yield the name of each call that writes files, such as `os.replace`."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value)
            name = node.func.attr
            is_module = owner in MODULES and name in WRITING_NAMES
            if is_module or name in ON_PATHS or (name == "open" and opens_for_writing(node)):
                yield called if "(" not in called else name
            if called == "os.open":
                yield called
        elif (called == "open" and opens_for_writing(node)) or called in WRITING_NAMES - OURS:
            yield called


def opens_for_writing(node: ast.Call) -> bool:
    """Tell whether a call of `open` has a mode other than one that reads.

    `archive.open(info, "w")` counts as well.
    """
    modes = [argument for argument in node.args if isinstance(argument, ast.Constant)]
    modes += [keyword.value for keyword in node.keywords if keyword.arg == "mode"]
    values = [mode.value if isinstance(mode, ast.Constant) else "?" for mode in modes]
    return any(isinstance(value, str) and set(value) & set("wax+?") for value in values)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_else_writes_renames_or_removes_files(path: Path) -> None:
    if name_of(path) in WRITERS:
        return
    for call in writing_calls(TREES[path]):
        if (name_of(path), call) not in EXCEPTIONS:
            raise AssertionError(f"{name_of(path)} calls {call}; use minillama.files")


def test_no_exception_is_left_that_nothing_needs() -> None:
    calls = {(name_of(path), call) for path in SOURCES for call in writing_calls(TREES[path])}
    assert EXCEPTIONS.keys() <= calls


@pytest.mark.parametrize(
    "code",
    [
        "open(path, 'w')",
        "open(path, mode='ab')",
        "path.open('x')",
        "os.open(path, os.O_WRONLY)",
        "path.write_text('a')",
        "shutil.copy(a, b)",
        "os.replace(a, b)",
        "a.rename(b)",
        "torch.save(a, b)",
        "save_file(tensors, path)",
        "np.save(a, b)",
        "tempfile.mkdtemp()",
    ],
)
def test_each_way_to_write_is_seen(code: str) -> None:
    assert list(writing_calls(ast.parse(code)))


@pytest.mark.parametrize(
    "code", ["open(path, 'rb')", "open(path)", "text.replace(a, b)", "tensor.copy_(b)"]
)
def test_reading_is_not_writing(code: str) -> None:
    assert not list(writing_calls(ast.parse(code)))
