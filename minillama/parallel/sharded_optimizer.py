"""What the trainer talks to: backward, clip, step, over all trainable parameters, in any precision.

Parameters of one dtype form one flat vector (`parallel.zero`); LoRA's fp32 factors beside 16-bit embeddings make two. Only the largest
sends while backward runs: a rank without a micro-batch sends one after the other, and all ranks must send alike. The gradient's norm is
that of all of them. In fp16 the loss is multiplied by a scale that keeps small gradients above 2^-24 and is divided out
again in the step; a scale too large shows as a gradient that is not finite, the same on every rank because the norm is.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minillama.comm import Mesh
from minillama.errors import UserError
from minillama.parallel.zero import ZeroAdamW
from minillama.train_config import TrainConfig


@dataclass
class LossScale:
    """DeepSpeed's dynamic loss scale: halve on overflow (once `hysteresis` of them are used up), double after `window` good steps."""

    scale: float = 2.0**16
    window: int = 1000
    hysteresis: int = 2
    minimum: float = 1.0
    patience: int = 2  # overflows left before the scale is halved
    good_steps: int = 0  # since the last overflow

    def overflowed(self) -> None:
        """Take note of an overflow. Raises UserError where the scale can go no lower."""
        self.good_steps = 0
        if self.patience > 1:
            self.patience -= 1
        elif self.scale <= self.minimum:
            raise UserError(
                f"fp16: gradients overflow at the smallest loss scale {self.minimum:g}; use --precision bf16 or fp32"
            )
        else:
            self.scale = max(self.scale / 2, self.minimum)

    def succeeded(self) -> None:
        self.good_steps += 1
        if self.good_steps % self.window == 0:
            self.scale, self.patience = self.scale * 2, self.hysteresis


class ShardedOptimizer:
    """AdamW, sharded, over the trainable ones of named parameters; with a loss scale where some are fp16."""

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], mesh: Mesh, settings: TrainConfig
    ) -> None:
        """Raises UserError where nothing is trainable."""
        named = list(named)
        dtypes = sorted({p.dtype for _, p in named if p.requires_grad}, key=str)
        if not dtypes:
            raise UserError("nothing to train: every parameter is frozen")
        parts = [
            ZeroAdamW(
                [x for x in named if x[1].requires_grad and x[1].dtype == dtype], mesh, settings
            )
            for dtype in dtypes
        ]
        self.parts = sorted(parts, key=lambda part: -part.total)
        for part in self.parts[1:]:
            part.gradients.waits = True
        patience, scale = settings.loss_scale_hysteresis, 2.0**settings.initial_scale_power
        scaled = any(p.dtype == torch.float16 for _, p in named)
        self.loss_scale = (
            LossScale(
                scale, settings.loss_scale_window, patience, settings.min_loss_scale, patience
            )
            if scaled
            else None
        )
        self.trained = sum(part.total for part in self.parts)

    def zero_grad(self) -> None:
        for part in self.parts:
            part.gradients.clear()

    def backward(self, loss: Tensor | None, ranks_present: int) -> None:
        """Add the gradients of this rank's next micro-batch. None: it has none this time, but its peers do.
        ranks_present: how many ranks, from rank 0 on, have one."""
        for part in self.parts:
            part.gradients.present = ranks_present
        if loss is not None:
            (loss * self.loss_scale.scale if self.loss_scale else loss).backward()
        for part in self.parts:
            part.gradients.end_micro_batch()

    def step(
        self, learning_rate: float, max_norm: float, loss_is_finite: bool = True
    ) -> tuple[float, bool]:
        """(norm of the whole gradient before clipping, whether the weights were updated). max_norm 0: do not clip.
        A gradient or loss that is not finite leaves the weights as they are, on every rank alike."""
        unscale = 1.0 / self.loss_scale.scale if self.loss_scale else 1.0
        norm = math.sqrt(float(sum(part.squared_norm() for part in self.parts))) * unscale
        if not (math.isfinite(norm) and loss_is_finite):
            if self.loss_scale:
                self.loss_scale.overflowed()
            return norm, False
        clip = max_norm / (norm + 1e-6) if max_norm and norm > max_norm else 1.0
        for part in self.parts:
            part.step(learning_rate, clip * unscale)
        if self.loss_scale:
            self.loss_scale.succeeded()
        return norm, True

    def first_non_finite(self) -> str:
        """The name of the first parameter with a gradient that is not finite, or an empty string."""
        return next(filter(None, (part.first_non_finite() for part in self.parts)), "")
