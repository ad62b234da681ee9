"""Flags of other systems: FastChat, LLaMA-Factory, Chinese-LLaMA-Alpaca, AscendSpeed, transformers.

Their command lines can be pasted after ours. Each of their flags is in one of three tables:

    KEY_NAMES    another name for a key of ours              --lora_r 8       is --lora_rank 8
    ALLOWED      a flag that may only have values that       --stage sft      is accepted
                 mean what this program does                 --stage dpo      is an error
    IGNORED      a flag that changes no result               --report_to tensorboard

Any other flag is unknown, and an error.
"""

from argparse import SUPPRESS
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minillama.cli import Parser
from minillama.errors import UserError


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
    "adapter": "adapter_name_or_path peft_path lora_load",
    "eval_strategy": "evaluation_strategy",
    "eval_steps": "eval_interval",
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
}
RENAMED = {name: key for key, names in KEY_NAMES.items() for name in names.split()}

NOT_SHARDED = "weights are not sharded here; use --zero_stage 2"
NOT_QUANTIZED = "quantized weights are not trained here"
NO_TENSOR_PARALLEL = "tensor parallelism does not exist here yet"
NO_PIPELINE_PARALLEL = "pipeline parallelism does not exist here yet"
ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf")

ALLOWED = {
    "stage": Allowed(("sft", "pt"), "only supervised fine-tuning and pre-training exist here"),
    "do_train": Allowed(("true",), "train.py trains; eval.py evaluates"),
    "finetuning_type": Allowed(("lora", "full"), "tune with lora or in full"),
    "tensor_model_parallel_size": Allowed(("1",), NO_TENSOR_PARALLEL),
    "pipeline_model_parallel_size": Allowed(("1",), NO_PIPELINE_PARALLEL),
    "quantization_bit": Allowed(("none",), NOT_QUANTIZED),
    "load_in_kbits": Allowed(("16",), NOT_QUANTIZED),
    "train_on_prompt": Allowed(("false",), "prompts are not targets here"),
    "zero3_enabled": Allowed(("false",), NOT_SHARDED),
    "fsdp": Allowed(("",), NOT_SHARDED),
    "lora_adapter_name": Allowed(("default",), "an adapter is named by its directory"),
    "optim": Allowed(ADAMW, "the optimizer is AdamW"),
    "disable_gradient_checkpointing": Allowed(("true", "false"), "it is true or false"),
}

# overwrite_cache: the cache of tokenized data depends on what it was made from, and is never stale.
IGNORED = """
    lazy_preprocess do_eval logging_first_step logging_strategy report_to torch_dtype ddp_timeout
    ddp_find_unused_parameters data_cache_dir flash_attn use_flash_attn lora_register_forward_hook
    split distributed_backend local_rank tokenizer_type tokenizer_not_use_fast use_fast_tokenizer
    overwrite_cache
""".split()

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
    for name in (*ALLOWED, *IGNORED):
        parser.add_argument(f"--{name}", nargs="*", help=SUPPRESS)


def keys_from(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the flags of ALLOWED and --dataset_dir mean, as values of our keys.

    Raises UserError for a value that is not allowed.
    """
    given: dict[str, str] = {}
    for name, allowed in ALLOWED.items():
        words = flags.get(name)
        if words is None:
            continue
        given[name] = " ".join(words).lower() if words else "true"
        if given[name] not in allowed.values:
            raise UserError(f"--{name} {given[name]} is not supported: {allowed.reason}")
    keys: dict[str, Any] = {}
    if "finetuning_type" in given:
        keys["lora"] = given["finetuning_type"] == "lora"
    if given.get("disable_gradient_checkpointing") == "true":
        keys["gradient_checkpointing"] = False
    if flags.get("dataset_dir") and not flags.get("data"):
        keys["data"] = (flags["dataset_dir"],)  # Chinese-LLaMA-Alpaca: the folder is the data
    return keys
