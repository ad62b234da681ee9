"""The converters of AscendSpeed and ModelLink, as subcommands of convert.py.

    tools/ckpt_convert/llama/convert_weights_from_huggingface.py     is convert.py megatron
    tools/ckpt_convert/llama/convert_weights_when_tp_pp_change.py    is convert.py reshard

Their flags for the size of the model change nothing, since config.json has it: they are compared
with it. Only where a directory of theirs has no config.json, `reshard` takes the heads from them.
"""

from argparse import SUPPRESS
from collections.abc import Mapping
from typing import Any

from minillama.cli import Parser
from minillama.compat.model_claims import size_of
from minillama.hf_config import published

# their script -> our subcommand
SUBCOMMANDS = {
    "convert_weights_from_huggingface": "megatron",
    "convert_weights_when_tp_pp_change": "reshard",
}
COMMON_FLAGS = {
    "input_model_dir": "input",
    "output_model_dir": "output",
    "make_vocab_size_divisible_by": "vocab_multiple",
    "num_layers": "n_layers",
    "num_heads": "n_heads",
    "num_kv_heads": "n_kv_heads",
    "hidden_size": "dim",
}
# our subcommand -> their flag -> ours
RENAMED = {
    "megatron": {
        **COMMON_FLAGS,
        "tensor_model_parallel_size": "tensor_parallel",
        "pipeline_model_parallel_size": "pipeline_parallel",
        "added_token_num": "added_tokens",
    },
    "reshard": {
        **COMMON_FLAGS,
        "src_tensor_model_parallel_size": "src_tensor_parallel",
        "src_pipeline_model_parallel_size": "src_pipeline_parallel",
        "tgt_tensor_model_parallel_size": "tensor_parallel",
        "tgt_pipeline_model_parallel_size": "pipeline_parallel",
        "orig_vocab_size": "vocab_size",
    },
}
NUMBERS = ("n_layers", "dim", "n_heads", "n_kv_heads")
# what their --type may be; with other names they need the flags for NUMBERS
TYPES = ("7b", "13b", "30b", "65b")


def add_number_flags(parser: Parser) -> None:
    """Let a parser accept their flags for the size of a model, which `--help` leaves out."""
    parser.add_argument("--type", default="", help=SUPPRESS)
    for name in NUMBERS:
        parser.add_argument(f"--{name}", type=int, help=SUPPRESS)


def numbers_of(flags: Mapping[str, Any]) -> dict[str, int]:
    """Return those of NUMBERS that flags name."""
    numbers = {}
    if flags["type"].lower() in TYPES:
        size = published(size_of(flags["type"]))
        numbers = {name: getattr(size, name) for name in NUMBERS}
    for name in NUMBERS:
        if flags[name] is not None:
            numbers[name] = flags[name]
    return numbers
