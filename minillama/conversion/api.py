"""The Python API of conversions: functions with the names and keywords of convert.py's subcommands.

    minillama.merge_lora("llama-7b-hf", ["adapter"], "merged", dtype="float16")

Every function that writes takes the keywords of `WriteOptions`. Each returns what the subcommand
prints, as a dataclass. Two names differ, because `minillama.data` and `minillama.tokenizer` are
modules: `tokenize_data` and `merge_tokenizers`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillama import device as devices
from minillama.conversion import checksums, merge, vocabulary
from minillama.conversion import delta as deltas
from minillama.conversion.checksums import Equality, WrittenManifest
from minillama.conversion.dataset import TokenizedDataset, tokenize_files
from minillama.conversion.merge import MergeReport
from minillama.conversion.meta import hf_to_meta, meta_to_hf
from minillama.conversion.published_hashes import PublishedMatch
from minillama.conversion.vocabulary import MergedTokenizer
from minillama.conversion.writer import Conversion, Output
from minillama.data.tokenize import DataOptions
from minillama.errors import UserError, closest
from minillama.options import from_keywords
from minillama.output_directory import GB

DirectoryOrFile = str | Path


@dataclass(frozen=True)
class WriteOptions:
    """How a conversion writes. The names are those of convert.py's flags."""

    overwrite: bool = False  # replace an existing checkpoint, once the new one is complete
    dtype: str = ""  # of the output; "": as the input
    max_shard_size: int = 5 * GB  # bytes of a file in Hugging Face's layout
    bin: bool = False  # pytorch_model.bin instead of model.safetensors
    verbose: bool = False  # print each tensor to stderr


def open_output(path: DirectoryOrFile, keywords: Mapping[str, Any]) -> Output:
    """An `Output` from the keywords of `WriteOptions`."""
    options = from_keywords(WriteOptions, keywords)
    if options.dtype and options.dtype not in devices.DTYPES:
        known = closest(options.dtype, devices.DTYPES)
        raise UserError(f"no dtype {options.dtype!r}{known}; {', '.join(devices.DTYPES)}")
    return Output(
        path=Path(path),
        overwrite=options.overwrite,
        dtype=devices.DTYPES.get(options.dtype),
        max_shard_bytes=options.max_shard_size,
        bin=options.bin,
        verbose=options.verbose,
    )


def meta(
    input: DirectoryOrFile,
    output: DirectoryOrFile,
    *,
    reverse: bool = False,
    shards: int = 0,
    tokenizer: DirectoryOrFile = "",
    max_seq_len: int = 0,
    **options: Any,
) -> Conversion:
    """Convert Meta's layout to Hugging Face's, or with `reverse` back, into `shards` files."""
    target = open_output(output, options)
    if reverse:
        if tokenizer or max_seq_len:
            raise UserError("tokenizer and max_seq_len have no meaning with reverse=True")
        return hf_to_meta(Path(input), target, shards)
    if shards:
        raise UserError("shards has no meaning without reverse=True")
    return meta_to_hf(Path(input), target, tokenizer, max_seq_len)


def megatron(
    input: DirectoryOrFile,
    output: DirectoryOrFile,
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    merge_mlp: bool = False,
    deepspeed: bool = False,
    bias: bool = False,
    vocab_multiple: int = 128,
    added_tokens: int = 0,
    **options: Any,
) -> Conversion:
    """Convert Hugging Face's layout to Megatron's, for a grid of ranks."""
    from minillama.conversion.megatron import hf_to_megatron
    from minillama.conversion.megatron_layout import MegatronOptions

    cut = MegatronOptions(
        tensor_parallel, pipeline_parallel, deepspeed, merge_mlp, vocab_multiple, added_tokens
    )
    return hf_to_megatron(Path(input), open_output(output, options), cut, bias)


def from_megatron(
    input: DirectoryOrFile,
    output: DirectoryOrFile,
    *,
    config: DirectoryOrFile = "",
    vocab_size: int = 0,
    lora_alpha: float = 0.0,
    **options: Any,
) -> Conversion:
    """Convert Megatron's layout to Hugging Face's, or a LoRA run's to PEFT's."""
    from minillama.conversion.megatron import megatron_to_hf

    target = open_output(output, options)
    return megatron_to_hf(Path(input), target, config, vocab_size, lora_alpha)


def reshard(
    input: DirectoryOrFile,
    output: DirectoryOrFile,
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    merge_mlp: bool = False,
    deepspeed: bool = False,
    vocab_multiple: int = 128,
    config: DirectoryOrFile = "",
    vocab_size: int = 0,
    **options: Any,
) -> Conversion:
    """Cut Megatron's files anew, for another number of ranks."""
    from minillama.conversion import megatron
    from minillama.conversion.megatron_layout import MegatronOptions

    cut = MegatronOptions(tensor_parallel, pipeline_parallel, deepspeed, merge_mlp, vocab_multiple)
    target = open_output(output, options)
    return megatron.reshard(Path(input), target, cut, config, vocab_size)


def apply_delta(
    base: DirectoryOrFile, delta: DirectoryOrFile, output: DirectoryOrFile, **options: Any
) -> Conversion:
    """Write target = base + delta."""
    return deltas.apply_delta(Path(base), Path(delta), open_output(output, options))


def make_delta(
    base: DirectoryOrFile, target: DirectoryOrFile, output: DirectoryOrFile, **options: Any
) -> Conversion:
    """Write delta = target - base."""
    return deltas.make_delta(Path(base), Path(target), open_output(output, options))


def merge_lora(
    base: DirectoryOrFile,
    lora: Sequence[DirectoryOrFile],
    output: DirectoryOrFile,
    *,
    format: str = "hf",
    shards: int = 0,
    device: str = "auto",
    seed: int = 0,
    **options: Any,
) -> MergeReport:
    """Merge the adapters `lora`, in order, into `base`.

    format: "hf", or "meta" in `shards` files.
    """
    if format not in ("hf", "meta"):
        raise UserError(f"format {format!r}: must be hf or meta")
    if shards and format == "hf":
        raise UserError('shards has no meaning without format="meta"')
    return merge.merge_lora(
        Path(base),
        [Path(adapter) for adapter in lora],
        open_output(output, options),
        meta=format == "meta",
        num_shards=shards,
        device=devices.pick(device),
        seed=seed,
    )


def sha256(
    directory: DirectoryOrFile, check: DirectoryOrFile = ""
) -> WrittenManifest | Equality | PublishedMatch:
    """Write DIR/manifest.json, or compare with a manifest, a directory or a published list."""
    if check:
        return checksums.check(Path(directory), Path(check))
    return checksums.write_manifest(Path(directory))


def tokenize_data(
    input: Sequence[DirectoryOrFile],
    tokenizer: DirectoryOrFile,
    output: DirectoryOrFile,
    *,
    overwrite: bool = False,
    **options: Any,
) -> TokenizedDataset:
    """Write the tokenized data set `output`, a PREFIX.

    options: data_format, template, append_eod, …; see `DataOptions`.
    """
    data_options = from_keywords(DataOptions, options)
    return tokenize_files(input, tokenizer, Path(output), data_options, overwrite)


def merge_tokenizers(
    base: DirectoryOrFile, add: DirectoryOrFile, output: DirectoryOrFile, *, overwrite: bool = False
) -> MergedTokenizer:
    """Write the tokenizer.model `base` with the new tokens of `add` appended."""
    return vocabulary.merge_tokenizers(Path(base), Path(add), Path(output), overwrite)
