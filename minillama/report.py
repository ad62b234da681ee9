"""What a run tells: a progress bar, metrics.jsonl, loss.png, summary.json."""

import json
import math
import os
import time
from itertools import accumulate
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minillama.errors import UserError


class Report:
    """The record of a run, kept by rank 0. Numbers that are not finite are written as null with their name in `non_finite`."""

    def __init__(self, out_dir: Path, total_steps: int, first_step: int, enabled: bool) -> None:
        self.path, self.enabled, self.began = (
            out_dir / "metrics.jsonl",
            enabled,
            time.perf_counter(),
        )
        self.bar = tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            desc="training",
            disable=not enabled,
            dynamic_ncols=True,
        )
        if enabled:  # drop a line that was not written to its end, and records of steps that a resumed run will take again
            lines = (
                self.path.read_text(encoding="utf-8").splitlines(keepends=True)
                if self.path.is_file()
                else []
            )
            kept = [
                line
                for line in lines
                if line.endswith("\n") and json.loads(line)["step"] <= first_step
            ]
            self.path.write_text("".join(kept), encoding="utf-8")

    def record(self, values: dict[str, Any]) -> None:
        """Append one record to metrics.jsonl."""
        if not self.enabled:
            return
        bad = [
            name
            for name, value in values.items()
            if isinstance(value, float) and not math.isfinite(value)
        ]
        line = {name: None if name in bad else value for name, value in values.items()} | (
            {"non_finite": bad} if bad else {}
        )
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def step(self, loss: float, tokens_per_second: float) -> None:
        self.bar.set_postfix_str(
            f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s", refresh=False
        )
        self.bar.update()

    def say(self, text: str) -> None:
        if self.enabled:
            self.bar.write(text)

    def close(self) -> float:
        """End the bar; returns the seconds since the report began."""
        self.bar.close()
        return time.perf_counter() - self.began


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
