"""What the trainer calls: backward, clip and step, over all trainable parameters of any kind.

The parameters of one kind form one flat vector (`parallel.zero`): of one dtype, on one device, and
held in the same way by the tensor ranks and stages of the grid. On one rank, LoRA's fp32 factors
beside 16-bit embeddings make two.

    held       by a tensor rank       its gradient                     in the norm
    cut        a part                 that of its part                 of every tensor rank
    whole      all, as its peers      that of its peers                of one tensor rank
    partial    all, as its peers      a part of a sum over its peers   of one tensor rank
    tied       by two stages          a part of a sum over the two     of the first stage

The norm of the gradient is the same number on every rank, so all of them clip alike, and all skip a
step whose gradient is not finite. Vectors that several ranks hold stay equal on them.
"""

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minillama import comm
from minillama.errors import UserError
from minillama.grid import Grid
from minillama.parallel.loss_scale import LossScale
from minillama.parallel.parts import (
    Part,
    SavedPiece,
    parameters_of_all_stages,
    parameters_of_stage,
)
from minillama.parallel.shards import Held, held
from minillama.parallel.zero import ZeroAdamW
from minillama.train_config import TrainConfig


class OptimizerStep(NamedTuple):
    """What came of one optimizer step."""

    norm: float  # of the whole gradient, before clipping
    updated: bool  # False: the gradient or the loss was not finite, and the weights are as before


@dataclass(frozen=True)
class SavedSlice:
    """What one rank saves of one flat vector."""

    pieces: list[SavedPiece]
    tensors: dict[str, Tensor]  # master, m, v


@dataclass(frozen=True)
class OptimizerState:
    """What a checkpoint holds of the optimizer, as seen by one rank."""

    slices: list[SavedSlice]  # of the flat vectors that this rank saves
    num_updates: int
    loss_scale: dict[str, Any] | None


# (part of a parameter, "master", "m" or "v", first, last) -> its elements first … last, flattened
ReadPart = Callable[[Part, str, int, int], Tensor]


@dataclass(frozen=True)
class VectorKind:
    """What the parameters of one flat vector have in common."""

    dtype: torch.dtype
    device: torch.device
    held: Held  # "whole" if there is one tensor rank
    is_tied: bool  # the first and the last stage both hold them


