"""Command lines of other systems: each resolves to keys of ours, or is refused by name."""

import runpy
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest

import train
from minillama.compat import flags as other_systems
from minillama.errors import UserError
from minillama.lora import LoraConfig, add_lora, save_adapter
from minillama.train_config import KEYS, TrainConfig
from minillama.training import dry_run
from minillama.training.model_building import lora_config
from tests.conftest import random_model
from tests.published_commands import (
    ASCEND,
    ASCENDSPEED,
    CHINESE,
    CHINESE_SFT,
    FASTCHAT,
    LLAMA_FACTORY,
    VICUNA,
)

ROOT = Path(__file__).parents[1]


def resolved(text: str, tmp_path: Path, base: Path, config: str = ASCEND) -> TrainConfig:
    (tmp_path / "deepspeed.json").write_text(config)
    words = {
        "BASE": str(base),
        "DEEPSPEED": str(tmp_path / "deepspeed.json"),
        "OUT": str(tmp_path / "out"),
    }
    return train.parse([words.get(word, word) for word in shlex.split(text)])[0]


@pytest.mark.parametrize(
    ("text", "config", "expected"),
    [
        (
            LLAMA_FACTORY,
            ASCEND,
            {
                "lora": True,
                "lora_targets": ("q_proj", "v_proj"),
                "data": ("alpaca_gpt4_zh",),
                "num_train_epochs": 4.0,
                "precision": "fp16",
                "gradient_checkpointing": False,
                "save_steps": 10,
                "plot_loss": True,
            },
        ),
        (
            FASTCHAT,
            ASCEND,
            {
                "lora": False,
                "max_length": 1024,
                "zero_stage": 1,
                "bucket_elements": 10**8,
                "initial_scale_power": 8,
                "gradient_accumulation_steps": 32,
                "eval_strategy": "no",
                "gradient_checkpointing": True,
                "tf32": False,
            },
        ),
        (
            CHINESE_SFT,
            CHINESE,
            {
                "lora": True,
                "zero_stage": 2,
                "data": ("data",),
                "validation_split": 0.001,
                "lora_rank": 64,
                "workers": 8,
                "modules_to_save": ("embed_tokens", "lm_head"),
                "min_loss_scale": 1e-10,
                "loss_scale_window": 100,
            },
        ),
        (
            ASCENDSPEED,
            ASCEND,
            {
                "max_steps": 2000,
                "learning_rate": 1e-6,
                "min_learning_rate": 1e-8,
                "per_device_train_batch_size": 4,
                "precision": "bf16",
                "adam_beta2": 0.95,
                "lora": True,
                "lora_rank": 16,
                "max_length": 512,
            },
        ),
    ],
    ids=["llama_factory", "fastchat", "chinese_llama_alpaca", "ascendspeed"],
)
def test_their_training_commands_resolve_and_can_be_planned(
    text, config, expected, tmp_path, tiny_checkpoint
):
    settings = resolved(text, tmp_path, tiny_checkpoint(), config)
    assert {name: getattr(settings, name) for name in expected} == expected
    assert "parameters" in dry_run.describe(settings, world_size=8)


@pytest.mark.parametrize(
    ("preset", "text"),
    [
        ("7b_lora_qv", LLAMA_FACTORY),
        (
            "7b_full",
            LLAMA_FACTORY.replace("finetuning_type lora", "finetuning_type full")
            .replace("epochs 4.0", "epochs 3.0")
            .replace("save_steps 10", "save_steps 100"),
        ),
        ("7b_vicuna", VICUNA),
    ],
    ids=["LoRA by LLaMA-Factory", "full by LLaMA-Factory", "Vicuna by FastChat"],
)
def test_a_preset_says_what_the_command_it_comes_from_says(preset, text, tmp_path):
    """Except for file names, and for shape, shards and lengths, which the command leaves open."""
    ours, theirs = train.parse(["--config", preset])[0], resolved(text, tmp_path, tmp_path)
    other = {name for name, value in asdict(ours).items() if value != getattr(theirs, name)}
    assert other <= {
        "model",
        "ckpt",
        "data",
        "out_dir",
        "zero_stage",
        "max_length",
        "template",
        "plot_loss",
        "lora_alpha",
    }
    assert lora_config(ours).alpha == lora_config(theirs).alpha


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            "--model-path vicuna-7b --conv-template vicuna_v1.1 --temperature 0.7 "
            "--max-new-tokens 512 --chat",
            {
                "ckpt": "vicuna-7b",
                "template": "vicuna_v1.1",
                "temperature": 0.7,
                "max_new_tokens": 512,
                "chat": True,
            },
        ),
        (
            "--base_model llama --lora_model adapter --tokenizer_path t.model --with_prompt "
            "--interactive",
            {
                "ckpt": "llama",
                "lora": ["adapter"],
                "tokenizer": "t.model",
                "template": "chinese_alpaca_2",
                "chat": True,
            },
        ),
        (
            "--base_model llama --data_file in.txt --predictions_file out.jsonl",
            {"prompt_file": "in.txt", "output": "out.jsonl"},
        ),
    ],
    ids=["fastchat", "chinese chat", "chinese batch"],
)
def test_their_generation_commands_are_understood(flags, expected):
    options = runpy.run_path(str(ROOT / "generate.py"))["parse"](shlex.split(flags))
    assert {name: getattr(options, name) for name in expected} == expected


