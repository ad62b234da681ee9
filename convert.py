"""Bring in any released LLaMA, change its layout, and prove that nothing was lost.

    python convert.py SUBCOMMAND --help      is the manual of a subcommand, with its examples

Example
    python convert.py apply-delta --base llama-7b-hf --delta vicuna-7b-delta-v1.1 --output vicuna-7b

Every weight conversion goes tensor by tensor: its memory does not grow with the model. Output is complete or absent.
"""

import argparse
import inspect
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from minillama import cli, threads
from minillama.cli import Parser, parse_bool
from minillama.compat.flags import CONVERSION
from minillama.errors import UserError, closest
from minillama.train_config import DEVICES

if TYPE_CHECKING:  # imported where it is used, so that --help and data need not load torch
    from minillama.conversion.writer import Output


def main(argv: list[str]) -> None:
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # an exception, so that unfinished output is removed
    if not argv or argv[0] in ("-h", "--help"):
        print(
            __doc__,
            "Subcommands",
            *(
                f"    {name:12} {made.__doc__.splitlines()[0]}"
                for name, made in SUBCOMMANDS.items()
            ),
            sep="\n",
        )
    elif argv[0] in SUBCOMMANDS:
        SUBCOMMANDS[argv[0]](argv[1:])
    else:
        raise UserError(
            f"unknown subcommand {argv[0]!r}{closest(argv[0], SUBCOMMANDS)}; choose one of: {', '.join(SUBCOMMANDS)}"
        )


def meta(argv: list[str]) -> None:
    """Meta's layout (consolidated.*.pth, params.json) to Hugging Face's, or back.

    Reads any number of shards, all heads alike or grouped, either way of cutting the embedding, and executes nothing.

    Examples
        python convert.py meta --input llama-2-13b/ --output llama-2-13b-hf
        python convert.py meta --reverse --input llama-2-13b-hf --output llama-2-13b-meta --shards 2
    """
    parser = _parser(meta, OUTPUT, input="Meta's directory, or with --reverse Hugging Face's")
    add = parser.add_argument
    add("--reverse", action="store_true", help="Hugging Face to Meta")
    add(
        "--shards",
        type=_positive,
        default=0,
        metavar="N",
        help="with --reverse: files [as Meta: 1; 13B 2, 33B 4, 65B and 70B 8]",
    )
    add(
        "--tokenizer",
        default="",
        metavar="FILE",
        help="tokenizer.model [in the input directory or its parent]",
    )
    add(
        "--max_seq_len",
        type=_positive,
        default=0,
        metavar="N",
        help="context length [LLaMA-1 2048, LLaMA-2 4096, CodeLlama 16384]",
    )
    flags = parser.parse_args(argv)
    parser.refuse(
        flags,
        *(
            ("with --reverse", ("tokenizer", "max_seq_len"))
            if flags.reverse
            else ("without --reverse", ("shards",))
        ),
    )
    from minillama.conversion.meta import hf_to_meta, meta_to_hf

    if flags.reverse:
        hf_to_meta(flags.input, _output(flags), flags.shards)
    else:
        meta_to_hf(flags.input, _output(flags), flags.tokenizer, flags.max_seq_len)


def apply_delta(argv: list[str]) -> None:
    """target = base + delta, as FastChat computes it, bit for bit (fp16: add --dtype float16 where the base is not).

    Prints both sides first and refuses what does not belong together. A delta with more rows than the base (Vicuna v0) is
    added to a base extended by zeros.

    Example
        python convert.py apply-delta --base llama-13b-hf --delta vicuna-13b-delta-v1.1 --output vicuna-13b
    """
    flags = _parser(
        apply_delta, OUTPUT, base=ORIGINAL, delta="the published difference, likewise"
    ).parse_args(argv)
    from minillama.conversion import delta

    delta.apply_delta(flags.base, flags.delta, _output(flags))


def make_delta(argv: list[str]) -> None:
    """delta = target - base: what may be published where the base may not.

    Example
        python convert.py make-delta --base llama-13b-hf --target my-13b --output my-13b-delta
    """
    flags = _parser(
        make_delta, OUTPUT, base=ORIGINAL, target="the fine-tuned model, likewise"
    ).parse_args(argv)
    from minillama.conversion import delta

    delta.make_delta(flags.base, flags.target, _output(flags))


