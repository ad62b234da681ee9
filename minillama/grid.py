"""The grid of ranks: data × stage × tensor (Narayanan et al. 2021).

    data      ranks with the same part of the model and different micro-batches
    stage     ranks with consecutive layers of one model, on the same micro-batches
    tensor    ranks with parts of the same layers, on the same micro-batches

Rank = (data · stages + stage) · tensors + tensor, as in Megatron. Tensor ranks send most, so they
are neighbours. With 8 ranks, 2 stages and 2 tensor ranks:

                 stage 0    stage 1
    data 0        0  1       2  3
    data 1        4  5       6  7

Each line through a rank is a `Mesh` of its own. A line of one rank needs no group, and all its
collectives are the identity. The ends of a stage line are a line too: a tied model has its
embedding on the first stage and the same weights as its head on the last.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from minillama import device as devices
from minillama.comm import Mesh
from minillama.errors import UserError


@dataclass(frozen=True)
class Grid:
    """All ranks, and the lines through this one."""

    all: Mesh
    data: Mesh
    stage: Mesh
    tensor: Mesh
    ends: Mesh  # the first and the last rank of the stage line; in between, this rank alone

    @property
    def elements_sent(self) -> float:
        """Tensor elements that this rank sent along all lines."""
        lines = {
            id(mesh): mesh for mesh in (self.all, self.data, self.stage, self.tensor, self.ends)
        }
        return sum(mesh.elements_sent for mesh in lines.values())


def check_ranks(ranks: int, tensor_parallel: int, pipeline_parallel: int) -> None:
    """Raise UserError unless `ranks` is a multiple of tensor_parallel · pipeline_parallel."""
    ranks_of_model = tensor_parallel * pipeline_parallel
    if ranks % ranks_of_model:
        raise UserError(
            f"{ranks} ranks cannot hold tensor_parallel = {tensor_parallel} times "
            f"pipeline_parallel = {pipeline_parallel}; start a multiple of {ranks_of_model} ranks"
        )


def make_grid(mesh: Mesh, tensor_parallel: int = 1, pipeline_parallel: int = 1) -> Grid:
    """Divide all ranks into a grid. Every rank must call this.

    Raises UserError unless the ranks are a multiple of tensor_parallel · pipeline_parallel.
    """
    check_ranks(mesh.size, tensor_parallel, pipeline_parallel)
    if tensor_parallel == pipeline_parallel == 1:
        single = Mesh(device=mesh.device)
        return Grid(all=mesh, data=mesh, stage=single, tensor=single, ends=single)
    numbers = torch.arange(mesh.size).view(-1, pipeline_parallel, tensor_parallel)
    stage = _line_through(mesh, numbers, axis=1)
    ends = stage
    if pipeline_parallel > 2:
        ends = _line_through(mesh, numbers[:, [0, -1]], axis=1)
    return Grid(
        all=mesh,
        data=_line_through(mesh, numbers, axis=0),
        stage=stage,
        tensor=_line_through(mesh, numbers, axis=2),
        ends=ends,
    )


def _line_through(mesh: Mesh, numbers: torch.Tensor, axis: int) -> Mesh:
    """The line along an axis that holds this rank; a line of its own if `numbers` lacks it.

    Every rank makes every group, in one order.
    """
    length = numbers.shape[axis]
    if length == 1:
        return Mesh(device=mesh.device)
    if length == mesh.size:
        return mesh
    own_line = Mesh(device=mesh.device)
    for line in numbers.movedim(axis, -1).reshape(-1, length).tolist():
        group = dist.new_group(
            line,
            timeout=timedelta(minutes=mesh.timeout_minutes),
            pg_options=devices.group_options(mesh.device, length),
        )
        if mesh.rank in line:
            own_line = Mesh(line.index(mesh.rank), length, mesh.device, group=group)
    return own_line
