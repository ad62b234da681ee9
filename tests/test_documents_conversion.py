"""Every command of the documents that converts: typed, on tiny models and a few records."""

import json
import shlex
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from minillama.checkpoint.hf_writer import save_model
from minillama.compat import megatron
from minillama.conversion import command_line
from minillama.data.memmap import Dataset
from minillama.errors import UserError
from minillama.lora import LoraConfig, add_lora, save_adapter
from minillama.tokenizer import SentencePieceTokenizer
from tests import documents_conversion as documents
from tests.conftest import random_model
from tests.conversions import read_weights, run_convert, save_meta
from tests.documents import Command, names_of
from tests.megatron import formula_config, formula_weights, save_weights

# A model that eight ranks and eight stages can share, in the place of those of the documents.
TINY = {"num_heads": 16, "num_kv_heads": 8, "hidden_size": 64, "num_layers": 8}
RECORDS = [
    {"instruction": "Say hello", "input": "", "output": f"hello {i}", "text": f"Say hello {i}"}
    for i in range(6)
]
MOSS = {"chat": {"turn_1": {"Human": "<|Human|>: hi<eoh>\n", "MOSS": "<|MOSS|>: hello<eom>\n"}}}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory, which the documents' relative paths are in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def typed(words: str, workplace: Path) -> list[str]:
    """The words of a command. The documents' absolute paths are moved into `workplace`."""
    moved = words.replace(" /path/to/", f" {workplace}/")
    return shlex.split(moved.replace(" /output/path/to/", f" {workplace}/"))