def merge_lora(argv: list[str]) -> None:
    """W + (alpha / r)·B·A for every adapted W, in fp32, rounded once to the output's dtype.

    Takes PEFT adapters of any age (adapter_model.safetensors or .bin, or a raw training state beside adapter_config.json),
    several in order, with grown vocabularies. Every key of an adapter is used exactly once, or it is an error. Prints, per
    layer, how much the weights changed, and by how much merged and unmerged layers differ on random hidden states.

    Example
        python convert.py merge-lora --base llama-7b-hf --lora chinese-llama-plus --lora chinese-alpaca-plus --output m
    """
    parser = _parser(merge_lora, OUTPUT, base="the model the first adapter was trained on")
    add = parser.add_argument
    add(
        "--lora",
        type=Path,
        action="append",
        required=True,
        metavar="DIR",
        help="adapter; repeat for several",
    )
    add(
        "--format",
        choices=("hf", "meta"),
        default="hf",
        help="layout of the output: hf, meta [hf]",
        type=lambda name: {"huggingface": "hf", "pth": "meta"}.get(name, name),
    )
    add(
        "--shards",
        type=_positive,
        default=0,
        metavar="N",
        help="with --format meta: files [as Meta does]",
    )
    add("--device", default="auto", choices=DEVICES, help="where B·A is computed [auto]")
    add("--seed", type=int, default=0, help="of the random hidden states of the check [0]")
    flags = parser.parse_args(argv)
    if flags.format == "hf":
        parser.refuse(flags, "without --format meta", ("shards",))
    from minillama import device
    from minillama.conversion import merge

    adapters = [Path(name) for given in flags.lora for name in str(given).split(",")]
    merge.merge_lora(
        flags.base,
        adapters,
        _output(flags),
        meta=flags.format == "meta",
        shards=flags.shards,
        device=device.pick(flags.device),
        seed=flags.seed,
    )


def tokenizer(argv: list[str]) -> None:
    """LLaMA's tokenizer.model with the pieces of another SentencePiece model appended: how Chinese-LLaMA's was made.

    Example
        python convert.py tokenizer --base llama/tokenizer.model --add chinese_sp.model --output merged.model
    """
    flags = _parser(
        tokenizer,
        "the merged tokenizer.model",
        base="the tokenizer.model that keeps its ids",
        add="the model whose new pieces are appended",
    ).parse_args(argv)
    from minillama.conversion.writer import write_file
    from minillama.tokenizer import merge_vocabularies, open_tokenizer

    before = open_tokenizer(flags.base).size
    write_file(flags.output, merge_vocabularies(flags.base, flags.add), flags.overwrite)
    merged = open_tokenizer(flags.output)
    print(
        f"{flags.output}: {before} + {merged.size - before} = {merged.size} pieces, sha256 {merged.sha256}"
    )


def data(argv: list[str]) -> None:
    """Raw files to a tokenized data set, PREFIX.bin .mask .idx .json, which train.py opens as --data PREFIX.

    An input is a file, a folder, or a name in the dataset_info.json of --dataset_dir. Formats: alpaca, sharegpt and moss
    (conversations, rendered by --template), ascend, text (a document a file or record), lines (a document a line). An
    interrupted run, started again the same way, goes on where it stopped.

    Example
        python convert.py data --input alpaca.json --tokenizer llama/tokenizer.model --output my_data --template vicuna_v1.1
    """
    parser = _parser(data, "what the data set's files are called before the dot")
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="raw files or folders: .json, .jsonl, .txt, .parquet",
    )
    add(
        "--tokenizer",
        required=True,
        metavar="FILE",
        help="tokenizer.model or tokenizer.json, or a directory that holds one",
    )
    add(
        "--format",
        choices=("auto", "alpaca", "sharegpt", "moss", "ascend", "text", "lines"),
        default="auto",
        help="of the input [auto]",
    )
    add(
        "--template",
        default="alpaca",
        metavar="NAME",
        help="prompt template of conversations [alpaca]",
    )
    add("--workers", type=_positive, default=1, metavar="N", help="processes that tokenize [1]")
    add(
        "--append_eod",
        type=parse_bool,
        default=True,
        metavar="true|false",
        help="end documents with the end-of-text token [true]",
    )
    add(
        "--skip_bad_records",
        action="store_true",
        help="leave malformed records out, count and list them, instead of stopping",
    )
    add(
        "--dataset_dir",
        default="",
        metavar="DIR",
        help="folder of the dataset_info.json that names data sets",
    )
    flags = parser.parse_args(argv)
    from minillama.data.tokenize import DataOptions, build_dataset
    from minillama.tokenizer import open_tokenizer

    for existing in filter(
        Path.exists, (Path(f"{flags.output}.{part}") for part in ("json", "bin", "mask", "idx"))
    ):
        if not flags.overwrite:
            raise UserError(
                f"{existing}: already exists; --overwrite replaces the data set once the new one is complete"
            )
    started, opened = time.monotonic(), open_tokenizer(flags.tokenizer)
    made = build_dataset(
        flags.input,
        opened,
        flags.output,
        DataOptions(
            data_format=flags.format,
            template=flags.template,
            append_eod=flags.append_eod,
            skip_bad_records=flags.skip_bad_records,
            dataset_dir=flags.dataset_dir,
            workers=flags.workers,
        ),
    )
    print(
        f"{flags.output}: {made['documents']} documents, {made['tokens']} tokens, {made['targets']} targets, "
        f"{len(made['skipped_records'])} records skipped, {time.monotonic() - started:.1f} s"
    )
    model = (
        ["7b_lora", "--ckpt", "LLAMA_DIR"]
        if made["template"]
        else ["7b_pretrain", "--tokenizer", str(opened.path)]
    )
    print(
        "next: "
        + shlex.join(["python", "train.py", "--config", *model, "--data", str(flags.output)])
    )


