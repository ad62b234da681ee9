"""Command lines that users of other systems have typed for years: each resolves, or is refused by name."""

import json
import runpy
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest

from minillama import device
from minillama.compat import deepspeed
from minillama.errors import UserError
from minillama.lora import LoraConfig, add_lora, save_adapter
from minillama.training import run
from minillama.training.dry_run import lora_config
from tests.conftest import random_model

ROOT = Path(__file__).parents[1]
PARSE = runpy.run_path(str(ROOT / "train.py"))["parse"]

# DeepSpeed's configurations of FastChat on Ascend (7B; 13B has stage 2 and 2e8), and of Chinese-LLaMA-Alpaca
ASCEND = {
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 8,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "optimizer": {
        "type": "Adam",
        "params": {
            "lr": "auto",
            "betas": "auto",
            "eps": "auto",
            "weight_decay": "auto",
            "torch_adam": True,
        },
    },
    "zero_optimization": {
        "stage": 1,
        "allgather_partitions": True,
        "allgather_bucket_size": 1e8,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 1e8,
        "contiguous_gradients": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}
CHINESE = {
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 100,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1e-10,
    },
    "zero_optimization": {
        "stage": 2,
        "allgather_partitions": True,
        "allgather_bucket_size": 1e8,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 1e8,
        "contiguous_gradients": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}

LLAMA_FACTORY = """--stage sft --do_train --model_name_or_path BASE --dataset alpaca_gpt4_zh --template default --finetuning_type lora
    --lora_target q_proj,v_proj --output_dir OUT --overwrite_cache --per_device_train_batch_size 1 --gradient_accumulation_steps 1
    --lr_scheduler_type cosine --logging_steps 1 --save_steps 10 --learning_rate 5e-5 --num_train_epochs 4.0 --plot_loss --fp16
    --overwrite_output_dir --disable_gradient_checkpointing"""
FASTCHAT = """--model_name_or_path BASE --data_path alpaca-data-conversation.json --fp16 True --output_dir OUT --num_train_epochs 1
    --per_device_train_batch_size 8 --per_device_eval_batch_size 1 --gradient_accumulation_steps 32 --evaluation_strategy no
    --save_strategy steps --save_steps 200 --save_total_limit 2 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03
    --lr_scheduler_type cosine --logging_steps 1 --tf32 False --model_max_length 1024 --gradient_checkpointing True
    --lazy_preprocess True --deepspeed DEEPSPEED"""
VICUNA = """--model_name_or_path BASE --data_path dummy.json --bf16 True --output_dir OUT --num_train_epochs 3
    --per_device_train_batch_size 2 --per_device_eval_batch_size 2 --gradient_accumulation_steps 16 --evaluation_strategy no
    --save_strategy steps --save_steps 1200 --save_total_limit 10 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03
    --lr_scheduler_type cosine --logging_steps 1 --tf32 True --model_max_length 2048 --gradient_checkpointing True
    --lazy_preprocess True"""
CHINESE_SFT = """--deepspeed DEEPSPEED --model_name_or_path BASE --tokenizer_name_or_path BASE --dataset_dir data
    --validation_split_percentage 0.001 --per_device_train_batch_size 1 --per_device_eval_batch_size 1 --do_train --do_eval --seed 7 --fp16
    --num_train_epochs 1 --lr_scheduler_type cosine --learning_rate 1e-4 --warmup_ratio 0.03 --weight_decay 0 --logging_strategy steps
    --logging_steps 10 --save_strategy steps --save_total_limit 3 --evaluation_strategy steps --eval_steps 100 --save_steps 200
    --gradient_accumulation_steps 8 --preprocessing_num_workers 8 --max_seq_length 1024 --output_dir OUT --overwrite_output_dir
    --ddp_timeout 30000 --logging_first_step True --lora_rank 64 --lora_alpha 128
    --trainable q_proj,v_proj,k_proj,o_proj,gate_proj,down_proj,up_proj --lora_dropout 0.05 --modules_to_save embed_tokens,lm_head
    --torch_dtype float16 --load_in_kbits 16 --gradient_checkpointing --ddp_find_unused_parameters False"""
ASCENDSPEED = """--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --load BASE --data-path alpaca.json --save OUT
    --tokenizer-type PretrainedFromHF --tokenizer-name-or-path BASE --tokenizer-not-use-fast --micro-batch-size 4 --seq-length 512
    --train-iters 2000 --lr 1e-6 --min-lr 1e-8 --lr-decay-style cosine --lr-warmup-fraction 0.01 --weight-decay 0.1 --clip-grad 1.0
    --adam-beta1 0.9 --adam-beta2 0.95 --log-interval 1 --save-interval 1000 --eval-interval 1000 --seed 1234 --bf16
    --lora-target-modules query_key_value,dense,gate_proj,up_proj,down_proj --lora-r 16 --lora-alpha 32 --lora-adapter-name default"""


def resolved(text: str, tmp_path: Path, base: Path, config: dict | None = None):
    (tmp_path / "deepspeed.json").write_text(json.dumps(config or ASCEND))
    words = {
        "BASE": str(base),
        "DEEPSPEED": str(tmp_path / "deepspeed.json"),
        "OUT": str(tmp_path / "out"),
    }
    return PARSE([words.get(word, word) for word in shlex.split(text)])[0]


@pytest.mark.parametrize(
    ("text", "config", "expected"),
    [
        (
            LLAMA_FACTORY,
            None,
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
            None,
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
    assert "parameters" in run.describe(settings, world_size=8)


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
    """But for names of files, and for what only a preset can say: the shape, the shards, and lengths that were their defaults."""
    ours, theirs = PARSE(["--config", preset])[0], resolved(text, tmp_path, tmp_path)
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
            "--model-path vicuna-7b --conv-template vicuna_v1.1 --temperature 0.7 --max-new-tokens 512 --chat",
            {
                "ckpt": "vicuna-7b",
                "template": "vicuna_v1.1",
                "temperature": 0.7,
                "max_new_tokens": 512,
                "chat": True,
            },
        ),
        (
            "--base_model llama --lora_model adapter --tokenizer_path t.model --with_prompt --interactive",
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
    """FastChat's make_delta and apply_delta, both spellings of the flags, and Chinese-LLaMA-Alpaca's merge."""
    convert = runpy.run_path(str(ROOT / "convert.py"))["main"]
    base, target = str(tiny_checkpoint("base")), str(tiny_checkpoint("target", seed=1))
    convert(
        [
            "make-delta",
            "--base-model-path",
            base,
            "--target-model-path",
            target,
            "--delta-path",
            str(tmp_path / "delta"),
        ]
    )
    convert(
        [
            "apply-delta",
            "--base",
            base,
            "--target",
            str(tmp_path / "applied"),
            "--delta",
            str(tmp_path / "delta"),
        ]
    )
    assert (tmp_path / "applied" / "model.safetensors").is_file()
    for name, seed in (("a", 2), ("b", 3)):
        model = random_model(seed)
        add_lora(model, LoraConfig(rank=2))
        save_adapter(model, LoraConfig(rank=2), tmp_path / name, base)
    convert(
        [
            "merge-lora",
            "--base_model",
            base,
            "--lora_model",
            f"{tmp_path / 'a'},{tmp_path / 'b'}",
            "--output_type",
            "huggingface",
            "--output_dir",
            str(tmp_path / "merged"),
        ]
    )
    assert (tmp_path / "merged" / "config.json").is_file()


def test_chips_are_not_split_yet(monkeypatch):
    monkeypatch.setenv("SOPHGO_SPLIT", "4")
    with pytest.raises(UserError, match="SOPHGO_SPLIT=4: layers are not placed"):
        device.pick("cpu")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--stage dpo", "--stage dpo is not supported"),
        ("--finetuning_type freeze", "--finetuning_type freeze"),
        ("--tensor-model-parallel-size 8", "tensor parallelism does not exist here yet"),
        ("--pipeline-model-parallel-size 2", "pipeline parallelism does not exist"),
        ("--quantization_bit 4", "--quantization_bit 4"),
        ("--load_in_kbits 8", "quantized weights"),
        ("--zero3_enabled True", "weights are not sharded"),
        ("--optim lion", "the optimizer is AdamW"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(flags, named):
    with pytest.raises(UserError, match=named):
        PARSE(["--model", "7b", *flags.split()])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"zero_optimization": {"stage": 3}}, "weights are not sharded here"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer.device = 'cpu'",
        ),
        (
            {"zero_optimisation": {"stage": 2}},
            "zero_optimisation.stage = 2: not supported .did you mean 'zero_optimization.stage'",
        ),
        (
            {"optimizer": {"type": "Lamb"}},
            "optimizer.type = 'Lamb': not supported; supported: 'Adam', 'AdamW'",
        ),
        (
            {"zero_optimization": {"stage": "two"}},
            "zero_optimization.stage = 'two': a value is wrong",
        ),
        (
            {"optimizer": {"params": {"betas": 0.9}}},
            "optimizer.params.betas = 0.9: a value is wrong",
        ),
        (
            {
                "train_batch_size": 100,
                "train_micro_batch_size_per_gpu": 8,
                "gradient_accumulation_steps": 2,
            },
            "100 is not .*8 × .*2 × 4 ranks = 64",
        ),
    ],
)
def test_a_deepspeed_file_that_asks_for_more_is_refused(change, named, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(change))
    with pytest.raises(UserError, match=named):
        deepspeed.read(tmp_path / "ds.json", world_size=4)


def test_a_deepspeed_file_sets_what_it_fixes_and_leaves_auto_to_the_command_line(tmp_path):
    config = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 2,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.95], "eps": "auto"}},
        "gradient_clipping": 0.5,
    }
    (tmp_path / "ds.json").write_text(json.dumps(config))
    assert deepspeed.read(tmp_path / "ds.json", world_size=4) == {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "precision": "bf16",
        "learning_rate": 1e-4,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "max_grad_norm": 0.5,
    }
