"""Whole tensors in files, parts of them on ranks: read the own part, join all parts to write.

    file ── read_part ──▶ part of this rank            no rank reads what it does not hold
    parts of all ranks ── write_joined ──▶ file        one whole tensor exists at a time

The tensor ranks of a stage join their parts, and the stage sends the whole to the first stage.

A file is always whole. So it is the same whatever the number of ranks, and any number can read it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from minillama import comm
from minillama.comm import Mesh
from minillama.parallel.parts import (
    WholeParameter,
    parameters_of_all_stages,
    parameters_of_stage,
)
from minillama.parallel.shards import join, part_of
from minillama.point_to_point import exchange
from minillama.tensor_files import TensorRef
from minillama.tensor_writers import TensorSpecs

# Takes the specs of whole tensors, and the tensors in that order.
Write = Callable[[TensorSpecs, Iterator[tuple[str, Tensor]]], None]


def read_part(tensor: TensorRef, axis: int | None, mesh: Mesh) -> Tensor:
    """Read what this rank of a tensor line holds of a tensor. Raises UserError if not finite."""
    if axis is None or mesh.size == 1:
        return tensor.read_finite()
    part = part_of(tensor.shape[axis], mesh.rank, mesh.size)
    return tensor.refuse_non_finite(tensor.read_part(part.start, part.stop, axis))


def write_joined(
    parameters: Mapping[str, Tensor],
    mesh: Mesh,
    write: Write,
    stages: Mesh | None = None,
    sort_key: Callable[[str, WholeParameter], Any] | None = None,
) -> None:
    """Join the parts of each tensor, one tensor at a time, and write them on the first rank.

    Every rank of the two lines calls this.

    Args:
        parameters: this rank's parts by Hugging Face's names.
        mesh: the line of tensor ranks, which have parts of the same tensors.
        write: called on the first rank alone.
        stages: the line of pipeline stages, which have other tensors.
        sort_key: of a name and its tensor: the order in which they are written; None: that of the
            model.
    """
    stages = stages or Mesh()
    own = parameters_of_stage(parameters, mesh, stages.rank)
    whole = parameters_of_all_stages(own, stages)
    if sort_key is not None:
        in_order = sorted(whole, key=lambda name: sort_key(name, whole[name]))
        whole = {name: whole[name] for name in in_order}
    tensors = _gather(parameters, whole, mesh, stages)
    try:
        if mesh.is_first and stages.is_first:
            specs = {name: (tensor.dtype, tensor.shape) for name, tensor in whole.items()}
            write(specs, tensors)
    finally:
        # If writing fails, the other ranks still send: take what they send, then fail.
        for _ in tensors:
            pass


def _gather(
    parameters: Mapping[str, Tensor],
    whole: Mapping[str, WholeParameter],
    mesh: Mesh,
    stages: Mesh,
) -> Iterator[tuple[str, Tensor]]:
    """Yield each whole tensor on the first rank of all; the others take their part in that."""
    for name, tensor in whole.items():
        if tensor.stage == stages.rank:
            values = parameters[name].detach()
            if tensor.axis is not None:
                values = join_over_ranks(values, tensor.axis, tensor.lengths, mesh)
            if stages.is_first:
                yield name, values
            elif mesh.is_first:
                exchange(stages, 0, [values], [])
        elif stages.is_first and mesh.is_first:
            values = torch.empty(tensor.shape, dtype=tensor.dtype, device=stages.device)
            exchange(stages, tensor.stage, [], [values])
            yield name, values


def join_over_ranks(part: Tensor, axis: int, lengths: Sequence[int], mesh: Mesh) -> Tensor:
    """The whole tensor, on every rank, of which each has a part of this length along an axis."""
    missing = max(lengths) - part.shape[axis]
    padding = part.new_empty([*part.shape[:axis], missing, *part.shape[axis + 1 :]])
    padded = torch.cat((part, padding), axis) if missing else part.contiguous()
    gathered = comm.all_gather(mesh, padded.flatten()).view(mesh.size, *padded.shape)
    parts = []
    for rank, length in enumerate(lengths):
        parts.append(gathered[rank].narrow(axis, 0, length))
    return join(parts, axis)


def sample_evenly(
    parameters: Mapping[str, Tensor], num_values: int, mesh: Mesh
) -> Iterator[Tensor]:
    """Yield about `num_values` evenly spaced values of each whole tensor, in fp32 on the CPU.

    parameters: this rank's parts by Hugging Face's names. All ranks yield the same values.
    """
    for name, whole in parameters_of_stage(parameters, mesh).items():
        part = parameters[name].detach()
        step = max(1, whole.size // num_values)
        if whole.axis is None:
            yield part.flatten()[::step].float().cpu()
        else:
            yield _sample_parts(part, whole, step, mesh)


def _sample_parts(part: Tensor, whole: WholeParameter, step: int, mesh: Mesh) -> Tensor:
    """Every step-th value of a tensor that is cut: each comes from the rank that has it."""
    assert whole.axis is not None
    positions = torch.arange(0, whole.size, step, device=part.device)
    index = list(torch.unravel_index(positions, whole.shape))
    index[whole.axis] = index[whole.axis] - sum(whole.lengths[: mesh.rank])
    on_axis = index[whole.axis]
    is_own = (on_axis >= 0) & (on_axis < part.shape[whole.axis])
    own_values = part[tuple(indices[is_own] for indices in index)]
    bits = torch.zeros(len(positions), dtype=torch.int32, device=part.device)
    bits[is_own] = own_values.float().view(torch.int32)  # the sum with zeros keeps each bit
    return comm.all_reduce_sum(mesh, bits).cpu().view(torch.float32)
