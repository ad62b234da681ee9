"""Bring in any released LLaMA, change its layout, and prove that nothing was lost.

    python convert.py SUBCOMMAND --help      is the manual of a subcommand

    meta         Meta's consolidated.*.pth -> Hugging Face, and back with --reverse
    apply-delta  base + delta = target (Vicuna)
    make-delta   target - base = delta
    merge-lora   fold LoRA adapters into their base
    tokenizer    append a SentencePiece vocabulary to LLaMA's
    sha256       write or check a manifest: which files, and which weights, are the same

Examples
    python convert.py meta --input llama-7b/ --output llama-7b-hf
    python convert.py apply-delta --base llama-7b-hf --delta vicuna-7b-delta-v1.1 --output vicuna-7b
    python convert.py merge-lora --base llama-7b-hf --lora chinese-llama-plus --lora chinese-alpaca-plus --output merged
    python convert.py sha256 merged --check merged-elsewhere/manifest.json

Every weight conversion goes tensor by tensor: its memory does not grow with the model. Output is complete or absent.
"""

import argparse
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from minillama import errors
from minillama.config import Parser
from minillama.errors import UserError, closest

if TYPE_CHECKING:  # imported where it is used, so that --help need not load torch
    from minillama.conversion.output import Output

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def main(argv: list[str]) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that unfinished output is removed
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
    elif argv[0] in SUBCOMMANDS:
        SUBCOMMANDS[argv[0]](argv[1:])
    else:
        raise UserError(f"unknown subcommand {argv[0]!r}{closest(argv[0], SUBCOMMANDS)}; choose one of: {', '.join(SUBCOMMANDS)}")


def meta(argv: list[str]) -> None:
    """Meta's layout (consolidated.*.pth, params.json) to Hugging Face's, or back.

    Reads any number of shards, all heads alike or grouped, and either way of cutting the embedding. Every file is read with
    an unpickler that executes nothing.

    Examples
        python convert.py meta --input llama-2-13b/ --output llama-2-13b-hf
        python convert.py meta --reverse --input llama-2-13b-hf --output llama-2-13b-meta --shards 2
    """
    parser = _parser(meta, output=True)
    parser.add_argument("--input", type=Path, required=True, metavar="DIR", help="Meta's, or with --reverse Hugging Face's")
    parser.add_argument("--reverse", action="store_true", help="Hugging Face to Meta")
    parser.add_argument("--shards", type=_positive, default=0, metavar="N",
                        help="with --reverse: files to write [as Meta: 1; 13B 2, 33B 4, 65B and 70B 8]")
    parser.add_argument("--tokenizer", default="", metavar="FILE", help="tokenizer.model [in the input directory or its parent]")
    parser.add_argument("--max_seq_len", type=_positive, default=0, metavar="N",
                        help="context length, which Meta's files do not hold [LLaMA-1 2048, LLaMA-2 4096, CodeLlama 16384]")
    flags = parser.parse_args(argv)
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
    parser = _parser(apply_delta, output=True)
    parser.add_argument("--base", type=Path, required=True, metavar="DIR", help="the original LLaMA, a Hugging Face directory")
    parser.add_argument("--delta", type=Path, required=True, metavar="DIR", help="the published difference, likewise")
    flags = parser.parse_args(argv)
    from minillama.conversion import delta
    delta.apply_delta(flags.base, flags.delta, _output(flags))


def make_delta(argv: list[str]) -> None:
    """delta = target - base: what may be published where the base may not.

    Example
        python convert.py make-delta --base llama-13b-hf --target my-13b --output my-13b-delta
    """
    parser = _parser(make_delta, output=True)
    parser.add_argument("--base", type=Path, required=True, metavar="DIR", help="the original LLaMA, a Hugging Face directory")
    parser.add_argument("--target", type=Path, required=True, metavar="DIR", help="the fine-tuned model, likewise")
    flags = parser.parse_args(argv)
    from minillama.conversion import delta
    delta.make_delta(flags.base, flags.target, _output(flags))


