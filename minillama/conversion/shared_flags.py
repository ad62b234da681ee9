"""Flags that several subcommands of convert.py share, and the types of their values."""

import argparse
import inspect
import re
from collections.abc import Callable
from pathlib import Path

from minillama.cli import Parser
from minillama.compat import conversion as other_systems
from minillama.compat import megatron as compat_megatron

WEIGHTS_DIRECTORY = "directory to write; complete or absent"
DTYPES = ("float32", "bfloat16", "float16")
UNIT_PREFIXES = " kmg"  # powers of 1000, or of 1024 before iB


def parse_share(text: str) -> float:
    """Return a number from 0 to below 1, for argparse."""
    share = float(text)
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0 and below 1")
    return share


def parse_size(text: str) -> int:
    """Return the bytes of a size such as 5GB or 500MiB, for argparse."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmg])(i?)b)?", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MiB")
    number, prefix, binary = match.groups()
    unit = 1024 if binary else 1000
    power = UNIT_PREFIXES.index(prefix or " ")
    return int(float(number) * unit**power)


def parse_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def new_parser(subcommand: Callable[[], Parser]) -> Parser:
    name = subcommand.__name__
    program = f"convert.py {name.replace('_', '-')}"
    parser = Parser(prog=program, description=inspect.getdoc(subcommand))
    other_systems.add_flags(parser, name)
    return parser


def add_path(parser: Parser, flag: str, help: str) -> None:
    parser.add_argument(flag, type=Path, required=True, metavar="PATH", help=help)


def add_count(parser: Parser, flag: str, help: str, default: int = 0) -> None:
    parser.add_argument(flag, type=parse_count, default=default, metavar="N", help=help)


def add_output(parser: Parser, help: str) -> None:
    add_overwrite(parser)
    add_path(parser, "--output", help)


def add_overwrite(parser: Parser) -> None:
    overwrite = "replace an existing output, once the new one is complete"
    parser.add_argument("--overwrite", action="store_true", help=overwrite)


def add_weights_output(parser: Parser) -> None:
    """Add the flags of every subcommand that writes weights in Hugging Face's layout."""
    add_tensor_output(parser)
    add = parser.add_argument
    size = "largest file of Hugging Face's layout [5GB]"
    add("--max_shard_size", type=parse_size, default=parse_size("5GB"), metavar="SIZE", help=size)
    add("--bin", action="store_true", help="write pytorch_model*.bin instead of safetensors")


def add_tensor_output(parser: Parser) -> None:
    add_output(parser, WEIGHTS_DIRECTORY)
    parser.add_argument("--dtype", choices=DTYPES, help="of the output [as the input]")
    parser.add_argument("--verbose", action="store_true", help="print each tensor")


def add_megatron_output(parser: Parser) -> None:
    add_tensor_output(parser)
    compat_megatron.add_number_flags(parser)
    add_count(parser, "--tensor_parallel", "TP: ranks that cut each tensor [1]", default=1)
    add_count(parser, "--pipeline_parallel", "PP: stages of layers [1]", default=1)
    multiple = "rows of a rank's vocabulary: a multiple of this [128]"
    add_count(parser, "--vocab_multiple", multiple, default=128)
    add = parser.add_argument
    add("--merge_mlp", action="store_true", help="gate and up as one tensor")
    add("--deepspeed", action="store_true", help="DeepSpeed's names of files")


def add_megatron_input(parser: Parser) -> None:
    files = "Megatron's directory, or the folder of an iteration"
    add_path(parser, "--input", files)
    config = "the model it came from: config.json, its directory, or 7b, … [beside the files]"
    parser.add_argument("--config", default="", metavar="DIR", help=config)
    add_count(parser, "--vocab_size", "rows of the vocabulary to keep [as config.json says]")
