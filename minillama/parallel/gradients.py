"""Where gradients go: from autograd into buckets, over the ranks, into what this rank keeps.

A bucket is a stretch of the flat vector, whole parameters, last ones first because backward meets them first. Stage 2 (and the exact
reduction) sends a bucket to its owners as soon as it and all before it are complete, while backward goes on, and frees it. Stages 0
and 1 let gradients add up in one flat vector and reduce it once, at the step.

    micro-batch 0   [bucket 2] [bucket 1] [bucket 0]      each: sum over ranks -> added to the owner's slice -> freed
    micro-batch 1   [bucket 2] …

The exact reduction keeps its partial sums as a binary counter does: two sums of equally many micro-batches become one.
"""

import torch
from torch import Tensor, nn

from minillama import comm
from minillama.comm import Mesh


def gradient_dtype(parameter: torch.dtype, accumulates: bool, exact: bool) -> torch.dtype:
    """Gradients of several micro-batches add up in fp32; a single one stays as backward left it."""
    return torch.float32 if accumulates or exact else parameter


class Gradients:
    """The gradients of a step. Call end_micro_batch after each backward, reduced() for the sum, clear() before the next step."""

    def __init__(self, named: list[tuple[str, nn.Parameter]], mesh: Mesh, slice_size: int, stage: int, exact: bool,
                 bucket_elements: int, dtype: torch.dtype) -> None:
        self.mesh, self.stage, self.exact, self.slice_size = mesh, stage, exact, slice_size
        self.named, self.device, self.at_once, self.present = named, named[0][1].device, stage == 2 or exact, mesh.size
        self.bucket_elements = bucket_elements
        self._plan_buckets(bucket_elements)
        self.sum = torch.zeros(slice_size if self.at_once else slice_size * mesh.size, dtype=dtype, device=self.device)
        self.levels: list[tuple[int, Tensor]] = []  # exact: (how many micro-batches, their sum), ever fewer
        self.result: Tensor | None = None
        for i, (_, parameter) in enumerate(named):
            place = self.sum[self.starts[i]:self.starts[i] + parameter.numel()].view(parameter.shape) if not self.at_once else None
            if place is not None and parameter.dtype == dtype:
                parameter.grad = place  # autograd adds in place
            else:
                parameter.register_post_accumulate_grad_hook(self._hook(i, place))

    def _plan_buckets(self, bucket_elements: int) -> None:
        """starts: where each parameter begins. buckets: [(start, stop, parameters)], last parameters first."""
        self.starts, self.buckets, self.bucket_of = [], [], {}
        stop, members = 0, 0
        for _, parameter in self.named:
            self.starts.append(stop)
            stop += parameter.numel()
        for i in reversed(range(len(self.named))):
            self.bucket_of[i], members = len(self.buckets), members + 1
            if stop - self.starts[i] >= bucket_elements or i == 0:
                self.buckets.append((self.starts[i], stop, members))
                stop, members = self.starts[i], 0
        self._begin_micro_batch()

    def _begin_micro_batch(self) -> None:
        self.waiting_for = [members for _, _, members in self.buckets]
        self.next_bucket = 0
        self.filled: dict[int, Tensor] = {}                    # buckets under way
        self.sent: list[tuple[comm.Pending, int]] = []         # and where in this rank's slice they go; -1: elsewhere

    def _hook(self, i: int, place: Tensor | None):
        def on_gradient(parameter: nn.Parameter) -> None:
            if place is not None:
                place.add_(parameter.grad)
            else:
                self._fill(i, parameter.grad)
            parameter.grad = None
        return on_gradient

    def _fill(self, i: int, gradient: Tensor) -> None:
        bucket = self.bucket_of[i]
        offset = self.starts[i] - self.buckets[bucket][0]
        self._values(bucket)[offset:offset + gradient.numel()] += gradient.flatten()
        self.waiting_for[bucket] -= 1
        while self.next_bucket < len(self.buckets) and self.waiting_for[self.next_bucket] == 0:
            self._send(self.next_bucket)

    def _values(self, bucket: int) -> Tensor:
        """What has come of a bucket in this micro-batch; zeros at first."""
        if bucket not in self.filled:
            start, stop, _ = self.buckets[bucket]
            dtype = torch.float32 if self.exact else self.named[0][1].dtype
            self.filled[bucket] = torch.zeros(stop - start, dtype=dtype, device=self.device)
        return self.filled[bucket]

    def _send(self, bucket: int) -> None:
        """Reduce a bucket to its owners; every rank sends its buckets in the same order."""
        start, stop, _ = self.buckets[bucket]
        values = self._values(bucket)
        del self.filled[bucket]
        for owner in range(start // self.slice_size, -(-stop // self.slice_size)):
            first, last = max(start, owner * self.slice_size), min(stop, (owner + 1) * self.slice_size)
            part = values[first - start:last - start]
            pending = comm.reduce_to(self.mesh, part, owner, self.present if self.exact else None)
            self.sent.append((pending, first - owner * self.slice_size if owner == self.mesh.rank else -1))
        self.next_bucket = bucket + 1
        while len(self.sent) > 2:  # bounds what is in flight
            self._receive()

    def _receive(self) -> None:
        pending, place = self.sent.pop(0)
        part = pending.wait()
        if place >= 0:
            self.sum[place:place + len(part)] += part

    def end_micro_batch(self) -> None:
        """Send what is left of a micro-batch; with the exact reduction, carry it into the counter."""
        self.result = None
        if not self.at_once:
            return
        while self.next_bucket < len(self.buckets):
            self._send(self.next_bucket)
        while self.sent:
            self._receive()
        self._begin_micro_batch()
        if self.exact:
            self._carry(1, self.sum)
            self.sum = torch.zeros_like(self.sum)

    def _carry(self, count: int, total: Tensor) -> None:
        while self.levels and self.levels[-1][0] == count:
            total = self.levels.pop()[1].add_(total)
            count *= 2
        self.levels.append((count, total))

    def reduced(self) -> Tensor:
        """The sum over micro-batches and ranks: the whole vector at stage 0, this rank's slice at 1 and 2. Ends accumulation."""
        if self.result is not None:
            return self.result
        if self.exact:
            total = self.levels.pop()[1]
            while self.levels:
                total = self.levels.pop()[1].add_(total)
            self.result = comm.all_gather(self.mesh, total) if self.stage == 0 else total
        elif self.stage == 0:
            self.result = comm.all_reduce_sum(self.mesh, self.sum)
        elif self.stage == 1:
            slices = self.sum.split(self.slice_size)
            for owner, part in enumerate(slices):
                for stretch in part.split(self.bucket_elements):  # bounds what the collective copies
                    comm.reduce_to(self.mesh, stretch, owner).wait()
            self.result = slices[self.mesh.rank]
        else:
            self.result = self.sum
        return self.result

    def clear(self) -> None:
        self.sum.zero_()
        self.levels, self.result = [], None
