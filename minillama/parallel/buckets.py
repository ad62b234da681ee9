"""Which gradients are reduced together: buckets of parameters that lie side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

from minillama.parallel.flat_layout import FlatLayout


@dataclass
class Bucket:
    """Whole parameters that lie side by side in the flat vector, from element `start` to `stop`."""

    start: int
    stop: int
    members: list[int]  # the indices of its parameters


def gaps_between(covered: Sequence[Bucket | range], end: int) -> list[range]:
    """The ranges of a flat vector, up to its `end`, that no bucket or range covers."""
    gaps = []
    position = 0
    for place in sorted(covered, key=lambda place: place.start):
        gaps.append(range(position, place.start))
        position = place.stop
    gaps.append(range(position, end))
    return [gap for gap in gaps if gap]


def plan_buckets(layout: FlatLayout, bucket_elements: int) -> list[Bucket]:
    """Group parameters into buckets of at most `bucket_elements` elements (a larger parameter gets
    its own).

    The buckets are in the order in which backward completes them: matrices from last to first, then
    the 1-D parameters likewise."""
    num_parameters = len(layout.ranges)
    buckets = []
    for group in (range(layout.num_matrices), range(layout.num_matrices, num_parameters)):
        bucket = None
        for i in reversed(group):
            place = layout.ranges[i]
            if bucket is None or bucket.stop - place.start > bucket_elements:
                bucket = Bucket(start=place.start, stop=place.stop, members=[])
                buckets.append(bucket)
            bucket.start = place.start
            bucket.members.append(i)
    return buckets
