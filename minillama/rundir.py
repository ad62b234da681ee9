"""A run directory belongs to one run: it is continued, or refused, or emptied on request; never mixed."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minillama import comm
from minillama.checkpoint import train_state
from minillama.checkpoint.directory import write_json
from minillama.config import Settings
from minillama.errors import UserError, read_json

# What may differ between the parts of one run without changing its result.
HARMLESS = {"out_dir", "resume", "device", "ops", "threads", "logging_steps", "eval_strategy", "eval_steps", "per_device_eval_batch_size",
            "save_strategy", "save_steps", "save_total_limit", "plot_loss", "peak_tflops", "cache_dir", "workers", "gradient_checkpointing",
            "gradient_accumulation_steps", "zero_stage", "bucket_elements"}  # the global batch is kept, on any number of ranks


def prepare_directory(settings: Settings, mesh: comm.Mesh, overwrite: bool) -> tuple[Path | None, dict[str, Any] | None]:
    """(checkpoint to resume or None, summary of a finished run or None); train_config.json is written for a run to be made."""
    out_dir = Path(settings.out_dir)
    with comm.first_rank_first(mesh):
        if out_dir.is_dir() and any(out_dir.iterdir()) and not (out_dir / "train_config.json").is_file():
            raise UserError(f"{out_dir}: holds files that no run of ours made, and is left alone; choose another --out_dir")
        if overwrite and mesh.is_first:
            shutil.rmtree(out_dir, ignore_errors=True)
        _refuse_other_settings(settings, out_dir)
        if settings.resume == "auto" and (out_dir / "summary.json").is_file():
            return None, read_json(out_dir / "summary.json")
        out_dir.mkdir(parents=True, exist_ok=True)
        if mesh.is_first:
            write_json(out_dir / "train_config.json", asdict(settings))  # which --config takes back
    if settings.resume != "auto":
        return None if settings.resume == "none" else Path(settings.resume), None
    found = train_state.newest_intact(out_dir, mesh.print) if mesh.is_first else None
    return comm.gather_objects(mesh, found)[0], None


def _refuse_other_settings(settings: Settings, out_dir: Path) -> None:
    if not (out_dir / "metrics.jsonl").is_file():
        return  # it never came to a first step: a mistake mended, nothing to protect
    before, now = read_json(out_dir / "train_config.json"), json.loads(json.dumps(asdict(settings)))
    changed = [name for name in now if name not in HARMLESS and name in before and before[name] != now[name]]
    if changed:
        shown = ", ".join(f"{name} was {before[name]!r}, is {now[name]!r}" for name in changed)
        raise UserError(f"{out_dir}: holds a run with other settings: {shown}; choose another --out_dir, or --overwrite_output_dir")
