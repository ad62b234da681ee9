"""Leaves of the tree: parts that nothing needs but a script or a table, so they can be removed."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_architecture import ROOT, SOURCES, TREES, imports, name_of

# module or folder of the package -> the only files outside it that may import it
LEAVES = {
    # the parsers of convert.py are a module of their own
    "compat": {
        *(f"{name}.py" for name in ("train", "generate", "convert", "eval")),
        "minillama/conversion/shared_flags.py",
    },
    "chat_template": {"minillama/data/encode.py"},
    "chat_marks": {"minillama/chat_template.py"},
    "jinja_renderer": {"minillama/chat_template.py"},
    "jinja_program": set(),  # it is run by its path
    "conversion.megatron": {"convert.py", "minillama/conversion/api.py"},
    "conversion.megatron_adapter": {"minillama/conversion/megatron.py"},
    "conversion.megatron_layout": {
        "convert.py",
        *(f"minillama/conversion/{name}.py" for name in ("api", "megatron")),
        *(f"minillama/conversion/megatron_{name}.py" for name in ("reader", "writer")),
    },
    "conversion.megatron_reader": {"minillama/conversion/megatron.py"},
    "conversion.megatron_writer": {"minillama/conversion/megatron.py"},
    # the table of the Python API: a name is imported at its first use
    "conversion": {"convert.py", "minillama/__init__.py"},
    "generation.web": {"generate.py"},
    "parallel.pipeline": {
        "minillama/training/model_building.py",
        "minillama/training/run.py",
    },
    "parallel.placement": {"minillama/checkpoint/placing.py"},
    "ops.triton": {"minillama/ops/cuda.py"},
    "ops.cuda": {"minillama/ops/__init__.py"},
    "ops.npu": {"minillama/ops/__init__.py"},
    "ops.mlu": {"minillama/ops/__init__.py"},
    "ops.tpu": {"minillama/ops/__init__.py"},
}
KERNELS = {"cuda", "npu", "mlu", "tpu"}


@pytest.mark.parametrize("leaf", LEAVES)
def test_only_a_script_or_a_table_imports_a_leaf(leaf: str) -> None:
    own_path = "minillama/" + leaf.replace(".", "/")
    importers = set()
    for path in SOURCES:
        modules = [f"{name}." for name in imports(TREES[path])]
        is_own = name_of(path).startswith((f"{own_path}.py", f"{own_path}/"))
        if not is_own and any(name.startswith(f"minillama.{leaf}.") for name in modules):
            importers.add(name_of(path))
    assert importers <= LEAVES[leaf]


class WithoutKernels(ast.NodeTransformer):
    """Removes the kernels of devices from the table of ops: their imports and their rows."""

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom:
        node.names = [alias for alias in node.names if alias.name not in KERNELS]
        return node

    def visit_Call(self, node: ast.Call) -> ast.Call:
        node.args = [row for row in node.args if not names_in(row) & KERNELS]
        return node


def names_in(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    """A copy of the package without the leaves."""
    copy = tmp_path / "pruned"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "minillama", copy / "minillama", ignore=ignored)
    for leaf in LEAVES:
        path = copy / "minillama" / leaf.replace(".", "/")
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.with_suffix(".py").unlink()
    table = copy / "minillama/ops/__init__.py"
    tree = WithoutKernels().visit(ast.parse(table.read_text()))
    table.write_text(ast.unparse(tree))
    return copy


def run_in(directory: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(directory)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_other_conversions_need_no_megatron(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "minillama", tmp_path / "minillama")
    shutil.copy(ROOT / "convert.py", tmp_path)
    for path in (tmp_path / "minillama/conversion").glob("megatron*.py"):
        path.unlink()
    model = str(ROOT / "tests/golden/model")
    words = ["--base", model, "--target", model, "--output", "delta"]
    assert "21 tensors" in run_in(tmp_path, "convert.py", "make-delta", *words)


def test_training_generation_and_evaluation_need_no_leaf(pruned: Path) -> None:
    commands = """
import minillama
from minillama import comm, presets, train_config
from minillama.training import trainer

flags = {"dim": 32, "ffn_dim": 64, "max_steps": 3, "out_dir": "run"}
with comm.start("cpu") as mesh:
    summary = trainer.train(presets.resolve("demo", flags), mesh)
print(summary["steps"])
model = minillama.load("run")
model.generate("Which number is larger, 31 or 62?", max_new_tokens=4)
print(minillama.evaluate("demo", model, limit=8).summary["n"])
"""
    assert run_in(pruned, "-c", commands).endswith("3\n8\n")
