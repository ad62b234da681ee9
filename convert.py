"""Bring in any released LLaMA, change its layout, and prove that nothing was lost.

    python convert.py SUBCOMMAND --help      is the manual of a subcommand, with its examples

The scripts of FastChat, AscendSpeed, Chinese-LLaMA-Alpaca and transformers are subcommands too, by
name or path, with their own flags: docs/commands.md.

Example
    python convert.py apply-delta --base llama-7b-hf --delta vicuna-7b-delta-v1.1 --output vicuna-7b

Every conversion of weights goes tensor by tensor: its memory does not grow with the model. The
output is complete or absent.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from minillama import cli, threads
from minillama.compat import conversion as other_systems
from minillama.compat.megatron import numbers_of
from minillama.conversion import command_line
from minillama.errors import UserError, closest
from minillama.options import from_flags

if TYPE_CHECKING:  # imported where it is used, so that --help and data need not load torch
    from minillama.conversion.writer import Output


HF_LAYOUT = ("bin", "max_shard_size")  # flags of Hugging Face's layout, which Meta's has not


def main(arguments: list[str]) -> None:
    """Run the subcommand that the first argument names, with the other arguments."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print_help()
        return
    name = other_systems.subcommand_of(arguments[0])
    if name not in SUBCOMMANDS:
        raise UserError(
            f"unknown subcommand {name!r}{closest(name, SUBCOMMANDS)}; "
            f"choose one of: {', '.join(SUBCOMMANDS)}"
        )
    with exit_on_sigterm():
        defaults = other_systems.defaults_of(arguments[0], arguments[1:])
        if defaults:
            print(f"note: {' '.join(defaults)}, as {arguments[0]} has it; {defaults[0]} changes it")
        SUBCOMMANDS[name]([*defaults, *arguments[1:]])


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """While the block runs, SIGTERM raises SystemExit, so that unfinished output is removed."""

    def handle(signal_number: int, frame: object) -> None:
        sys.exit(128 + signal_number)

    previous = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def print_help() -> None:
    print(__doc__)
    print("Subcommands")
    for name, new_parser in command_line.PARSERS.items():
        summary = (new_parser.__doc__ or "").splitlines()[0]
        print(f"    {name:14} {summary}")


def meta(arguments: list[str]) -> None:
    parser = command_line.meta()
    flags = parser.parse_args(arguments)
    if flags.reverse:
        not_of_meta = ("tokenizer", "max_seq_len", "model_size", *HF_LAYOUT)
        parser.refuse(flags, "with --reverse", not_of_meta)
    else:
        parser.refuse(flags, "without --reverse", ("shards",))
    from minillama.conversion.meta import hf_to_meta, meta_to_hf

    output = output_of(flags)
    if flags.reverse:
        print(hf_to_meta(flags.input, output, flags.shards))
    else:
        source = other_systems.meta_directory(flags.input, flags.model_size)
        print(meta_to_hf(source, output, flags.tokenizer, flags.max_seq_len))


def megatron(arguments: list[str]) -> None:
    flags = command_line.megatron().parse_args(arguments)
    from minillama.conversion.megatron import hf_to_megatron
    from minillama.conversion.megatron_layout import MegatronOptions

    options = from_flags(MegatronOptions, vars(flags))
    numbers = numbers_of(vars(flags))
    print(hf_to_megatron(flags.input, output_of(flags), options, flags.bias, numbers))


def from_megatron(arguments: list[str]) -> None:
    flags = command_line.from_megatron().parse_args(arguments)
    from minillama.conversion.megatron import megatron_to_hf

    options = (flags.config, flags.vocab_size, flags.lora_alpha)
    print(megatron_to_hf(flags.input, output_of(flags), *options))


