"""The command that a preset's run ends with is typed, on a tiny model, and works.

A preset that divides its model trains on two ranks for each way in which it divides it.
"""

import contextlib
import io
import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

import generate
import train
from minillama import presets
from minillama.tokenizer import open_tokenizer, train_tokenizer
from tests.ranks import run_on_ranks
from tests.test_presets import PRESETS

TEXTS = ["Say hello to the world 123", "Hello, world! How are you?", "the cat sat on the mat"]


@pytest.fixture
def words(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> list[str]:
    """Flags for one step of any preset on a tiny model with a tokenizer of its own."""
    (tmp_path / "tokenizer.model").write_bytes(train_tokenizer(TEXTS * 9, 300))
    size = open_tokenizer(tmp_path / "tokenizer.model").size
    base = tiny_checkpoint(vocab_size=size, max_seq_len=512, n_kv_heads=2)
    (base / "tokenizer.model").write_bytes((tmp_path / "tokenizer.model").read_bytes())
    records = [{"instruction": text, "input": "", "output": text} for text in TEXTS * 9]
    (tmp_path / "alpaca.json").write_text(json.dumps(records))
    (tmp_path / "text.txt").write_text("\n".join(TEXTS * 99))
    flags = {
        "max_steps": 1,
        "gradient_accumulation_steps": 1,
        "precision": "fp32",
        "tf32": "false",
        "device": "cpu",
        "zero_stage": 0,
        "cache_dir": tmp_path / "cache",
        "out_dir": tmp_path / "run",
    }
    result = []
    for name, value in flags.items():
        result += [f"--{name}", str(value)]
    return result


def own_inputs(preset: str, folder: Path) -> list[str]:
    """What a preset's second comment line leaves to the user: checkpoint, data, tokenizer."""
    settings = presets.resolve(preset, {})
    if settings.data == ("demo",) and settings.init == "scratch":
        return ["--dim", "24", "--n_layers", "2", "--n_heads", "6", "--ffn_dim", "42"]
    data = "text.txt" if "pretrain" in preset else "alpaca.json"
    result = ["--data", str(folder / data), "--max_length", "512"]
    if settings.init == "scratch":
        shape = ["--dim", "24", "--n_layers", "2", "--n_heads", "6", "--ffn_dim", "42"]
        return [*result, "--model", "", *shape, "--tokenizer", str(folder / "tokenizer.model")]
    result += ["--ckpt", str(folder / "base")]
    if "embed_tokens" in settings.modules_to_save:  # so new tokens can be trained
        larger = folder / "larger.model"
        larger.write_bytes(train_tokenizer([*TEXTS, "玄德曰：备今日得见天日。"] * 9, 320))
        result += ["--tokenizer", str(larger)]
    return result


def small_grid(preset: str) -> dict[str, int]:
    """The numbers of tensor ranks and of pipeline stages of a preset, at most two of each."""
    settings = presets.resolve(preset, {})
    return {
        "tensor_parallel": min(2, settings.tensor_parallel),
        "pipeline_parallel": min(2, settings.pipeline_parallel),
    }


def output_of_training(arguments: list[str]) -> str:
    """Train, and return what this rank prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert train.main(arguments) == 0
    return printed.getvalue()


def next_command(output: str) -> list[str]:
    """The words of the command that a run proposes, the last one where it proposes two."""
    lines = [line for line in output.splitlines() if line.startswith("next: ")]
    assert len(lines) == 1, output
    command = lines[0].removeprefix("next: ").rpartition("   or   ")[2]
    return shlex.split(command)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_next_command_of_a_preset_works(
    preset: str,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["--config", preset, *own_inputs(preset, tmp_path), *words]
    grid = small_grid(preset)
    for name, number in grid.items():
        arguments += [f"--{name}", str(number)]
    ranks = math.prod(grid.values())
    if ranks == 1:
        output = output_of_training(arguments)
    else:
        output, *others = run_on_ranks(ranks, output_of_training, arguments)
        assert others == [""] * (ranks - 1)
    command = next_command(output)
    assert command[:2] == ["python", "generate.py"]
    monkeypatch.setattr("sys.stdin", io.StringIO("Say hello\n"))
    generate.main([*command[2:], "--max_new_tokens", "3", "--greedy"])
    assert "Traceback" not in capsys.readouterr().out
