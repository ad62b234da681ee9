"""The state of a run: what a resume needs, complete or absent.

    checkpoints/step-000100/                   the model or adapter, as a directory of its own, and
        state-00000-0.safetensors              master, m, v of what rank 0 owns of a flat vector
        state-00001-0.safetensors              … of rank 1
        state.json                             step, updates, tokens, skipped steps, loss scale,
                                               global batch, fingerprints of the inputs
        manifest.json                          sha256 of every file; written last

Every rank writes its own slices; nothing is gathered. Each file says which parameters it holds, by
name (optimizer_files.py), so any grid of ranks reads it back.

    1  rank 0 creates step-000100.partial
    2  every rank writes its slices there
    3  the ranks together write the model
    4  rank 0 writes state.json
    5  rank 0 writes manifest.json and renames the directory to step-000100

After each phase its files are flushed, and all ranks know of an error in it. Then they end the save
together. A full disk or a killed process leaves the earlier checkpoints as they are. The order of
the data and the seeds of dropout follow from the step, so nothing else is stored of them.

A checkpoint that is damaged, or of a step that is trained again, is renamed: it is kept, and not
counted among those that a run has.
"""

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillama import comm
from minillama.checkpoint.optimizer_files import write_slice
from minillama.checkpoint.run_directory import checkpoint_path, list_states, step_of
from minillama.comm import Mesh
from minillama.errors import UserError
from minillama.files import flush_to_disk, read_json, sha256_of, write_json
from minillama.output_directory import free_bytes
from minillama.parallel.sharded_optimizer import SavedSlice

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class RankFiles:
    """What a rank has written: the sha256 of its files by name, or why it failed."""

    hashes: dict[str, str]
    error: str | None


def save_state(
    out_dir: Path,
    step: int,
    mesh: Mesh,
    slices: list[SavedSlice],
    state: dict[str, Any],
    write_model: Callable[[Path], None],
    keep: int,
) -> str | None:
    """Write checkpoints/step-N. Returns why nothing was written, or None.

    slices: what this rank saves of its flat vectors.
    state: the content of state.json.
    write_model: writes the model into a directory; called on every rank, so it may gather what
        the ranks hold.
    keep: delete all but the newest `keep` checkpoints (0: none).
    """
    final = checkpoint_path(out_dir, step)
    partial = final.with_name(f"{final.name}.partial")

    def create() -> dict[str, str]:
        if mesh.is_first:
            _remove(partial)
            partial.mkdir(parents=True)
        return {}

    def write_slices() -> dict[str, str]:
        _refuse_full_disk(partial, needed)
        return _write_slices(partial, mesh.rank, slices)

    def write_whole_model() -> dict[str, str]:
        write_model(partial)
        return {}

    def write_state() -> dict[str, str]:
        return _write_state(partial, state) if mesh.is_first else {}

    def finish() -> dict[str, str]:
        if mesh.is_first:
            write_json(partial / MANIFEST, {"sha256": hashes})
            publish(partial, final)
            for old in list_states(out_dir)[:-keep] if keep > 0 else []:
                _remove(old)
        return {}

    needed = sum(comm.gather_objects(mesh, _bytes_of(slices)))
    hashes: dict[str, str] = {}
    for phase in (create, write_slices, write_whole_model, write_state, finish):
        outcome = _on_all_ranks(mesh, partial, phase)
        hashes |= outcome.hashes
        if outcome.error is not None:
            break
    if mesh.is_first and outcome.error is not None:
        with suppress(OSError):
            _remove(partial)
    comm.barrier(mesh)
    return outcome.error


def _on_all_ranks(mesh: Mesh, place: Path, phase: Callable[[], dict[str, str]]) -> RankFiles:
    """Run a phase on every rank. Returns all hashes that it made, and all errors."""
    hashes: dict[str, str] = {}
    error = None
    try:
        hashes = phase()
    except OSError as failure:
        error = f"rank {mesh.rank}: {failure.strerror or failure} ({failure.filename or place})"
    all_hashes: dict[str, str] = {}
    errors = []
    for written in comm.gather_objects(mesh, RankFiles(hashes, error)):
        all_hashes |= written.hashes
        if written.error is not None:
            errors.append(written.error)
    return RankFiles(all_hashes, "; ".join(errors) or None)


