"""Flags of other systems that need more than a table of names: what each comes to."""

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train
from minillama.checkpoint.hf_writer import save_model
from minillama.compat import flags as other_systems
from minillama.compat import model_claims, training_flags
from minillama.data.token_cache import open_data
from minillama.data.tokenize import DataOptions
from minillama.errors import UserError
from minillama.tokenizer import SentencePieceTokenizer
from minillama.train_config import KEYS
from minillama.training.model_building import refuse_other_adapter
from tests.conftest import TINY, random_model
from tests.conversions import run_convert
from tests.datasets import alpaca, write_json_lines
from tests.published_commands import ASCEND
from tests.runs import weights_of
from tests.test_conversion_megatron_runs import GQA, lora_parts, save_lora_run

CKPT = ["--load", "BASE", "--data-path", "a.json"]


def parsed(text: str) -> dict:
    return vars(train.parse([*CKPT, *text.split()])[0])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--global-batch-size 32 --micro-batch-size 4", {"gradient_accumulation_steps": 8}),
        (
            "--global-batch-size 32 --micro-batch-size 4 --dry_run --world_size 4",
            {"gradient_accumulation_steps": 2},
        ),
        (
            "--global-batch-size 32 --micro-batch-size 4 --tensor-model-parallel-size 2 "
            "--dry_run --world_size 4",
            {"gradient_accumulation_steps": 4},
        ),
        ("--split 100,0,0 --eval-interval 7", {"eval_strategy": "no", "validation_split": 0.0}),
        ("--split 90,10 --eval-interval 7 --eval-iters 0", {"eval_strategy": "no"}),
        ("--split 90,10 --eval-interval 7 --eval-iters 5", {"eval_steps": 7}),
        ("--checkpoint-activations", {"gradient_checkpointing": True}),
        ("--recompute-granularity full", {"gradient_checkpointing": True}),
        ("--use-distributed-optimizer", {"zero_stage": 1}),
        ("--use-distributed-optimizer --zero-stage 2", {"zero_stage": 2}),
        ("--initial-loss-scale 65536", {"initial_scale_power": 16}),
        ("--train-iters 9 --lr-decay-iters 9", {"max_steps": 9}),
        ("--full_finetuning True --lora_rank 8", {"lora": False}),
        ("--full_finetuning False --lora_rank 8", {"lora": True}),
        ("--neat_packing", {"packing": True}),
        (
            "--additional_target embed_tokens,lm_head",
            {"modules_to_save": ("embed_tokens", "lm_head")},
        ),
        ("--force_resize_embeddings", {"grow_vocabulary": True}),
        ("--resume_from_checkpoint True", {"resume": "auto"}),
        ("--resume_from_checkpoint False", {"resume": "none"}),
        ("--resume_from_checkpoint Out/Step-5", {"resume": "Out/Step-5"}),
        ("--max_samples 100", {"max_samples": 100}),
        ("--append-eod", {"append_eod": True}),
        ("--deepspeed --zero-stage 2", {"zero_stage": 2}),
        ("--lora_targets q_proj k_proj,v_proj", {"lora_targets": ("q_proj", "k_proj", "v_proj")}),
        ("--lora-modules-to-save embed_tokens lm_head", {"lora": True}),
        ("--max-position-embeddings 4096", {"context": 4096}),
    ],
)
def test_what_their_flags_come_to(text: str, expected: dict) -> None:
    settings = parsed(text)
    assert {name: settings[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("--global-batch-size 30 --micro-batch-size 4", "30 is no multiple of per_device"),
        (
            "--global-batch-size 32 --micro-batch-size 4 --gradient_accumulation_steps 3",
            "means gradient_accumulation_steps = 8, the command says 3",
        ),
        ("--initial-loss-scale 1000", "--initial_loss_scale 1000: expected a power of 2"),
        ("--train-iters 9 --lr-decay-iters 8", "--lr_decay_iters 8: the schedule ends with"),
        ("--normalization LayerNorm", "--normalization LayerNorm is not supported: LLaMA's norm"),
        ("--attention-dropout 0.1", "LLaMA has no dropout"),
        ("--load_best_model_at_end", "eval_loss in metrics.jsonl tells which"),
        ("--save_only_model True", "--save_strategy no leaves final/ alone"),
        ("--group_by_length", "--packing true"),
        (
            "--rope_scaling linear",
            "--rope_scaling linear is not supported: the checkpoint's config",
        ),
        ("--push_to_hub", "hf upload NAME OUT_DIR/final"),
        ("--mask_history True", "every answer of a conversation is trained on"),
        ("--optimizer sgd", "the optimizer is AdamW"),
        ("--is-instruction-dataset --data x_text_document", "is text for pre-training"),
        ("--lora-load nowhere", "--lora_load nowhere: no such directory"),
        ("--deepspeed a.json --deepspeed_config b.json", "give one of them"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(text: str, named: str) -> None:
    with pytest.raises(UserError) as error:
        parsed(text)
    assert named in str(error.value)


def test_every_flag_is_in_one_table() -> None:
    tables = (training_flags.ALLOWED, training_flags.HARMLESS, training_flags.OTHERS)
    names = [name for table in tables for name in table]
    assert len(set(names)) == len(names)
    assert not set(names) & (KEYS.keys() | other_systems.TABLE.renamed.keys())


def test_ascendspeeds_two_flags_name_a_deepspeed_file(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(ASCEND)
    words = f"--deepspeed --deepspeed_config {tmp_path}/ds.json"
    assert parsed(words)["zero_stage"] == 1
    assert parsed(f"{words} --zero-stage 2")["zero_stage"] == 2


@pytest.mark.parametrize(
    ("flag", "changes", "named"),
    [
        ("--untie-embeddings-and-output-weights", {"tie_embeddings": True}, "its head is its emb"),
        ("--disable-bias-linear", {"attention_bias": True}, "have biases"),
        ("--group-query-attention", {"n_heads": 6, "n_kv_heads": 6}, "--n_kv_heads N groups them"),
        ("--make-vocab-size-divisible-by 8", {"vocab_size": 50}, "8 does not divide its 50 rows"),
        ("--layernorm-epsilon 1e-6", {}, "layernorm_epsilon 1e-6 describes another model: it has"),
        ("--rotary-base 500000", {}, "it has 10000"),
        ("--pad-vocab-size-to 100008", {}, "it has 50"),
        ("--type 7B", {}, "it has 2 layers of width 24"),
    ],
)
def test_what_a_flag_says_of_the_model_is_compared_with_it(
    flag: str, changes: dict, named: str
) -> None:
    flags = vars(train.parse([*CKPT, *flag.split()])[1])
    assert model_claims.describes_model(flags)
    with pytest.raises(UserError, match=named):
        model_claims.refuse_other_model(flags, replace(TINY, **changes))
    rows = 100008 if "pad" in flag else 64
    fitting = replace(TINY, n_layers=32, dim=4096, norm_eps=1e-6, rope_theta=5e5, vocab_size=rows)
    model_claims.refuse_other_model(flags, fitting)


def test_the_rows_of_a_vocabulary_are_cut_over_the_tensor_ranks() -> None:
    flags = vars(train.parse([*CKPT, "--make-vocab-size-divisible-by", "8"])[1])
    llama = replace(TINY, vocab_size=32)
    model_claims.refuse_other_model(flags, llama, tensor_parallel=4)
    with pytest.raises(UserError, match="64 does not divide its 32 rows"):
        model_claims.refuse_other_model(flags, llama, tensor_parallel=8)


def test_a_size_of_theirs_names_a_model_from_scratch() -> None:
    assert train.parse("--type 30B --data a --tokenizer t --init scratch".split())[0].model == "33b"
    assert train.parse("--model 7B --init scratch --tokenizer t --dry_run".split())[0].model == "7B"


def test_the_first_records_of_each_file_are_read(
    tmp_path: Path, small_tokenizer: SentencePieceTokenizer
) -> None:
    files = [write_json_lines(tmp_path / f"{name}.jsonl", alpaca(10)) for name in "ab"]
    options = DataOptions(max_samples=3, cache_dir=str(tmp_path / "cache"), quiet=True)
    names = [str(file) for file in files]
    dataset = open_data(names, small_tokenizer, options)
    assert len(dataset) == 6
    assert len(open_data(names, small_tokenizer, replace(options, max_samples=0))) == 20
    with pytest.raises(UserError, match="max_samples = 3 counts records of raw files"):
        open_data([str(dataset.prefix)], small_tokenizer, options)


def test_the_blocks_of_a_text_are_one_record(
    tmp_path: Path, small_tokenizer: SentencePieceTokenizer
) -> None:
    line = "the cat sat on the mat\n"
    (tmp_path / "a.txt").write_text(line * 60_000)  # more than one block
    options = DataOptions(cache_dir=str(tmp_path / "cache"), quiet=True)
    files = [str(tmp_path / "a.txt")]
    whole = open_data(files, small_tokenizer, options)
    first = open_data(files, small_tokenizer, replace(options, max_samples=1))
    assert len(first.tokens) == len(whole.tokens)


LORA_RUN = (
    "--load {inputs}/base --data-path {inputs}/alpaca.json --template llama_factory_default "
    "--seq-length 96 --micro-batch-size 2 --lr 1e-2 --lora-target-modules query_key_value "
    "--lora-r 4 --lora-alpha 8 --seed 3 --device cpu --save_steps 2 --lr_scheduler_type constant "
    "--num_train_epochs 1 "
)


def adapter_of(run: Path) -> dict:
    return weights_of(run / "final")


@pytest.mark.parametrize("place", ["run", "run/checkpoints/step-000002"])
def test_lora_load_continues_a_run_of_ours_to_the_bit(
    place: str, inputs: Path, tmp_path: Path
) -> None:
    """`--load ORIGINAL --lora-load LORA --save NEW`: step 3 follows step 2."""
    words = LORA_RUN.format(inputs=inputs).split()
    train.main([*words, "--train-iters", "3", "--save", str(tmp_path / "run")])
    continued = ["--lora-load", str(tmp_path / place), "--save", str(tmp_path / "continued")]
    train.main([*words, "--train-iters", "3", *continued])
    expected = adapter_of(tmp_path / "run")
    for name, tensor in adapter_of(tmp_path / "continued").items():
        assert tensor.equal(expected[name])
    lines = (tmp_path / "continued/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3]


def test_lora_load_of_a_peft_directory_starts_from_it(inputs: Path, tmp_path: Path) -> None:
    words = LORA_RUN.format(inputs=inputs).split()
    train.main([*words, "--train-iters", "1", "--save", str(tmp_path / "run")])
    final = tmp_path / "run/final"
    config = train.parse([*words, "--lora-load", str(final), "--save", "x"])[0]
    assert config.adapter == str(final)
    assert config.resume == "auto"


def test_lora_load_of_megatrons_files_shows_a_command_that_works(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shape = {name: getattr(GQA, name) for name in ("n_heads", "n_kv_heads", "dim", "ffn_dim")}
    tiny_checkpoint("base", **shape)
    save_lora_run(tmp_path / "theirs", lora_parts(GQA, 2), torch.randn(52, GQA.dim))
    words = "--load base --data a.json --lora-r 2 --lora-alpha 6 --save new --lora-load".split()
    with pytest.raises(UserError) as error:
        train.parse([*words, "theirs"])
    command, _, rest = str(error.value).partition("   then: --lora_load ")
    run_convert(*shlex.split(command.partition("convert.py ")[2]))
    config = train.parse([*words, rest])[0]
    assert config.adapter == "theirs-peft"
    refuse_other_adapter(config, ("lora_rank", "lora_alpha"))


def test_the_instruction_set_of_a_prefix_is_opened_where_there_is_a_text_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for ending in ("text_document", "packed_input_ids_document"):
        Path(f"alpaca_{ending}.idx").touch()
    words = ["--load", "base", "--data-path", "alpaca"]
    assert train.parse(words)[0].data == ("alpaca",)
    config = train.parse([*words, "--is-instruction-dataset"])[0]
    assert config.data == ("alpaca_packed_input_ids_document",)


def test_the_flags_of_a_model_are_compared_before_training(tmp_path: Path, inputs: Path) -> None:
    save_model(random_model(tie_embeddings=True, vocab_size=320), tmp_path / "tied")
    words = ["--load", str(tmp_path / "tied"), "--data", str(inputs / "alpaca.json")]
    with pytest.raises(UserError, match="untie_embeddings_and_output_weights describes another"):
        train.main([*words, "--untie-embeddings-and-output-weights", "--out_dir", "x"])
