"""Flags of other systems: FastChat, LLaMA-Factory, Chinese-LLaMA-Alpaca, AscendSpeed, transformers.

Their command lines can be pasted after ours. Each of their flags is in one of three tables:

    KEY_NAMES    another name for a key of ours              --lora_r 8       is --lora_rank 8
    ALLOWED      a flag that may only have values that       --stage sft      is accepted
                 mean what this program does                 --stage dpo      is an error
    HARMLESS     a flag that changes no result, and why      --overwrite_cache

Any other flag is unknown, and an error. Nothing that would change a result is accepted and ignored;
ignored_keys.py says the same of our own keys.
"""

import math
from argparse import SUPPRESS
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minillama.cli import Parser
from minillama.errors import UserError
from minillama.ignored_keys import NO_EVAL_DATA
from minillama.launch import read_launch
from minillama.train_config import PRECISIONS, TrainConfig


@dataclass(frozen=True)
class Allowed:
    """The values that a flag may have, and why others are an error."""

    values: tuple[str, ...]
    reason: str


# our key -> what they call it, separated by spaces
KEY_NAMES = {
    "ckpt": "model_name_or_path load",
    "data": "data_path dataset",
    "out_dir": "output_dir save",
    "tokenizer": "tokenizer_name_or_path",
    "max_length": "model_max_length cutoff_len max_seq_length block_size seq_length",
    "workers": "preprocessing_num_workers",
    "validation_split": "val_size validation_split_percentage",
    "eval_data": "validation_file",
    "precision": "dtype",
    "lora_rank": "lora_r",
    "lora_targets": "lora_target trainable lora_target_modules",
    "modules_to_save": "lora_modules_to_save",
    "cache_dir": "data_cache_dir",
    "adapter": "adapter_name_or_path peft_path",
    "eval_strategy": "evaluation_strategy",
    "per_device_train_batch_size": "micro_batch_size",
    "learning_rate": "lr",
    "min_learning_rate": "min_lr",
    "max_grad_norm": "clip_grad",
    "lr_scheduler_type": "lr_decay_style",
    "warmup_ratio": "lr_warmup_fraction",
    "warmup_steps": "lr_warmup_iters",
    "dim": "hidden_size",
    "max_steps": "train_iters",
    "adam_epsilon": "adam_eps",
    "logging_steps": "log_interval",
    "save_steps": "save_interval",
    "n_layers": "num_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_query_groups",
    "ffn_dim": "ffn_hidden_size",
    "initializer_range": "init_method_std",
    "tensor_parallel": "tensor_model_parallel_size",
    "pipeline_parallel": "pipeline_model_parallel_size",
}
RENAMED = {name: key for key, names in KEY_NAMES.items() for name in names.split()}

NOT_SHARDED = "weights are not sharded here; use --zero_stage 2"
NOT_QUANTIZED = "quantized weights are not trained here"
ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf")
LLAMA_TOKENIZERS = ("pretrainedfromhf", "llama2tokenizer", "sentencepiecetokenizer")

ALLOWED = {
    "stage": Allowed(("sft", "pt"), "only supervised fine-tuning and pre-training exist here"),
    "do_train": Allowed(("true",), "train.py trains; eval.py evaluates"),
    "finetuning_type": Allowed(("lora", "full"), "tune with lora or in full"),
    "quantization_bit": Allowed(("none",), NOT_QUANTIZED),
    "load_in_kbits": Allowed(("16",), NOT_QUANTIZED),
    "train_on_prompt": Allowed(("false",), "prompts are not targets here"),
    "zero3_enabled": Allowed(("false",), NOT_SHARDED),
    "fsdp": Allowed(("",), NOT_SHARDED),
    "lora_adapter_name": Allowed(("default",), "an adapter is named by its directory"),
    "lora_load": Allowed(
        (),
        "to continue a run, repeat its command with the same --out_dir, or add --resume "
        "OUT_DIR/checkpoints/step-N; --adapter DIR starts a new run, at step 1, from an adapter",
    ),
    "optim": Allowed(ADAMW, "the optimizer is AdamW"),
    "disable_gradient_checkpointing": Allowed(("true", "false"), "it is true or false"),
    "do_eval": Allowed(("true", "false"), "it is true or false"),
    "report_to": Allowed(("none",), "OUT_DIR/metrics.jsonl and loss.png have the losses"),
    "logging_strategy": Allowed(("steps",), "records are written every --logging_steps updates"),
    "torch_dtype": Allowed(("auto", *PRECISIONS), f"choose auto, {', '.join(PRECISIONS)}"),
    "tokenizer_type": Allowed(LLAMA_TOKENIZERS, "--tokenizer FILE names LLaMA's tokenizer"),
}

# flag -> why it changes no result
HARMLESS = {
    "lazy_preprocess": "when a text is tokenized, not how",
    "logging_first_step": "it only adds a record",
    "ddp_timeout": "ranks that wait too long for each other stop with an error",
    "ddp_find_unused_parameters": "every trained parameter is used",
    "distributed_backend": "the device decides which library sends",
    "flash_attn": "another order of the same sums; --ops chooses",
    "use_flash_attn": "another order of the same sums; --ops chooses",
    "lora_register_forward_hook": "recomputation needs no hook here",
    "tokenizer_not_use_fast": "both tokenizers of transformers have the same ids",
    "use_fast_tokenizer": "both tokenizers of transformers have the same ids",
    "overwrite_cache": "the cache of a tokenized file depends on all it was made from",
}
# These need more than a table: see `keys_from` and `refuse_contradictions`.
OTHERS = ("split", "eval_interval", "local_rank")
DEFAULT_SPLIT = "969,30,1"  # AscendSpeed's shares for training, validation and test

