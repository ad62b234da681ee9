"""Whole tensors in files, parts of them on ranks: read the own part, join all parts to write.

    file ── read_part ──▶ part of this rank            no rank reads what it does not hold
    parts of all ranks ── write_joined ──▶ file        one whole tensor exists at a time

A file is always whole. So it is the same whatever the number of ranks, and any number can read it.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from minillama import comm
from minillama.comm import Mesh
from minillama.parallel.shards import axis_of, join, part_of
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


def write_joined(parameters: Mapping[str, Tensor], mesh: Mesh, write: Write) -> None:
    """Join the parts of each tensor, one tensor at a time, and write them on the first rank.

    parameters: this rank's parts by Hugging Face's names. Every rank of the line calls this with
    the same names. write: called on the first rank alone.
    """
    axes = {name: axis_of(name) for name in parameters} if mesh.size > 1 else {}
    lengths = _lengths(parameters, axes, mesh)
    specs = {}
    for name, parameter in parameters.items():
        shape = list(parameter.shape)
        axis = axes.get(name)
        if axis is not None:
            shape[axis] = sum(lengths[name])
        specs[name] = (parameter.dtype, tuple(shape))
    tensors = _joined(parameters, axes, lengths, mesh)
    try:
        if mesh.is_first:
            write(specs, tensors)
    finally:
        # If writing fails, the other ranks still send: take what they send, then fail.
        for _ in tensors:
            pass


Axes = Mapping[str, int | None]


def _lengths(parameters: Mapping[str, Tensor], axes: Axes, mesh: Mesh) -> dict[str, list[int]]:
    """The length of each rank's part along its axis, in order of rank, for tensors that are cut."""
    own = {}
    for name, axis in axes.items():
        if axis is not None:
            own[name] = parameters[name].shape[axis]
    lengths: dict[str, list[int]] = {name: [] for name in own}
    for lengths_of_rank in comm.gather_objects(mesh, own):
        for name, length in lengths_of_rank.items():
            lengths[name].append(length)
    return lengths


def _joined(
    parameters: Mapping[str, Tensor], axes: Axes, lengths: Mapping[str, list[int]], mesh: Mesh
) -> Iterator[tuple[str, Tensor]]:
    """Yield each whole tensor on every rank."""
    for name, parameter in parameters.items():
        axis = axes.get(name)
        if axis is None:
            yield name, parameter
        else:
            yield name, join_over_ranks(parameter.detach(), axis, lengths[name], mesh)


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
