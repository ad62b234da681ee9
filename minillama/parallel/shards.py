"""Shards: which part of which tensor a rank holds. The only place that knows an axis.

Tensor parallelism cuts each linear layer over N ranks. In front of the nonlinearity a rank computes
some of the outputs, behind it a rank reads some of the inputs:

    cut by rows        q, k, v, gate, up        weight (out, in): rows are outputs
    cut by columns     o, down                  columns are inputs
    cut by rows        embedding, head          rows are the vocabulary
    on every rank      norms

So q, k and v of a rank are whole heads, and o reads exactly those. A LoRA factor is cut where its
module is: B (out, R) has the rows of the weight, A (R, in) its columns.

Pipeline parallelism gives each stage a run of layers. Training, loading, saving, Meta's files and
Megatron's files all use the functions of this module.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from minillama.errors import UserError

ROWS = 0
COLUMNS = 1

# module -> the axis of its weight (out, in) that ranks cut; None: every rank holds all of it
MODULE_AXES: dict[str, int | None] = {
    "embed_tokens": ROWS,
    "q_proj": ROWS,
    "k_proj": ROWS,
    "v_proj": ROWS,
    "o_proj": COLUMNS,
    "gate_proj": ROWS,
    "up_proj": ROWS,
    "down_proj": COLUMNS,
    "input_layernorm": None,
    "post_attention_layernorm": None,
    "norm": None,
    "lm_head": ROWS,
}
# parameter of a module -> its own axis, by the axis of the weight; not named: None
PARAMETER_AXES: dict[str, dict[int, int]] = {
    "weight": {ROWS: ROWS, COLUMNS: COLUMNS},
    "bias": {ROWS: ROWS},  # (out,)
    "lora_A": {COLUMNS: COLUMNS},  # (R, in)
    "lora_B": {ROWS: ROWS},  # (out, R)
    "lora_embedding_A": {ROWS: COLUMNS},  # (R, V)
    "lora_embedding_B": {},  # (C, R)
}


def axis_of(name: str) -> int | None:
    """Return the axis along which ranks cut a parameter; None: every rank holds all of it.

    name: as Hugging Face calls it, or the name of a LoRA factor in such a module.
    """
    words = name.split(".")
    for module, parameter in pairwise(words):
        if module in MODULE_AXES and parameter in PARAMETER_AXES:
            axis = MODULE_AXES[module]
            return None if axis is None else PARAMETER_AXES[parameter].get(axis)
    raise KeyError(f"{name}: no module of the table has this parameter")


Held = Literal["cut", "whole", "partial"]


def held(name: str) -> Held:
    """Return what a tensor rank holds of a trained parameter.

    cut      a part of it
    whole    all of it, and the rank computes the whole gradient: norms, biases of o and down
    partial  all of it, but the rank computes a part of the gradient, and the sum over the ranks is
             the gradient: the LoRA factor that is not cut, beside one that is
    """
    if axis_of(name) is not None:
        return "cut"
    is_factor = any(word.startswith("lora_") for word in name.split("."))
    return "partial" if is_factor else "whole"


def part_of(length: int, rank: int, size: int) -> range:
    """Return the indices of an axis that one of `size` ranks holds.

    All parts are equal. The rest of a vocabulary that is no multiple of `size` is the last rank's.
    """
    equal = length // size
    stop = length if rank == size - 1 else equal * (rank + 1)
    return range(equal * rank, stop)


def cut(tensor: Tensor, axis: int | None, rank: int, size: int) -> Tensor:
    """Return what one of `size` ranks holds of a tensor, as a view."""
    if axis is None:
        return tensor
    part = part_of(tensor.shape[axis], rank, size)
    return tensor.narrow(axis, part.start, len(part))


def join(tensors: Sequence[Tensor], axis: int | None) -> Tensor:
    """Return the tensor, in memory of its own, of which the ranks hold these parts, in order."""
    return tensors[0].clone() if axis is None else torch.cat(list(tensors), axis)


def layers_of_stage(n_layers: int, stages: int, stage: int) -> range:
    """Return the layers of one of `stages` pipeline stages.

    They follow each other. Where the layers do not divide, the first stages have one more.
    """
    if stages > n_layers:
        raise UserError(
            f"n_layers = {n_layers} cannot fill {stages} pipeline stages; use at most {n_layers}"
        )
    least, rest = divmod(n_layers, stages)
    start = stage * least + min(stage, rest)
    return range(start, start + least + (stage < rest))


def is_on_stage(name: str, n_layers: int, stages: int, stage: int, is_tied: bool) -> bool:
    """Return whether one of `stages` pipeline stages holds a parameter.

    name: as Hugging Face calls it.
    is_tied: the head is the embedding, so the last stage has a copy of that.
    """
    is_first = stage == 0
    is_last = stage == stages - 1
    if name.startswith("model.layers."):
        layer = int(name.split(".")[2])
        return layer in layers_of_stage(n_layers, stages, stage)
    if name.startswith("model.embed_tokens."):
        return is_first or (is_last and is_tied)
    return is_last  # the last norm and the head


def check_tensor_parallel(sizes: Mapping[str, int], ranks: int) -> None:
    """Raise UserError unless `ranks` ranks can cut all of these sizes into equal parts.

    sizes: by name: n_heads, n_kv_heads and ffn_dim, as far as they are known.
    """
    for name, size in sizes.items():
        if size % ranks:
            common = math.gcd(*sizes.values())
            possible = [str(number) for number in range(1, common + 1) if common % number == 0]
            raise UserError(
                f"{name} = {size} cannot be cut over {ranks} tensor-parallel ranks; "
                f"use {' or '.join(possible)}"
            )