def reshard(arguments: list[str]) -> None:
    flags = command_line.reshard().parse_args(arguments)
    from minillama.conversion import megatron
    from minillama.conversion.megatron_layout import MegatronOptions

    megatron.check_source_grid(flags.input, flags.src_tensor_parallel, flags.src_pipeline_parallel)
    report = megatron.reshard(
        flags.input,
        output_of(flags),
        from_flags(MegatronOptions, vars(flags)),
        flags.config,
        flags.vocab_size,
        numbers_of(vars(flags)),
    )
    print(report)


def apply_delta(arguments: list[str]) -> None:
    flags = command_line.apply_delta().parse_args(arguments)
    from minillama.conversion import delta

    print(delta.compare(flags.base, flags.delta, "delta"))
    print(delta.apply_delta(flags.base, flags.delta, output_of(flags)))


def make_delta(arguments: list[str]) -> None:
    flags = command_line.make_delta().parse_args(arguments)
    from minillama.conversion import delta

    print(delta.compare(flags.base, flags.target, "target"))
    print(delta.make_delta(flags.base, flags.target, output_of(flags)))


def merge_lora(arguments: list[str]) -> None:
    parser = command_line.merge_lora()
    flags = parser.parse_args(arguments)
    if flags.format == "hf":
        parser.refuse(flags, "without --format meta", ("shards",))
    else:
        parser.refuse(flags, "with --format meta", HF_LAYOUT)
    from minillama import device
    from minillama.conversion import merge

    adapters = []
    for names in flags.lora:  # Chinese-LLaMA-Alpaca's script separates adapters by commas
        adapters += [Path(name) for name in str(names).split(",")]
    report = merge.merge_lora(
        flags.base,
        adapters,
        output_of(flags),
        meta=flags.format == "meta",
        num_shards=flags.shards,
        device=device.pick(flags.device),
        seed=flags.seed,
    )
    print(report)


def tokenizer(arguments: list[str]) -> None:
    flags = command_line.tokenizer().parse_args(arguments)
    from minillama.conversion.vocabulary import merge_tokenizers

    print(merge_tokenizers(flags.base, flags.add, flags.output, flags.overwrite))


def data(arguments: list[str]) -> None:
    flags = command_line.data().parse_args(arguments)
    from minillama.conversion.dataset import tokenize_files
    from minillama.data.tokenize import DataOptions

    request = other_systems.preprocessing(vars(flags))
    note = other_systems.preprocessing_note(vars(flags))
    if note:
        print(note)
    options = DataOptions(
        data_format=request["format"],
        template=request["template"],
        append_eod=flags.append_eod is not False,
        skip_bad_records=flags.skip_bad_records,
        max_dropped=flags.max_dropped,
        dataset_dir=flags.dataset_dir,
        workers=flags.workers,
    )
    prefix = request["output"]
    print(tokenize_files(flags.input, flags.tokenizer, prefix, options, flags.overwrite))


def sha256(arguments: list[str]) -> None:
    flags = command_line.sha256().parse_args(arguments)
    from minillama.conversion.checksums import check, write_manifest

    if flags.check:
        print(check(flags.directory, flags.check))
    else:
        print(write_manifest(flags.directory))


SUBCOMMANDS: dict[str, Callable[[list[str]], None]] = {
    "meta": meta,
    "megatron": megatron,
    "from-megatron": from_megatron,
    "reshard": reshard,
    "apply-delta": apply_delta,
    "make-delta": make_delta,
    "merge-lora": merge_lora,
    "tokenizer": tokenizer,
    "data": data,
    "sha256": sha256,
}


def output_of(flags: argparse.Namespace) -> "Output":
    """Return where and how to write weights."""
    from minillama.conversion.writer import Output
    from minillama.device import DTYPES

    return Output(
        path=flags.output,
        overwrite=flags.overwrite,
        dtype=DTYPES.get(flags.dtype),
        max_shard_bytes=getattr(flags, "max_shard_size", 0),  # Megatron's files have no such flags
        bin=getattr(flags, "bin", False),
        verbose=flags.verbose,
    )


if __name__ == "__main__":
    threads.prepare_environment()
    # torch then asks for large pages, which the system clears sooner
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    cli.run(main, sys.argv[1:])
