"""Deltas: a fine-tuned model, published as its difference from a base that may not be published.

    delta = target - base         target = base + delta

Each tensor is computed by itself, in the base's dtype (fp16), as FastChat does. Vicuna v1.1 has the
base's shapes. Vicuna v0 has one token more: the base is extended by rows of zeros.

The sum of a base and a delta that do not belong together is a model that runs without an error, but
predicts badly. So the headers of both sides are compared before any work, and can be shown
(`compare`).

Rotary positions are never taken from a delta: the `inv_freq` of an old file is a difference too,
all zeros.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from minillama.checkpoint.hf_reader import EMBEDDING, HEAD, open_weights
from minillama.checkpoint.tokenizer_files import has_tokenizer
from minillama.conversion.writer import (
    Conversion,
    LazyTensor,
    Output,
    tokenizer_notes,
    write_checkpoint,
    write_companions,
)
from minillama.errors import UserError, listed
from minillama.hf_config import read_config
from minillama.tensor_files import TensorRef
from minillama.tokenizer import open_tokenizer

ARE_SWAPPED = (
    "are the two swapped, or is the base already fine-tuned? It must be the original LLaMA"
)


@dataclass(frozen=True)
class Side:
    """What shows whether two checkpoints belong together."""

    role: str  # base, delta or target
    num_rows: int  # of the embedding
    dtype: str
    num_tensors: int
    tokenizer: str

    def __str__(self) -> str:
        numbers = f"{self.num_rows:7}  {self.dtype:10}{self.num_tensors:8}"
        return f"{self.role:8}{numbers}  {self.tokenizer}"


@dataclass(frozen=True)
class Comparison:
    """A base beside a delta or target. `str()` gives the table for the user."""

    base: Side
    other: Side
    problems: tuple[str, ...]  # why they do not belong together

    def __str__(self) -> str:
        lines = [f"{'':8}{'rows':>7}  {'dtype':10}{'tensors':>8}  tokenizer"]
        lines += [str(self.base), str(self.other)]
        if not self.problems:
            lines.append(self._describe_rows())
        return "\n".join(lines)

    def _describe_rows(self) -> str:
        added = self.other.num_rows - self.base.num_rows
        if added == 0:
            return "same shapes, as in Vicuna v1.1"
        vicuna = ", as in Vicuna v0" if added == 1 else ""
        return f"the {self.other.role} has {added} rows more{vicuna}: the base is extended by zeros"


def apply_delta(base: Path, delta: Path, output: Output) -> Conversion:
    """Write target = base + delta, with the config of the base.

    The tokenizer is the delta's, or the base's if the delta has none. Raises UserError if the two
    do not belong together.
    """
    return _convert(base, delta, "delta", Tensor.add_, output, model=base)


def make_delta(base: Path, target: Path, output: Output) -> Conversion:
    """Write delta = target - base, with the target's config and tokenizer.

    Raises UserError if the two do not belong together.
    """
    return _convert(base, target, "target", Tensor.sub_, output, model=target)


def compare(base: Path, other: Path, role: str) -> Comparison:
    """Compare the headers of a base with those of a delta or target, which is its `role`."""
    base_tensors = open_weights(base)
    other_tensors = open_weights(other)
    problems = _find_mismatches(base_tensors, other_tensors, role)
    base_theta = read_config(base).rope_theta
    other_theta = read_config(other).rope_theta
    if base_theta != other_theta:
        problems.append(f"rope_theta is {base_theta} in the base, {other_theta} in the {role}")
    return Comparison(
        base=_describe("base", base, base_tensors),
        other=_describe(role, other, other_tensors),
        problems=tuple(sorted(problems)),
    )


def _convert(
    base: Path,
    other: Path,
    role: str,
    operation: Callable[[Tensor, Tensor], Tensor],
    output: Output,
    model: Path,
) -> Conversion:
    """Write other ± base. model: the directory whose config the output gets."""
    problems = compare(base, other, role).problems
    if problems:
        raise UserError(f"base and {role} do not belong together: {listed(list(problems), 3)}")
    other_tensors = open_weights(other)
    tensors = {}
    for name, tensor in open_weights(base).items():
        dtype = output.dtype or tensor.dtype
        tensors[name] = _combine(tensor, other_tensors[name], operation, dtype)
    embedding = tensors[EMBEDDING]
    config = replace(read_config(model), vocab_size=embedding.shape[0])
    tokenizers = (other, base)

    def write_other_files(directory: Path) -> None:
        write_companions(directory, model, config, embedding.dtype, tokenizers)

    notes = tokenizer_notes(tokenizers)
    return write_checkpoint(output, [base, other], tensors, write_other_files, notes=notes)


def _combine(
    base: TensorRef,
    other: TensorRef,
    operation: Callable[[Tensor, Tensor], Tensor],
    dtype: torch.dtype,
) -> LazyTensor:
    """other ± base in `dtype`, in place: two tensors in memory. Missing rows count as zeros."""

    def read() -> Tensor:
        result = other.read().to(dtype)
        start = base.read().to(dtype)
        operation(result[: len(start)], start)
        return result

    return LazyTensor(dtype, other.shape, read)


def _describe(role: str, directory: Path, tensors: Mapping[str, TensorRef]) -> Side:
    tokenizer = "tokenizer.json" if has_tokenizer(directory) else "none"
    if (directory / "tokenizer.model").is_file():
        opened = open_tokenizer(directory)
        tokenizer = f"{opened.size} tokens, sha256 {opened.sha256[:8]}"
    num_rows = 0
    dtype = "?"
    embedding = tensors.get(EMBEDDING)
    if embedding is not None:
        num_rows = embedding.shape[0]
        dtype = str(embedding.dtype).removeprefix("torch.")
    return Side(role, num_rows, dtype, len(tensors), tokenizer)


def _find_mismatches(
    base: Mapping[str, TensorRef], other: Mapping[str, TensorRef], role: str
) -> list[str]:
    problems = [f"the {role} lacks {name}" for name in base if name not in other]
    problems += [f"the base lacks {name}" for name in other if name not in base]
    for name in base.keys() & other.keys():
        base_shape = base[name].shape
        shape = other[name].shape
        may_grow = name in (EMBEDDING, HEAD) and base_shape[1:] == shape[1:]
        if may_grow and base_shape[0] > shape[0]:
            rows = f"{base_shape[0]} rows in the base and {shape[0]} in the {role}"
            problems.append(f"{name} has {rows}: {ARE_SWAPPED}")
        elif base_shape != shape and not may_grow:
            problems.append(f"{name} is {base_shape} in the base, {shape} in the {role}")
    return problems
