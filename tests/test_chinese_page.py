"""docs/zh-CN.md: its commands, typed one after the other, on real Chinese files.

The files are those of the folder that MINILLAMA_SHARED names, under the names of the page. A
training stops after two steps, so losses and scores are not those of the page.
"""

import runpy
import shlex
import shutil
from pathlib import Path

import pytest

from docs.check import Block, read_blocks
from docs.understand import why_not_understood

ROOT = Path(__file__).parents[1]
PAGE = "docs/zh-CN.md"
BLOCKS = read_blocks(PAGE)
FILES = {
    "LLAMA_DIR": "models/stories260K",
    "chinese_sp.model": "tokenizers/chinese_sp/chinese_sp.model",
    "sanguo.txt": "text/sanguo_ch1-20_zh.txt",
    "alpaca_zh_demo.json": "sft/alpaca_zh_demo.json",
    "ceval": "eval/ceval",
}
STEPS = ("tokenizer", "pretrain", "generate", "tune", "merge", "ceval")


def put_files(shared: Path, folder: Path) -> None:
    for name, source in FILES.items():
        original = shared / source
        if original.is_dir():
            shutil.copytree(original, folder / name)
        else:
            shutil.copyfile(original, folder / name)


def run(block: Block) -> None:
    """Run a command of the page in this process; a training stops after two steps."""
    python, script, *arguments = shlex.split(block.command.replace("\\\n", " "))
    assert python == "python"
    if script == "train.py":
        arguments += ["--max_steps", "2", "--max_samples", "50", "--cache_dir", "cache"]
    assert not runpy.run_path(str(ROOT / script))["main"](arguments)


def test_the_five_steps_follow_from_each_other(
    shared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    put_files(shared, tmp_path)
    monkeypatch.chdir(tmp_path)
    printed = {}
    for step, block in zip(STEPS, BLOCKS, strict=False):
        run(block)
        printed[step] = capsys.readouterr().out
    assert printed["tokenizer"] == BLOCKS[0].output
    assert "35 products and 2 whole tensors, each used once" in printed["merge"]
    assert "protocol chinese_alpaca, 0 shots, with BOS, split val, 68 queries" in printed["ceval"]
    assert (tmp_path / "zh/ceval/take0/summary.json").is_file()


@pytest.mark.parametrize("block", BLOCKS[len(STEPS) :], ids=lambda block: block.place)
def test_the_commands_for_7b_are_understood(block: Block) -> None:
    assert not why_not_understood(block.command)


def test_every_file_of_the_commands_is_in_the_table_of_files() -> None:
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    for name in FILES:
        assert f"| `{name}` |" in text
