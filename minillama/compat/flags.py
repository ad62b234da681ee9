"""Command lines of other systems, so that they can be pasted: FastChat, LLaMA-Factory, Chinese-LLaMA-Alpaca, AscendSpeed.

Each of their flags is one of three things here: another name for a key of ours; a flag that must have certain values, because
only those are what this program does; or one that changes no result. Any other flag is unknown, and said to be.
"""

from typing import Any

from minillama.errors import UserError

# our key: what they call it
NAMES = {
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
RENAMED = {theirs: ours for ours, names in NAMES.items() for theirs in names.split()}
# flag -> the values that mean what this program does, and why others are refused
ONLY = {
    "stage": (("sft", "pt"), "only supervised fine-tuning and pre-training exist here"),
    "do_train": (("true",), "train.py trains; eval.py evaluates"),
    "finetuning_type": (("lora", "full"), "tune with lora or in full"),
    "tensor_model_parallel_size": (("1",), "tensor parallelism does not exist here yet"),
    "pipeline_model_parallel_size": (("1",), "pipeline parallelism does not exist here yet"),
    "quantization_bit": (("none",), "quantized weights are not trained here"),
    "load_in_kbits": (("16",), "quantized weights are not trained here"),
    "train_on_prompt": (("false",), "prompts are not targets here"),
    "zero3_enabled": (("false",), "weights are not sharded here; use --zero_stage 2"),
    "fsdp": (("",), "weights are not sharded here; use --zero_stage 2"),
    "lora_adapter_name": (("default",), "an adapter is named by its directory"),
    "optim": (("adamw_torch", "adamw_torch_fused", "adamw_hf"), "the optimizer is AdamW"),
    "disable_gradient_checkpointing": (("true", "false"), "it is true or false"),
}
# flags that change no result
HARMLESS = (
    "lazy_preprocess",
    "do_eval",
    "logging_first_step",
    "logging_strategy",
    "report_to",
    "torch_dtype",
    "ddp_timeout",
    "ddp_find_unused_parameters",
    "data_cache_dir",
    "flash_attn",
    "use_flash_attn",
    "lora_register_forward_hook",
    "split",
    "distributed_backend",
    "local_rank",
    "tokenizer_type",
    "tokenizer_not_use_fast",
    "use_fast_tokenizer",
    "overwrite_cache",
)  # the cache of tokenized data is keyed by what it was made from, so it is never stale

# generate.py, from FastChat's cli and Chinese-LLaMA-Alpaca's inference scripts: their flag -> ours, with a value where it is fixed
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
# convert.py, by subcommand, from FastChat's apply_delta and make_delta, Chinese-LLaMA-Alpaca's merge, and transformers' converter
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


def settings_from(flags: dict[str, Any]) -> dict[str, Any]:
    """What the other systems' flags say in keys of ours. Raises UserError for a value that cannot be honoured, by name."""
    said = {
        flag: " ".join(words).lower() if words else "true"
        for flag in ONLY
        if (words := flags.get(flag)) is not None
    }
    for flag, value in said.items():
        allowed, why = ONLY[flag]
        if value not in allowed:
            raise UserError(f"--{flag} {value} is not supported: {why}")
    found: dict[str, Any] = (
        {"lora": said["finetuning_type"] == "lora"} if "finetuning_type" in said else {}
    )
    if said.get("disable_gradient_checkpointing") == "true":
        found["gradient_checkpointing"] = False
    if flags.get("dataset_dir") and not flags.get(
        "data"
    ):  # Chinese-LLaMA-Alpaca: the folder itself
        found["data"] = (flags["dataset_dir"],)
    return found
