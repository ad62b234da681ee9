"""Deltas: a fine-tuned model published as its difference from a base that may not be redistributed (Vicuna).

    delta = target - base         target = base + delta         each tensor by itself, in the base's dtype (fp16), as FastChat does

Vicuna v1.1 has the base's shapes. Vicuna v0 has one token more: the base is extended by rows of zeros. A sum of wrong parts is a
model that talks plausibly, so both sides' headers are compared, and shown, before any work. Positions are never taken from a delta:
an old file's `inv_freq` is a difference too, all zeros.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from minillama.architecture import LlamaConfig, read_config
from minillama.checkpoint.directory import open_weights
from minillama.checkpoint.tensor_files import Entry
from minillama.conversion.output import Output, Recipe, has_tokenizer, write_checkpoint, write_companions
from minillama.errors import UserError
from minillama.tokenizer import open_tokenizer

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Operation = Callable[[Tensor, Tensor], Tensor]  # in place on the first


def apply_delta(base: Path, delta: Path, output: Output) -> None:
    """Write target = base + delta. The tokenizer is the delta's, or the base's where the delta has none."""
    _convert(base, delta, "delta", torch.Tensor.add_, output, model=base)


def make_delta(base: Path, target: Path, output: Output) -> None:
    """Write delta = target - base, with the target's config and tokenizer."""
    _convert(base, target, "target", torch.Tensor.sub_, output, model=target)


def _convert(base: Path, other: Path, role: str, operation: Operation, output: Output, model: Path) -> None:
    base_entries, other_entries = open_weights(base), open_weights(other)
    _show((("base", base, base_entries), (role, other, other_entries)))
    _refuse_mismatch(base_entries, other_entries, role, (read_config(base), read_config(other)))
    recipes = {name: Recipe(output.dtype or base_entries[name].dtype, entry.shape,
                            partial(_combine, base_entries[name], entry, operation, output.dtype or base_entries[name].dtype))
               for name, entry in other_entries.items()}
    dtype = recipes[EMBEDDING].dtype
    rows = other_entries[EMBEDDING].shape[0]
    write_checkpoint(output, recipes, lambda directory: write_companions(directory, model, rows, dtype, (other, base)))


def _combine(base: Entry, other: Entry, operation: Operation, dtype: torch.dtype) -> Tensor:
    """other ± base in `dtype`, in place: two tensors in memory. Rows that the base lacks count as zeros."""
    result, start = other.read().to(dtype), base.read().to(dtype)
    operation(result[:len(start)], start)
    return result


def _show(sides: Iterable[tuple[str, Path, dict[str, Entry]]]) -> None:
    """A line for each side: what one would look at to see that they belong together."""
    print(f"{'':8}{'rows':>7}  {'dtype':10}{'tensors':>8}  tokenizer")
    for role, directory, entries in sides:
        embedding = entries.get(EMBEDDING)
        tokenizer = "none"
        if (directory / "tokenizer.model").is_file():
            opened = open_tokenizer(directory / "tokenizer.model")
            tokenizer = f"{opened.size} pieces, sha256 {opened.sha256[:8]}"
        elif has_tokenizer(directory):
            tokenizer = "tokenizer.json"
        rows, dtype = (embedding.shape[0], str(embedding.dtype).removeprefix("torch.")) if embedding else (0, "?")
        print(f"{role:8}{rows:7}  {dtype:10}{len(entries):8}  {tokenizer}")


def _refuse_mismatch(base: dict[str, Entry], other: dict[str, Entry], role: str, configs: tuple[LlamaConfig, LlamaConfig]) -> None:
    problems = [f"the {role} lacks {name}" for name in base if name not in other]
    problems += [f"the base lacks {name}" for name in other if name not in base]
    if configs[0].rope_theta != configs[1].rope_theta:
        problems.append(f"rope_theta is {configs[0].rope_theta} in the base, {configs[1].rope_theta} in the {role}")
    for name in base.keys() & other.keys():
        ours, theirs = base[name].shape, other[name].shape
        if name in (EMBEDDING, HEAD) and ours[1:] == theirs[1:] and ours[0] != theirs[0]:
            if ours[0] > theirs[0]:
                problems.append(f"{name} has {ours[0]} rows in the base and {theirs[0]} in the {role}: are the two swapped, "
                                "or is the base already fine-tuned? It must be the original LLaMA")
        elif ours != theirs:
            problems.append(f"{name} is {ours} in the base, {theirs} in the {role}")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"base and {role} do not belong together: {'; '.join(sorted(problems)[:3])}{more}")
    added = other[EMBEDDING].shape[0] - base[EMBEDDING].shape[0]
    print("same shapes, as in Vicuna v1.1" if added == 0 else
          f"the {role} has {added} rows more{', as in Vicuna v0' if added == 1 else ''}: the base is extended by zeros")
