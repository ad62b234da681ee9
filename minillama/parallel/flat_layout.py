"""Where each parameter lies in a flat vector: matrices first, then norms and biases.

They lie end to end, or with a gap before each one, so that it begins at a multiple of `align`:

    align = 1     | q_proj | k_proj | norm |
    align = 8     | q_proj     | k_proj     | norm   |
"""

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `number`."""
    return -(-number // multiple) * multiple


@dataclass(frozen=True)
class Piece:
    """The elements of one parameter that lie in a range of the vector."""

    index: int  # of the parameter
    first: int  # its elements, flattened: from this one on
    last: int  # up to this one
    offset: int  # where they lie in the range


@dataclass(frozen=True)
class FlatLayout:
    """The ranges of a flat vector's parameters."""

    ranges: tuple[range, ...]  # of each parameter, in order
    num_matrices: int  # parameters of more than one axis; they come first

    @property
    def total(self) -> int:
        """The end of the last parameter."""
        return self.ranges[-1].stop

    @property
    def decayed(self) -> int:
        """The end of the last matrix: weight decay ends there."""
        return self.ranges[self.num_matrices - 1].stop if self.num_matrices else 0

    def index_at(self, position: int) -> int:
        """The index of the parameter that has an element of the vector."""
        return bisect(self.ranges, position, key=lambda place: place.start) - 1

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """What lies in the range start … stop of the vector."""
        pieces = []
        for index, place in enumerate(self.ranges):
            first = max(start, place.start)
            last = min(stop, place.stop)
            if first < last:
                piece = Piece(index, first - place.start, last - place.start, first - start)
                pieces.append(piece)
        return pieces


def lay_out(shapes: Sequence[Sequence[int]], align: int = 1) -> FlatLayout:
    """Lay parameters of these shapes one after the other. Matrices come first."""
    ranges = []
    stop = 0
    for shape in shapes:
        start = round_up(stop, align)
        stop = start + prod(shape)
        ranges.append(range(start, stop))
    num_matrices = sum(len(shape) > 1 for shape in shapes)
    return FlatLayout(tuple(ranges), num_matrices)
