"""Loss curves: read metrics.jsonl, smooth the loss, and draw it over the steps."""

import importlib.util
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minillama.errors import UserError
from minillama.files import new_file, read_json_lines

Curve = list[tuple[int, float]]  # (step, value)

LOSS_LABEL = "loss per target token"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl. Raises UserError if it is missing or damaged."""
    return read_json_lines(path, "expected a metrics.jsonl, as train.py writes it")


def smoothed(values: list[float]) -> list[float]:
    """Exponential moving average with the bias of its start removed, as Adam removes it.

        sum_k = w * sum_(k-1) + (1 - w) * value_k      sum_0 = 0
        average_k = sum_k / (1 - w^k)

    The first average is the first value, which then fades as all values do. With the sum started
    at the first value instead, a high first loss stays in the averages for a long time. w is
    LLaMA-Factory's, 1.8 (sigmoid(0.05 n) - 0.5): the more values (n), the more of them are
    averaged.
    """
    sigmoid = 1 / (1 + math.exp(-0.05 * len(values)))
    w = 1.8 * (sigmoid - 0.5)
    weighted_sum = 0.0
    averages = []
    for k, value in enumerate(values, start=1):
        weighted_sum = w * weighted_sum + (1 - w) * value
        averages.append(weighted_sum / (1 - w**k))
    return averages


def plot_loss(out_dir: Path) -> None:
    """Draw out_dir/loss.png: the loss, the smoothed loss, and the validation loss if there is one.

    Raises UserError if matplotlib is missing.
    """
    metrics = read_metrics(out_dir / "metrics.jsonl")
    losses = curve_of(metrics, "loss")
    if not losses:
        return
    steps = [step for step, _ in losses]
    averages = smoothed([loss for _, loss in losses])
    curves = {"loss": losses, "smoothed": list(zip(steps, averages, strict=True))}
    validation = curve_of(metrics, "eval_loss")
    if validation:
        curves["validation"] = validation
    draw_curves(out_dir / "loss.png", curves, LOSS_LABEL, f"training loss of {out_dir.name}")


def curve_of(metrics: list[dict[str, Any]], name: str) -> Curve:
    """The steps at which a metric was recorded, and its values."""
    return [(m["step"], m[name]) for m in metrics if m.get(name) is not None]


def require_matplotlib() -> None:
    """Raise UserError if matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("matplotlib is not installed; pip install matplotlib")


def needs_log_scale(curves: Mapping[str, Curve]) -> bool:
    """Whether the values are positive, and the largest is ten times the smallest or more."""
    values = [value for curve in curves.values() for _, value in curve]
    return min(values) > 0 and max(values) >= 10 * min(values)


def draw_curves(
    path: Path,
    curves: Mapping[str, Curve],
    label: str,
    title: str = "",
    may_be_log: bool = True,
) -> None:
    """Draw curves by name, the first of several faint.

    label: of the values' axis, which is logarithmic if `needs_log_scale` says so and it may be.
    Raises UserError if matplotlib is missing.
    """
    require_matplotlib()
    os.environ.setdefault("MPLBACKEND", "Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="tight")
    for number, (name, curve) in enumerate(curves.items()):
        steps, values = zip(*curve, strict=True)
        style = "o-" if name == "validation" else "-"
        is_faint = number == 0 and len(curves) > 1
        alpha = 0.35 if is_faint else 1.0
        axes.plot(steps, values, style, markersize=3, alpha=alpha, label=name)
    axes.set(xlabel="step", ylabel=label, title=title)
    if may_be_log and needs_log_scale(curves):
        axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with new_file(path) as file:
        figure.savefig(file, format="png", dpi=100)
    pyplot.close(figure)
