"""How every conversion writes: one tensor at a time, and all or nothing.

A conversion is a table of recipes: for each tensor its dtype and shape, known from headers, and a function that makes it. Since
the whole output is known before the first byte, the disk is checked first and headers are written first; then each tensor is
made, written and forgotten, so memory holds one or two of them, whatever the size of the model.

The output grows in a hidden directory beside its final name and gets that name by one rename, after everything is on the disk.
Killed at any moment, a conversion leaves what was there before; a second attempt clears the remains of the first.
"""

import ctypes
import fcntl
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minillama.architecture import read_config
from minillama.checkpoint.directory import GB, copy_tokenizer_files, write_generation_config, write_json, write_weights
from minillama.checkpoint.tensor_files import Entry, Plan
from minillama.errors import UserError

Writer = Callable[[Path, Iterator[tuple[str, Tensor]], Plan], None]
OURS = ("config.json", "params.json", "adapter_config.json", "manifest.json")  # a directory with one of these may be overwritten
HEADROOM = 16 * 2**20                                                           # bytes for headers, config and tokenizer
EXCHANGE, HERE = 2, -100                                                        # renameat2's RENAME_EXCHANGE and AT_FDCWD


@dataclass(frozen=True)
class Recipe:
    """A tensor to be written: what it will be, and how to make it when its turn comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


@dataclass(frozen=True)
class Output:
    """What the user said about the output. dtype None: as the input."""

    path: Path
    overwrite: bool = False
    dtype: torch.dtype | None = None
    max_shard_bytes: int = 5 * GB
    bin: bool = False
    verbose: bool = False


def copies(entries: Mapping[str, Entry]) -> dict[str, Recipe]:
    """The recipes that leave every tensor as it is."""
    return {name: Recipe(entry.dtype, entry.shape, entry.read) for name, entry in entries.items()}


def write_checkpoint(output: Output, recipes: Mapping[str, Recipe], finish: Callable[[Path], None],
                     write: Writer | None = None) -> None:
    """Carry out `recipes`. write: how weights are laid out (default: as Hugging Face does); finish: adds the other files."""
    started = time.monotonic()
    plan = {name: (output.dtype or recipe.dtype, recipe.shape) for name, recipe in recipes.items()}
    sizes = {name: prod(shape) * dtype.itemsize for name, (dtype, shape) in plan.items()}
    total = sum(sizes.values())

    def tensors() -> Iterator[tuple[str, Tensor]]:
        with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
            for name, recipe in recipes.items():
                if output.verbose:
                    bar.write(f"{name} {tuple(recipe.shape)} {plan[name][0]}", file=sys.stderr)
                yield name, recipe.make()
                bar.update(sizes[name])

    with complete_or_absent(output.path, total, output.overwrite) as directory:
        if write is None:
            write_weights(directory, tensors(), plan, output.max_shard_bytes, output.bin)
        else:
            write(directory, tensors(), plan)
        finish(directory)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"{output.path}: {len(plan)} tensors, {total / GB:.3g} GB in {time.monotonic() - started:.1f} s, "
          f"peak memory {peak / GB:.2f} GB")


def write_companions(directory: Path, model: Path, rows: int, dtype: torch.dtype, tokenizers: Sequence[Path],
                     tie: bool | None = None) -> None:
    """The files beside the weights: `model`'s config.json with the new vocabulary and dtype, its generation_config.json, and the
    tokenizer and minillama.json of the first of `tokenizers` that has them.
    """
    raw = json.loads((model / "config.json").read_text(encoding="utf-8"))
    raw |= {"vocab_size": rows, "dtype" if "dtype" in raw else "torch_dtype": str(dtype).removeprefix("torch.")}
    if tie is not None:
        raw["tie_word_embeddings"] = tie
    write_json(directory / "config.json", raw)
    if (model / "generation_config.json").is_file():
        shutil.copyfile(model / "generation_config.json", directory / "generation_config.json")
    else:
        write_generation_config(directory, read_config(model))
    source = next((path for path in tokenizers if has_tokenizer(path)), None)
    if source is None:
        print("note: none of the inputs has a tokenizer, so the output has none")
    else:
        copy_tokenizer_files(source, directory)
    if about := next((path / "minillama.json" for path in tokenizers if (path / "minillama.json").is_file()), None):
        shutil.copyfile(about, directory / about.name)


def has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))


@contextmanager
def complete_or_absent(path: Path, nbytes: int, overwrite: bool) -> Iterator[Path]:
    """A directory to write `nbytes` into, which becomes `path` when the block ends well, and vanishes when it does not.

    Raises UserError where `path` exists (and `overwrite` is not set, or it is no checkpoint), another conversion is writing
    it, the disk has too little room, or a file cannot be written.
    """
    path = path.resolve()
    _refuse_existing(path, overwrite)
    partial = path.with_name(f".{path.name}.partial")
    lock = None
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = _lock(partial, path)
        for remains in partial.iterdir():
            remains.unlink()
        free = shutil.disk_usage(partial).free
        if nbytes + HEADROOM > free:
            raise UserError(f"{path}: needs {nbytes / GB:.2f} GB, and {free / GB:.2f} GB are free there; "
                            "make room, or write to another disk")
        yield partial
        for file in [*partial.iterdir(), partial]:
            _to_disk(file)
        _publish(partial, path)
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror or error}; no output was written, "
                        "and what was there before is untouched") from error
    finally:
        if lock is not None:
            shutil.rmtree(partial, ignore_errors=True)  # what failed, or, after an exchange, the old output
            os.close(lock)


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{path}: already exists; --overwrite replaces it once the new one is complete")
    if not any((path / name).is_file() for name in OURS) or any(inner.is_dir() for inner in path.iterdir()):
        raise UserError(f"{path}: not a plain checkpoint directory, so --overwrite does not remove it; name another output")


def _lock(partial: Path, path: Path) -> int:
    """Lock the unfinished directory, so that its remains are never mistaken; the kernel unlocks it however the process ends."""
    lock = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(f"{path}: another conversion is writing this output; wait for it, or name another") from None
    return lock


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _publish(partial: Path, path: Path) -> None:
    """Give `partial` the name `path`; an old output gets the name `partial`. One atomic step where the system has it."""
    if path.exists() and any(path.iterdir()):
        libc = ctypes.CDLL(None)
        arguments = HERE, os.fsencode(partial), HERE, os.fsencode(path), EXCHANGE
        if not hasattr(libc, "renameat2") or libc.renameat2(*arguments) != 0:
            aside = path.with_name(f".{path.name}.old")
            for source, target in ((path, aside), (partial, path), (aside, partial)):
                source.rename(target)
    else:
        partial.rename(path)
    _to_disk(path.parent)


def write_file(path: Path, content: bytes, overwrite: bool) -> None:
    """Write a single file, complete or absent."""
    if path.exists() and not (overwrite and path.is_file()):
        raise UserError(f"{path}: already exists; --overwrite replaces a file")
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        _to_disk(partial)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path}: {error.strerror}; nothing was written") from error