# generate.py: flags of FastChat's cli and Chinese-LLaMA-Alpaca's inference scripts -> ours, and its
# value where it is fixed
GENERATION = {
    "model_path": "ckpt",
    "model_name_or_path": "ckpt",
    "base_model": "ckpt",
    "lora_model": "lora",
    "tokenizer_path": "tokenizer",
    "conv_template": "template",
    "with_prompt": "template=chinese_alpaca_2",
    "interactive": "chat",
    "data_file": "prompt_file",
    "predictions_file": "output",
    "system_prompt": "system",
}
# convert.py, by subcommand: flags of FastChat's apply_delta and make_delta, Chinese-LLaMA-Alpaca's
# merge and transformers' converter -> ours
CONVERSION = {
    "apply_delta": {
        "base_model_path": "base",
        "delta_path": "delta",
        "target": "output",
        "target_model_path": "output",
    },
    "make_delta": {
        "base_model_path": "base",
        "target_model_path": "target",
        "delta": "output",
        "delta_path": "output",
    },
    "merge_lora": {
        "base_model": "base",
        "lora_model": "lora",
        "output_type": "format",
        "output_dir": "output",
    },
    "meta": {"input_dir": "input", "output_dir": "output"},
}


def add_flags(parser: Parser) -> None:
    """Let a parser accept the other systems' flags for training, which `--help` leaves out."""
    parser.renamed |= RENAMED
    for name in (*ALLOWED, *HARMLESS, *OTHERS):
        parser.add_argument(f"--{name}", nargs="*", help=SUPPRESS)


def keys_from(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return what flags mean that are no names of ours, as values of our keys.

    Raises UserError for a value that is not allowed.
    """
    given = {name: _text(flags[name]) for name in ALLOWED if flags.get(name) is not None}
    for name, value in given.items():
        if value not in ALLOWED[name].values:
            raise UserError(f"--{name} {value} is not supported: {ALLOWED[name].reason}")
    keys: dict[str, Any] = {}
    if "finetuning_type" in given:
        keys["lora"] = given["finetuning_type"] == "lora"
    if given.get("disable_gradient_checkpointing") == "true":
        keys["gradient_checkpointing"] = False
    if given.get("stage") == "pt":
        keys["data_format"] = "text"
    if flags.get("dataset_dir") and not flags.get("data"):
        keys["data"] = (flags["dataset_dir"],)  # Chinese-LLaMA-Alpaca: the folder is the data
    return keys | _evaluation_keys(flags)


def _evaluation_keys(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return what AscendSpeed's --split and --eval_interval mean.

    Its validation and test parts are one part here, which is not trained on.
    """
    keys: dict[str, Any] = {}
    split = flags.get("split")
    interval = flags.get("eval_interval")
    if interval is not None:
        keys["eval_strategy"] = "steps"
        keys["eval_steps"] = _whole_number("eval_interval", _text(interval))
        has_eval_data = bool(flags.get("eval_data") or flags.get("validation_split"))
        if split is None and not has_eval_data:
            split = [DEFAULT_SPLIT]
    if split is not None:
        keys["validation_split"] = _held_out(_text(split))
    return keys


def _held_out(split: str) -> float:
    """Return the share of the documents that is not trained on, of a split such as 949,50,1."""
    shares = [_share(word) for word in split.replace("/", ",").replace(" ", ",").split(",")]
    is_valid = len(shares) <= 3 and shares[0] > 0 and min(shares) >= 0
    if not is_valid:
        raise UserError(
            f"--split {split}: expected up to three numbers, for training, validation and test, "
            "such as 949,50,1"
        )
    return sum(shares[1:]) / sum(shares)


def refuse_contradictions(flags: Mapping[str, Any], config: TrainConfig) -> None:
    """Raise UserError for a flag that says something else than the settings of the run."""
    wants_evaluation = flags.get("do_eval") is not None and _text(flags["do_eval"]) == "true"
    if wants_evaluation and not (config.eval_data or config.validation_split):
        raise UserError(f"--do_eval would be ignored: {NO_EVAL_DATA}")
    dtype = _text(flags.get("torch_dtype") or ["auto"])
    if dtype != "auto" and PRECISIONS[dtype] != config.precision:
        raise UserError(
            f"--torch_dtype {dtype} is not the precision {config.precision}: the model has the "
            f"dtype of the computation; use --precision {PRECISIONS[dtype]}, or leave it out"
        )
    local_rank = _text(flags.get("local_rank") or ["-1"])
    if local_rank not in ("-1", str(read_launch().local_rank)):
        raise UserError(
            f"--local_rank {local_rank}: not what the launcher says in the environment; "
            "use torchrun --nproc_per_node N train.py"
        )


def _text(words: Sequence[str]) -> str:
    """Return the value of a flag of any number of words; without one it is a switch."""
    return " ".join(words).lower() if words else "true"


def _whole_number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise UserError(f"--{name} {text}: expected a whole number")
    return int(text)


def _share(text: str) -> float:
    """Return a number from 0, or -1 if it is none."""
    try:
        share = float(text)
    except ValueError:
        return -1.0
    return share if 0 <= share < math.inf else -1.0
