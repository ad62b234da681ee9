"""A sum whose order does not depend on who adds: the exact reduction's, over micro-batches.

It keeps a list of partial sums, like the bits of a binary counter: two partial sums over equally
many micro-batches are added and become one.

    micro-batch   partial sums afterwards
    1             [1]
    2             [1+2]
    3             [1+2] [3]
    4             [(1+2)+(3+4)]
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class PartialSum:
    """The sum of this rank's slice over `num_micro_batches` micro-batches of every rank."""

    num_micro_batches: int
    total: Tensor


class PairwiseSum:
    """Adds tensors in a pairwise tree, ((1+2)+(3+4))+…, as they come.

    Overwrites what it is given.
    """

    def __init__(self) -> None:
        self.partial_sums: list[PartialSum] = []  # of ever fewer micro-batches

    def add(self, total: Tensor) -> None:
        """Add the sum of one more micro-batch, as one is added to a binary counter."""
        count = 1
        while self.partial_sums and self.partial_sums[-1].num_micro_batches == count:
            earlier = self.partial_sums.pop()
            total = earlier.total.add_(total)
            count *= 2
        self.partial_sums.append(PartialSum(count, total))

    def result(self) -> Tensor:
        """The sum over all micro-batches. Leaves nothing behind."""
        total = self.partial_sums.pop().total
        while self.partial_sums:
            total = self.partial_sums.pop().total.add_(total)
        return total
