"""The directory of a run: what may be continued, what is refused, and what starting writes.

    OUT_DIR/train_config.json    the settings; written when a run starts. --config takes it back
            inputs.json          fingerprints of what the run reads (inputs.py)
            metrics.jsonl        a record per logged step: the run has taken a step
            trainer_log.jsonl    how far the run is, a line for each of these records
            checkpoints/         to resume from
            final/  summary.json    the run is finished
            data/                the embedded data, if the run uses it

A directory belongs to one run. It is continued, or refused, or emptied on request, never mixed.
First everything is checked, without writing. Only then `start_run` changes the directory, so a
mistake in a command costs nothing. It is locked from the first check on: a second command for the
same run is refused.
"""

import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from minillama import comm
from minillama.checkpoint import train_state
from minillama.errors import UserError
from minillama.files import is_temporary, read_json, write_json
from minillama.grid import Grid
from minillama.output_directory import lock_directory
from minillama.train_config import TrainConfig
from minillama.training.data_building import EMBEDDED
from minillama.training.inputs import (
    INPUTS_FILE,
    FileRecord,
    RunInputs,
)
from minillama.training.settings import refuse_changed_settings
from minillama.training.summary import Summary

# What the embedded data is made of, in OUT_DIR/data.
EMBEDDED_FILES = {"demo.json", "demo_lora.json", "tokenizer.model", "cache"}


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to continue from."""

    directory: Path
    state: dict[str, Any]  # state.json


@contextmanager
def locked(config: TrainConfig, mesh: comm.Mesh) -> Iterator[None]:
    """Hold out_dir for this run while the block runs.

    Raises UserError, on every rank, if another process holds it, or it cannot be created.
    """
    _refuse_no_directory(config)
    with ExitStack() as stack:
        problem = None
        if mesh.is_first:
            try:
                stack.enter_context(lock_directory(Path(config.out_dir)))
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem = f"{error.filename or config.out_dir}: {error.strerror or error}"
        comm.raise_together(mesh, problem)
        yield


def check_directory(config: TrainConfig, overwrite: bool) -> None:
    """Raise UserError if out_dir belongs to something else. Writes nothing.

    overwrite: the run in it, if any, will be deleted.
    """
    _refuse_no_directory(config)
    out_dir = Path(config.out_dir)
    has_run = (out_dir / "train_config.json").is_file()
    if out_dir.is_dir() and not has_run:
        _refuse_foreign_files(config, out_dir)
    if overwrite:
        _refuse_inputs_inside(config, out_dir)
    elif (out_dir / "metrics.jsonl").is_file():  # no step taken: nothing is lost
        refuse_changed_settings(config, out_dir)


def finished_summary(config: TrainConfig) -> Summary | None:
    """The summary of a run that is finished; None if there is something to train.

    A damaged summary is made again: the run goes on from its newest checkpoint.
    """
    path = Path(config.out_dir) / "summary.json"
    if config.resume != "auto" or not path.is_file():
        return None
    try:
        return read_json(path)
    except UserError as error:
        print(f"warning: {error}; the run goes on to make it again", file=sys.stderr)
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


def with_global_batch(config: TrainConfig, grid: Grid, rows_per_step: int) -> TrainConfig:
    """The settings with the accumulation that makes `rows_per_step` rows on this many data ranks.

    Raises UserError if no accumulation does.
    """
    data_ranks = grid.data.size
    rows_at_once = config.per_device_train_batch_size * data_ranks
    accumulation, rest = divmod(rows_per_step, rows_at_once)
    if rest:
        raise UserError(
            f"the run's global batch is {rows_per_step} rows, which {data_ranks} data ranks with "
            f"{config.per_device_train_batch_size} rows at a time cannot make; "
            "use another number of ranks"
        )
    if accumulation != config.gradient_accumulation_steps:
        grid.all.print(
            f"global batch kept at {rows_per_step} rows: gradient_accumulation_steps is "
            f"{accumulation} on {data_ranks} data ranks"
        )
    return replace(config, gradient_accumulation_steps=accumulation)


def start_run(
    config: TrainConfig,
    inputs: RunInputs,
    resume_point: ResumePoint | None,
    overwrite: bool,
    in_use: Sequence[str],
) -> None:
    """Write train_config.json and inputs.json. Called on rank 0.

    Before, the old run is deleted if `overwrite`. Otherwise checkpoints of steps that are about to
    be trained again are renamed.
    in_use: paths that this run reads; they stay, such as the embedded data and the token cache.
    """
    out_dir = Path(config.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    if overwrite:
        _refuse_files_inside(out_dir, inputs.files, in_use)
        _empty(out_dir, in_use)
    step = resume_point.state["step"] if resume_point else 0
    for path in train_state.set_aside_after(out_dir, step):
        print(f"renamed, because the run goes on from step {step}: {path}", file=sys.stderr)
    write_json(out_dir / "train_config.json", asdict(config))  # first: it makes out_dir a run's
    write_json(out_dir / INPUTS_FILE, asdict(inputs))


def _refuse_no_directory(config: TrainConfig) -> None:
    if not config.out_dir:
        raise UserError("name a run directory with --out_dir runs/NAME")


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
    if is_temporary(path):
        return True
    if config.cache_dir and Path(config.cache_dir).resolve().is_relative_to(path.resolve()):
        return True
    if path.name != "data" or not path.is_dir():
        return False
    return all(file.name in EMBEDDED_FILES or is_temporary(file) for file in path.iterdir())


def _refuse_inputs_inside(config: TrainConfig, out_dir: Path) -> None:
    """Raise UserError if an input lies in the directory that is about to be emptied."""
    inputs = [config.ckpt, config.tokenizer, config.adapter, *config.data, *config.eval_data]
    if config.resume not in ("auto", "none"):
        inputs.append(config.resume)
    for name in inputs:
        is_file = bool(name) and name not in EMBEDDED
        if is_file and Path(name).resolve().is_relative_to(out_dir.resolve()):
            raise _lies_inside(name, out_dir)


def _lies_inside(name: str, out_dir: Path) -> UserError:
    return UserError(
        f"{name}: lies in {out_dir}, which --overwrite_output_dir would empty; "
        "choose another --out_dir"
    )


def _refuse_files_inside(
    out_dir: Path, files: Mapping[str, FileRecord], in_use: Sequence[str]
) -> None:
    """Raise UserError if a file that the run reads lies in out_dir, where a link may lead."""
    kept = [Path(name).resolve() for name in in_use if name]
    for name in files:
        path = Path(name)
        is_kept = any(path.is_relative_to(place) for place in kept)
        if path.is_relative_to(out_dir.resolve()) and not is_kept:
            raise _lies_inside(name, out_dir)


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
