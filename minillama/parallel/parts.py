"""Which part of each whole parameter this rank holds, by name.

A tensor rank holds some rows or columns of most parameters (`parallel.shards`), and a stage holds
some of the layers. What is saved, counted or printed is about the whole model. So a rank needs to
know where its part lies in the whole, and what the other stages hold.

    whole q_proj.weight (8, 6)        tensor rank 0: axis 0, rows 0 … 3
                                      tensor rank 1: axis 0, rows 4 … 7
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn

from minillama import comm
from minillama.grid import Grid
from minillama.parallel.shards import axis_of


@dataclass(frozen=True)
class WholeParameter:
    """A parameter of the whole model, wherever it is."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """The number of its elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Part:
    """The part of a parameter that a rank holds: indices `start` … `stop` of an axis."""

    name: str
    whole_shape: tuple[int, ...]
    axis: int | None = None  # None: all of it
    start: int = 0
    stop: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what the rank holds."""
        shape = list(self.whole_shape)
        if self.axis is not None:
            shape[self.axis] = self.stop - self.start
        return tuple(shape)

    def overlaps(self, other: "Part") -> bool:
        """Whether two parts of one parameter have elements in common."""
        if self.axis is None or other.axis is None:
            return True
        return max(self.start, other.start) < min(self.stop, other.stop)

    def cut_from(self, whole: Tensor) -> Tensor:
        """This part of a tensor of the whole shape, as a view."""
        if self.axis is None:
            return whole
        return whole.narrow(self.axis, self.start, self.stop - self.start)


@dataclass(frozen=True)
class SavedPiece:
    """Elements `first` … `last` of a flattened part, which lie at `offset` of a saved vector."""

    part: Part
    first: int
    last: int
    offset: int


def parts_on_rank(named: Sequence[tuple[str, nn.Parameter]], grid: Grid) -> dict[str, Part]:
    """The parts of the parameters that this rank holds, by name. Called on every rank."""
    shapes = [tuple(parameter.shape) for _, parameter in named]
    shapes_by_rank = comm.gather_objects(grid.tensor, shapes)
    parts = {}
    for index, (name, _) in enumerate(named):
        part = Part(name, shapes[index])
        axis = axis_of(name) if grid.tensor.size > 1 else None
        if axis is not None:
            lengths = [shapes_of_rank[index][axis] for shapes_of_rank in shapes_by_rank]
            part = _place_on_axis(part, axis, lengths, grid.tensor.rank)
        parts[name] = part
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


def parameters_of_all_stages(
    named: Sequence[tuple[str, nn.Parameter]], parts: dict[str, Part], grid: Grid
) -> dict[str, WholeParameter]:
    """The parameters of the whole model by name, in its order. Called on every rank.

    A parameter that two stages hold is there once.
    """
    own = {}
    for name, parameter in named:
        own[name] = WholeParameter(parts[name].whole_shape, parameter.dtype)
    everything: dict[str, WholeParameter] = {}
    for parameters_of_stage in comm.gather_objects(grid.stage, own):
        for name, whole in parameters_of_stage.items():
            everything.setdefault(name, whole)
    return everything