def each(commands: tuple[Command, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("command", commands, ids=names_of(commands))


@each(documents.DELTAS)
def test_a_delta_is_applied_once_it_is_downloaded(
    command: Command, workplace: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    words = typed(command.words, workplace)
    flags = dict(zip(words[1::2], words[2::2], strict=True))
    base = tiny_checkpoint(Path(flags["--base-model-path"]).name, dtype=torch.float16)
    with pytest.raises(UserError, match=command.reason):
        run_convert(*words)
    Path("lmsys").mkdir()
    target = tiny_checkpoint("target", dtype=torch.float16, seed=1)
    run_convert("make_delta", "--base", base, "--target", target, "--delta", flags["--delta-path"])
    run_convert(*words, "--low-cpu-mem")
    assert read_weights(Path(flags["--target-model-path"])).keys() == read_weights(target).keys()


def test_metas_root_and_a_size_are_converted(workplace: Path) -> None:
    """The weights are in the folder of the size, the tokenizer is in the root."""
    model = random_model()
    save_model(model, Path("hf"))
    run_convert("meta", "--reverse", "--input", "hf", "--output", "meta")
    root = workplace / "path_to_original_llama_root_dir"
    root.mkdir()
    Path("meta").rename(root / "7B")
    run_convert(*typed(documents.META.words, workplace))
    converted = read_weights(workplace / "path_to_original_llama_hf_dir")
    for name, parameter in model.named_parameters():
        assert torch.equal(converted[name], parameter)


def test_metas_root_of_another_size_is_refused(workplace: Path) -> None:
    words = ["convert_llama_weights_to_hf", "--model_size", "13B", "--output_dir", "out"]
    with pytest.raises(UserError, match="neither a folder 13B nor consolidated"):
        run_convert(*words, "--input_dir", workplace)
    save_meta(workplace / "llama", [{}])
    with pytest.raises(UserError, match="2 layers of width 24, which is not 13B"):
        run_convert(*words, "--input_dir", workplace / "llama")


@pytest.fixture
def merge_inputs(workplace: Path, tiny_checkpoint: Callable[..., Path]) -> Path:
    base = tiny_checkpoint("path_to_original_llama_hf_dir")
    names = ("chinese_llama_or_alpaca", "chinese_llama_plus", "chinese_alpaca_plus")
    for seed, name in enumerate(names):
        model = random_model(seed)
        add_lora(model, LoraConfig(rank=2))
        save_adapter(model, LoraConfig(rank=2), workplace / f"path_to_{name}_lora", str(base))
    return base


@each(documents.MERGES)
def test_adapters_are_merged(command: Command, workplace: Path, merge_inputs: Path) -> None:
    run_convert(*typed(command.words, workplace))
    merged = read_weights(workplace / "path_to_merged_hf_dir")
    assert merged.keys() == read_weights(merge_inputs).keys()


def test_a_script_of_theirs_writes_what_it_writes_without_output_type(
    workplace: Path, merge_inputs: Path, capsys: pytest.CaptureFixture
) -> None:
    """pth, and Hugging Face's layout for the second generation, with a line that says so."""
    adapter = "path_to_chinese_llama_or_alpaca_lora"
    paths = ["--base_model", str(merge_inputs), "--lora_model", adapter]
    run_convert("merge_llama_with_chinese_lora.py", *paths, "--output_dir", "first")
    assert "note: --output_type pth, as merge_llama_with_chinese_lora.py has it" in _out(capsys)
    assert (workplace / "first/consolidated.00.pth").is_file()
    run_convert("merge_llama2_with_chinese_lora_low_mem.py", *paths)
    assert "note: --output_dir merged_model" in _out(capsys)
    assert (workplace / "merged_model/model.safetensors").is_file()
    run_convert("merge_lora", *paths, "--output", "ours")
    assert "note: --output_type" not in _out(capsys)
    assert (workplace / "ours/model.safetensors").is_file()
    with pytest.raises(UserError, match="required: --output"):
        run_convert("merge_llama_with_chinese_lora", *paths)


def _out(capsys: pytest.CaptureFixture) -> str:
    return capsys.readouterr().out


def tiny_words(command: Command, workplace: Path) -> list[str]:
    """The words of a command, with the numbers of the tiny model in the place of the document's."""
    words = typed(command.words, workplace)
    for name, value in TINY.items():
        if f"--{name}" in words:
            words[words.index(f"--{name}") + 1] = str(value)
    return words


@pytest.fixture
def tiny_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let --type 7B and 13B stand for the tiny model."""
    tiny = formula_config(L=8, C=64, H=16, K=8, F=128, V=1024, bias=False)
    monkeypatch.setattr(megatron, "published", lambda name: tiny)


def write_tiny_model(directory: str) -> None:
    config = formula_config(L=8, C=64, H=16, K=8, F=128, V=1024, bias=False)
    save_weights(Path(directory), config, formula_weights(config, torch.float16))


@each(documents.TO_MEGATRON)
def test_models_are_cut_for_megatron(command: Command, workplace: Path, tiny_types: None) -> None:
    words = tiny_words(command, workplace)
    write_tiny_model(words[words.index("--input-model-dir") + 1])
    run_convert(*words)
    output = Path(words[words.index("--output-model-dir") + 1])
    ranks = int(words[words.index("--tensor-model-parallel-size") + 1])
    stages = int(words[words.index("--pipeline-model-parallel-size") + 1])
    assert len(list(output.glob("release/mp_rank_*"))) == ranks * stages


@each(documents.TO_MEGATRON)
def test_the_numbers_that_a_document_prints_are_those_of_its_model(command: Command) -> None:
    """--type and the numbers are compared with config.json, so they must be read right."""
    flags = vars(command_line.megatron().parse_args(shlex.split(command.words)[1:]))
    sizes = {
        "7b": (32, 4096),
        "13b": (40, 5120),
        "llama2-70b": (80, 8192),
        "llama2-34b": (48, 8192),
    }
    numbers = megatron.numbers_of(flags)
    assert (numbers["n_layers"], numbers["dim"]) == sizes[flags["type"].lower()]


@each(documents.RESHARDS)
def test_files_are_cut_anew(command: Command, workplace: Path) -> None:
    stages = 8 if "70B" in command.name else 2
    write_tiny_model("model")
    grid = ["--tensor_parallel", "8", "--pipeline_parallel", str(stages), "--vocab_multiple", "8"]
    run_convert("megatron", "--input", "model", "--output", "load_ckpt", *grid)
    words = tiny_words(command, workplace)
    words[words.index("--orig-vocab-size") + 1] = "1024"
    if command.changed:
        with pytest.raises(UserError, match=command.reason):
            run_convert(*words)
        flag, value = command.changed.split()
        words.remove(flag)
        words.remove(value)
    run_convert(*words)
    output = Path(words[words.index("--output-model-dir") + 1])
    assert sorted(path.name for path in output.glob("release/*")) == [
        f"mp_rank_{rank:02d}" for rank in range(8)
    ]


def write_data(words: list[str], tokenizer: SentencePieceTokenizer) -> str:
    """Write what a command of preprocess_data reads. Returns its prefix."""
    flags = dict(pairwise(words))
    source = Path(flags["--input"])
    source.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(RECORDS), source)
    else:
        records = [MOSS] if source.suffix == ".jsonl" else RECORDS
        lines = [json.dumps(record) for record in records]
        source.write_text("\n".join(lines) + "\n")
    folder = Path(flags["--tokenizer-name-or-path"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    Path(flags["--output-prefix"]).parent.mkdir(parents=True, exist_ok=True)
    return flags["--output-prefix"]


@each(documents.INSTRUCTIONS)
def test_conversations_become_a_data_set_at_the_prefix(
    command: Command,
    workplace: Path,
    small_tokenizer: SentencePieceTokenizer,
    capsys: pytest.CaptureFixture,
) -> None:
    words = typed(command.words, workplace)
    prefix = write_data(words, small_tokenizer)
    run_convert(*words)
    dataset = Dataset(prefix, verify=True)
    assert dataset.template == "ascend_instruction"
    assert len(dataset) == (1 if "MOSS" in command.name else 6)
    assert dataset.tokens[-1] == small_tokenizer.eos_id
    says_difference = "note: documents end with EOS" in capsys.readouterr().out
    assert says_difference != ("--append-eod" in words)


@each(documents.TEXTS)
def test_texts_become_a_data_set_with_their_ending(
    command: Command, workplace: Path, small_tokenizer: SentencePieceTokenizer
) -> None:
    words = typed(command.words, workplace)
    prefix = write_data(words, small_tokenizer)
    run_convert(*words)
    dataset = Dataset(f"{prefix}_text_document", verify=True)
    text = small_tokenizer.decode(dataset.tokens[: dataset.offsets[1]].tolist())
    assert text == "Say hello 0"
    assert dataset.mask is None


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--handler-name AlpacaPretrainHandler", "--handler_name AlpacaPretrainHandler: not known"),
        ("--json-keys content", "--json_keys: content is not supported: text for pre-training"),
        ("--tokenizer-type GPT2BPETokenizer", "--tokenizer FILE names LLaMA's tokenizer"),
        ("--output other", "--output and --output_prefix: give one of them"),
        ("--split-sentences", "unknown argument --split_sentences"),
    ],
)
def test_what_preprocessing_cannot_honour_is_refused(words: str, named: str) -> None:
    command = "preprocess_data --input a.json --tokenizer t --output-prefix p"
    with pytest.raises(UserError) as error:
        run_convert(*command.split(), *words.split())
    assert named in str(error.value)


def test_nothing_is_uploaded() -> None:
    words = "make_delta --base a --target b --delta c --hub-repo-id me/delta"
    with pytest.raises(UserError, match="hub_repo_id: me/delta is not supported: nothing is upl"):
        run_convert(*words.split())


def test_tokenizers_are_merged_by_their_script(
    workplace: Path, small_tokenizer: SentencePieceTokenizer
) -> None:
    Path("llama").mkdir()
    Path("llama/tokenizer.model").write_bytes(small_tokenizer.path.read_bytes())
    added = ["--chinese_sp_model_file", str(small_tokenizer.path)]
    run_convert("scripts/merge_tokenizers.py", "--llama_tokenizer_dir", "llama", *added)
    assert Path("merged_tokenizer_hf/tokenizer.model").is_file()