def flush_and_hash(path: Path) -> str:
    """Wait until a file is on the disk; returns the sha256 of its content."""
    flush_to_disk(path)
    return sha256_of(path)


def publish(partial: Path, final: Path) -> None:
    """Rename `partial`, complete and flushed, to `final`, which is replaced if it exists."""
    _remove(final)
    os.replace(partial, final)
    flush_to_disk(final)
    flush_to_disk(final.parent)


def _remove(path: Path) -> None:
    """Delete a directory, or a link to one, and not what the link leads to."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def set_aside(directory: Path, reason: str) -> Path:
    """Rename a checkpoint to NAME.REASON, so that it is kept but not counted; returns the path."""
    target = directory.with_name(f"{directory.name}.{reason}")
    number = 2
    while target.exists() or target.is_symlink():
        target = directory.with_name(f"{directory.name}.{reason}-{number}")
        number += 1
    directory.rename(target)
    return target


def set_aside_after(out_dir: Path, step: int) -> list[Path]:
    """Rename the checkpoints of later steps than `step`; returns their new paths."""
    later = [path for path in list_states(out_dir) if step_of(path) > step]
    return [set_aside(path, "replaced") for path in later]


def verify(directory: Path) -> str | None:
    """Compare a checkpoint with its manifest. Returns what is wrong, or None."""
    try:
        manifest = read_json(
            directory / MANIFEST, keys={"sha256": dict}, what="a checkpoint's manifest"
        )
        for name, sha256 in manifest["sha256"].items():
            if sha256_of(directory / name) != sha256:
                return f"{directory / name}: its content is not what was written"
    except (UserError, OSError) as error:
        return str(error)
    return None


def newest_intact(out_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint that `verify` accepts, and rename those that it does not.

    `warn` is told of each.
    """
    for path in reversed(list_states(out_dir)):
        error = verify(path)
        if error is None:
            return path
        kept = set_aside(path, "damaged")
        warn(f"warning: damaged checkpoint skipped: {error}; it is kept as {kept}")
    return None


def read_state(directory: Path) -> dict[str, Any]:
    """Return state.json of a checkpoint. Raises UserError if the checkpoint is damaged."""
    error = verify(directory)
    if error is not None:
        raise UserError(f"{error}; name another checkpoint with --resume DIR")
    return read_json(directory / "state.json")


def _bytes_of(slices: list[SavedSlice]) -> int:
    num_bytes = 0
    for part in slices:
        num_bytes += sum(tensor.nbytes for tensor in part.tensors.values())
    return num_bytes


def _refuse_full_disk(partial: Path, needed: int) -> None:
    """needed: bytes of the optimizer's state of all ranks."""
    free = free_bytes(partial)
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{needed:,} bytes are needed for the optimizer's state alone, {free:,} are free",
            str(partial),
        )


def _write_slices(partial: Path, rank: int, slices: list[SavedSlice]) -> dict[str, str]:
    """Write a rank's slices; returns the files' sha256 by name."""
    hashes = {}
    for number, part in enumerate(slices):
        path = partial / f"state-{rank:05d}-{number}.safetensors"
        write_slice(path, part)
        hashes[path.name] = flush_and_hash(path)
    return hashes


def _write_state(partial: Path, state: dict[str, Any]) -> dict[str, str]:
    """Write state.json; returns the sha256 of it and of the model's files by name."""
    write_json(partial / "state.json", state)
    hashes = {}
    for path in sorted(partial.iterdir()):
        if not path.name.startswith("state-"):  # those are hashed by the ranks that write them
            hashes[path.name] = flush_and_hash(path)
    return hashes
