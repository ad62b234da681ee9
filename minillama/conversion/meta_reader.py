"""Reads Meta's consolidated.*.pth as whole tensors under Hugging Face's names.

    consolidated.00.pth ┐
    consolidated.01.pth ┼─ join along the axis of the cut ─▶ Hugging Face's rotary order ─▶ tensor
    …                   ┘

Only headers are read at first; the slices of a tensor are read when its `read` is called.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minillama.checkpoint.hf_reader import EMBEDDING, check_names, open_files
from minillama.conversion.meta_layout import (
    MetaTensor,
    config_from_params,
    meta_tensors,
    read_params,
    rotary_heads,
    to_halves,
)
from minillama.conversion.writer import LazyTensor
from minillama.errors import UserError
from minillama.hub import hub_hint
from minillama.llama_config import LlamaConfig
from minillama.output_directory import restore
from minillama.parallel.shards import ROWS, join
from minillama.tensor_files import TensorRef
from minillama.torch_files import map_torch

FIRST_GATE = "layers.0.feed_forward.w1.weight"


@dataclass(frozen=True)
class MetaCheckpoint:
    """A directory in Meta's layout, described in Hugging Face's terms."""

    config: LlamaConfig
    tensors: dict[str, LazyTensor]  # by Hugging Face's name


def read_meta(directory: Path) -> MetaCheckpoint:
    """Read the headers of a directory in Meta's layout.

    Raises UserError for damaged or missing files, all of them in one message, and for tensors that
    do not fit params.json.
    """
    restore(directory)
    paths = sorted(directory.glob("consolidated.*.pth"))
    if not paths:
        raise UserError(f"{directory}: holds no consolidated.*.pth{hub_hint(directory)}")
    params = read_params(directory / "params.json")
    layout = meta_tensors(params.n_layers)
    shards = _open_shards(directory, paths, layout, params.n_layers)

    is_cut_by_rows = shards[0]["tok_embeddings.weight"].shape[-1] == params.dim
    if is_cut_by_rows:  # by LLaMA 3 and some exports
        layout[EMBEDDING] = MetaTensor("tok_embeddings.weight", ROWS)
    vocab_size = sum(shard["output.weight"].shape[0] for shard in shards)
    ffn_dim = sum(shard[FIRST_GATE].shape[0] for shard in shards)
    if params.vocab_size not in (None, vocab_size):
        raise UserError(
            f"{directory}: params.json says vocab_size = {params.vocab_size}, "
            f"the embedding has {vocab_size} rows; a file is missing"
        )
    config = config_from_params(params, vocab_size, ffn_dim)

    tensors = {}
    for name, (meta_name, axis) in layout.items():
        slices = [shard[meta_name] for shard in shards]
        tensors[name] = _join(name, slices, axis, rotary_heads(name, config))
    check_names(config, tensors, directory)
    return MetaCheckpoint(config, tensors)


def _open_shards(
    directory: Path, paths: Sequence[Path], layout: dict[str, MetaTensor], n_layers: int
) -> list[dict[str, TensorRef]]:
    """Return the tensors of each file. Each file must hold every tensor of the layout, no other."""
    expected = [tensor.name for tensor in layout.values()]
    source = f"params.json says {n_layers} layers"
    files = dict.fromkeys(paths, expected)
    shards = open_files(files, f"belongs there: {source}", alike=True)
    unknown = set().union(*shards).difference(expected)
    if unknown:
        raise UserError(f"{directory}: {source}, and {min(unknown)} is none of their tensors")
    return shards


def _join(name: str, slices: Sequence[TensorRef], axis: int | None, heads: int) -> LazyTensor:
    """Join the slices of a tensor along `axis`.

    axis: None if every shard holds all of it. heads: of q and k, which get Hugging Face's rotary
    order; 0 for all others.
    """
    _check_slices(name, slices, axis)
    first = slices[0]
    shape = list(first.shape)
    for dimension in range(len(shape)):
        if dimension == axis:
            shape[dimension] = sum(part.shape[dimension] for part in slices)

    def read() -> Tensor:
        if axis is None:
            tensor = _read_copies(name, slices)
        else:
            tensor = join([map_torch(part.file)[part.name] for part in slices], axis)
        return to_halves(tensor, heads) if heads else tensor

    return LazyTensor(first.dtype, tuple(shape), read)


def _check_slices(name: str, slices: Sequence[TensorRef], axis: int | None) -> None:
    """Raise UserError unless all slices have one dtype, and one shape apart from `axis`."""
    kinds = set()
    for part in slices:
        other_sizes = [size for dimension, size in enumerate(part.shape) if dimension != axis]
        kinds.add((part.dtype, *other_sizes))
    if len(kinds) > 1:
        described = [f"{part.shape} of {part.dtype} in {part.file.name}" for part in slices]
        raise UserError(f"{name}: the shards do not fit together: {', '.join(described)}")


def _read_copies(name: str, copies: Sequence[TensorRef]) -> Tensor:
    """Read a tensor that every shard holds. Raises UserError unless all have the same values."""
    tensor = copies[0].read()
    for copy in copies[1:]:
        if not torch.equal(tensor, copy.read()):
            raise UserError(
                f"{name}: differs between the shards that should all hold it; "
                "files of different models"
            )
    return tensor