def test_their_conversion_commands_convert(tmp_path, tiny_checkpoint):
    """FastChat's make_delta and apply_delta, both spellings, and Chinese-LLaMA-Alpaca's merge."""
    convert = runpy.run_path(str(ROOT / "convert.py"))["main"]
    base, target = str(tiny_checkpoint("base")), str(tiny_checkpoint("target", seed=1))
    delta = str(tmp_path / "delta")
    theirs = ["--base-model-path", base, "--target-model-path", target, "--delta-path", delta]
    convert(["make-delta", *theirs])
    applied = str(tmp_path / "applied")
    convert(["apply-delta", "--base", base, "--target", applied, "--delta", delta])
    assert (tmp_path / "applied" / "model.safetensors").is_file()
    for name, seed in (("a", 2), ("b", 3)):
        model = random_model(seed)
        add_lora(model, LoraConfig(rank=2))
        save_adapter(model, LoraConfig(rank=2), tmp_path / name, base)
    adapters = f"{tmp_path / 'a'},{tmp_path / 'b'}"
    merged = ["--output_type", "huggingface", "--output_dir", str(tmp_path / "merged")]
    convert(["merge-lora", "--base_model", base, "--lora_model", adapters, *merged])
    assert (tmp_path / "merged" / "config.json").is_file()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--stage dpo", "--stage dpo is not supported"),
        ("--finetuning_type freeze", "--finetuning_type freeze"),
        ("--quantization_bit 4", "--quantization_bit 4"),
        ("--load_in_kbits 8", "quantized weights"),
        ("--zero3_enabled True", "weights are not sharded"),
        ("--optim lion", "the optimizer is AdamW"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(flags, named):
    with pytest.raises(UserError, match=named):
        train.parse(["--model", "7b", *flags.split()])


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    [
        ("--model_name_or_path x", "ckpt", "x"),
        ("--data_path a.json,b.json", "data", ("a.json", "b.json")),
        ("--output_dir o", "out_dir", "o"),
        ("--model_max_length 77", "max_length", 77),
        ("--cutoff_len 77", "max_length", 77),
        ("--lora_r 4", "lora_rank", 4),
        ("--lora_target q_proj,v_proj", "lora_targets", ("q_proj", "v_proj")),
        ("--evaluation_strategy epoch", "eval_strategy", "epoch"),
        ("--dtype bfloat16", "precision", "bf16"),
        ("--finetuning_type full --lora_target q_proj", "lora", False),
        ("--tensor-model-parallel-size 8", "tensor_parallel", 8),
        ("--pipeline-model-parallel-size 2", "pipeline_parallel", 2),
    ],
)
def test_their_names_of_our_keys_are_understood(flags: str, key: str, value: object) -> None:
    settings, _ = train.parse(flags.split())
    assert getattr(settings, key) == value


def test_a_file_may_use_their_names_too(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("[lora]\nlora_r = 4\n")
    settings, _ = train.parse(["--config", str(tmp_path / "recipe.toml")])
    assert settings.lora_rank == 4


def test_a_misspelt_name_of_theirs_is_named() -> None:
    with pytest.raises(UserError, match="did you mean '--model_name_or_path'"):
        train.parse(["--model_name_or_pth", "x"])


def test_every_name_of_theirs_stands_for_a_key_and_is_no_key() -> None:
    assert set(other_systems.TABLE.renamed.values()) <= KEYS.keys()
    assert not set(other_systems.TABLE.renamed) & KEYS.keys()