def sha256(argv: list[str]) -> None:
    """Write DIR/manifest.json (sha256 of every file and tensor, and of the content as a whole), or compare with one.

    The content fingerprint covers names, dtypes, shapes and bytes of the tensors: any format, sharding or layout has the same.

    Examples
        python convert.py sha256 vicuna-7b                                 # writes vicuna-7b/manifest.json
        python convert.py sha256 vicuna-7b --check downloaded/manifest.json
        python convert.py sha256 vicuna-7b --check vicuna-7b-elsewhere     # names the first tensor that differs, and by how much
    """
    parser = _parser(sha256)
    parser.add_argument(
        "directory",
        type=Path,
        metavar="DIR",
        help="a checkpoint: Hugging Face's layout, Meta's, or an adapter",
    )
    parser.add_argument(
        "--check",
        type=Path,
        metavar="FILE|DIR",
        help="compare with a manifest or checkpoint; writes nothing",
    )
    flags = parser.parse_args(argv)
    from minillama.conversion.checksums import check, write_manifest

    report = (
        check(flags.directory, flags.check)
        if flags.check
        else [f"{flags.directory}: content {write_manifest(flags.directory)}"]
    )
    print("\n".join(report))


ORIGINAL = "the original LLaMA, a Hugging Face directory"
OUTPUT = "directory to write; complete or absent"  # of every subcommand that writes weights
SUBCOMMANDS = {
    "meta": meta,
    "apply-delta": apply_delta,
    "make-delta": make_delta,
    "merge-lora": merge_lora,
    "tokenizer": tokenizer,
    "data": data,
    "sha256": sha256,
}


def _parser(subcommand: Callable[[list[str]], None], output: str = "", **inputs: str) -> Parser:
    """A parser whose help is the subcommand's docstring. output and inputs: the paths it must be given, and what they are."""
    name = subcommand.__name__
    parser = Parser(
        CONVERSION.get(name),
        prog=f"convert.py {name.replace('_', '-')}",
        description=inspect.cleandoc(subcommand.__doc__),
    )
    add = parser.add_argument
    if output:
        inputs = {"output": output} | inputs
        add(
            "--overwrite",
            action="store_true",
            help="replace an existing output, once the new one is complete",
        )
    if output == OUTPUT:
        add(
            "--dtype",
            choices=("float32", "bfloat16", "float16"),
            help="of the output [as the input]",
        )
        add(
            "--max_shard_size",
            type=_size,
            default=_size("5GB"),
            metavar="SIZE",
            help="largest file of Hugging Face's layout [5GB]",
        )
        add("--bin", action="store_true", help="write pytorch_model*.bin instead of safetensors")
        add("--verbose", action="store_true", help="print each tensor")
    for name, help in inputs.items():
        add(f"--{name}", type=Path, required=True, metavar="PATH", help=help)
    return parser


def _output(flags: argparse.Namespace) -> "Output":
    from minillama.conversion.writer import Output
    from minillama.device import DTYPES

    return Output(
        flags.output,
        flags.overwrite,
        DTYPES.get(flags.dtype),
        flags.max_shard_size,
        flags.bin,
        flags.verbose,
    )


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmg])(i?)b)?", text.strip().lower())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MiB")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** (" kmg".index(prefix or " ")))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


if __name__ == "__main__":
    threads.prepare_environment()
    os.environ.setdefault(
        "THP_MEM_ALLOC_ENABLE", "1"
    )  # torch then asks for large pages, which are cleared sooner
    cli.run(main, sys.argv[1:])
