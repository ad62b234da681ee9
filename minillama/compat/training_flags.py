"""Flags of other systems for training: the table of train.py, of the kind in flag_tables.py.

compat/flags.py has what OTHERS mean, which need more than a table.
"""

from minillama.compat.flag_tables import (
    HARMLESS_EVERYWHERE,
    KERNEL,
    LLAMA_TOKENIZERS,
    RMSNORM,
    Allowed,
    FlagTable,
)
from minillama.compat.model_claims import DIVISOR, NUMBERS, TYPE
from minillama.train_config import PRECISIONS

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
    "modules_to_save": "lora_modules_to_save additional_target",
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
    "context": "max_position_embeddings",
    "max_steps": "train_iters",
    "adam_epsilon": "adam_eps",
    "logging_steps": "log_interval",
    "save_steps": "save_interval",
    "n_layers": "num_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_query_groups num_key_value_heads",
    "ffn_dim": "ffn_hidden_size",
    "initializer_range": "init_method_std",
    "grow_vocabulary": "force_resize_embeddings",
    "tensor_parallel": "tensor_model_parallel_size",
    "pipeline_parallel": "pipeline_model_parallel_size",
}

NOT_SHARDED = "weights are not sharded here; use --zero_stage 2"
NOT_QUANTIZED = "quantized weights are not trained here"
NO_DROPOUT = "LLaMA has no dropout; --lora_dropout is the adapters'"
ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf")
ZERO = ("0.0", "0", "0.")
YES = ("true",)
NO = ("false",)

ALLOWED = {
    "stage": Allowed(("sft", "pt"), "only supervised fine-tuning and pre-training exist here"),
    "do_train": Allowed(YES, "train.py trains; eval.py evaluates"),
    "finetuning_type": Allowed(("lora", "full"), "tune with lora or in full"),
    "quantization_bit": Allowed(("none",), NOT_QUANTIZED),
    "load_in_kbits": Allowed(("16",), NOT_QUANTIZED),
    "train_on_prompt": Allowed(NO, "prompts are not targets here"),
    "zero3_enabled": Allowed((*NO, "true"), "it is true or false"),
    "fsdp": Allowed(("",), NOT_SHARDED),
    "lora_adapter_name": Allowed(("default",), "an adapter is named by its directory"),
    "optim": Allowed(ADAMW, "the optimizer is AdamW"),
    "optimizer": Allowed(("adam", "adamw"), "the optimizer is AdamW"),
    "disable_gradient_checkpointing": Allowed(("true", "false"), "it is true or false"),
    "full_finetuning": Allowed(("true", "false"), "it is true or false"),
    "do_eval": Allowed(("true", "false"), "it is true or false"),
    "report_to": Allowed(("none",), "OUT_DIR/metrics.jsonl and loss.png have the losses"),
    "logging_strategy": Allowed(("steps",), "records are written every --logging_steps updates"),
    "torch_dtype": Allowed(("auto", *PRECISIONS), f"choose auto, {', '.join(PRECISIONS)}"),
    "tokenizer_type": LLAMA_TOKENIZERS,
    "position_embedding_type": Allowed(("rope",), "LLaMA's positions are rotary"),
    "normalization": RMSNORM,
    "swiglu": Allowed(YES, "LLaMA's MLP is SwiGLU"),
    "attention_softmax_in_fp32": Allowed(YES, "the softmax of attention is always fp32"),
    "attention_dropout": Allowed(ZERO, NO_DROPOUT),
    "hidden_dropout": Allowed(ZERO, NO_DROPOUT),
    "untie_embeddings_and_output_weights": Allowed(YES, "the checkpoint decides"),
    "disable_bias_linear": Allowed(YES, "the checkpoint decides"),
    "group_query_attention": Allowed(YES, "--n_kv_heads says how many"),
    "data_impl": Allowed(("mmap", "infer"), "the mmap format is read, and raw files"),
    "recompute_granularity": Allowed(("full", "selective"), "full or selective"),
    "load_best_model_at_end": Allowed(
        NO,
        "final/ is the last step; eval_loss in metrics.jsonl tells which of checkpoints/step-N is "
        "better",
    ),
    "save_only_model": Allowed(
        NO,
        "checkpoints hold what a resume needs; --save_strategy no leaves final/ alone",
    ),
    "save_safetensors": Allowed(YES, "final/ is safetensors; leave the flag out"),
    "rope_scaling": Allowed(("none",), "the checkpoint's config.json has it"),
    "group_by_length": Allowed(NO, "--packing true (the default) fills rows in its place"),
    "push_to_hub": Allowed(NO, "nothing is uploaded; afterwards: hf upload NAME OUT_DIR/final"),
    "neat_packing": Allowed(YES, "packed documents never attend to each other here"),
    "mask_history": Allowed(
        NO,
        "every answer of a conversation is trained on; MOSS's format and --template "
        "ascend_instruction train on the last one alone",
    ),
}

# flag -> why it changes no result
HARMLESS = HARMLESS_EVERYWHERE | {
    "lazy_preprocess": "when a text is tokenized, not how",
    "logging_first_step": "it only adds a record",
    "logging_dir": "OUT_DIR/metrics.jsonl has the records",
    "run_name": "a name for trackers, of which there are none",
    "ddp_timeout": "ranks that wait too long for each other stop with an error",
    "ddp_find_unused_parameters": "every trained parameter is used",
    "DDP_impl": "how gradients are sent; --reduction has their order",
    "distributed_backend": "the device decides which library sends",
    "no_pipeline_parallel": "--pipeline_parallel has the number of stages",
    "overlap_grad_reduce": "when gradients are sent, not what is sent",
    "overlap_param_gather": "when parameters are sent, not what is sent",
    "no_gradient_accumulation_fusion": "where gradients are added up, not what they are",
    "no_contiguous_buffers_in_local_ddp": "where gradients lie in memory",
    "triangle_attn": KERNEL,
    "use_fused_swiglu": KERNEL,
    "no_bias_gelu_fusion": KERNEL,
    "sequence_parallel": "which rank holds an activation, not what it is",
    "recompute_method": "which activations are computed again, not what they are",
    "recompute_num_layers": "which activations are computed again, not what they are",
    "lora_register_forward_hook": "recomputation needs no hook here",
    "use_cpu_initialization": "the initial weights follow from --seed on every device",
    "use_rotary_position_embeddings": "LLaMA's positions are rotary",
    "finetune": "--load takes weights alone, and a new run begins at step 0",
    "no_load_optim": "--load takes weights alone; a run continues from its own --out_dir",
    "no_load_rng": "dropout and the order of the data follow from --seed and the step",
    "remove_unused_columns": "only the columns of the format are read",
    "num_workers": "batches are cut from a file that is mapped into memory",
    "dataloader_num_workers": "batches are cut from a file that is mapped into memory",
    "overwrite_cache": "the cache of a tokenized file depends on all it was made from",
}
OTHERS = (
    "split",
    "eval_interval",
    "eval_iters",
    "local_rank",
    *NUMBERS,
    DIVISOR,
    TYPE,
    "global_batch_size",
    "initial_loss_scale",
    "lr_decay_iters",
    "checkpoint_activations",
    "deepspeed_activation_checkpointing",
    "recompute_activations",
    "use_distributed_optimizer",
    "is_instruction_dataset",
    "lora_load",
    "resume_from_checkpoint",
    "deepspeed_config",
)

RENAMED = {name: key for key, names in KEY_NAMES.items() for name in names.split()}
TABLE = FlagTable(RENAMED, ALLOWED, HARMLESS, refused={}, numbers=(), others=OTHERS)
