"""How every conversion writes: one tensor at a time, and all or nothing.

A conversion is a dictionary of lazy tensors. Each has a dtype, a shape and `read()`. It is either a
`TensorRef` of a file, or a `LazyTensor` that computes its value when `read` is called.

    headers of the inputs ──▶ names, dtypes, shapes ──▶ is the disk large enough?
        ──▶ for each tensor: read, compute, write, forget ──▶ fsync, rename: the output exists

The whole output is known before the first byte is written. So the free disk space is checked first,
and headers are written first. Memory holds one or two tensors, whatever the size of the model. A
conversion that is killed leaves what was there before (output_directory.py).
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minillama.checkpoint.hf_writer import write_configs, write_weights
from minillama.checkpoint.stop_tokens import write_stop_ids
from minillama.checkpoint.template_files import JINJA_FILE
from minillama.checkpoint.tokenizer_files import copy_tokenizer, has_tokenizer
from minillama.conversion.tokenizer_companions import complete_tokenizer
from minillama.files import read_json, write_bytes, write_json
from minillama.llama_config import LlamaConfig
from minillama.memory import peak_resident_bytes
from minillama.output_directory import GB, new_directory, refuse_overlap
from minillama.tensor_files import TensorRef
from minillama.tensor_writers import TensorSpecs

# A directory with one of these files is a checkpoint, which --overwrite may replace.
CHECKPOINT_FILES = ("config.json", "params.json", "adapter_config.json", "manifest.json")
# Megatron's directory has its weights in the folder RELEASE, and one of these files beside it.
RELEASE = "release"
TRACKERS = ("latest_checkpointed_iteration.txt", "latest")


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of the output that is computed when `read` is called."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


LazyTensors = Mapping[str, TensorRef | LazyTensor]
TensorWriter = Callable[[Path, Iterator[tuple[str, Tensor]], TensorSpecs], None]


@dataclass(frozen=True)
class Output:
    """Where and how a conversion writes."""

    path: Path
    overwrite: bool = False  # replace an existing checkpoint, once the new one is complete
    dtype: torch.dtype | None = None  # None: as the input
    max_shard_bytes: int = 5 * GB  # of a file in Hugging Face's layout
    bin: bool = False  # pytorch_model.bin instead of model.safetensors
    verbose: bool = False  # print each tensor to stderr


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote. `str()` gives the lines for the user."""

    path: Path
    num_tensors: int
    num_bytes: int
    seconds: float
    peak_bytes: int | None  # resident memory of this process; None: unknown on this system
    notes: tuple[str, ...] = ()  # what the user should know about the output

    def __str__(self) -> str:
        size = f"{self.num_tensors} tensors, {self.num_bytes / GB:.3g} GB"
        summary = f"{self.path}: {size} in {self.seconds:.1f} s"
        if self.peak_bytes is not None:
            summary += f", peak memory {self.peak_bytes / GB:.2f} GB"
        return "\n".join([*self.notes, summary])


def write_checkpoint(
    output: Output,
    inputs: Sequence[Path],
    tensors: LazyTensors,
    write_other_files: Callable[[Path], None],
    write_tensors: TensorWriter | None = None,
    notes: Iterable[str] = (),
) -> Conversion:
    """Compute `tensors` and write them to a new directory.

    Args:
        inputs: what the conversion reads; none of it may be what it writes.
        write_other_files: writes config and tokenizer into the directory, after the tensors. It may
            check what was written: after a UserError there is no output.
        write_tensors: the layout of the tensors; None: Hugging Face's.
        notes: for the result.

    Raises UserError if the output is an input, may not be replaced, or cannot be written.
    """
    refuse_overlap(output.path, inputs)
    started = time.monotonic()
    specs: TensorSpecs = {
        name: (output.dtype or tensor.dtype, tensor.shape) for name, tensor in tensors.items()
    }
    num_bytes = sum(_num_bytes(specs, name) for name in specs)
    if write_tensors is None:
        max_shard_bytes = output.max_shard_bytes
        write_tensors = partial(write_weights, max_shard_bytes=max_shard_bytes, bin=output.bin)
    may_replace = _is_plain_checkpoint if output.overwrite else False
    with new_directory(output.path, may_replace, num_bytes, "conversion") as directory:
        read_in_order = _read_in_order(tensors, specs, output.verbose)
        write_tensors(directory, read_in_order, specs)
        write_other_files(directory)
        if (directory / "config.json").is_file():  # Hugging Face's layout
            notes = [*notes, *complete_tokenizer(directory)]
    return Conversion(
        path=output.path,
        num_tensors=len(specs),
        num_bytes=num_bytes,
        seconds=time.monotonic() - started,
        peak_bytes=peak_resident_bytes(),
        notes=tuple(notes),
    )


def write_companions(
    directory: Path,
    model: Path,
    config: LlamaConfig,
    dtype: torch.dtype,
    tokenizers: Sequence[Path],
) -> None:
    """Write the files beside the weights of a Hugging Face directory.

    config.json is the one of `model` with a new dtype and with the vocabulary size and tying of
    `config`; generation_config.json is `model`'s. The tokenizer and minillama.json come from the
    first of the directories `tokenizers` that has them, and what ends a text by them is added.
    """
    write_configs(directory, config, dtype)
    raw_config = read_json(model / "config.json")
    dtype_key = "dtype" if "dtype" in raw_config else "torch_dtype"
    raw_config[dtype_key] = str(dtype).removeprefix("torch.")
    raw_config["vocab_size"] = config.vocab_size
    raw_config["tie_word_embeddings"] = config.tie_embeddings
    write_json(directory / "config.json", raw_config)
    _copy_first(["generation_config.json"], [model], directory)
    _copy_first(["minillama.json", JINJA_FILE], tokenizers, directory)
    for source in tokenizers:
        if has_tokenizer(source):
            copy_tokenizer(source, directory)
            break
    write_stop_ids(directory)


def tokenizer_notes(directories: Sequence[Path]) -> list[str]:
    """Return the note for an output without a tokenizer, if none of the inputs has one."""
    if any(has_tokenizer(directory) for directory in directories):
        return []
    return ["note: none of the inputs has a tokenizer, so the output has none"]


def _num_bytes(specs: TensorSpecs, name: str) -> int:
    dtype, shape = specs[name]
    return prod(shape) * dtype.itemsize


def _read_in_order(
    tensors: LazyTensors, specs: TensorSpecs, verbose: bool
) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor with its name, and show a progress bar in bytes."""
    total = sum(_num_bytes(specs, name) for name in specs)
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
        for name, tensor in tensors.items():
            if verbose:
                dtype, shape = specs[name]
                bar.write(f"{name} {tuple(shape)} {dtype}", file=sys.stderr)
            yield name, tensor.read()
            bar.update(_num_bytes(specs, name))


def _copy_first(names: Sequence[str], sources: Sequence[Path], directory: Path) -> None:
    """Copy the files `names`, as far as they are there, from the first of `sources` with one."""
    for source in sources:
        found = [name for name in names if (source / name).is_file()]
        for name in found:
            write_bytes(directory / name, (source / name).read_bytes())
        if found:
            return


def _is_plain_checkpoint(path: Path) -> bool:
    """Tell whether a directory is a checkpoint without subdirectories, which hold other things."""
    subdirectories = [inner.name for inner in path.iterdir() if inner.is_dir()]
    if subdirectories == [RELEASE]:
        return any((path / name).is_file() for name in TRACKERS)
    if subdirectories:
        return False
    return any((path / name).is_file() for name in CHECKPOINT_FILES)