def merge_lora(argv: list[str]) -> None:
    """W + (alpha / r)·B·A for every adapted W, in fp32, rounded once to the output's dtype.

    Takes PEFT adapters of any age (adapter_model.safetensors or .bin, or a raw training state beside adapter_config.json),
    several in order, with grown vocabularies. Every key of an adapter is used exactly once, or it is an error. Prints, per
    layer, how much the weights changed, and by how much merged and unmerged layers differ on random hidden states.

    Examples
        python convert.py merge-lora --base llama-7b-hf --lora runs/a/final --output merged
        python convert.py merge-lora --base llama-7b-hf --lora chinese-llama-plus --lora chinese-alpaca-plus --output m
    """
    parser = _parser(merge_lora, output=True)
    parser.add_argument("--base", type=Path, required=True, metavar="DIR", help="the model the first adapter was trained on")
    parser.add_argument("--lora", type=Path, action="append", required=True, metavar="DIR", help="adapter; repeat for several")
    parser.add_argument("--format", choices=("hf", "meta"), default="hf", help="layout of the output: hf, meta [hf]")
    parser.add_argument("--shards", type=_positive, default=0, metavar="N", help="with --format meta: files [as Meta does]")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "npu", "mlu", "tpu"),
                        help="where B·A is computed: auto, cpu, cuda, npu, mlu, tpu [auto]")
    parser.add_argument("--seed", type=int, default=0, help="of the random hidden states of the check [0]")
    flags = parser.parse_args(argv)
    from minillama import device
    from minillama.conversion import merge
    merge.merge_lora(flags.base, flags.lora, _output(flags), meta=flags.format == "meta", shards=flags.shards,
                     device=device.pick(flags.device), seed=flags.seed)


def tokenizer(argv: list[str]) -> None:
    """LLaMA's tokenizer.model with the pieces of another SentencePiece model appended: how Chinese-LLaMA's was made.

    Example
        python convert.py tokenizer --base llama/tokenizer.model --add chinese_sp.model --output merged.model
    """
    parser = _parser(tokenizer)
    parser.add_argument("--base", type=Path, required=True, metavar="FILE", help="the tokenizer.model that keeps its ids")
    parser.add_argument("--add", type=Path, required=True, metavar="FILE", help="the model whose new pieces are appended")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the merged tokenizer.model")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    flags = parser.parse_args(argv)
    from minillama.conversion.output import write_file
    from minillama.tokenizer import merge_vocabularies, open_tokenizer
    before = open_tokenizer(flags.base).size
    write_file(flags.output, merge_vocabularies(flags.base, flags.add), flags.overwrite)
    merged = open_tokenizer(flags.output)
    print(f"{flags.output}: {before} + {merged.size - before} = {merged.size} pieces, sha256 {merged.sha256}")


def sha256(argv: list[str]) -> None:
    """Write DIR/manifest.json (sha256 of every file and tensor, and of the content as a whole), or compare with one.

    The content fingerprint covers names, dtypes, shapes and bytes of the tensors, not files: it is the same for safetensors
    and .bin, one shard or many, Meta's layout or Hugging Face's.

    Examples
        python convert.py sha256 vicuna-7b                                 # writes vicuna-7b/manifest.json
        python convert.py sha256 vicuna-7b --check downloaded/manifest.json
        python convert.py sha256 vicuna-7b --check vicuna-7b-elsewhere     # names the first tensor that differs, and by how much
    """
    parser = _parser(sha256)
    parser.add_argument("directory", type=Path, metavar="DIR", help="a checkpoint: Hugging Face's layout, Meta's, or an adapter")
    parser.add_argument("--check", type=Path, metavar="FILE|DIR", help="compare with a manifest or checkpoint; writes nothing")
    flags = parser.parse_args(argv)
    from minillama.conversion.fingerprint import check, write_manifest
    if flags.check:
        print("\n".join(check(flags.directory, flags.check)))
    else:
        print(f"{flags.directory}: content {write_manifest(flags.directory)}")


SUBCOMMANDS = {"meta": meta, "apply-delta": apply_delta, "make-delta": make_delta, "merge-lora": merge_lora,
               "tokenizer": tokenizer, "sha256": sha256}


def _parser(subcommand: Callable[[list[str]], None], output: bool = False) -> Parser:
    """A parser whose help is the subcommand's docstring. output: with the flags of everything that writes weights."""
    lines = subcommand.__doc__.strip().splitlines()
    text = "\n".join([lines[0], *(line.removeprefix("    ") for line in lines[1:])])
    parser = Parser(prog=f"convert.py {subcommand.__name__.replace('_', '-')}", description=text)
    if output:
        parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory to write; complete or absent")
        parser.add_argument("--overwrite", action="store_true", help="replace an existing output, once the new one is complete")
        parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the output [as the input]")
        parser.add_argument("--max_shard_size", type=_size, default=_size("5GB"), metavar="SIZE",
                            help="largest file of Hugging Face's layout: 5GB, 500MB, 2GiB, … [5GB]")
        parser.add_argument("--bin", action="store_true", help="write pytorch_model*.bin instead of safetensors")
        parser.add_argument("--verbose", action="store_true", help="print each tensor")
    return parser


def _output(flags: argparse.Namespace) -> "Output":
    from minillama.conversion.output import Output
    from minillama.device import DTYPES
    dtype = DTYPES[flags.dtype] if flags.dtype else None
    return Output(flags.output, flags.overwrite, dtype, flags.max_shard_size, flags.bin, flags.verbose)


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if not match or match[2].upper() not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


if __name__ == "__main__":
    errors.run(main)
