"""Which part of each whole parameter this rank holds, by name.

A tensor rank holds some rows or columns of most parameters (`parallel.shards`), a stage holds some
of the layers. What is saved, counted or printed speaks of the whole model: so a rank needs to know
where its part lies in the whole, and what the other stages hold.

    whole q_proj.weight (8, 6)        tensor rank 0: axis 0, rows 0 … 3
                                      tensor rank 1: axis 0, rows 4 … 7
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import nn

from minillama import comm
from minillama.grid import Grid
from minillama.parallel.shards import axis_of


@dataclass(frozen=True)
class Part:
    """The part of a parameter that a rank holds: indices `start` … `stop` of an axis."""

    name: str
    whole_shape: tuple[int, ...]
    dtype: torch.dtype
    axis: int | None = None  # None: all of it
    start: int = 0
    stop: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what this rank holds."""
        shape = list(self.whole_shape)
        if self.axis is not None:
            shape[self.axis] = self.stop - self.start
        return tuple(shape)

    @property
    def whole_size(self) -> int:
        """The number of elements of the whole parameter."""
        return prod(self.whole_shape)


def parts_on_rank(named: Sequence[tuple[str, nn.Parameter]], grid: Grid) -> list[Part]:
    """Describe the parameters that this rank holds. Called on every rank."""
    shapes = [tuple(parameter.shape) for _, parameter in named]
    shapes_by_rank = comm.gather_objects(grid.tensor, shapes)
    parts = []
    for index, (name, parameter) in enumerate(named):
        part = Part(name, shapes[index], parameter.dtype)
        axis = axis_of(name) if grid.tensor.size > 1 else None
        if axis is not None:
            lengths = [shapes_of_rank[index][axis] for shapes_of_rank in shapes_by_rank]
            part = _place_on_axis(part, axis, lengths, grid.tensor.rank)
        parts.append(part)
    return parts


def _place_on_axis(part: Part, axis: int, lengths: Sequence[int], rank: int) -> Part:
    """A part of a parameter that is cut along `axis`. lengths: of the parts of all tensor ranks."""
    whole_shape = list(part.whole_shape)
    whole_shape[axis] = sum(lengths)
    start = sum(lengths[:rank])
    return replace(
        part,
        whole_shape=tuple(whole_shape),
        axis=axis,
        start=start,
        stop=start + lengths[rank],
    )


def parts_of_all_stages(parts: Sequence[Part], grid: Grid) -> dict[str, Part]:
    """The parameters of the whole model by name, in its order. Called on every rank.

    A parameter that two stages hold is there once.
    """
    by_name: dict[str, Part] = {}
    for parts_of_stage in comm.gather_objects(grid.stage, list(parts)):
        for part in parts_of_stage:
            by_name.setdefault(part.name, part)
    return by_name
