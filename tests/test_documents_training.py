"""Every command of the documents that trains: planned at its size, and run on a tiny model."""

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import train
from minillama import presets
from minillama.checkpoint.hf_writer import save_model
from minillama.data.demo import records
from minillama.errors import UserError
from minillama.files import write_json
from minillama.hf_config import published, to_hf
from minillama.lora import resolve_names
from minillama.train_config import TrainConfig
from minillama.training import dry_run, settings
from tests import documents_conversion
from tests import documents_training as documents
from tests.conftest import random_model
from tests.conversions import LINEARS, run_convert
from tests.documents import Command, names_of
from tests.published_commands import ASCEND, CHINESE

TINY = {
    "--num-layers": "2",
    "--hidden-size": "24",
    "--ffn-hidden-size": "42",
    "--num-attention-heads": "6",
    "--num-query-groups": "3",
    "--max-position-embeddings": "512",
    "--micro-batch-size": "2",
    "--global-batch-size": "4",
    "--train-iters": "3",
    "--tensor-model-parallel-size": "1",
    "--pipeline-model-parallel-size": "1",
    "--lr-warmup-iters": "1",
    "--gradient_accumulation_steps": "1",
    "--num_train_epochs": "0.1",
    "--preprocessing_num_workers": "1",
    "--validation_split_percentage": "0.1",
}
LENGTHS = ("--seq-length", "--model_max_length", "--max_seq_length", "--block_size")
SIZES = {"7B": "7b", "13B": "13b", "70B": "70b"}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the documents' DeepSpeed files, which their relative paths are in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    for name in ("deepspeed_config_7B.json", "deepspeed_config_13B.json"):
        Path(name).write_text(ASCEND)
    Path("ds_zero2_no_offload.json").write_text(CHINESE)
    return tmp_path


def typed(command: Command, workplace: Path) -> list[str]:
    """The words of a command. The documents' absolute paths are moved into `workplace`."""
    return shlex.split(command.words.replace(" /workspace/", f" {workplace}/workspace/"))


def value_of(words: list[str], *names: str) -> str:
    """The word behind the first of the flags that is there."""
    flag = next(word for word in words if word in names)
    return words[words.index(flag) + 1]


def model_of(words: list[str]) -> Path:
    return Path(value_of(words, "--load", "--model_name_or_path"))


def size_of(command: Command) -> str:
    """The published size that a command trains."""
    for name, size in SIZES.items():
        if name in command.name:
            return size
    return "chinese-13b" if command.document == "003" else "13b"


