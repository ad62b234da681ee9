"""The log of a run: a progress bar, and a record per logged step.

metrics.jsonl has all figures of a step; trainer_log.jsonl says how far the run is (trainer_log.py).
"""

import json
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minillama import loss_curves
from minillama.errors import UserError
from minillama.files import append_file, json_line, write_json_lines
from minillama.training.trainer_log import progress_entry


class RecordFile:
    """A file of JSON lines that grows while a run goes on. Each record has the number of a step."""

    def __init__(self, path: Path, step_key: str, warn: Callable[[str], None]) -> None:
        self.path = path
        self.step_key = step_key
        self.warn = warn

    def keep_until(self, step: int) -> None:
        """Remove the records of later steps, which a resumed run writes again."""
        kept = [record for record in self._read() if record[self.step_key] <= step]
        write_json_lines(self.path, kept)

    def _read(self) -> list[dict[str, Any]]:
        """The records of before. Damaged lines are left out, and their number is printed."""
        if not self.path.is_file():
            return []
        records = []
        num_damaged = 0
        for line in self.path.read_bytes().splitlines():
            try:
                record = json.loads(line)
                records.append({**record, self.step_key: int(record[self.step_key])})
            except (ValueError, TypeError, KeyError):
                num_damaged += 1
        if num_damaged:
            self.warn(f"warning: {self.path}: {num_damaged} damaged lines are left out")
        return records

    def append(self, record: dict[str, Any]) -> None:
        """Append a line, whole or not at all. On a full disk, training goes on without it."""
        size = self.path.stat().st_size if self.path.is_file() else 0
        try:
            with append_file(self.path) as file:
                file.write(json_line(record).encode())
        except OSError as error:
            self.warn(
                f"WARNING: {self.path}: {error.strerror or error}; a record is lost; "
                "training goes on"
            )
            with suppress(OSError):
                os.truncate(self.path, size)


class TrainingLog:
    """Written by rank 0 only; on other ranks (`enabled` is false) every method does nothing."""

    def __init__(self, out_dir: Path, total_steps: int, first_step: int, enabled: bool) -> None:
        """first_step: updates done before. Later records, which a resumed run replaces, go."""
        self.metrics = RecordFile(out_dir / "metrics.jsonl", "step", self.print)
        self.progress = RecordFile(out_dir / "trainer_log.jsonl", "current_steps", self.print)
        self.total_steps = total_steps
        self.first_step = first_step
        self.enabled = enabled
        self.started = time.perf_counter()
        if enabled:
            self.metrics.keep_until(first_step)
            self.progress.keep_until(first_step)
        self.bar = tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            desc="training",
            disable=not enabled,
            dynamic_ncols=True,
        )

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
        self.metrics.append(record)
        seconds = time.perf_counter() - self.started
        self.progress.append(progress_entry(record, self.total_steps, self.first_step, seconds))

    def step(self, loss: float, tokens_per_second: float) -> None:
        """Move the bar by one step."""
        text = f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        if self.enabled:
            tqdm.write(text)

    def close(self) -> float:
        """End the bar. Returns the seconds since the log was opened."""
        self.bar.close()
        return time.perf_counter() - self.started


def draw_loss(out_dir: Path, insist: bool) -> None:
    """Draw loss.png. If that fails, the run is finished all the same, unless the user insists."""
    try:
        loss_curves.plot_loss(out_dir)
    except (UserError, OSError) as error:
        if insist:
            raise
        print(f"note: {out_dir / 'loss.png'} was not drawn: {error}")


def draw_missing_loss(out_dir: Path, insist: bool, enabled: bool) -> None:
    """Draw loss.png of a finished run that was killed before it was drawn. Rank 0 alone does."""
    if enabled and not (out_dir / "loss.png").exists():
        draw_loss(out_dir, insist)
