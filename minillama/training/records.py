"""The figures of a run: what metrics.jsonl holds of a step, and summary.json of all steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minillama.memory import peak_bytes
from minillama.training.run import Run
from minillama.training.summary import StepHistory, Summary, throughput


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step came to. Both are as computed, even if they are not finite."""

    loss: float  # mean over the targets of the global batch
    grad_norm: float  # before clipping


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    step: int  # updates done, or skipped
    skipped: int  # of them, because something was not finite
    tokens: int  # trained on
    eval_loss: float | None  # of the newest evaluation


def step_record(run: Run, progress: Progress, result: StepResult, rate: float) -> dict[str, Any]:
    """What came of a step. rate: its learning rate."""
    record = {
        "step": progress.step,
        "epoch": round(run.train_batches.epoch_at(progress.step), 4),
        "loss": result.loss,
        "learning_rate": rate,
        "grad_norm": result.grad_norm,
        "skipped": progress.skipped,
    }
    if run.optimizer.loss_scale is not None:
        record["loss_scale"] = run.optimizer.loss_scale.scale
    return record


def figures(run: Run, tokens: int, tokens_per_second: float, lengths: Sequence[int]) -> Summary:
    """What records and the summary both hold: tokens, speed of a device, memory.

    tokens_per_second: of a device. lengths: of the documents.
    """
    speed = throughput(run.model.config, tokens_per_second, lengths, run.config.peak_tflops)
    return {
        "tokens": tokens,
        **speed,
        "peak_memory_bytes": peak_bytes(run.devices),
    }


def summarize(run: Run, progress: Progress, history: StepHistory, seconds: float) -> Summary:
    """What summary.json holds. seconds: since training began."""
    losses = history.finite_losses
    tokens_per_second = history.tokens_per_second / run.num_devices
    samples_per_second = history.steps_per_second * run.train_batches.rows_per_step
    lengths = run.train_batches.windows.length.tolist()
    return {
        "train_loss": sum(losses) / len(losses) if losses else None,
        "last_loss": losses[-1] if losses else None,
        "eval_loss": progress.eval_loss,
        "steps": progress.step,
        "step_seconds": round(history.seconds_per_step, 4),
        "samples_per_second": round(samples_per_second, 4),
        "devices": run.num_devices,
        "skipped_steps": progress.skipped,
        "seconds": round(seconds, 2),
        "trainable_parameters": run.optimizer.num_trained,
        **figures(run, progress.tokens, tokens_per_second, lengths),
    }
