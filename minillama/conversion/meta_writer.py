"""Writes tensors with Hugging Face's names as Meta's consolidated.*.pth and params.json.

    tensor ─▶ Meta's rotary order ─▶ cut along the axis of its name ─┬▶ consolidated.00.pth
                                                                     ├▶ consolidated.01.pth
                                                                     └▶ …

All files are open at once: each tensor is computed once, and each file gets its slice.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from minillama.checkpoint.hf_reader import EMBEDDING, HEAD
from minillama.checkpoint.tokenizer_files import copy_tokenizer
from minillama.conversion.meta_layout import (
    NUM_SHARDS,
    meta_tensors,
    params_of,
    rotary_heads,
    to_pairs,
)
from minillama.conversion.writer import Conversion, LazyTensors, Output, write_checkpoint
from minillama.errors import UserError
from minillama.files import write_json
from minillama.llama_config import LlamaConfig
from minillama.parallel.shards import cut
from minillama.tensor_writers import TensorSpecs, specs_of, torch_writer


def write_meta(
    output: Output,
    inputs: Sequence[Path],
    tensors: LazyTensors,
    config: LlamaConfig,
    companions: Path,
    num_shards: int = 0,
    check: Callable[[Path], None] | None = None,
    notes: Iterable[str] = (),
) -> Conversion:
    """Write a directory in Meta's layout.

    Args:
        inputs, notes: as of `write_checkpoint`.
        tensors: whole, under Hugging Face's names.
        companions: the directory whose tokenizer is copied.
        num_shards: files of weights; 0: as many as Meta has for this width.
        check: called with the directory once all files are in it.

    Raises UserError if Meta's layout cannot hold this model.
    """
    num_shards = num_shards or NUM_SHARDS.get(config.dim, 1)
    _check_layout(config, num_shards)
    ordered = {}
    for name in meta_tensors(config.n_layers):
        is_tied_head = name == HEAD and HEAD not in tensors
        ordered[name] = tensors[EMBEDDING if is_tied_head else name]

    def write_other_files(directory: Path) -> None:
        write_json(directory / "params.json", params_of(config))
        copy_tokenizer(companions, directory)
        if check is not None:
            check(directory)

    write_tensors = partial(_write_shards, config, num_shards)
    return write_checkpoint(output, inputs, ordered, write_other_files, write_tensors, notes)


def _check_layout(config: LlamaConfig, num_shards: int) -> None:
    if config.attention_bias or config.mlp_bias:
        raise UserError("Meta's layout has no biases; this model has some")
    if config.rope_scaling is not None:
        raise UserError(f"params.json has no place for rope scaling {config.rope_scaling.kind!r}")
    if config.head_dim * config.n_heads != config.dim:
        raise UserError(
            f"head_dim = {config.head_dim}: Meta's layout means dim / n_heads = "
            f"{config.dim // config.n_heads}"
        )
    for name in ("n_heads", "n_kv_heads", "ffn_dim", "dim"):
        size = getattr(config, name)
        if size % num_shards:
            raise UserError(
                f"{name} = {size} cannot be cut into {num_shards} shards; "
                "choose a divisor with --shards"
            )


def _write_shards(
    config: LlamaConfig,
    num_shards: int,
    directory: Path,
    tensors: Iterator[tuple[str, Tensor]],
    specs: TensorSpecs,
) -> None:
    """Write each tensor once: every file gets its slice of it."""
    layout = meta_tensors(config.n_layers)
    with ExitStack() as open_files:
        appends = []
        for shard, shard_specs in enumerate(_specs_of_shards(config, num_shards, specs)):
            path = directory / f"consolidated.{shard:02d}.pth"
            appends.append(open_files.enter_context(torch_writer(path, shard_specs)))
        for name, tensor in tensors:
            heads = rotary_heads(name, config)
            if heads:
                tensor = to_pairs(tensor, heads)
            meta_name, axis = layout[name]
            for shard, append in enumerate(appends):
                append(meta_name, cut(tensor, axis, shard, num_shards))


def _specs_of_shards(
    config: LlamaConfig, num_shards: int, specs: TensorSpecs
) -> Iterator[TensorSpecs]:
    """Yield what each file will hold, under Meta's names."""
    for shard in range(num_shards):
        slices = {}
        for name, (meta_name, axis) in meta_tensors(config.n_layers).items():
            dtype, shape = specs[name]
            tensor = torch.empty(shape, dtype=dtype, device="meta")
            slices[meta_name] = cut(tensor, axis, shard, num_shards)
        yield specs_of(slices)
