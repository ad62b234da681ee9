"""How every conversion writes: one tensor at a time, and all or nothing.

A conversion is a table of recipes: what has a dtype, a shape and `read()`, be it an `TensorRef` of a file or a `LazyTensor` that computes.
Since the whole output is known before the first byte, the disk is checked first and headers are written first; then each tensor is
made, written and forgotten, so memory holds one or two of them, whatever the size of the model.

The output grows in a hidden directory beside its final name and is renamed after everything is on the disk; an old output steps
aside and is removed last. Killed at any moment, a conversion leaves what was there before, and the next one clears its remains.
"""

import fcntl
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minillama.checkpoint.hf_format import (
    GB,
    copy_tokenizer,
    has_tokenizer,
    write_configs,
    write_json,
    write_weights,
)
from minillama.errors import UserError, read_json
from minillama.files import flush_to_disk
from minillama.llama_config import LlamaConfig
from minillama.tensor_files import TensorRef
from minillama.tensor_writers import TensorSpecs

OURS = (
    "config.json",
    "params.json",
    "adapter_config.json",
    "manifest.json",
)  # a directory with one of these may be overwritten
HEADROOM = 16 * 2**20  # bytes for headers, config and tokenizer


@dataclass(frozen=True)
class LazyTensor:
    """A tensor to be written: what it will be, and how to make it when its turn comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


LazyTensors = Mapping[str, TensorRef | LazyTensor]
Writer = Callable[[Path, Iterator[tuple[str, Tensor]], TensorSpecs], None]


@dataclass(frozen=True)
class Output:
    """What the user said about the output. dtype None: as the input."""

    path: Path
    overwrite: bool = False
    dtype: torch.dtype | None = None
    max_shard_bytes: int = 5 * GB
    bin: bool = False
    verbose: bool = False


def write_checkpoint(
    output: Output,
    recipes: LazyTensors,
    finish: Callable[[Path], None],
    write: Writer | None = None,
) -> None:
    """Carry out `recipes`. write: how weights are laid out (default: as Hugging Face does); finish: adds the other files."""
    started = time.monotonic()
    plan = {name: (output.dtype or recipe.dtype, recipe.shape) for name, recipe in recipes.items()}
    sizes = {name: prod(shape) * dtype.itemsize for name, (dtype, shape) in plan.items()}
    total = sum(sizes.values())
    write = write or partial(write_weights, max_shard_bytes=output.max_shard_bytes, bin=output.bin)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
            for name, recipe in recipes.items():
                if output.verbose:
                    bar.write(f"{name} {tuple(recipe.shape)} {plan[name][0]}", file=sys.stderr)
                yield name, recipe.read()
                bar.update(sizes[name])

    with complete_or_absent(output.path, total, output.overwrite) as directory:
        write(directory, tensors(), plan)
        finish(directory)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    print(
        f"{output.path}: {len(plan)} tensors, {total / GB:.3g} GB in {time.monotonic() - started:.1f} s, peak memory {peak / GB:.2f} GB"
    )


def write_companions(
    directory: Path,
    model: Path,
    config: LlamaConfig,
    dtype: torch.dtype,
    tokenizers: Sequence[Path],
) -> None:
    """The files beside the weights: `model`'s config.json with the dtype, and the vocabulary and tying of `config`; its
    generation_config.json; and the tokenizer and minillama.json of the first of `tokenizers` that has them."""
    write_configs(directory, config, dtype)
    raw = read_json(model / "config.json")
    changes = {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tie_embeddings}
    changes |= {"dtype" if "dtype" in raw else "torch_dtype": str(dtype).removeprefix("torch.")}
    write_json(directory / "config.json", raw | changes)
    for name, places in {"generation_config.json": [model], "minillama.json": tokenizers}.items():
        if found := next((place / name for place in places if (place / name).is_file()), None):
            shutil.copyfile(found, directory / name)
    if source := next(filter(has_tokenizer, tokenizers), None):
        copy_tokenizer(source, directory)
    else:
        print("note: none of the inputs has a tokenizer, so the output has none")


@contextmanager
def complete_or_absent(path: Path, nbytes: int, overwrite: bool) -> Iterator[Path]:
    """A directory to write `nbytes` into, which becomes `path` when the block ends well, and vanishes when it does not.
    Raises UserError where `path` is in the way, another conversion is writing it, or the disk has too little room."""
    path = path.resolve()
    unfinished, aside = (path.with_name(f".{path.name}.{state}") for state in ("partial", "old"))
    try:
        with ExitStack() as last:
            unfinished.mkdir(parents=True, exist_ok=True)
            lock = os.open(
                unfinished, os.O_RDONLY
            )  # the kernel unlocks it, however the process ends
            last.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            last.callback(shutil.rmtree, unfinished, ignore_errors=True)
            last.callback(_settle, path, aside)
            _settle(path, aside)
            for remains in unfinished.iterdir():
                remains.unlink()
            _refuse_existing(path, overwrite)
            free = shutil.disk_usage(unfinished).free
            if nbytes + HEADROOM > free:
                raise UserError(
                    f"{path}: needs {nbytes / GB:.2f} GB, and {free / GB:.2f} GB are free there; "
                    "make room, or write to another disk"
                )
            yield unfinished
            _publish(unfinished, path, aside)
    except BlockingIOError:
        raise UserError(
            f"{path}: another conversion is writing this output; wait for it, or name another"
        ) from None
    except OSError as error:
        raise UserError(
            f"{error.filename or path}: {error.strerror or error}; no output was written, "
            "and what was there before is untouched"
        ) from error


def _settle(path: Path, aside: Path) -> None:
    """An old output that stepped aside: put it back where nothing took its place, even if a killed conversion left it so."""
    if aside.exists() and not path.exists():
        aside.rename(path)
    shutil.rmtree(aside, ignore_errors=True)


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise UserError(
            f"{path}: already exists; --overwrite replaces it once the new one is complete"
        )
    if not any((path / name).is_file() for name in OURS) or any(
        inner.is_dir() for inner in path.iterdir()
    ):
        raise UserError(
            f"{path}: not a plain checkpoint directory, so --overwrite does not remove it; name another output"
        )


def _publish(unfinished: Path, path: Path, aside: Path) -> None:
    for file in (*unfinished.iterdir(), unfinished):
        flush_to_disk(file)
    if path.exists():
        path.rename(aside)
    unfinished.rename(path)
    flush_to_disk(path.parent)


def write_file(path: Path, content: bytes, overwrite: bool) -> None:
    """Write a single file, complete or absent."""
    if path.exists() and not (overwrite and path.is_file()):
        raise UserError(f"{path}: already exists; --overwrite replaces a file")
    unfinished = path.with_name(f".{path.name}.partial")
    try:
        unfinished.write_bytes(content)
        flush_to_disk(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
