"""Errors that no chapter expects: one line, exit code 2, and no file left behind."""

import errno
import re
from pathlib import Path

import pytest
import torch

import convert
import train
from minillama import cli
from minillama.errors import UserError
from minillama.generation.loading import load_with_adapters
from minillama.hf_config import read_config
from minillama.lora import load_adapter
from minillama.tokenizer import open_tokenizer
from tests.conftest import random_model

GOLDEN = Path(__file__).parent / "golden"


def error_line(capsys: pytest.CaptureFixture, main, arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.run(main, arguments)
    text = capsys.readouterr().err
    assert ended.value.code == 2 and text.count("error: ") == 1 and "Traceback" not in text
    return text


@pytest.mark.parametrize("command", ["tokenizer", "data"])
def test_an_output_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, command: str
) -> None:
    (tmp_path / "file").write_text("[]")
    vocabulary = str(GOLDEN / "model/tokenizer.model")
    (tmp_path / "one.json").write_text('[{"instruction": "a", "input": "", "output": "b"}]')
    given = (
        ["--base", vocabulary, "--add", vocabulary]
        if command == "tokenizer"
        else ["--tokenizer", vocabulary, "--input", str(tmp_path / "one.json")]
    )
    text = error_line(
        capsys, convert.main, [command, *given, "--output", str(tmp_path / "file/inside")]
    )
    assert str(tmp_path / "file") in text and "name another path" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "one.json"]


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "No space left on device; name another path",
        ),
        (
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            ),
            "not enough memory; .*9 bytes",
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "not enough memory; .*2 GiB"),
        (MemoryError(), "not enough memory"),
    ],
)
def test_a_full_disk_or_memory_is_one_line(
    capsys: pytest.CaptureFixture, error: Exception, named: str
) -> None:
    def main(arguments: list[str]) -> None:
        raise error

    assert re.search(named, error_line(capsys, main, []))


def test_a_defect_of_ours_keeps_its_traceback() -> None:
    def main(arguments: list[str]) -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        cli.run(main, [])


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("[1]", "holds no JSON object"),
        ("null", "holds no JSON object"),
        (
            '{"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 0, '
            '"intermediate_size": 8, "vocab_size": 8, "rms_norm_eps": 1}',
            "a value is wrong or of the wrong type .integer division",
        ),
    ],
)
def test_a_config_of_another_kind_is_named(tmp_path: Path, content: str, named: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=f"config.json: {named}"):
        read_config(tmp_path)


def test_an_empty_vocabulary_and_a_cut_adapter_are_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UserError, match=r"tokenizer\.model: the file is empty"):
        open_tokenizer(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(
        (GOLDEN / "adapter/adapter_config.json").read_bytes()
    )
    (tmp_path / "adapter_model.safetensors").write_bytes(
        (GOLDEN / "adapter/adapter_model.safetensors").read_bytes()[:500]
    )
    with pytest.raises(
        UserError, match=r"adapter_model\.safetensors: not a safetensors file, or cut short"
    ):
        load_adapter(random_model(), tmp_path)


def test_an_adapter_whose_base_is_elsewhere_asks_for_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match="its base model model is not here; name it with --base DIR"
    ):
        load_with_adapters(GOLDEN / "adapter", "", [], "float32", [torch.device("cpu")])


def test_the_number_of_ranks_to_plan_for_is_a_number_from_one(monkeypatch) -> None:
    with pytest.raises(UserError, match="--world_size 0: must be at least 1"):
        train.parse(["--dry_run", "--world_size", "0"])
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(UserError, match="WORLD_SIZE=many: must be a whole number from 1"):
        train.parse(["--dry_run"])
