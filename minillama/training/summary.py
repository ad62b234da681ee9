"""How a run ends, and its figures: those of its records and of its summary.

    FLOPs of training = 24 F T L C^2 (1 + S/(6 C) + V/(16 L C))     T tokens, in documents of S
                        F = 3: forward and backward; F = 4: activations are recomputed

This is the formula by which Megatron and AscendSpeed publish TFLOP/s (Narayanan et al. 2021,
appendix). It assumes attention of full width and an MLP of about 8/3 C. MFU, model-FLOPs
utilisation, is the share of the device's peak; it always counts F = 3.
"""

import math
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from minillama.llama_config import LlamaConfig

Summary = dict[str, Any]  # what summary.json holds


@dataclass(frozen=True)
class Stopped:
    """A signal ended training between two micro-batches. The step under way is given up."""

    signal: str  # its name
    step: int  # updates done
    is_saved: bool = False  # whether a checkpoint holds this step

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as a shell reports it: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + signal.Signals[self.signal]


@dataclass
class StepHistory:
    """What the steps since the start of this command came to; a resumed run starts a new one."""

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0

    def add(self, loss: float, seconds: float, tokens: int) -> None:
        """Record one step."""
        self.losses.append(loss)
        self.seconds += seconds
        self.tokens += tokens

    @property
    def seconds_per_step(self) -> float:
        return self.seconds / max(1, len(self.losses))

    @property
    def steps_per_second(self) -> float:
        return len(self.losses) / max(self.seconds, 1e-9)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def finite_losses(self) -> list[float]:
        return [loss for loss in self.losses if math.isfinite(loss)]


def training_flops(
    llama: LlamaConfig, tokens: float, sequence: float, recompute: bool = False
) -> float:
    """Floating-point operations to train on `tokens` tokens in documents of `sequence` tokens."""
    L, C, V = llama.n_layers, llama.dim, llama.vocab_size
    F = 4 if recompute else 3
    attention = sequence / (6 * C)
    lm_head = V / (16 * L * C)
    return 24 * F * tokens * L * C**2 * (1 + attention + lm_head)


def throughput(
    llama: LlamaConfig, tokens_per_second: float, lengths: Sequence[int], peak_tflops: float
) -> dict[str, float | None]:
    """The speed of one device, in three units.

    lengths: of the documents.
    peak_tflops: the device's own; 0: not given, and no MFU.
    """
    squares = sum(length * length for length in lengths)
    sequence = squares / sum(lengths)  # length of the document that a token is in, on average
    tflops = tokens_per_second * training_flops(llama, 1.0, sequence) / 1e12
    return {
        "tokens_per_second": round(tokens_per_second, 2),
        "tflops": round(tflops, 4),
        "mfu": tflops / peak_tflops if peak_tflops else None,
    }


def gigabytes(count: float | None) -> str:
    """A number of bytes as text. None: the device does not report it."""
    return "not reported" if count is None else f"{count / 1e9:.2f} GB"
