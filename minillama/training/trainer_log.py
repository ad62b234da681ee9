"""trainer_log.jsonl: how far a run is, with the keys of LLaMA-Factory's file of this name.

Programs that watch LLaMA-Factory's runs read it. It says less than metrics.jsonl, and has a line
for each of its records:

    {"current_steps": 10, "total_steps": 40, "loss": 1.9, "lr": 5e-05, "learning_rate": 5e-05,
     "epoch": 0.25, "percentage": 25.0, "elapsed_time": "0:00:12", "remaining_time": "0:00:36"}

LLaMA-Factory called the rate `learning_rate` until 2024, and calls it `lr` now. Both are written.
"""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any


def progress_entry(
    record: Mapping[str, Any], total_steps: int, first_step: int, seconds: float
) -> dict[str, Any]:
    """Return the line for a record of metrics.jsonl.

    first_step: updates done before this command. seconds: since it began to train.
    """
    step = record["step"]
    entry: dict[str, Any] = {"current_steps": step, "total_steps": total_steps}
    for name in ("loss", "eval_loss"):
        if name in record:
            entry[name] = record[name]
    if "learning_rate" in record:
        entry["lr"] = record["learning_rate"]
        entry["learning_rate"] = record["learning_rate"]
    seconds_per_step = seconds / max(1, step - first_step)
    return entry | {
        "epoch": round(record["epoch"], 2),
        "percentage": round(100 * step / total_steps, 2),
        "elapsed_time": _clock(seconds),
        "remaining_time": _clock(seconds_per_step * (total_steps - step)),
    }


def _clock(seconds: float) -> str:
    """Return a duration as h:mm:ss."""
    return str(timedelta(seconds=int(seconds)))
