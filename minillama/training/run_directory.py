"""The directory of a run: what may be continued, what is refused, and what starting writes.

    OUT_DIR/train_config.json    the settings; written when a run starts. --config takes it back
            metrics.jsonl        a record per logged step: the run has taken a step
            checkpoints/         to resume from
            final/  summary.json    the run is finished
            data/                the embedded data, if the run uses it

A directory belongs to one run. It is continued, or refused, or emptied on request, never mixed.
Looking comes first and writes nothing: everything else of the run is built and checked before
`start_run` changes the directory, so a mistake in a command costs nothing.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from minillama import comm
from minillama.checkpoint import train_state
from minillama.errors import UserError
from minillama.files import read_json, write_json
from minillama.train_config import TrainConfig
from minillama.training.data_building import EMBEDDED
from minillama.training.summary import Summary

# What the embedded data is made of, in OUT_DIR/data.
EMBEDDED_FILES = {"demo.json", "demo_lora.json", "tokenizer.model", "cache"}
# Keys that may change when a run is continued: they leave its result as it is. The global batch is
# kept, so the accumulation may change too.
MAY_CHANGE = {
    "out_dir",
    "resume",
    "device",
    "ops",
    "threads",
    "logging_steps",
    "eval_strategy",
    "eval_steps",
    "per_device_eval_batch_size",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "plot_loss",
    "peak_tflops",
    "cache_dir",
    "max_dropped",
    "workers",
    "gradient_checkpointing",
    "gradient_accumulation_steps",
    "zero_stage",
    "bucket_elements",
}


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to continue from."""

    directory: Path
    state: dict[str, Any]  # state.json


def check_directory(config: TrainConfig, overwrite: bool) -> None:
    """Raise UserError if out_dir belongs to something else. Writes nothing.

    overwrite: the run in it, if any, will be deleted.
    """
    if not config.out_dir:
        raise UserError("name a run directory with --out_dir runs/NAME")
    out_dir = Path(config.out_dir)
    has_run = (out_dir / "train_config.json").is_file()
    if out_dir.is_dir() and not has_run:
        _refuse_foreign_files(config, out_dir)
    if overwrite:
        _refuse_inputs_inside(config, out_dir)
    elif (out_dir / "metrics.jsonl").is_file():  # no step taken: nothing is lost
        _refuse_other_settings(config, out_dir)


def finished_summary(config: TrainConfig) -> Summary | None:
    """The summary of a run that is finished; None if there is something to train."""
    path = Path(config.out_dir) / "summary.json"
    if config.resume == "auto" and path.is_file():
        return read_json(path)
    return None


def find_resume_point(config: TrainConfig, overwrite: bool, mesh: comm.Mesh) -> ResumePoint | None:
    """The checkpoint to continue from, the same on every rank; None: start at step 0."""
    newest = None
    if mesh.is_first and config.resume == "auto" and not overwrite:
        newest = train_state.newest_intact(Path(config.out_dir), mesh.print)
    directory: Path | None = comm.gather_objects(mesh, newest)[0]
    if config.resume not in ("auto", "none"):
        directory = Path(config.resume)
    if directory is None:
        return None
    return ResumePoint(directory, train_state.read_state(directory))


def with_global_batch(config: TrainConfig, mesh: comm.Mesh, rows_per_step: int) -> TrainConfig:
    """The settings with the accumulation that makes `rows_per_step` rows on this many ranks.

    Raises UserError if no accumulation does.
    """
    rows_at_once = config.per_device_train_batch_size * mesh.size
    accumulation, rest = divmod(rows_per_step, rows_at_once)
    if rest:
        raise UserError(
            f"the run's global batch is {rows_per_step} rows, which {mesh.size} ranks with "
            f"{config.per_device_train_batch_size} rows at a time cannot make; "
            "use another number of ranks"
        )
    if accumulation != config.gradient_accumulation_steps:
        mesh.print(
            f"global batch kept at {rows_per_step} rows: gradient_accumulation_steps is "
            f"{accumulation} on {mesh.size} ranks"
        )
    return replace(config, gradient_accumulation_steps=accumulation)


def start_run(config: TrainConfig, overwrite: bool, in_use: Sequence[str]) -> None:
    """Write train_config.json, after deleting the old run if `overwrite`. Called on rank 0.

    in_use: paths that this run reads; they stay, such as the embedded data and the token cache.
    """
    out_dir = Path(config.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    if overwrite:
        _empty(out_dir, in_use)
    write_json(out_dir / "train_config.json", asdict(config))


def _refuse_foreign_files(config: TrainConfig, out_dir: Path) -> None:
    """Raise UserError if out_dir, which holds no run, holds anything of the user's."""
    for path in out_dir.iterdir():
        if not _is_preparation(config, path):
            raise UserError(
                f"{out_dir}: holds files that no run of ours made, and is left alone; "
                "choose another --out_dir"
            )


def _is_preparation(config: TrainConfig, path: Path) -> bool:
    """Whether `path` can come from a run that ended before it wrote train_config.json."""
    if _is_partial(path):
        return True
    if config.cache_dir and Path(config.cache_dir).resolve().is_relative_to(path.resolve()):
        return True
    if path.name != "data" or not path.is_dir():
        return False
    return all(file.name in EMBEDDED_FILES or _is_partial(file) for file in path.iterdir())


def _is_partial(path: Path) -> bool:
    """Whether `path` is what `files` leaves of a file if the process is killed."""
    return path.name.startswith(".") and path.name.endswith(".partial")


def _refuse_inputs_inside(config: TrainConfig, out_dir: Path) -> None:
    """Raise UserError if an input lies in the directory that is about to be emptied."""
    inputs = [config.ckpt, config.tokenizer, config.adapter, *config.data, *config.eval_data]
    if config.resume not in ("auto", "none"):
        inputs.append(config.resume)
    for name in inputs:
        is_file = bool(name) and name not in EMBEDDED
        if is_file and Path(name).resolve().is_relative_to(out_dir.resolve()):
            raise UserError(
                f"{name}: lies in {out_dir}, which --overwrite_output_dir would empty; "
                "choose another --out_dir"
            )


def _refuse_other_settings(config: TrainConfig, out_dir: Path) -> None:
    """Raise UserError if a key that changes the result differs from that of the run there."""
    before = read_json(out_dir / "train_config.json")
    now = json.loads(json.dumps(asdict(config)))  # tuples become lists, as in the file
    changes = []
    for name, value in now.items():
        if name not in MAY_CHANGE and name in before and before[name] != value:
            changes.append(f"{name} was {before[name]!r}, is {value!r}")
    if changes:
        raise UserError(
            f"{out_dir}: holds a run with other settings: {', '.join(changes)}; "
            "choose another --out_dir, or --overwrite_output_dir"
        )


def _empty(out_dir: Path, in_use: Sequence[str]) -> None:
    """Delete everything in a directory except what holds the paths `in_use`.

    train_config.json goes last: without it, what is left of a killed deletion would be foreign.
    """
    kept = [Path(name).resolve() for name in in_use if name]
    entries = sorted(out_dir.resolve().iterdir(), key=lambda path: path.name == "train_config.json")
    for path in entries:
        if any(used.is_relative_to(path) for used in kept):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
