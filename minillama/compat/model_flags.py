"""Flags of other systems for generate.py and eval.py: how they are read, and those of both scripts.

Their command lines can be pasted after ours. A flag of theirs is in one row of a table:

    renamed     another name for a flag of ours             --load DIR                 is --ckpt DIR
    allowed     may only have values that mean what         --normalization RMSNorm    is accepted
                this program does
    harmless    changes no result, and why                  --use-flash-attn
    refused     is not done here, and what is instead       --load-8bit
    numbers     a number that the checkpoint says itself    --num-layers 32            must be right

Any other flag is unknown, and an error.
"""

from argparse import SUPPRESS
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from minillama.cli import Parser
from minillama.compat.training_flags import LLAMA_TOKENIZERS, Allowed
from minillama.errors import UserError
from minillama.llama_config import LlamaConfig


@dataclass(frozen=True)
class FlagTable:
    """The flags of other systems that one script reads beside its own."""

    renamed: Mapping[str, str]  # their name -> ours, and its value where it is fixed
    allowed: Mapping[str, Allowed]
    harmless: Mapping[str, str]  # flag -> why it changes no result
    refused: Mapping[str, str]  # flag -> what to use instead
    numbers: tuple[str, ...]  # see SHAPE and CONTEXT
    others: tuple[str, ...]  # these need more than a table

    @property
    def names(self) -> list[str]:
        """All flags but the renamed ones."""
        return [*self.allowed, *self.harmless, *self.refused, *self.numbers, *self.others]

    def add_to(self, parser: Parser) -> None:
        """Let a parser accept the flags, which `--help` leaves out."""
        parser.renamed |= self.renamed
        for name in self.names:
            parser.add_argument(f"--{name}", nargs="*", help=SUPPRESS)

    def given(self, flags: Mapping[str, Any]) -> dict[str, str]:
        """The values of the flags that were given; one without a value is "true".

        Raises UserError for a flag that is refused, and for a value that is not allowed.
        """
        values = {}
        for name in self.names:
            words = flags.get(name)
            if words is not None:
                values[name] = " ".join(words) if words else "true"
        for name, value in values.items():
            if name in self.refused:
                raise UserError(f"--{name} is not supported: {self.refused[name]}")
            if name in self.allowed and value.lower() not in self.allowed[name].values:
                raise UserError(f"--{name} {value} is not supported: {self.allowed[name].reason}")
        return values


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
    "normalization": Allowed(("rmsnorm",), "LLaMA has RMSNorm"),
    "tokenizer_type": Allowed(LLAMA_TOKENIZERS, "--tokenizer FILE names LLaMA's tokenizer"),
}
ORDER_OF_SUMS = "another order of the same sums; --ops chooses"
HARMLESS = {
    "flash_attn": ORDER_OF_SUMS,
    "use_flash_attn": ORDER_OF_SUMS,
    "use_flash_attention_2": ORDER_OF_SUMS,
    "use_fused_rmsnorm": ORDER_OF_SUMS,
    "use_fused_rotary_pos_emb": ORDER_OF_SUMS,
    "mlp_layer_fusion": ORDER_OF_SUMS,
    "no_masked_softmax_fusion": ORDER_OF_SUMS,
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
    "tokenizer_not_use_fast": "both tokenizers of transformers have the same ids",
    "use_fast_tokenizer": "both tokenizers of transformers have the same ids",
    "local_rank": "the launcher's environment says it",
    "low_cpu_mem_usage": "weights are always read tensor by tensor",
    "trust_remote_code": "nothing of a checkpoint is executed",
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


def whole_number(name: str, text: str) -> int:
    """The value of a flag that is a whole number from 0."""
    if not text.isdecimal():
        raise UserError(f"--{name} {text}: expected a whole number")
    return int(text)


def truth(name: str, text: str) -> bool:
    """The value of a flag that is true or false."""
    if text.lower() not in ("true", "false"):
        raise UserError(f"--{name} {text}: expected True or False")
    return text.lower() == "true"
