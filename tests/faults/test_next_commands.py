"""The command that a preset's run ends with is typed, on a tiny model, and works."""

import io
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

import generate
import train
from minillama import presets
from minillama.tokenizer import open_tokenizer, train_tokenizer
from tests.test_presets import PRESETS

TEXTS = ["Say hello to the world 123", "Hello, world! How are you?", "the cat sat on the mat"]


@pytest.fixture
def words(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> list[str]:
    """Flags for one step of any preset on a tiny model with a tokenizer of its own."""
    (tmp_path / "tokenizer.model").write_bytes(train_tokenizer(TEXTS * 9, 300))
    size = open_tokenizer(tmp_path / "tokenizer.model").size
    base = tiny_checkpoint(vocab_size=size, max_seq_len=512)
    (base / "tokenizer.model").write_bytes((tmp_path / "tokenizer.model").read_bytes())
    records = [{"instruction": text, "input": "", "output": text} for text in TEXTS * 9]
    (tmp_path / "alpaca.json").write_text(json.dumps(records))
    (tmp_path / "text.txt").write_text("\n".join(TEXTS * 99))
    flags = {
        "max_steps": 1,
        "gradient_accumulation_steps": 1,
        "max_length": 256,
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
    result = ["--data", str(folder / data)]
    if settings.init == "scratch":
        shape = ["--dim", "24", "--n_layers", "2", "--n_heads", "6", "--ffn_dim", "42"]
        return [*result, "--model", "", *shape, "--tokenizer", str(folder / "tokenizer.model")]
    result += ["--ckpt", str(folder / "base")]
    if preset.startswith("chinese"):
        larger = folder / "larger.model"
        larger.write_bytes(train_tokenizer([*TEXTS, "玄德曰：备今日得见天日。"] * 9, 320))
        result += ["--tokenizer", str(larger)]
    return result


@pytest.mark.parametrize("preset", PRESETS)
def test_the_next_command_of_a_preset_works(
    preset: str,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train.main(["--config", preset, *own_inputs(preset, tmp_path), *words])
    last_line = capsys.readouterr().out.splitlines()[-1]
    command = shlex.split(last_line.rpartition("   or   ")[2].removeprefix("next: "))
    assert command[:2] == ["python", "generate.py"]
    monkeypatch.setattr("sys.stdin", io.StringIO("Say hello\n"))
    generate.main([*command[2:], "--max_new_tokens", "3", "--greedy"])
    assert "Traceback" not in capsys.readouterr().out
