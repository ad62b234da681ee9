"""The log of a run: a progress bar, and a record per logged step in metrics.jsonl."""

import math
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minillama.files import append_file, json_line, read_json_lines, write_json_lines


class TrainingLog:
    """Written by rank 0 only; on other ranks (`enabled` is false) every method does nothing."""

    def __init__(self, out_dir: Path, total_steps: int, first_step: int, enabled: bool) -> None:
        """first_step: updates done before. Later records, which a resumed run replaces, go."""
        self.path = out_dir / "metrics.jsonl"
        self.enabled = enabled
        self.started = time.perf_counter()
        self.bar = tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            desc="training",
            disable=not enabled,
            dynamic_ncols=True,
        )
        if enabled:
            records = read_json_lines(self.path) if self.path.is_file() else []
            kept = [record for record in records if record["step"] <= first_step]
            write_json_lines(self.path, kept)

    def record(self, values: dict[str, Any]) -> None:
        """Append a record. JSON has no NaN and no infinity: such a value becomes null, and its
        name is listed in `non_finite`.
        """
        if not self.enabled:
            return
        record = dict(values)
        non_finite = []
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                record[name] = None
                non_finite.append(name)
        if non_finite:
            record["non_finite"] = non_finite
        with append_file(self.path) as file:
            file.write(json_line(record).encode())

    def step(self, loss: float, tokens_per_second: float) -> None:
        """Move the bar by one step."""
        text = f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        if self.enabled:
            self.bar.write(text)

    def close(self) -> float:
        """End the bar. Returns the seconds since the log was opened."""
        self.bar.close()
        return time.perf_counter() - self.started
