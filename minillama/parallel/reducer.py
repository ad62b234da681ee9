"""Sums gradients over micro-batches and ranks, bucket by bucket.

Autograd produces the gradient of one parameter at a time, the last layer first. Parameters that lie
side by side in the flat vector (see `parallel.zero`) form a bucket, which is reduced in one piece:

    lm_head -> last layer -> … -> embed_tokens -> all norms     the order of backward

Norms and biases come last: the norm of the first layer is the last gradient of all.

    mode             a bucket is reduced …               its sum goes to     dtype of the reduction
    fast, stage 0    once a step, at the end             every rank          dtype of the sums
    fast, stage 1    once a step, at the end             its owner           dtype of the sums
    fast, stage 2    in every micro-batch, in backward   its owner           dtype of the parameters
    exact            in every micro-batch, in backward   its owner           fp32

Sums are fp32 if several micro-batches are added, else of the parameters' dtype.

    once a step           Gradients are added up in one vector, in which they lie as the weights do.
                          It is reduced in place.
    in every micro-batch  Gradients are collected in a bucket. Its sum is added to the slice of its
                          owner, and its memory is freed. A bucket of one large parameter is the
                          gradient that autograd made, without a copy.

The exact reduction adds micro-batches in a fixed pairwise tree (`parallel.pairwise_sum`).
Between two steps no gradient takes memory, but for the one vector of several ranks on CPUs: they
keep it, because the system would have to clear every page of a new one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from minillama import comm
from minillama.memory import release_freed
from minillama.parallel.buckets import gaps_between, plan_buckets
from minillama.parallel.flat_layout import FlatLayout
from minillama.parallel.pairwise_sum import PairwiseSum
from minillama.train_config import TrainConfig

RELEASE_EVERY = 1 << 24  # freed gradient elements after which memory is returned to the system
MAX_IN_FLIGHT = 2  # reductions under way at a time; more would only hold more memory


@dataclass
class PendingReduction:
    """A reduction under way: `wait()` returns the sum, which belongs at `offset` of this rank's
    slice.
    """

    wait: Callable[[], Tensor]
    offset: int  # negative, or beyond the slice, if another rank owns the sum


class GradientReducer:
    """Reduces the gradients of `parameters` as backward produces them.

    Use: `clear()` before a step, `end_micro_batch()` after each backward, `reduced()` for the sum.

    Args:
        parameters: in the order of the flat vector.
        layout: where they lie in it.
        mesh: the ranks with the same parameters and other micro-batches.
        slice_size: elements of the flat vector that each rank owns.
        config: `zero_stage`, `reduction`, `bucket_elements`, `gradient_accumulation_steps`.
        defer: reduce only after backward. A rank without a micro-batch runs no backward, and all
            ranks must reduce in the same order. So only one vector may reduce during backward.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        layout: FlatLayout,
        mesh: comm.Mesh,
        slice_size: int,
        config: TrainConfig,
        defer: bool = False,
    ) -> None:
        self.layout = layout
        self.device = parameters[0].device
        self.mesh = mesh
        self.bucket_elements = config.bucket_elements
        self.stage = config.zero_stage
        self.exact = config.reduction == "exact"
        self.every_micro_batch = self.stage == 2 or self.exact
        self.reduce_in_backward = self.every_micro_batch and not defer
        self.all_reduce = self.stage == 0 and not self.exact
        adds_up = self.exact or config.gradient_accumulation_steps > 1
        self.sum_dtype = torch.float32 if adds_up else parameters[0].dtype
        early = self.stage == 2 and not self.exact
        self.reduce_dtype = parameters[0].dtype if early else self.sum_dtype
        self.padded = slice_size * mesh.size  # elements of the whole vector
        self.owned = slice(mesh.rank * slice_size, (mesh.rank + 1) * slice_size)
        self.slice_size = self.padded if self.all_reduce else slice_size
        on_cpu_ranks = mesh.size > 1 and self.device.type == "cpu"
        self.keeps_vector = on_cpu_ranks and not self.every_micro_batch
        self.vector: Tensor | None = None  # all gradients, if they are reduced once a step
        self.active_ranks = mesh.size  # ranks, from 0 on, that have a micro-batch in this round
        self.freed_elements = 0

        self.buckets = plan_buckets(layout, self.bucket_elements)
        self.gaps = gaps_between(self.buckets, self.padded)
        self.bucket_of: dict[int, int] = {}  # index of a parameter -> index of its bucket
        for number, bucket in enumerate(self.buckets):
            for i in bucket.members:
                self.bucket_of[i] = number
        self.clear()
        for i, parameter in enumerate(parameters):
            parameter.register_post_accumulate_grad_hook(partial(self._on_grad_ready, i))

    def clear(self) -> None:
        """Forget all gradients."""
        if not self.keeps_vector:
            self.vector = None
        self.added: set[int] = set()  # indices of the parameters whose gradients are in `vector`
        self.sum: Tensor | None = None  # of this rank's slice, if every micro-batch is reduced
        self.pairwise_sum = PairwiseSum()  # exact reduction only
        self.result: Tensor | None = None
        self._begin_round()

    def _begin_round(self) -> None:
        """Start a round, in which every bucket is reduced once: a micro-batch, or a whole step."""
        self.missing = [len(bucket.members) for bucket in self.buckets]  # gradients to come
        self.next_bucket = 0
        self.is_first_round = self.sum is None
        self.filled: dict[int, Tensor] = {}  # index of a bucket -> its gradients so far
        self.pending: list[PendingReduction] = []

    def _on_grad_ready(self, i: int, parameter: nn.Parameter) -> None:
        """Take the gradient of parameter i from it."""
        assert parameter.grad is not None
        gradient = parameter.grad.flatten()
        parameter.grad = None
        if not self.keeps_vector:  # else the gradients to come take the same memory again
            self._note_freed(len(gradient))
        if self.every_micro_batch:
            self._put_into_bucket(i, gradient)
        else:
            self._add_to_vector(i, gradient)

    def _add_to_vector(self, i: int, gradient: Tensor) -> None:
        """Add the gradient of parameter i in its place of the whole vector."""
        place = self.layout.ranges[i]
        total = self._whole_vector()[place.start : place.stop]
        if i in self.added:
            total.add_(gradient)
        else:
            total.copy_(gradient)
            self.added.add(i)

    def _whole_vector(self) -> Tensor:
        """The vector of all gradients. Its memory is taken only as it is written."""
        if self.vector is None:
            self.vector = torch.empty(self.padded, dtype=self.sum_dtype, device=self.device)
        return self.vector

    def _put_into_bucket(self, i: int, gradient: Tensor) -> None:
        """Move the gradient of parameter i into its bucket, and reduce the buckets whose turn it
        is.
        """
        number = self.bucket_of[i]
        bucket = self.buckets[number]
        if len(bucket.members) == 1 and number not in self.filled:
            self.filled[number] = gradient.to(self.reduce_dtype)
        else:
            start = self.layout.ranges[i].start - bucket.start
            self._bucket_values(number)[start : start + len(gradient)] += gradient
        self.missing[number] -= 1
        while self.reduce_in_backward and self._next_is_complete():
            self._start_next_bucket()

    def _next_is_complete(self) -> bool:
        return self.next_bucket < len(self.buckets) and self.missing[self.next_bucket] == 0

    def _note_freed(self, elements: int) -> None:
        self.freed_elements += elements
        if self.freed_elements >= RELEASE_EVERY:
            release_freed(self.device)
            self.freed_elements = 0

    def _bucket_values(self, number: int) -> Tensor:
        """The gradients of a bucket so far in this round; zeros at first."""
        if number not in self.filled:
            bucket = self.buckets[number]
            size = bucket.stop - bucket.start
            self.filled[number] = torch.zeros(size, dtype=self.reduce_dtype, device=self.device)
        return self.filled[number]

    def _start_next_bucket(self) -> None:
        """Start the reduction of the next bucket.

        Every rank reduces its buckets in the same order.
        """
        bucket = self.buckets[self.next_bucket]
        values = self._bucket_values(self.next_bucket)
        del self.filled[self.next_bucket]
        self.next_bucket += 1
        if self.sum is None:
            self.sum = self._new_sum()
        self._start_reduce(values, bucket.start)

    def _start_reduce(self, values: Tensor, start: int) -> None:
        """Start to reduce what lies in the vector from element `start` on.

        It may reach over the slices of several owners.
        """
        end = start + len(values)
        while values.numel():
            owner = start // self.slice_size
            end_of_slice = (owner + 1) * self.slice_size
            stop = min(end, start + self.bucket_elements, end_of_slice)
            part, values = values.split([stop - start, end - stop])
            wait = comm.reduce_to(
                self.mesh,
                part,
                owner=None if self.all_reduce else owner,
                pairwise_of=self.active_ranks if self.exact else None,
            )
            self.pending.append(PendingReduction(wait, offset=start - self.owned.start))
            start = stop
            while len(self.pending) > MAX_IN_FLIGHT:
                self._finish_reduce()

    def _new_sum(self) -> Tensor:
        """Room for this rank's slice, with zeros between the buckets.

        Its memory is taken only as it is written, while gradients are freed.
        """
        total = torch.empty(self.slice_size, dtype=self.sum_dtype, device=self.device)
        for gap in self.gaps:
            start = max(0, gap.start - self.owned.start)
            stop = max(0, gap.stop - self.owned.start)
            total[start:stop] = 0
        return total

    def _finish_reduce(self) -> None:
        """Wait for the oldest reduction under way. Add a bucket's sum to this rank's slice, if it
        belongs there; a part of the whole vector is in its place.
        """
        reduction = self.pending.pop(0)
        part = reduction.wait()
        if not self.every_micro_batch or not 0 <= reduction.offset < self.slice_size:
            return
        assert self.sum is not None
        destination = self.sum[reduction.offset : reduction.offset + len(part)]
        if self.is_first_round:
            destination.copy_(part)
        else:
            destination.add_(part)

    def end_micro_batch(self) -> None:
        """Finish a micro-batch; a rank without one calls this too."""
        assert self.result is None, "call clear() between reduced() and the next backward"
        if self.every_micro_batch:
            self._end_round()

    def _end_round(self) -> None:
        while self.next_bucket < len(self.buckets):
            self._start_next_bucket()
        while self.pending:
            self._finish_reduce()
        if self.exact:
            assert self.sum is not None
            self.pairwise_sum.add(self.sum)
            self.sum = None
        self._begin_round()

    def _reduce_vector(self) -> Tensor:
        """Sum the whole vector over the ranks, once a step. It is 0 where no gradient came."""
        vector = self._whole_vector()
        written = [self.layout.ranges[i] for i in self.added]
        for gap in gaps_between(written, self.padded):
            vector[gap.start : gap.stop] = 0
        for bucket in self.buckets:
            self._start_reduce(vector[bucket.start : bucket.stop], bucket.start)
        while self.pending:
            self._finish_reduce()
        return vector[self.owned] if self.stage == 1 else vector

    def reduced(self) -> Tensor:
        """The sum over micro-batches and ranks: the whole padded vector at stage 0, this rank's
        slice at 1 and 2.
        """
        if self.result is None:
            self.result = self._finish_step()
        return self.result

    def _finish_step(self) -> Tensor:
        if self.exact:
            total = self.pairwise_sum.result()
            return comm.all_gather(self.mesh, total) if self.stage == 0 else total
        if not self.every_micro_batch:
            return self._reduce_vector()
        assert self.sum is not None
        return self.sum
