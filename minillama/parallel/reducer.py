"""Where gradients go: from autograd into buckets, over the ranks, into what this rank keeps.

A bucket is a stretch of the flat vector, whole parameters. Buckets go out in the order in which backward completes them: matrices from
the last to the first, and then the vectors, because the first layer's norm comes last of all. A parameter as large as a bucket is sent
from where autograd left its gradient, a stretch at a time; smaller ones are copied together.

    lm_head -> last layer -> … -> embed_tokens -> all norms          each bucket: sum over ranks -> added to its owner's slice -> freed

Stage 2 (and the exact reduction) sends a bucket as soon as it and all before it are complete, while backward goes on. Stages 0 and 1
let the micro-batches add up in the buckets, and send them at the step. The exact reduction keeps its partial sums as a binary counter
does: two sums of equally many micro-batches become one. Between two steps no gradient takes memory.
"""

from collections.abc import Callable
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn

from minillama import comm, device
from minillama.train_config import TrainConfig

RELEASE_EVERY = (
    1 << 23
)  # elements of gradients, after which the system gets back what has been freed


class GradientReducer:
    """The gradients of a step. Call end_micro_batch after each backward, reduced() for the sum, clear() before the next step."""

    def __init__(
        self,
        parameters: list[nn.Parameter],
        mesh: comm.Mesh,
        slice_size: int,
        settings: TrainConfig,
    ) -> None:
        self.parameters, self.mesh, self.bucket_elements = (
            parameters,
            mesh,
            settings.bucket_elements,
        )
        self.stage, self.exact, self.present, self.freed = (
            settings.zero_stage,
            settings.reduction == "exact",
            mesh.size,
            0,
        )
        self.at_once = self.stage == 2 or self.exact
        self.waits = (
            not self.at_once
        )  # send nothing before the end of the micro-batch; also where another vector goes first
        self.dtype = (
            torch.float32
            if self.exact or settings.gradient_accumulation_steps > 1
            else parameters[0].dtype
        )  # of sums
        self.sent_as = parameters[0].dtype if self.at_once and not self.exact else self.dtype
        self.for_everyone = (
            self.stage == 0 and not self.exact
        )  # the exact sums of stage 0 are gathered in the end
        self.slice_size = slice_size * mesh.size if self.for_everyone else slice_size
        self.kept_from = 0 if self.for_everyone else mesh.rank * slice_size
        self._plan_buckets()
        self.clear()
        for i, parameter in enumerate(parameters):
            parameter.register_post_accumulate_grad_hook(partial(self._take, i))

    def _plan_buckets(self) -> None:
        """starts: where each parameter begins. buckets: [(start, stop, parameters)], in the order in which they are sent."""
        sizes, matrices = (
            [p.numel() for p in self.parameters],
            sum(p.ndim > 1 for p in self.parameters),
        )
        self.starts, self.buckets, self.bucket_of = [0, *accumulate(sizes)], [], {}
        for group in (range(matrices), range(matrices, len(sizes))):
            room = 0
            for i in reversed(group):
                if sizes[i] > room:
                    self.buckets.append((0, self.starts[i + 1], 0))
                    room = self.bucket_elements
                room -= sizes[i]
                _, stop, members = self.buckets[-1]
                self.buckets[-1] = self.starts[i], stop, members + 1
                self.bucket_of[i] = len(self.buckets) - 1

    def clear(self) -> None:
        self.sum: Tensor | None = None  # what this rank keeps
        self.levels: list[
            tuple[int, Tensor]
        ] = []  # exact: (how many micro-batches, their sum), ever fewer
        self.result: Tensor | None = None
        self._begin_round()

    def _begin_round(self) -> None:
        """Every bucket is sent once a round: in each micro-batch, or once a step."""
        self.missing = [members for _, _, members in self.buckets]
        self.next_bucket, self.is_first_round = 0, self.sum is None
        self.filled: dict[int, Tensor] = {}  # buckets under way
        self.sent: list[
            tuple[Callable[[], Tensor], int]
        ] = []  # and where in `sum` they go; outside of it: to another rank

    def _take(self, i: int, parameter: nn.Parameter) -> None:
        """What autograd calls: move a gradient into its bucket, and send the buckets whose turn it is."""
        gradient, parameter.grad = parameter.grad.flatten(), None
        self._note_freed(len(gradient))
        bucket = self.bucket_of[i]
        start, _, members = self.buckets[bucket]
        if members == 1 and bucket not in self.filled:
            self.filled[bucket] = gradient.to(self.sent_as)
        else:
            self._values(bucket)[self.starts[i] - start : self.starts[i + 1] - start] += gradient
        self.missing[bucket] -= 1
        while (
            not self.waits
            and self.next_bucket < len(self.buckets)
            and self.missing[self.next_bucket] == 0
        ):
            self._send()

    def _note_freed(self, elements: int) -> None:
        self.freed += elements
        if self.freed >= RELEASE_EVERY:
            device.release_freed(self.parameters[0].device)
            self.freed = 0

    def _values(self, bucket: int) -> Tensor:
        """What has come of a bucket in this round; zeros at first."""
        if bucket not in self.filled:
            start, stop, _ = self.buckets[bucket]
            self.filled[bucket] = torch.zeros(
                stop - start, dtype=self.sent_as, device=self.parameters[0].device
            )
        return self.filled[bucket]

    def _send(self) -> None:
        """Reduce the next bucket to its owners; every rank sends its buckets in the same order."""
        start, stop, _ = self.buckets[self.next_bucket]
        values = self._values(self.next_bucket)
        del self.filled[self.next_bucket]
        self.next_bucket += 1
        if not self.at_once:
            self._note_freed(stop - start)
        if self.sum is None:  # empty: memory is taken as it is filled, while gradients are freed
            self.sum = torch.empty(self.slice_size, dtype=self.dtype, device=values.device)
            self.sum[max(0, self.starts[-1] - self.kept_from) :] = 0
        at = start
        while at < stop:
            owner = at // self.slice_size
            end = min(stop, at + self.bucket_elements, (owner + 1) * self.slice_size)
            wait = comm.reduce_to(
                self.mesh,
                values[at - start : end - start],
                None if self.for_everyone else owner,
                self.present if self.exact else None,
            )
            self.sent.append((wait, at - self.kept_from))
            at = end
            while len(self.sent) > 2:  # bounds what is in flight
                self._receive()

    def _receive(self) -> None:
        wait, place = self.sent.pop(0)
        part = wait()
        if 0 <= place < self.slice_size:
            mine = self.sum[place : place + len(part)]
            (mine.copy_ if self.is_first_round else mine.add_)(part)

    def end_micro_batch(self) -> None:
        """Send what is left of a micro-batch; with the exact reduction, carry it into the counter."""
        self.result = None
        if self.at_once:
            self._end_round()

    def _end_round(self) -> None:
        while self.next_bucket < len(self.buckets):
            self._send()
        while self.sent:
            self._receive()
        if self.exact:
            self._carry(1, self.sum)
            self.sum = None
        self._begin_round()

    def _carry(self, count: int, total: Tensor) -> None:
        while self.levels and self.levels[-1][0] == count:
            total = self.levels.pop()[1].add_(total)
            count *= 2
        self.levels.append((count, total))

    def reduced(self) -> Tensor:
        """The sum over micro-batches and ranks: the whole vector at stage 0, this rank's slice at 1 and 2. Ends accumulation."""
        if self.result is not None:
            return self.result
        if not self.at_once:
            self._end_round()
        self.result = self.sum
        if self.exact:
            total = self.levels.pop()[1]
            while self.levels:
                total = self.levels.pop()[1].add_(total)
            self.result = comm.all_gather(self.mesh, total) if self.stage == 0 else total
        return self.result
