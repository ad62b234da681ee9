"""The state of a run: what a resume needs, complete or absent.

    checkpoints/step-000100/                   the model or adapter, as a directory of its own, and
        state-0-000000000000.safetensors       master, m, v of flat vector 0 from position 0 on
        state-0-000000016384.safetensors       … from position 16384 on; one file per rank
        state.json                             step, tokens, skipped steps, loss scale, global batch
        manifest.json                          sha256 of every file; written last

State is stored by its position in the flat vector and never by rank, so any number of ranks reads
it back. Every rank writes its own slice; nothing is gathered.

    1  rank 0 creates step-000100.partial
    2  every rank writes its slices there, rank 0 also the model and state.json; all are flushed
    3  every rank tells whether it failed, and the hashes of its files
    4  rank 0 writes manifest.json and renames the directory to step-000100

A full disk or a killed process leaves the earlier checkpoints as they are. The order of the data
and the seeds of dropout follow from the step, so nothing else is stored of them.
"""

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillama import comm
from minillama.checkpoint.run_directory import checkpoint_path, list_states
from minillama.comm import Mesh
from minillama.errors import UserError
from minillama.files import flush_to_disk, read_json, sha256_of, write_json
from minillama.output_directory import free_bytes
from minillama.parallel.sharded_optimizer import ReadRange, SavedSlice
from minillama.tensor_files import TensorRef, read_safetensors
from minillama.tensor_writers import write_safetensors

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Written:
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

    slices: this rank's slice of each flat vector.
    state: the content of state.json.
    write_model: writes the model into a directory; called on rank 0.
    keep: delete all but the newest `keep` checkpoints (0: none).
    """
    final = checkpoint_path(out_dir, step)
    partial = final.with_name(f"{final.name}.partial")
    if mesh.is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    comm.barrier(mesh)

    hashes: dict[str, str] = {}
    error = None
    try:
        _refuse_full_disk(partial, mesh, slices)
        hashes |= _write_slices(partial, slices)
        if mesh.is_first:
            hashes |= _write_model_and_state(partial, write_model, state)
    except OSError as failure:
        place = failure.filename or partial
        error = f"rank {mesh.rank}: {failure.strerror or failure} ({place})"
    all_written: list[Written] = comm.gather_objects(mesh, Written(hashes, error))

    errors = [written.error for written in all_written if written.error is not None]
    if mesh.is_first and errors:
        shutil.rmtree(partial, ignore_errors=True)
    elif mesh.is_first:
        all_hashes: dict[str, str] = {}
        for written in all_written:
            all_hashes |= written.hashes
        write_json(partial / MANIFEST, {"sha256": all_hashes})
        publish(partial, final)
        if keep > 0:
            for old in list_states(out_dir)[:-keep]:
                shutil.rmtree(old)
    comm.barrier(mesh)
    return "; ".join(errors) or None


def flush_and_hash(path: Path) -> str:
    """Wait until a file is on the disk; returns the sha256 of its content."""
    flush_to_disk(path)
    return sha256_of(path)


def publish(partial: Path, final: Path) -> None:
    """Rename `partial`, complete and flushed, to `final`, which is replaced if it exists."""
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    flush_to_disk(final)
    flush_to_disk(final.parent)


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
    """Return the newest checkpoint that `verify` accepts; `warn` is told of each it does not."""
    for path in reversed(list_states(out_dir)):
        error = verify(path)
        if error is None:
            return path
        warn(f"warning: damaged checkpoint passed over: {error}")
    return None


def read_state(directory: Path) -> dict[str, Any]:
    """Return state.json of a checkpoint. Raises UserError if the checkpoint is damaged."""
    error = verify(directory)
    if error is not None:
        raise UserError(f"{error}; name another checkpoint with --resume DIR")
    return read_json(directory / "state.json")


def slice_reader(directory: Path, number: int, total: int) -> ReadRange:
    """Return read(name, start, stop), which reads a range of flat vector `number`.

    name: "master", "m" or "v". The range may lie in the files of several ranks.
    total: the vector's length in this run. Raises UserError if the checkpoint's is another.
    """
    files: dict[int, dict[str, TensorRef]] = {}  # the position of the first element -> tensors
    for path in directory.glob(f"state-{number}-*.safetensors"):
        position = int(path.stem.rsplit("-", 1)[1])
        files[position] = read_safetensors(path)
    length = sum(tensors["m"].shape[0] for tensors in files.values())
    if length != total:
        raise UserError(
            f"{directory}: holds {length:,} trained parameters, this run has {total:,}; "
            "it belongs to another run"
        )

    def read(name: str, start: int, stop: int) -> Tensor:
        result = torch.empty(max(0, stop - start), dtype=torch.float32)
        for position, tensors in files.items():
            tensor = tensors[name]
            first = max(start, position)
            last = min(stop, position + tensor.shape[0])
            if first < last:
                part = tensor.read_part(first - position, last - position)
                result[first - start : last - start] = part
        return result

    return read


def _refuse_full_disk(partial: Path, mesh: Mesh, slices: list[SavedSlice]) -> None:
    num_bytes = 0
    for part in slices:
        num_bytes += sum(tensor.nbytes for tensor in part.tensors.values())
    needed = mesh.size * num_bytes  # all ranks have about as much
    free = free_bytes(partial)
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{needed:,} bytes are needed for the optimizer's state alone, {free:,} are free",
            str(partial),
        )


def _write_slices(partial: Path, slices: list[SavedSlice]) -> dict[str, str]:
    """Write a rank's slices; returns the files' sha256 by name."""
    hashes = {}
    for number, part in enumerate(slices):
        path = partial / f"state-{number}-{part.start:012d}.safetensors"
        write_safetensors(path, part.tensors)
        hashes[path.name] = flush_and_hash(path)
    return hashes


def _write_model_and_state(
    partial: Path, write_model: Callable[[Path], None], state: dict[str, Any]
) -> dict[str, str]:
    """Write what rank 0 writes; returns the files' sha256 by name."""
    write_model(partial)
    write_json(partial / "state.json", state)
    hashes = {}
    for path in sorted(partial.iterdir()):
        if not path.name.startswith("state-"):  # those are hashed by the ranks that write them
            hashes[path.name] = flush_and_hash(path)
    return hashes
