"""ZeRO: AdamW over a flat vector, of which every rank owns a slice (Rajbhandari et al. 2020).

The trainable parameters lie end to end in one flat vector: matrices first, then norms and biases,
which are never decayed. Gradients and Adam's two moments lie the same way. Rank r of N owns the
r-th of N equal slices:

    weights        | q_proj …… | k_proj …… | …matrices… | norm | bias | pad |   every rank,
                                                                                in the compute dtype
    owner          |<-------- rank 0 -------->|<--------- rank 1 ---------->|
    master, m, v                              | fp32, this slice only       |   stage 1 and 2;
                                                                                stage 0: all of it

    1. backward    gradients appear, the last layers first; a bucket is a range of the vector whose
                   gradients are complete
    2. reduce      buckets are summed over ranks: at stage 0 for every rank; at 1 for their owner,
                   at the end of the step; at 2 for their owner, during backward
    3. clip        squared norms of slices are all-gathered and summed, so that every rank has the
                   same number
    4. step        each owner updates its slice
    5. all-gather  the updated slices become the weights of every rank

With `reduction="exact"` the gradients of the micro-batches 0, 1, 2, … are added in one pairwise
tree, ((0+1)+(2+3))+…, whichever rank computed them. Micro-batch a·N + r belongs to rank r, so the
ranks are the lowest levels of the tree. The norm is a sum over parameters, and of each one over
chunks that begin with it, so it does not depend on what else a rank holds; math.fsum adds without
rounding in between, so the order does not matter. All ZeRO stages, numbers of ranks (powers of two)
and pipeline stages then give the same bytes. The price is a reduction of every micro-batch, one
partial sum per level of the tree, and parameters that are padded to whole chunks. `"fast"` adds
gradients in the order in which they arrive."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from minillama import comm, ops
from minillama.errors import UserError
from minillama.parallel.flat_layout import Piece, lay_out, round_up
from minillama.parallel.reducer import GradientReducer
from minillama.train_config import TrainConfig

# Elements whose squares the exact norm adds at a time. Chunks begin where a parameter does, and
# slices are whole chunks, so a chunk never lies on two ranks. Smaller ones would cost time: each is
# an operation of its own. Larger ones would cost memory: a parameter is padded to whole chunks.
CHUNK = 16384
# Elements updated at a time. On a CPU their temporary copies should stay in the cache; on other
# devices each chunk takes several kernels, so it should be larger.
CPU_UPDATE_CHUNK = 1 << 20
UPDATE_CHUNK = 1 << 22
STATE = ("master", "m", "v")  # the vectors that a checkpoint holds


class ZeroAdamW:
    """AdamW over trainable parameters of one kind, sharded as `config.zero_stage` says.

    Args:
        named: (name, parameter) pairs; the parameters become views of the flat vector.
        mesh: the ranks that share the parameters: the data line of the grid.
        config: stage, reduction, AdamW's constants.
        defer: see `GradientReducer`.

    Raises UserError if the exact reduction is asked for on a number of ranks that is not a power of
    two."""

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        mesh: comm.Mesh,
        config: TrainConfig,
        defer: bool = False,
    ) -> None:
        self.is_exact = config.reduction == "exact"
        if self.is_exact and mesh.size & (mesh.size - 1):
            raise UserError(
                f"reduction = 'exact' needs 1, 2, 4, 8, … data ranks, not {mesh.size}; "
                "use --reduction fast"
            )
        self.named = sorted(named, key=lambda item: item[1].ndim <= 1)  # stable: matrices first
        self.mesh = mesh
        self.stage = config.zero_stage
        self.steps = 0
        self.weight_decay = config.weight_decay
        self.beta1 = config.adam_beta1
        self.beta2 = config.adam_beta2
        self.epsilon = config.adam_epsilon
        # Fused kernels round the ends of a range differently: their result depends on where the
        # vector is cut.
        self.adamw = ops.reference.adamw if self.is_exact else ops.adamw

        parameters = [parameter for _, parameter in self.named]
        shapes = [parameter.shape for parameter in parameters]
        self.layout = lay_out(shapes, align=CHUNK if self.is_exact else 1)
        padded = round_up(self.layout.total, CHUNK * mesh.size)
        slice_size = padded // mesh.size
        self.owned = slice(mesh.rank * slice_size, (mesh.rank + 1) * slice_size)
        self.update_range = self.owned if self.stage else slice(0, padded)  # what this rank updates
        self._lay_out_weights(padded)
        updated_weights = self.weights[self.update_range]
        is_fp32 = updated_weights.dtype == torch.float32
        self.master = updated_weights if is_fp32 else updated_weights.float()
        self.m = torch.zeros_like(self.master)
        self.v = torch.zeros_like(self.master)
        self.update_chunk = CPU_UPDATE_CHUNK if self.weights.is_cpu else UPDATE_CHUNK
        self.gradients = GradientReducer(parameters, self.layout, mesh, slice_size, config, defer)

    def _lay_out_weights(self, padded: int) -> None:
        """Copy the parameters end to end into `self.weights`, and make each one a view of it."""
        first = self.named[0][1]
        self.weights = torch.zeros(padded, dtype=first.dtype, device=first.device)
        for (_, parameter), view in zip(self.named, self.views(self.weights), strict=True):
            view.copy_(parameter.detach())
            parameter.data = view

    def views(self, vector: Tensor) -> list[Tensor]:
        """A flat vector (padded,) cut into tensors of the parameters' shapes."""
        views = []
        for place, (_, parameter) in zip(self.layout.ranges, self.named, strict=True):
            views.append(vector[place.start : place.stop].view(parameter.shape))
        return views

    def squared_norms(self) -> list[float]:
        """Numbers whose sum is the squared norm of the step's gradient, equal on all data ranks.

        With the exact reduction there is one for each parameter, which depends on nothing else.
        """
        block_size = CHUNK if self.is_exact else self.update_chunk
        blocks = self.gradients.reduced().split(block_size)
        squares = torch.stack([block.float().square().sum() for block in blocks])
        if self.stage:
            squares = comm.all_gather(self.mesh, squares)
        of_blocks = squares.tolist()
        if not self.is_exact:
            return [math.fsum(of_blocks)]
        of_parameters = []
        for place in self.layout.ranges:
            own_chunks = slice(place.start // CHUNK, round_up(place.stop, CHUNK) // CHUNK)
            of_parameters.append(math.fsum(of_blocks[own_chunks]))
        return of_parameters

    def step(self, learning_rate: float, scale: float = 1.0) -> None:
        """Update the weights of every rank once, with the gradient times `scale`."""
        self.steps += 1
        matrices_end = self._clamp_to_update_range(self.layout.decayed)
        end = self._clamp_to_update_range(self.layout.total)
        self._update_range(0, matrices_end, learning_rate, scale, self.weight_decay)
        self._update_range(matrices_end, end, learning_rate, scale, 0.0)
        self.all_gather_weights()

    def _clamp_to_update_range(self, position: int) -> int:
        """A position of the flat vector, counted from the start of `update_range` and limited
        to it.
        """
        size = self.update_range.stop - self.update_range.start
        return min(max(position - self.update_range.start, 0), size)

    def _update_range(
        self, start: int, stop: int, learning_rate: float, scale: float, weight_decay: float
    ) -> None:
        """AdamW on the elements start … stop of what this rank updates."""
        gradient = self.gradients.reduced()
        for first in range(start, stop, self.update_chunk):
            place = slice(first, min(first + self.update_chunk, stop))
            scaled = gradient[place].float()
            if scale != 1.0:
                scaled = scaled * scale
            self.adamw(
                self.master[place],
                scaled,
                self.m[place],
                self.v[place],
                self.steps,
                learning_rate=learning_rate,
                weight_decay=weight_decay,
                beta1=self.beta1,
                beta2=self.beta2,
                epsilon=self.epsilon,
            )

    def all_gather_weights(self) -> None:
        """Copy the fp32 master weights into the weights of every rank."""
        if self.master.dtype != self.weights.dtype:
            self.weights[self.update_range].copy_(self.master)
        if self.stage:
            comm.all_gather_into(self.mesh, self.weights, self.weights[self.owned])

    def first_non_finite(self) -> str:
        """The first parameter with a gradient, among those this rank keeps, that is not finite;
        or an empty string.
        """
        bad = (~self.gradients.reduced().isfinite()).nonzero()
        if len(bad) == 0:
            return ""
        position = int(bad[0]) + self.update_range.start
        return self.named[self.layout.index_at(position)][0]

    def owned_pieces(self) -> list[Piece]:
        """Which elements of which parameters lie in the slice that this rank owns."""
        return self.layout.pieces(self.owned.start, self.owned.stop)

    def state(self) -> dict[str, Tensor]:
        """master, m and v of the slice that this rank owns, without padding at its end."""
        first = self._clamp_to_update_range(min(self.owned.start, self.layout.total))
        last = self._clamp_to_update_range(min(self.owned.stop, self.layout.total))
        return {name: getattr(self, name)[first:last] for name in STATE}

    def load_state(self, read: Callable[[str, str, int, int], Tensor], steps: int) -> None:
        """Continue from a saved state, one parameter after the other.

        Args:
            read: read(name, vector, first, last) returns elements first … last of a parameter,
                flattened, from a vector of `STATE`.
            steps: updates made so far.
        """
        for piece in self.layout.pieces(self.update_range.start, self.update_range.stop):
            name = self.named[piece.index][0]
            end = piece.offset + piece.last - piece.first
            for vector in STATE:
                values = read(name, vector, piece.first, piece.last)
                getattr(self, vector)[piece.offset : end] = values
        self.steps = steps
        self.all_gather_weights()
