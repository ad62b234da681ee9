"""Whole tensors in files, parts of them on ranks: read the own part, join all parts to write.

    file ── read_part ──▶ part of this rank            no rank reads what it does not hold
    parts of all ranks ── write_joined ──▶ file        one whole tensor exists at a time

The tensor ranks of a stage join their parts, and the stage sends the whole to the first stage.

A file is always whole. So it is the same whatever the number of ranks, and any number can read it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from minillama import comm
from minillama.comm import Mesh
from minillama.parallel.shards import axis_of, join, part_of
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


@dataclass(frozen=True)
class WholeTensor:
    """A tensor of a file, and where it comes from."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    axis: int | None  # that the tensor ranks cut; None: each has all of it
    lengths: list[int]  # along the axis, of the part of each tensor rank
    stage: int  # of the pipeline, that has it


def write_joined(
    parameters: Mapping[str, Tensor],
    mesh: Mesh,
    write: Write,
    stages: Mesh | None = None,
    sort_key: Callable[[WholeTensor], Any] | None = None,
) -> None:
    """Join the parts of each tensor, one tensor at a time, and write them on the first rank.

    Every rank of the two lines calls this.

    Args:
        parameters: this rank's parts by Hugging Face's names.
        mesh: the line of tensor ranks, which have parts of the same tensors.
        write: called on the first rank alone.
        stages: the line of pipeline stages, which have other tensors.
        sort_key: of the order in which the tensors are written; None: that of the model.
    """
    stages = stages or Mesh()
    whole = _all_stages(_describe(parameters, mesh, stages), stages)
    if sort_key is not None:
        whole.sort(key=sort_key)
    tensors = _gather(parameters, whole, mesh, stages)
    try:
        if mesh.is_first and stages.is_first:
            specs = {tensor.name: (tensor.dtype, tensor.shape) for tensor in whole}
            write(specs, tensors)
    finally:
        # If writing fails, the other ranks still send: take what they send, then fail.
        for _ in tensors:
            pass


def _describe(parameters: Mapping[str, Tensor], mesh: Mesh, stages: Mesh) -> list[WholeTensor]:
    """The whole tensors of this stage, in the order of `parameters`."""
    own_shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    shapes_by_rank = comm.gather_objects(mesh, own_shapes)
    whole = []
    for name, parameter in parameters.items():
        shape = list(parameter.shape)
        axis = axis_of(name) if mesh.size > 1 else None
        lengths = []
        if axis is not None:
            lengths = [shapes[name][axis] for shapes in shapes_by_rank]
            shape[axis] = sum(lengths)
        tensor = WholeTensor(name, parameter.dtype, tuple(shape), axis, lengths, stages.rank)
        whole.append(tensor)
    return whole


def _all_stages(own: list[WholeTensor], stages: Mesh) -> list[WholeTensor]:
    """The tensors of all stages in order. The first stage that has a tensor writes it."""
    by_name: dict[str, WholeTensor] = {}
    for tensors_of_stage in comm.gather_objects(stages, own):
        for tensor in tensors_of_stage:
            by_name.setdefault(tensor.name, tensor)
    return list(by_name.values())


def _gather(
    parameters: Mapping[str, Tensor], whole: list[WholeTensor], mesh: Mesh, stages: Mesh
) -> Iterator[tuple[str, Tensor]]:
    """Yield each whole tensor on the first rank of all; the others take their part in that."""
    for tensor in whole:
        if tensor.stage == stages.rank:
            values = parameters[tensor.name].detach()
            if tensor.axis is not None:
                values = join_over_ranks(values, tensor.axis, tensor.lengths, mesh)
            if stages.is_first:
                yield tensor.name, values
            elif mesh.is_first:
                exchange(stages, 0, [values], [])
        elif stages.is_first and mesh.is_first:
            values = torch.empty(tensor.shape, dtype=tensor.dtype, device=stages.device)
            exchange(stages, tensor.stage, [], [values])
            yield tensor.name, values


def join_over_ranks(part: Tensor, axis: int, lengths: list[int], mesh: Mesh) -> Tensor:
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
    for whole in _describe(parameters, mesh, Mesh()):
        part = parameters[whole.name].detach()
        step = max(1, prod(whole.shape) // num_values)
        if whole.axis is None:
            yield part.flatten()[::step].float().cpu()
        else:
            yield _sample_parts(part, whole, step, mesh)


def _sample_parts(part: Tensor, whole: WholeTensor, step: int, mesh: Mesh) -> Tensor:
    """Every step-th value of a tensor that is cut: each comes from the rank that has it."""
    assert whole.axis is not None
    positions = torch.arange(0, prod(whole.shape), step, device=part.device)
    index = list(torch.unravel_index(positions, whole.shape))
    index[whole.axis] = index[whole.axis] - sum(whole.lengths[: mesh.rank])
    on_axis = index[whole.axis]
    is_own = (on_axis >= 0) & (on_axis < part.shape[whole.axis])
    own_values = part[tuple(indices[is_own] for indices in index)]
    bits = torch.zeros(len(positions), dtype=torch.int32, device=part.device)
    bits[is_own] = own_values.float().view(torch.int32)  # the sum with zeros keeps each bit
    return comm.all_reduce_sum(mesh, bits).cpu().view(torch.float32)
