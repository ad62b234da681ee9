"""Deltas: a fine-tuned model published as its difference from a base that may not be redistributed (Vicuna).

    delta = target - base         target = base + delta         each tensor by itself, in the base's dtype (fp16), as FastChat does

Vicuna v1.1 has the base's shapes. Vicuna v0 has one token more: the base is extended by rows of zeros. A sum of wrong parts is a
model that talks plausibly, so both sides' headers are compared, and shown, before any work. Positions are never taken from a delta:
an old file's `inv_freq` is a difference too, all zeros.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from minillama.checkpoint.hf_format import EMBEDDING, HEAD, has_tokenizer, listed, open_weights
from minillama.conversion.writer import LazyTensor, Output, write_checkpoint, write_companions
from minillama.errors import UserError
from minillama.hf_config import read_config
from minillama.tensor_files import TensorRef
from minillama.tokenizer import open_tokenizer


def apply_delta(base: Path, delta: Path, output: Output) -> None:
    """Write target = base + delta. The tokenizer is the delta's, or the base's where the delta has none."""
    _convert(base, delta, "delta", Tensor.add_, output, model=base)


def make_delta(base: Path, target: Path, output: Output) -> None:
    """Write delta = target - base, with the target's config and tokenizer."""
    _convert(base, target, "target", Tensor.sub_, output, model=target)


def _convert(
    base: Path, other: Path, role: str, operation: Callable, output: Output, model: Path
) -> None:
    ours, theirs = open_weights(base), open_weights(other)
    print(f"{'':8}{'rows':>7}  {'dtype':10}{'tensors':>8}  tokenizer")
    _show("base", base, ours)
    _show(role, other, theirs)
    problems = _mismatches(ours, theirs, role)
    theta, other_theta = read_config(base).rope_theta, read_config(other).rope_theta
    if theta != other_theta:
        problems.append(f"rope_theta is {theta} in the base, {other_theta} in the {role}")
    if problems:
        raise UserError(f"base and {role} do not belong together: {listed(sorted(problems), 3)}")
    rows = theirs[EMBEDDING].shape[0]
    added = rows - ours[EMBEDDING].shape[0]
    print(
        "same shapes, as in Vicuna v1.1"
        if added == 0
        else f"the {role} has {added} rows more{', as in Vicuna v0' if added == 1 else ''}: the base is extended by zeros"
    )
    recipes = {
        name: _combined(start, theirs[name], operation, output.dtype or start.dtype)
        for name, start in ours.items()
    }
    config = replace(read_config(model), vocab_size=rows)
    write_checkpoint(
        output,
        recipes,
        lambda path: write_companions(path, model, config, recipes[EMBEDDING].dtype, (other, base)),
    )


def _combined(
    base: TensorRef, other: TensorRef, operation: Callable, dtype: torch.dtype
) -> LazyTensor:
    """other ± base in `dtype`, in place: two tensors in memory. Rows that the base lacks count as zeros."""

    def read() -> Tensor:
        result, start = other.read().to(dtype), base.read().to(dtype)
        operation(result[: len(start)], start)
        return result

    return LazyTensor(dtype, other.shape, read)


def _show(role: str, directory: Path, entries: dict[str, TensorRef]) -> None:
    """A line for a side: what one would look at to see that both belong together."""
    tokenizer = "tokenizer.json" if has_tokenizer(directory) else "none"
    if (directory / "tokenizer.model").is_file():
        opened = open_tokenizer(directory)
        tokenizer = f"{opened.size} pieces, sha256 {opened.sha256[:8]}"
    embedding = entries.get(EMBEDDING)
    rows, dtype = (
        (embedding.shape[0], str(embedding.dtype).removeprefix("torch.")) if embedding else (0, "?")
    )
    print(f"{role:8}{rows:7}  {dtype:10}{len(entries):8}  {tokenizer}")


def _mismatches(base: dict[str, TensorRef], other: dict[str, TensorRef], role: str) -> list[str]:
    problems = [f"the {role} lacks {name}" for name in base if name not in other]
    problems += [f"the base lacks {name}" for name in other if name not in base]
    for name in base.keys() & other.keys():
        ours, theirs = base[name].shape, other[name].shape
        same_but_rows = name in (EMBEDDING, HEAD) and ours[1:] == theirs[1:]
        if same_but_rows and ours[0] > theirs[0]:
            problems.append(
                f"{name} has {ours[0]} rows in the base and {theirs[0]} in the {role}: are the two swapped, "
                "or is the base already fine-tuned? It must be the original LLaMA"
            )
        elif ours != theirs and not same_but_rows:
            problems.append(f"{name} is {ours} in the base, {theirs} in the {role}")
    return problems
