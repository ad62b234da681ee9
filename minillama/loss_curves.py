"""Loss curves: read metrics.jsonl, smooth the loss, and draw loss.png."""

import math
import os
from pathlib import Path
from typing import Any

from minillama.errors import UserError
from minillama.files import new_file, read_json_lines

Curve = list[tuple[int, float]]  # (step, loss)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl. Raises UserError if it is missing or damaged."""
    return read_json_lines(path, "expected a metrics.jsonl, as train.py writes it")


def smoothed(values: list[float]) -> list[float]:
    """Exponential moving average, as LLaMA-Factory draws it.

        average = w * average + (1 - w) * value      w = 1.8 (sigmoid(0.05 n) - 0.5)

    The more values (n), the more of them are averaged.
    """
    sigmoid = 1 / (1 + math.exp(-0.05 * len(values)))
    w = 1.8 * (sigmoid - 0.5)
    averages = values[:1]
    for value in values[1:]:
        averages.append(w * averages[-1] + (1 - w) * value)
    return averages


def plot_loss(out_dir: Path, insist: bool) -> None:
    """Draw out_dir/loss.png: the loss, the smoothed loss, and the validation loss if there is one.

    insist: raise UserError if matplotlib is missing. Otherwise nothing is drawn then.
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
    drawn = draw_losses(out_dir / "loss.png", curves, f"training loss of {out_dir.name}")
    if drawn is None and insist:
        raise UserError("plot_loss needs matplotlib; pip install 'minillama[plot]'")


def curve_of(metrics: list[dict[str, Any]], name: str) -> Curve:
    """The steps at which a metric was recorded, and its values."""
    return [(m["step"], m[name]) for m in metrics if m.get(name) is not None]


def draw_losses(path: Path, curves: dict[str, Curve], title: str = "") -> Path | None:
    """Draw curves by name, the first one faint. Returns `path`; None if matplotlib is missing."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    try:
        from matplotlib import pyplot
    except ImportError:
        return None
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="tight")
    for number, (name, curve) in enumerate(curves.items()):
        steps, losses = zip(*curve, strict=True)
        style = "o-" if name == "validation" else "-"
        alpha = 0.35 if number == 0 else 1.0
        axes.plot(steps, losses, style, markersize=3, alpha=alpha, label=name)
    axes.set(xlabel="step", ylabel="loss per target token", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with new_file(path) as file:
        figure.savefig(file, format="png", dpi=100)
    pyplot.close(figure)
    return path
