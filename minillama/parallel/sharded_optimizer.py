"""What the trainer calls: backward, clip and step, over all trainable parameters of any dtype.

The parameters of one dtype form one flat vector (`parallel.zero`). LoRA's fp32 factors beside
16-bit embeddings make two. The norm of the gradient is taken over all of them.

fp16 gradients below 2^-24 would become zero, so the loss is multiplied by a scale, and the step
divides by it again. If the scale is too large, some gradient is not finite. Every rank sees that,
because every rank has the same norm."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minillama.comm import Mesh
from minillama.errors import UserError
from minillama.parallel.zero import ZeroAdamW
from minillama.train_config import TrainConfig


@dataclass
class LossScale:
    """DeepSpeed's dynamic loss scale: halve it after `hysteresis` overflows, double it after
    `window` good steps.
    """

    scale: float = 2.0**16
    window: int = 1000
    hysteresis: int = 2
    minimum: float = 1.0
    hysteresis_left: int = 2  # overflows left until the scale is halved
    good_steps: int = 0  # since the last overflow

    def on_overflow(self) -> None:
        """Count an overflow. Raises UserError if the scale cannot be lowered any further."""
        self.good_steps = 0
        if self.hysteresis_left > 1:
            self.hysteresis_left -= 1
        elif self.scale <= self.minimum:
            raise UserError(
                f"fp16: gradients overflow at the smallest loss scale {self.minimum:g}; "
                "use --precision bf16 or fp32"
            )
        else:
            self.scale = max(self.scale / 2, self.minimum)

    def on_success(self) -> None:
        """Count a step without overflow."""
        self.good_steps += 1
        if self.good_steps % self.window == 0:
            self.scale *= 2
            self.hysteresis_left = self.hysteresis

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds. `patience` is the name of hysteresis_left in state.json."""
        state = asdict(self)
        state["patience"] = state.pop("hysteresis_left")
        return state

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "LossScale":
        """The loss scale that `state()` described."""
        fields = dict(state)
        fields["hysteresis_left"] = fields.pop("patience")
        return cls(**fields)


class OptimizerStep(NamedTuple):
    """What came of one optimizer step."""

    norm: float  # of the whole gradient, before clipping
    updated: bool  # False: the gradient or the loss was not finite, and the weights are as before


@dataclass(frozen=True)
class SavedSlice:
    """What one rank saves of one flat vector."""

    start: int  # position of the slice in the flat vector
    tensors: dict[str, Tensor]  # master, m, v


@dataclass(frozen=True)
class OptimizerState:
    """What a checkpoint holds of the optimizer, as seen by one rank."""

    slices: list[SavedSlice]  # one for each flat vector
    num_updates: int
    loss_scale: dict[str, Any] | None


ReadRange = Callable[[str, int, int], Tensor]  # (name, start, stop) -> that range of a saved vector


class ShardedOptimizer:
    """AdamW, sharded, over the trainable parameters; with a loss scale if any parameter is fp16.

    Raises UserError if nothing is trainable.
    """

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], mesh: Mesh, config: TrainConfig
    ) -> None:
        by_dtype: dict[torch.dtype, list[tuple[str, nn.Parameter]]] = {}
        has_fp16 = False
        for name, parameter in named:
            has_fp16 |= parameter.dtype == torch.float16
            if parameter.requires_grad:
                by_dtype.setdefault(parameter.dtype, []).append((name, parameter))
        if not by_dtype:
            raise UserError("nothing to train: every parameter is frozen")

        def size(group: list[tuple[str, nn.Parameter]]) -> int:
            return sum(parameter.numel() for _, parameter in group)

        in_order = sorted(by_dtype, key=str)
        groups = sorted((by_dtype[dtype] for dtype in in_order), key=size, reverse=True)
        # Only the largest vector is reduced during backward; see `GradientReducer`, defer.
        self.vectors = [
            ZeroAdamW(group, mesh, config, defer=number > 0) for number, group in enumerate(groups)
        ]
        self.num_trained = sum(vector.total for vector in self.vectors)
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

    def backward(
        self, output: Tensor | None, active_ranks: int, gradient: Tensor | None = None
    ) -> None:
        """Add the gradients of this rank's next micro-batch.

        Args:
            output: the loss, or with `gradient` what another rank computes the loss from; None if
                this rank has no micro-batch this time, while others do.
            active_ranks: how many ranks, from rank 0 on, have one.
            gradient: that of the loss, which the other rank has scaled, by `output`.
        """
        for vector in self.vectors:
            vector.gradients.active_ranks = active_ranks
        if output is not None:
            if self.loss_scale and gradient is None:
                output = output * self.loss_scale.scale
            output.backward(gradient)
        for vector in self.vectors:
            vector.gradients.end_micro_batch()

    def step(
        self, learning_rate: float, max_norm: float, loss_is_finite: bool = True
    ) -> OptimizerStep:
        """Clip the norm of the gradient to `max_norm` (0: do not clip) and update the weights.

        If the gradient or the loss is not finite, the weights stay as they are, on every rank.
        """
        unscale = 1.0 / self.loss_scale.scale if self.loss_scale else 1.0
        squared_norms = [vector.squared_norm() for vector in self.vectors]
        norm = math.sqrt(float(sum(squared_norms))) * unscale
        if not (math.isfinite(norm) and loss_is_finite):
            if self.loss_scale:
                self.loss_scale.on_overflow()
            return OptimizerStep(norm, updated=False)
        is_clipped = max_norm > 0 and norm > max_norm
        clip = max_norm / (norm + 1e-6) if is_clipped else 1.0
        for vector in self.vectors:
            vector.step(learning_rate, clip * unscale)
        if self.loss_scale:
            self.loss_scale.on_success()
        return OptimizerStep(norm, updated=True)

    def state(self) -> OptimizerState:
        """What this rank saves."""
        return OptimizerState(
            slices=[SavedSlice(vector.owned.start, vector.state()) for vector in self.vectors],
            num_updates=self.vectors[0].steps,
            loss_scale=self.loss_scale.state() if self.loss_scale else None,
        )

    def load_state(
        self,
        open_vector: Callable[[int, int], ReadRange],
        num_updates: int,
        loss_scale: dict[str, Any] | None,
    ) -> None:
        """Continue from a saved state, written by any number of ranks.

        Args:
            open_vector: open_vector(number, total) returns the reader of flat vector `number`, of
                `total` elements.
            num_updates: updates made so far.
            loss_scale: `OptimizerState.loss_scale`.
        """
        for number, vector in enumerate(self.vectors):
            vector.load_state(open_vector(number, vector.total), num_updates)
        if self.loss_scale and loss_scale:
            self.loss_scale = LossScale.from_state(loss_scale)

    def first_non_finite(self) -> str:
        """The name of the first parameter whose gradient is not finite, or an empty string."""
        for vector in self.vectors:
            name = vector.first_non_finite()
            if name:
                return name
        return ""
