"""ZeRO: AdamW over one flat vector, of which every rank owns a slice (Rajbhandari et al. 2020).

The trainable parameters, matrices first and then the vectors that never decay, lie end to end in one flat vector; gradients and
Adam's two moments lie the same way. Rank r of N owns the r-th of N equal slices:

    weights   | q_proj …… | k_proj …… | …matrices… | norm | bias | pad |      every rank, in the compute dtype
    owner     |<-------- rank 0 -------->|<--------- rank 1 ---------->|
    master, m, v                         | fp32, this slice only       |      stage 1 and 2; stage 0: all of it

    1. backward    gradients appear, last layers first; a bucket is a stretch of the vector whose gradients are all there
    2. reduce      buckets are summed over ranks: stage 0 for everyone, 1 for their owner at the step, 2 for their owner at once
    3. clip        squared norms of fixed chunks, gathered, summed in order: the same number on every rank
    4. step        each owner updates its slice
    5. gather      the updated slices become everyone's weights

`reduction="exact"` sums the gradients of the micro-batches 0, 1, 2, … in one pairwise tree, ((0+1)+(2+3))+…, whoever computed them:
micro-batch a·N + r is rank r's, so ranks are the lowest levels of the tree. Then stages and (power-of-two) numbers of ranks give the
same bytes, at the price of reducing every micro-batch and of a partial sum per level. `"fast"` adds as it comes.
"""

from bisect import bisect
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from minillama import comm, ops
from minillama.errors import UserError
from minillama.parallel.reducer import GradientReducer
from minillama.train_config import TrainConfig

CHUNK = 16384  # elements; slices are whole chunks, so that a chunk's norm never depends on the number of ranks
AT_ONCE = 1 << 22  # elements updated at a time, which bounds the temporary copies of a step


class ZeroAdamW:
    """AdamW over trainable parameters of one dtype, sharded by stage."""

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], mesh: comm.Mesh, settings: TrainConfig
    ) -> None:
        exact = settings.reduction == "exact"
        if exact and mesh.size & (mesh.size - 1):
            raise UserError(
                f"reduction = 'exact' needs 1, 2, 4, 8, … ranks, not {mesh.size}; use --reduction fast"
            )
        self.named = sorted(named, key=lambda item: item[1].ndim <= 1)  # stable: matrices first
        self.mesh, self.stage, self.steps, self.weight_decay = (
            mesh,
            settings.zero_stage,
            0,
            settings.weight_decay,
        )
        self.adam = {
            "beta1": settings.adam_beta1,
            "beta2": settings.adam_beta2,
            "epsilon": settings.adam_epsilon,
        }
        # fused kernels round the ends of a stretch otherwise, so their result depends on how the vector is cut
        self.update = ops.reference.adamw if exact else ops.adamw
        self.total = sum(p.numel() for _, p in self.named)
        self.decayed = sum(p.numel() for _, p in self.named if p.ndim > 1)
        size = -(-self.total // (CHUNK * mesh.size)) * CHUNK  # of a slice
        self.owned = slice(mesh.rank * size, (mesh.rank + 1) * size)
        self.kept = (
            self.owned if self.stage else slice(0, size * mesh.size)
        )  # what this rank updates
        dtype, device = self.named[0][1].dtype, self.named[0][1].device
        self.weights = torch.zeros(size * mesh.size, dtype=dtype, device=device)
        for (_, parameter), view in zip(self.named, self.views(self.weights), strict=True):
            view.copy_(parameter.detach())
            parameter.data = view
        mine = self.weights[self.kept]
        self.master = mine if dtype == torch.float32 else mine.float()
        self.m, self.v = torch.zeros_like(self.master), torch.zeros_like(self.master)
        self.gradients = GradientReducer([p for _, p in self.named], mesh, size, settings)

    def views(self, vector: Tensor) -> list[Tensor]:
        """A flat vector cut into the parameters' shapes."""
        parts = vector[: self.total].split([p.numel() for _, p in self.named])
        return [part.view(p.shape) for part, (_, p) in zip(parts, self.named, strict=True)]

    def squared_norm(self) -> Tensor:
        """The squared norm of the step's whole gradient, () fp64 on the host (not every device has it), the same number on every rank."""
        chunks = torch.stack(
            [row.float().square().sum() for row in self.gradients.reduced().view(-1, CHUNK)]
        )
        if self.stage:
            chunks = comm.all_gather(self.mesh, chunks)
        return chunks[: -(-self.total // CHUNK)].cpu().double().sum()

    def step(self, learning_rate: float, scale: float = 1.0) -> None:
        """One AdamW update with the gradient times `scale`; afterwards every rank has the new weights."""
        self.steps += 1
        grad = self.gradients.reduced()
        border, end = (
            min(max(place - self.kept.start, 0), len(grad)) for place in (self.decayed, self.total)
        )
        for start, stop, decay in ((0, border, self.weight_decay), (border, end, 0.0)):
            for at in range(start, stop, AT_ONCE):
                part = slice(at, min(at + AT_ONCE, stop))
                scaled = grad[part].float() if scale == 1.0 else grad[part].float() * scale
                self.update(
                    self.master[part],
                    scaled,
                    self.m[part],
                    self.v[part],
                    self.steps,
                    learning_rate=learning_rate,
                    weight_decay=decay,
                    **self.adam,
                )
        self.publish()

    def publish(self) -> None:
        """Make the masters everyone's weights."""
        if self.master.dtype != self.weights.dtype:
            self.weights[self.kept].copy_(self.master)
        if self.stage:
            comm.all_gather_into(self.mesh, self.weights, self.weights[self.owned])

    def first_non_finite(self) -> str:
        """The first parameter whose gradient, as far as this rank keeps it, is not finite; or an empty string."""
        bad = (~self.gradients.reduced().isfinite()).nonzero()
        return (
            self.named[bisect(self.gradients.starts, int(bad[0]) + self.kept.start) - 1][0]
            if len(bad)
            else ""
        )

    def state(self) -> dict[str, Tensor]:
        """What this rank owns: master, m and v from position `owned.start` on, cut after the last parameter."""
        first, last = (
            min(place, self.total) - self.kept.start
            for place in (self.owned.start, self.owned.stop)
        )
        return {
            name: getattr(self, name)[max(first, 0) : max(last, 0)] for name in ("master", "m", "v")
        }

    def load_state(self, read: Callable[[str, int, int], Tensor], steps: int) -> None:
        """Take the state over: read(name, start, stop) returns a stretch of a saved vector by position, whoever saved it."""
        start, stop = min(self.kept.start, self.total), min(self.kept.stop, self.total)
        for name in ("master", "m", "v"):
            getattr(self, name)[: stop - start] = read(name, start, stop)
        self.steps = steps
        self.publish()
