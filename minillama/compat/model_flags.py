"""Flags of other systems that generate.py and eval.py both read: the rows of flag_tables.py.

Numbers that the checkpoint has itself, such as --num-layers 32, are compared with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from minillama.compat.flag_tables import (
    HARMLESS_EVERYWHERE,
    LLAMA_TOKENIZERS,
    RMSNORM,
    Allowed,
    whole_number,
)
from minillama.errors import UserError
from minillama.llama_config import LlamaConfig


@dataclass(frozen=True)
class Translation:
    """What their flags mean: values of our flags, and numbers that the checkpoint must have."""

    flags: dict[str, Any] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)

    def check_numbers(self, config: LlamaConfig) -> None:
        """Raise UserError for a number that is not that of the loaded checkpoint."""
        for name, number in self.numbers.items():
            if name in CONTEXT and number > config.max_seq_len:
                raise UserError(
                    f"--{name} {number}: the model's context is {config.max_seq_len} tokens; give "
                    "at most that, or correct max_position_embeddings in its config.json"
                )
            if name in SHAPE and number != getattr(config, SHAPE[name]):
                raise UserError(
                    f"--{name} {number}: the checkpoint has {getattr(config, SHAPE[name])}, as its "
                    "config.json says; leave the flag out, or give the checkpoint that it is for"
                )


# their flag -> the field of LlamaConfig that must have its value
SHAPE = {
    "num_layers": "n_layers",
    "hidden_size": "dim",
    "ffn_hidden_size": "ffn_dim",
    "num_attention_heads": "n_heads",
    "num_query_groups": "n_kv_heads",
    "num_key_value_heads": "n_kv_heads",
}
CONTEXT = ("max_position_embeddings", "seq_length")  # at most the model's context

RENAMED = {
    "tokenizer_path": "tokenizer",
    "tokenizer_name_or_path": "tokenizer",
    "model_name_or_path": "ckpt",
    "lora_load": "lora",
    "lora_model": "lora",
    "micro_batch_size": "batch_size",
    "fp16": "dtype=float16",
    "bf16": "dtype=bfloat16",
    "only_cpu": "device=cpu",
    "tensor_model_parallel_size": "tensor_parallel",
    "load_8bit": "dtype=int8",
    "load_in_8bit": "dtype=int8",
}

ADAPTER_KNOWS = "the adapter's own adapter_config.json says it; leave the flag out"
NO_STAGES = (
    "stages are for training, and a checkpoint is whole; --tensor_parallel N divides a model over "
    "ranks, --devices N over devices of one process"
)
ALLOWED = {
    "pipeline_parallel": Allowed(("1",), NO_STAGES),
    "pipeline_model_parallel_size": Allowed(("1",), NO_STAGES),
    "position_embedding_type": Allowed(("rope", "rotary"), "LLaMA has rotary positions"),
    "normalization": RMSNORM,
    "tokenizer_type": LLAMA_TOKENIZERS,
}
HARMLESS = HARMLESS_EVERYWHERE | {
    "attention_softmax_in_fp32": "softmax is always computed in fp32",
    "group_query_attention": "config.json has the number of key/value heads",
    "swiglu": "LLaMA's MLP is SwiGLU",
    "disable_bias_linear": "config.json says whether there are biases",
    "untie_embeddings_and_output_weights": "config.json says whether they are tied",
    "make_vocab_size_divisible_by": "the vocabulary needs no padding",
    "pad_vocab_size_to": "the vocabulary needs no padding",
    "no_contiguous_buffers_in_local_ddp": "nothing is trained",
    "no_load_optim": "nothing is trained",
    "deepspeed": "nothing is trained",
    "deepspeed_config": "nothing is trained",
    "no_pipeline_parallel": "layers are not spread over ranks",
    "no_load_rng": "--seed decides",
    "exit_on_missing_checkpoint": "a missing checkpoint is always an error",
    "local_rank": "the launcher's environment says it",
}
REFUSED = {
    "load_in_4bit": "weights of 4 bits are not read; --dtype int8 has 8 bits",
    "lora_r": ADAPTER_KNOWS,
    "lora_alpha": ADAPTER_KNOWS,
    "lora_target_modules": ADAPTER_KNOWS,
    "use_vllm": "text is written by this program itself; leave it out",
}


def numbers_of(given: Mapping[str, str]) -> dict[str, int]:
    """The numbers among the given flags. Raises UserError for one that is no whole number."""
    numbers = {}
    for name in (*SHAPE, *CONTEXT):
        if name in given:
            numbers[name] = whole_number(name, given[name])
    return numbers
