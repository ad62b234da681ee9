"""What would change a result is honoured or refused by name, never accepted and ignored."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

import convert
import train
from minillama import ignored_keys
from minillama.compat import deepspeed
from minillama.compat import flags as other_systems
from minillama.conversion import command_line
from minillama.errors import UserError
from minillama.lora import LoraConfig, add_lora, save_adapter
from minillama.train_config import KEYS

evaluate = importlib.import_module("eval")
CKPT = "--ckpt BASE --data a.json"


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (f"{CKPT} --eval_strategy steps", "eval_strategy = 'steps' would be ignored: there is not"),
        (f"{CKPT} --eval_strategy epoch", "add --validation_split 0.05 or --eval_data FILE"),
        (f"{CKPT} --eval_steps 7 --validation_split 0.1", "only with --eval_strategy steps"),
        (f"{CKPT} --save_strategy epoch --save_steps 7", "only with --save_strategy steps"),
        (f"{CKPT} --validation_split 0.1 --eval_data b.json", "eval_data is evaluated in its plac"),
        (f"{CKPT} --model 7b", "model = '7b' would be ignored: the checkpoint has a shape"),
        (f"{CKPT} --adapter A --lora false", "adapter = 'A' would be ignored: lora is false"),
        (f"{CKPT} --adapter_name_or_path A --finetuning_type full", "adapter = 'A' would be ignor"),
        (f"{CKPT} --lr_scheduler_type constant --warmup_ratio 0.03", "use constant_with_warmup"),
        (f"{CKPT} --lr_scheduler_type constant --warmup_steps 5", "warmup_steps = 5"),
        (f"{CKPT} --lr_decay_style constant --min_lr 1e-6", "min_learning_rate = 1e-06"),
        (f"{CKPT} --do_eval", "--do_eval would be ignored: there is nothing to evaluate on"),
        (f"{CKPT} --report_to wandb", "--report_to wandb is not supported"),
        (f"{CKPT} --report_to tensorboard", "metrics.jsonl and loss.png have the losses"),
        (f"{CKPT} --logging_strategy epoch", "--logging_strategy epoch"),
        (f"{CKPT} --torch_dtype bfloat16", "--torch_dtype bfloat16 is not the precision fp32"),
        (f"{CKPT} --torch_dtype float16 --bf16", "use --precision fp16"),
        (f"{CKPT} --tokenizer_type GPT2BPETokenizer", "--tokenizer_type GPT2BPETokenizer is not"),
        (f"{CKPT} --local_rank 3", "--local_rank 3: not what the launcher says"),
        (f"{CKPT} --split 1,2,3,4", "--split 1,2,3,4: expected up to three numbers"),
        (f"{CKPT} --split 9x,1", "--split 9x,1"),
        (f"{CKPT} --split 0,1", "--split 0,1"),
        (f"{CKPT} --split 90,10 --eval_data b.json", "validation_split = 0.1 would be ignored"),
        (f"{CKPT} --eval_interval x", "--eval_interval x: expected a whole number"),
        (f"{CKPT} --world_size 8", "--world_size has no meaning without --dry_run"),
        ("--load BASE --data a --lora_load CKPT", "--lora_load CKPT: no such directory"),
        (f"{CKPT} --workers 0", "workers = 0: must be at least 1"),
    ],
)
def test_a_flag_that_would_be_ignored_is_refused_by_name(command: str, named: str) -> None:
    with pytest.raises(UserError) as error:
        train.parse(command.split())
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("--split 949,50,1", {"validation_split": 0.051}),
        ("--split 80/20", {"validation_split": 0.2}),
        ("--split 100,0,0", {"validation_split": 0.0}),
        ("--split 1", {"validation_split": 0.0}),
        (
            "--eval_interval 7",  # AscendSpeed's own default split: 969, 30, 1
            {"eval_strategy": "steps", "eval_steps": 7, "validation_split": 0.031},
        ),
        (
            "--eval_interval 7 --split 98,1,1",
            {"eval_strategy": "steps", "eval_steps": 7, "validation_split": 0.02},
        ),
        (
            "--eval_interval 7 --eval_data b.json",
            {"eval_strategy": "steps", "eval_data": ("b.json",), "validation_split": 0.0},
        ),
        ("--stage pt", {"data_format": "text"}),
        ("--torch_dtype bfloat16 --bf16", {"precision": "bf16"}),
        ("--do_eval --validation_split 0.1", {"validation_split": 0.1}),
        ("--data_cache_dir cache", {"cache_dir": "cache"}),
    ],
)
def test_what_was_accepted_and_ignored_is_honoured(command: str, expected: dict) -> None:
    settings, _ = train.parse([*CKPT.split(), *command.split()])
    for name, value in expected.items():
        found = getattr(settings, name)
        assert found == (pytest.approx(value) if isinstance(value, float) else value)


def test_a_flag_wins_over_a_key_of_a_file_that_it_makes_meaningless(tmp_path: Path) -> None:
    """Two keys of one file are a mistake, and so is a flag that a key of the file is in the way of.

    The settings of a run that was started are not checked again.
    """
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('lr_scheduler_type = "cosine"\nwarmup_ratio = 0.1\nmodel = "7b"\n')
    flags = ["--config", str(recipe), "--lr_scheduler_type", "constant", "--ckpt", "BASE"]
    assert train.parse(flags)[0].lr_scheduler_type == "constant"
    recipe.write_text('lr_scheduler_type = "constant"\n')
    with pytest.raises(UserError, match="warmup_steps = 3 would be ignored"):
        train.parse(["--config", str(recipe), "--warmup_steps", "3"])
    recipe.write_text('lr_scheduler_type = "constant"\nwarmup_steps = 3\n')
    with pytest.raises(UserError, match="warmup_steps = 3 would be ignored"):
        train.parse(["--config", str(recipe)])
    recipe.write_text("lr = 1.0\nlearning_rate = 2.0\n")
    with pytest.raises(UserError, match="has a value for learning_rate already"):
        train.parse(["--config", str(recipe)])
    saved = tmp_path / "train_config.json"
    saved.write_text('{"lr_scheduler_type": "constant", "warmup_steps": 3}')
    assert train.parse(["--config", str(saved)])[0].warmup_steps == 3


@pytest.fixture
def adapter(tmp_path: Path, inputs: Path) -> Path:
    """An adapter of rank 4 and alpha 8 on q_proj and v_proj of the base in `inputs`."""
    from minillama.checkpoint.hf_reader import load_model

    model = load_model(inputs / "base")
    config = LoraConfig(rank=4, alpha=8.0)
    add_lora(model, config)
    save_adapter(model, config, tmp_path / "adapter", str(inputs / "base"))
    return tmp_path / "adapter"


def training_command(inputs: Path, out_dir: Path, *flags: str) -> list[str]:
    shared = (
        f"--ckpt {inputs}/base --data {inputs}/alpaca.json --template llama_factory_default "
        f"--max_length 96 --per_device_train_batch_size 2 --max_steps 2 --learning_rate 3e-3 "
        f"--cache_dir {inputs}/cache --out_dir {out_dir} --save_strategy no --device cpu"
    )
    return [*shared.split(), *flags]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--lora_rank 8", "lora_rank = 8, but the adapter .* has 4"),
        ("--lora_rank 4 --lora_alpha 16", "lora_alpha = 16.0, but the adapter .* has 8.0"),
        ("--lora_targets all", "lora_targets = "),
        ("--modules_to_save lm_head", "modules_to_save = "),
        ("--use_rslora", "use_rslora = True"),
    ],
)
def test_keys_that_differ_from_the_adapter_are_refused(
    flags: str, named: str, inputs: Path, adapter: Path, tmp_path: Path
) -> None:
    command = training_command(inputs, tmp_path / "run", "--adapter", str(adapter), *flags.split())
    with pytest.raises(UserError, match=named):
        train.main(command)
    assert not (tmp_path / "run").exists()


def test_keys_that_an_adapter_has_too_are_accepted(
    inputs: Path, adapter: Path, tmp_path: Path
) -> None:
    flags = "--lora-r 4 --lora-alpha 8 --lora_target v_proj,q_proj".split()
    train.main(training_command(inputs, tmp_path / "a", "--adapter", str(adapter), *flags))
    train.main(training_command(inputs, tmp_path / "b", "--adapter", str(adapter)))
    weights = [(tmp_path / name / "final/adapter_model.safetensors") for name in "ab"]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    preset = train.parse(["--config", "7b_lora", "--adapter", str(adapter)])[0]
    assert preset.lora_rank == KEYS["lora_rank"].default  # the adapter decides, not the preset


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--vocab_size 77", "vocab_size = 77, but"),
        ("--context 99", "context = 99, but"),
        ("--dim 8", "dim = 8, but"),
    ],
)
def test_a_shape_that_the_checkpoint_does_not_have_is_refused(
    flags: str, named: str, inputs: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=named):
        train.main(training_command(inputs, tmp_path / "run", *flags.split()))


def test_what_is_harmless_changes_no_byte(inputs: Path, tmp_path: Path) -> None:
    """All flags of the tables of harmless ones at once, and the same run without them."""
    theirs = [f"--{name}=true" for name in other_systems.TABLE.harmless]
    ours = {
        "lora": "false",
        "lora_rank": 3,
        "lora_alpha": 5,
        "lora_dropout": 0.5,
        "lora_targets": "all",
        "modules_to_save": "lm_head",
        "use_rslora": "true",
        "initializer_range": 0.7,
        "num_train_epochs": 9,
        "warmup_ratio": 0.5,
        "initial_scale_power": 3,
        "loss_scale_window": 2,
        "loss_scale_hysteresis": 7,
        "min_loss_scale": 0.5,
        "tf32": "true",
        "grow_vocabulary": "true",
        "per_device_eval_batch_size": 3,
        "save_total_limit": 9,
        "dataset_dir": "nowhere",
        "workers": 2,
        "zero_stage": 2,
        "bucket_elements": 99,
        "skip_bad_records": "true",
        "cache_dir": str(tmp_path / "cache"),
    }
    assert ignored_keys.HARMLESS.keys() <= ours.keys()
    flags = [f"--{name}={value}" for name, value in ours.items()]
    train.main(training_command(inputs, tmp_path / "plain", "--warmup_steps", "1"))
    train.main(training_command(inputs, tmp_path / "all", "--warmup_steps", "1", *flags, *theirs))
    for name in ("model.safetensors", "config.json"):
        plain = (tmp_path / "plain/final" / name).read_bytes()
        assert plain == (tmp_path / "all/final" / name).read_bytes()


def test_harmless_entries_of_a_deepspeed_file_change_no_key(tmp_path: Path) -> None:
    tree: dict = {}
    for entry in deepspeed.HARMLESS:
        *sections, name = entry.split(".")
        section = tree
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = 5
    (tmp_path / "ds.json").write_text(json.dumps(tree))
    assert deepspeed.read(tmp_path / "ds.json").keys == {}


def test_every_table_names_keys_that_exist_and_reasons() -> None:
    ruled = {rule.key for rule in ignored_keys.RULES}
    assert ruled | ignored_keys.HARMLESS.keys() <= KEYS.keys()
    for rule in ignored_keys.RULES:
        assert set(rule.because) <= KEYS.keys()
    for table in (ignored_keys.HARMLESS, other_systems.TABLE.harmless, deepspeed.HARMLESS):
        assert all(table.values())


@pytest.mark.parametrize(
    ("main", "command", "named"),
    [
        (convert.main, "meta --reverse --bin", "--bin has no meaning with --reverse"),
        (convert.main, "meta --reverse --max_shard_size 1GB", "--max_shard_size has no meaning"),
        (convert.main, "merge-lora --base b --lora l --format meta --bin", "with --format meta"),
        (convert.main, "meta --reverse --tokenizer t", "--tokenizer has no meaning with --reverse"),
        (evaluate.main, "--task boolq --ckpt a --data b --seed 3", "--seed has no meaning for"),
        (evaluate.main, "--task perplexity --ckpt a --data b --seed 3", "--seed has no meaning"),
        (evaluate.main, "--task loss --data a --compare b --lora c", "which loads no model"),
        (evaluate.main, "--task loss --data a --compare b --dtype float16", "--dtype has no mean"),
    ],
)
def test_convert_and_eval_refuse_what_they_would_ignore(
    main: Callable[[list[str]], object], command: str, named: str
) -> None:
    words = command.split()
    if main is convert.main:
        words += [] if "merge-lora" in words else ["--input", "i"]
        words += ["--output", "o"]
    with pytest.raises(UserError) as error:
        main(words)
    assert named in str(error.value)


def test_the_default_size_of_a_shard_is_no_flag_that_was_given() -> None:
    flags = command_line.meta().parse_args("--reverse --input i --output o".split())
    assert flags.max_shard_size == command_line.meta().get_default("max_shard_size") == 5 * 10**9
