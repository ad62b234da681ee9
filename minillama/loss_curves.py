"""Loss curves: read metrics.jsonl, smooth it, and draw loss.png."""

import json
import math
import os
from itertools import accumulate
from pathlib import Path
from typing import Any

from minillama.errors import UserError


def read_metrics(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{path}: no such file, or not a metrics file ({error})") from None


def smoothed(values: list[float]) -> list[float]:
    """Exponential moving average whose memory grows with the run: w = 1.8 (sigmoid(0.05 n) - 0.5), as LLaMA-Factory draws it."""
    w = 1.8 * (1 / (1 + math.exp(-0.05 * len(values))) - 0.5)
    return list(accumulate(values, lambda before, value: w * before + (1 - w) * value))


def plot_loss(out_dir: Path, insist: bool) -> None:
    """Draw loss.png from metrics.jsonl: the raw and the smoothed loss, the evaluations. insist: UserError without matplotlib."""
    metrics = read_metrics(out_dir / "metrics.jsonl")
    train, held_out = (
        [(m["step"], m[name]) for m in metrics if m.get(name) is not None]
        for name in ("loss", "eval_loss")
    )
    smooth = list(
        zip([step for step, _ in train], smoothed([loss for _, loss in train]), strict=True)
    )
    curves = {"loss": train, "smoothed": smooth} | ({"validation": held_out} if held_out else {})
    if (
        train
        and not draw_losses(out_dir / "loss.png", curves, f"training loss of {out_dir.name}")
        and insist
    ):
        raise UserError("plot_loss needs matplotlib; pip install 'minillama[plot]'")


def draw_losses(
    file: Path, curves: dict[str, list[tuple[int, float]]], title: str = ""
) -> Path | None:
    """Draw (step, loss) curves by name, the first one faint; returns `file`, or None where matplotlib is missing."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    try:
        from matplotlib import pyplot
    except ImportError:
        return None
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="tight")
    for number, (name, points) in enumerate(curves.items()):
        axes.plot(
            *zip(*points, strict=True),
            "o-" if name == "validation" else "-",
            markersize=3,
            alpha=1 if number else 0.35,
            label=name,
        )
    axes.set(xlabel="step", ylabel="loss per target token", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=100)
    pyplot.close(figure)
    return file
