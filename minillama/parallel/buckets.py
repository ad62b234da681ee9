"""Which gradients are reduced together: buckets of parameters that lie side by side."""

from dataclasses import dataclass
from itertools import accumulate

from torch import nn


@dataclass
class Bucket:
    """Whole parameters that lie side by side in the flat vector, from element `start` to `stop`."""

    start: int
    stop: int
    members: list[int]  # the indices of its parameters


def plan_buckets(parameters: list[nn.Parameter], bucket_elements: int) -> list[Bucket]:
    """Group parameters into buckets of at most `bucket_elements` elements (a larger parameter gets
    its own).

    `parameters` are in the order of the flat vector: matrices first, then 1-D parameters. The
    buckets are in the order in which backward completes them: matrices from last to first, then the
    1-D parameters likewise."""
    starts = [0, *accumulate(parameter.numel() for parameter in parameters)]
    num_matrices = sum(parameter.ndim > 1 for parameter in parameters)
    buckets = []
    for group in (range(num_matrices), range(num_matrices, len(parameters))):
        room = 0
        for i in reversed(group):
            size = parameters[i].numel()
            if size > room:
                buckets.append(Bucket(start=starts[i], stop=starts[i + 1], members=[]))
                room = bucket_elements
            room -= size
            buckets[-1].start = starts[i]
            buckets[-1].members.append(i)
    return buckets
