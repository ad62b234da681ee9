"""Which part of each whole parameter this rank holds, by name.

A tensor rank holds some rows or columns of most parameters (`parallel.shards`), and a stage holds
some of the layers. What is saved, counted or printed is about the whole model. So a rank needs to
know where its part lies in the whole, and what the other stages hold.

    whole q_proj.weight (8, 6)        tensor rank 0: axis 0, rows 0 … 3
                                      tensor rank 1: axis 0, rows 4 … 7
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from minillama import comm
from minillama.comm import Mesh
from minillama.parallel.shards import axis_of


@dataclass(frozen=True)
class WholeParameter:
    """A parameter of the whole model, and which ranks hold it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    axis: int | None = None  # that the tensor ranks cut; None: each has all of it
    lengths: tuple[int, ...] = ()  # along the axis, of the part of each tensor rank
    stage: int = 0  # the first pipeline stage that holds it

    @property
    def size(self) -> int:
        """The number of its elements."""
        return prod(self.shape)

    def part_on(self, rank: int, name: str) -> "Part":
        """The part that a tensor rank of its stage holds."""
        if self.axis is None:
            return Part(name, self.shape)
        start = sum(self.lengths[:rank])
        return Part(name, self.shape, self.axis, start, start + self.lengths[rank])


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


def parameters_of_stage(
    parameters: Mapping[str, Tensor], tensor_ranks: Mesh, stage: int = 0
) -> dict[str, WholeParameter]:
    """What the tensor ranks of a stage hold together, in the order of `parameters`.

    parameters: this rank's parts by Hugging Face's names. Called on every tensor rank.
    """
    own_shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    shapes_by_rank = comm.gather_objects(tensor_ranks, own_shapes)
    result = {}
    for name, parameter in parameters.items():
        shape = list(parameter.shape)
        axis = axis_of(name) if tensor_ranks.size > 1 else None
        lengths: list[int] = []
        if axis is not None:
            lengths = [shapes[name][axis] for shapes in shapes_by_rank]
            shape[axis] = sum(lengths)
        result[name] = WholeParameter(tuple(shape), parameter.dtype, axis, tuple(lengths), stage)
    return result


def parameters_of_all_stages(
    own: Mapping[str, WholeParameter], stages: Mesh
) -> dict[str, WholeParameter]:
    """The parameters of the whole model by name, in its order. Called on every stage.

    own: those of this stage. What two stages hold is there once, as the first one's.
    """
    everything: dict[str, WholeParameter] = {}
    for parameters in comm.gather_objects(stages, own):
        for name, whole in parameters.items():
            everything.setdefault(name, whole)
    return everything
