"""What a run records: a progress bar and metrics.jsonl."""

import json
import math
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm


class TrainingLog:
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