class ShardedOptimizer:
    """AdamW, sharded, over the trainable parameters; with a loss scale if any parameter is fp16.

    Args:
        named: the parameters that this rank holds, by their names in the whole model.
        grid: the ranks. Every rank makes its optimizer at the same time.
        config: stage, reduction, AdamW's constants, loss scale.
        tied: names of the parameters that the first and the last stage both hold, under one name.

    Raises UserError if nothing is trainable.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        grid: Grid,
        config: TrainConfig,
        tied: Collection[str] = (),
    ) -> None:
        self.grid = grid
        trained = []
        has_fp16 = False
        for name, parameter in named:
            has_fp16 |= parameter.dtype == torch.float16
            if parameter.requires_grad:
                trained.append((name, parameter))
        own = parameters_of_stage(dict(trained), grid.tensor)
        self.parts = {name: own[name].part_on(grid.tensor.rank, name) for name in own}
        self.parameters = parameters_of_all_stages(own, grid.stage)
        if not self.parameters:
            raise UserError("nothing to train: every parameter is frozen")
        self.num_trained = sum(parameter.size for parameter in self.parameters.values())

        groups = _group_by_kind(trained, grid, tied)
        self.kinds = list(groups)
        # Only the largest vector is reduced during backward; see `GradientReducer`, defer.
        self.vectors = [
            ZeroAdamW(group, grid.data, config, defer=number > 0)
            for number, group in enumerate(groups.values())
        ]
        self.num_updates = 0
        self.loss_scale: LossScale | None = None
        if has_fp16:
            self.loss_scale = LossScale(
                scale=2.0**config.initial_scale_power,
                window=config.loss_scale_window,
                hysteresis=config.loss_scale_hysteresis,
                minimum=config.min_loss_scale,
                hysteresis_left=config.loss_scale_hysteresis,
            )

    def zero_grad(self) -> None:
        """Forget the gradients of the step before."""
        for vector in self.vectors:
            vector.gradients.clear()

    def backward(self, loss: Tensor | None, active_ranks: int) -> None:
        """Add the gradients of this rank's next micro-batch.

        Args:
            loss: None if this rank has no micro-batch this time, while others do.
            active_ranks: how many data ranks, from rank 0 on, have one.
        """
        for vector in self.vectors:
            vector.gradients.active_ranks = active_ranks
        if loss is not None:
            if self.loss_scale:
                loss = loss * self.loss_scale.scale
            loss.backward()
        for vector in self.vectors:
            vector.gradients.end_micro_batch()

    def step(
        self, learning_rate: float, max_norm: float, loss_is_finite: bool = True
    ) -> OptimizerStep:
        """Clip the norm of the gradient to `max_norm` (0: do not clip) and update the weights.

        If the gradient or the loss is not finite, the weights stay as they are, on every rank.
        """
        self._sum_partial_gradients()
        unscale = 1.0 / self.loss_scale.scale if self.loss_scale else 1.0
        norm = math.sqrt(self._squared_norm()) * unscale
        if not (math.isfinite(norm) and loss_is_finite):
            if self.loss_scale:
                self.loss_scale.on_overflow()
            return OptimizerStep(norm, updated=False)
        is_clipped = max_norm > 0 and norm > max_norm
        clip = max_norm / (norm + 1e-6) if is_clipped else 1.0
        for vector in self.vectors:
            vector.step(learning_rate, clip * unscale)
        self.num_updates += 1
        if self.loss_scale:
            self.loss_scale.on_success()
        return OptimizerStep(norm, updated=True)

    def _sum_partial_gradients(self) -> None:
        """Complete the gradients of which several ranks have a part, the same on all of them."""
        for kind, vector in zip(self.kinds, self.vectors, strict=True):
            if kind.held == "partial":
                comm.all_reduce_sum(self.grid.tensor, vector.gradients.reduced())
            if kind.is_tied:
                comm.all_reduce_sum(self.grid.ends, vector.gradients.reduced())

    def _squared_norm(self) -> float:
        """The squared norm of the whole gradient, the same number on every rank.

        What several ranks hold is counted on one of them. math.fsum rounds once, so the order of
        the ranks does not matter.
        """
        squares = []
        for kind, vector in zip(self.kinds, self.vectors, strict=True):
            if self._answers_for(kind):
                squares += vector.squared_norms()
        for line in (self.grid.tensor, self.grid.stage):
            squares_by_rank = comm.gather_objects(line, squares)
            squares = list(chain.from_iterable(squares_by_rank))
        return math.fsum(squares)

    def _answers_for(self, kind: VectorKind) -> bool:
        """Whether this rank counts and saves what it holds of a vector, and not a peer."""
        if kind.held != "cut" and not self.grid.tensor.is_first:
            return False
        return self.grid.stage.is_first or not kind.is_tied

    def state(self) -> OptimizerState:
        """What this rank saves. What several ranks hold, one of them saves."""
        slices = []
        for kind, vector in zip(self.kinds, self.vectors, strict=True):
            pieces = []
            for piece in vector.owned_pieces():
                part = self.parts[vector.named[piece.index][0]]
                pieces.append(SavedPiece(part, piece.first, piece.last, piece.offset))
            if pieces and self._answers_for(kind):
                slices.append(SavedSlice(pieces, vector.state()))
        return OptimizerState(
            slices=slices,
            num_updates=self.num_updates,
            loss_scale=self.loss_scale.state() if self.loss_scale else None,
        )

    def load_state(
        self, read: ReadPart, num_updates: int, loss_scale: dict[str, Any] | None
    ) -> None:
        """Continue from a saved state, written by any grid of ranks.

        Args:
            read: reads elements of a part of a parameter.
            num_updates: updates made so far.
            loss_scale: `OptimizerState.loss_scale`.
        """

        def read_by_name(name: str, vector: str, first: int, last: int) -> Tensor:
            return read(self.parts[name], vector, first, last)

        for vector in self.vectors:
            vector.load_state(read_by_name, num_updates)
        self.num_updates = num_updates
        if self.loss_scale and loss_scale:
            self.loss_scale = LossScale.from_state(loss_scale)

    def first_non_finite(self) -> str:
        """The name of the first parameter whose gradient is not finite, or an empty string.

        Called on every rank. All get the same name, whichever of them hold the parameter.
        """
        own_names = [vector.first_non_finite() for vector in self.vectors]
        for names in comm.gather_objects(self.grid.all, own_names):
            for name in filter(None, names):
                return name
        return ""


def _group_by_kind(
    trained: list[tuple[str, nn.Parameter]], grid: Grid, tied: Collection[str]
) -> dict[VectorKind, list[tuple[str, nn.Parameter]]]:
    """The parameters of each flat vector, the largest vector first."""
    groups: dict[VectorKind, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in trained:
        kind = VectorKind(
            dtype=parameter.dtype,
            device=parameter.device,
            held=held(name) if grid.tensor.size > 1 else "whole",
            is_tied=grid.ends.size > 1 and name in tied,
        )
        groups.setdefault(kind, []).append((name, parameter))

    def size(kind: VectorKind) -> int:
        return sum(parameter.numel() for _, parameter in groups[kind])

    in_order = sorted(sorted(groups, key=str), key=size, reverse=True)
    return {kind: groups[kind] for kind in in_order}