def each(commands: tuple[Command, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("command", commands, ids=names_of(commands))


WORKING = tuple(command for command in documents.ALL if not command.reason)


@each(WORKING)
def test_a_command_is_planned_at_its_own_size(
    command: Command,
    workplace: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """--dry_run, from a config.json of the published shape; 64 ranks for 70B."""
    monkeypatch.setattr(settings, "UNFINISHED", {}, raising=False)
    words = typed(command, workplace)
    model_of(words).mkdir(parents=True)
    shape = replace(published(size_of(command)), max_seq_len=4096)
    write_json(model_of(words) / "config.json", to_hf(shape))
    ranks = "64" if "70B" in command.name else "16"
    if command.chips:
        ranks = "1"
        monkeypatch.setenv("USE_SOPHGO", "1")
        monkeypatch.setenv("SOPHGO_SPLIT", str(command.chips))
        monkeypatch.setenv("CHIPS", "0")
    assert train.main([*words, "--dry_run", "--world_size", ranks]) == 0
    printed = capsys.readouterr().out
    assert f"{shape.parameter_count():,}" in printed
    assert not command.chips or f"{command.chips} devices in each process" in printed


def test_each_command_is_typed_or_its_change_or_its_refusal_is_named() -> None:
    outcomes = {"works as typed", "works with a named change", "refused with a reason"}
    for command in (*documents.ALL, *documents_conversion.ALL):
        assert command.outcome in outcomes
        assert bool(command.change) == (command.outcome == "works with a named change")
    for commands in (documents.ALL, documents_conversion.ALL):
        names = names_of(commands)
        assert len(set(names)) == len(names)


@each(tuple(command for command in documents.ALL if command.reason))
def test_what_cannot_be_honoured_is_refused_and_its_change_works(
    command: Command, workplace: Path
) -> None:
    words = typed(command, workplace)
    with pytest.raises(UserError, match=command.reason):
        train.parse(words)
    kept = words[: words.index("--zero3_enabled")]
    assert train.parse([*kept, *command.changed.split()])[0].zero_stage == 2


def tiny_words(command: Command, workplace: Path) -> list[str]:
    """The words of a command, with the numbers of the tiny model and of a short run."""
    words = typed(command, workplace)
    for flag, value in TINY.items():
        if flag in words:
            words[words.index(flag) + 1] = value
    for flag in LENGTHS:
        if flag in words:
            words[words.index(flag) + 1] = "400"
    return words


@pytest.fixture
def write_inputs(workplace: Path, inputs: Path) -> Callable[[list[str]], None]:
    """A function that writes what the words of a command read: model, data and dataset_info.json"""

    def write(words: list[str]) -> None:
        from minillama.tokenizer import open_tokenizer

        tokenizer = open_tokenizer(inputs / "tokenizer.model")
        directory = model_of(words)
        directory.mkdir(parents=True)
        model = random_model(vocab_size=tokenizer.size, max_seq_len=512)
        save_model(model, directory, tokenizer)
        Path("data").mkdir()
        Path("cache").mkdir()
        examples = records(("first", "repeat"), 40, seed=0, held_out=False)
        if "--block_size" in words:
            lines = [example["instruction"] for example in examples]
            Path("data/text.txt").write_text("\n".join(lines))
        else:
            Path("data/alpaca.json").write_text(json.dumps(examples))
        if "--dataset" in words:
            info = {"alpaca_gpt4_zh": {"file_name": "alpaca.json"}}
            Path("data/dataset_info.json").write_text(json.dumps(info))
        if "--data-path" in words:
            write_tokenized(Path(value_of(words, "--data-path")), directory)
        if "--data_path" in words:
            write_conversations(Path(value_of(words, "--data_path")), examples)

    return write


def write_tokenized(prefix: Path, tokenizer: Path) -> None:
    """Make a data set by the command that the documents make it with."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    words = ["--input", "data/alpaca.json", "--tokenizer-name-or-path", str(tokenizer)]
    if prefix.name.endswith("_text_document"):
        rows = json.loads(Path("data/alpaca.json").read_text())
        texts = [{"text": row["instruction"] + row["output"]} for row in rows]
        Path("data/alpaca.json").write_text(json.dumps(texts))
        prefix = prefix.with_name(prefix.name.removesuffix("_text_document"))
    else:
        words += ["--handler-name", "GeneralInstructionHandler"]
    run_convert("preprocess_data", *words, "--output-prefix", prefix)


def write_conversations(path: Path, examples: list[dict]) -> None:
    path.parent.mkdir(parents=True)
    conversations = []
    for number, example in enumerate(examples):
        question = {"from": "human", "value": example["instruction"]}
        answer = {"from": "gpt", "value": example["output"]}
        conversations.append({"id": str(number), "conversations": [question, answer]})
    path.write_text(json.dumps(conversations))


RUN_HERE = [
    *documents.FASTCHATS[:1],
    *documents.ASCENDSPEEDS[1:7],
    *documents.CHINESE_2S[:2],
    documents.LLAMA_FACTORIES[0],
    documents.LLAMA_FACTORIES[2],
]


@each(tuple(RUN_HERE))
def test_a_command_trains_a_tiny_model(
    command: Command, workplace: Path, write_inputs: Callable[[list[str]], None]
) -> None:
    words = tiny_words(command, workplace)
    write_inputs(words)
    assert train.main([*words, *command.changed.split(), "--device", "cpu"]) == 0
    out_dir = Path(value_of(words, "--save", "--output_dir"))
    summary = json.loads((out_dir / "summary.json").read_text())
    assert summary["steps"] > 0
    assert (out_dir / "final/minillama.json").is_file()


def test_the_presets_that_the_pages_name_exist() -> None:
    pages = sorted((Path(train.__file__).parent / "docs").glob("commands*.md"))
    assert len(pages) == 6
    names = set()
    for page in pages:
        names |= set(re.findall(r"--config (\w+)", page.read_text(encoding="utf-8")))
    assert len(names) >= 7
    assert names <= presets.list_presets().keys()


LORA_COMMANDS = tuple(c for c in documents.ASCENDSPEEDS if "LoRA" in c.name)


@each(LORA_COMMANDS)
def test_megatrons_names_adapt_every_linear_layer(command: Command, workplace: Path) -> None:
    config = train.parse(typed(command, workplace))[0]
    assert set(resolve_names(config.lora_targets)) == set(LINEARS)
    assert set(resolve_names(config.modules_to_save)) <= {"embed_tokens", "lm_head"}


@each(tuple(RUN_HERE[:1] + RUN_HERE[-1:]))
def test_the_template_is_the_document_s(command: Command, workplace: Path) -> None:
    config: TrainConfig = train.parse(typed(command, workplace))[0]
    assert config.template == ("default" if command.document == "004" else "")
    assert "parameters" in dry_run.describe(
        replace(config, ckpt="", model="15m", init="scratch"), 1
    )
