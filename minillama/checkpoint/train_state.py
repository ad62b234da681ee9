"""The state of a run: what a resume needs, complete or absent.

    checkpoints/step-000100/                   the model (or adapter), as a directory that opens by itself, and
        state-0-000000000000.safetensors       master, m, v from position 0 of flat vector 0 on; one file a rank
        state-0-000000016384.safetensors       …
        state.json                             step, tokens, skipped steps, loss scale, rows of a global batch
        manifest.json                          sha256 of every file; written last

State is stored by its position in the flat vector and never by rank, so any number of ranks reads it back. Every rank writes its own
slice; nothing is gathered. All of it goes to `step-000100.partial`, is flushed to the disk, and becomes visible by one rename of
rank 0 after every rank has said that it is done. A disk that fills up, or a process that dies, leaves the checkpoints before it.
The order of the data and the seeds of dropout follow from the step, so the step is all there is to know about them.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillama import comm
from minillama.checkpoint.hf_format import list_states, write_json
from minillama.comm import Mesh
from minillama.errors import UserError
from minillama.files import flush_to_disk as to_disk
from minillama.files import sha256_of
from minillama.tensor_files import read_safetensors
from minillama.tensor_writers import write_safetensors


def save_state(
    out_dir: Path,
    step: int,
    mesh: Mesh,
    slices: list[tuple[int, dict[str, Tensor]]],
    state: dict[str, Any],
    write_model: Callable[[Path], None],
    keep: int,
) -> str:
    """Write checkpoints/step-N and delete all but the newest `keep` (0: none). Returns "", or why nothing was written.
    slices: for each flat vector, the position this rank's slice begins at, and its tensors. write_model is called on rank 0."""
    final = out_dir / "checkpoints" / f"step-{step:06d}"
    partial = final.with_name(final.name + ".partial")
    needed = mesh.size * sum(tensor.nbytes for _, tensors in slices for tensor in tensors.values())
    problem, hashes = "", {}
    if mesh.is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    comm.barrier(mesh)
    try:
        if (free := shutil.disk_usage(partial).free) < needed:
            raise OSError(
                28,
                f"{needed:,} bytes are needed for the optimizer's state alone, {free:,} are free",
                str(partial),
            )
        for number, (start, tensors) in enumerate(slices):
            path = partial / f"state-{number}-{start:012d}.safetensors"
            write_safetensors(path, tensors)
            hashes[path.name] = flush_and_hash(path)
        if mesh.is_first:
            write_model(partial)
            write_json(partial / "state.json", state)
            hashes |= {
                p.name: flush_and_hash(p)
                for p in sorted(partial.iterdir())
                if not p.name.startswith("state-")
            }
    except OSError as error:
        problem = f"rank {mesh.rank}: {error.strerror or error} ({error.filename or partial})"
    said = comm.gather_objects(mesh, (problem, hashes))
    problems = [other for other, _ in said if other]
    if mesh.is_first and problems:
        shutil.rmtree(partial, ignore_errors=True)
    elif mesh.is_first:
        write_json(
            partial / "manifest.json",
            {"sha256": {name: sha for _, part in said for name, sha in part.items()}},
        )
        publish(partial, final)
        for old in list_states(out_dir)[:-keep] if keep else []:
            shutil.rmtree(old)
    comm.barrier(mesh)
    return "; ".join(problems)


def flush_and_hash(path: Path) -> str:
    """Flush a file to the disk; returns the sha256 of what it holds."""
    to_disk(path)
    return sha256_of(path)


def publish(partial: Path, final: Path) -> None:
    """Make `partial`, complete and flushed, visible as `final`, by one rename."""
    to_disk(partial / "manifest.json")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    to_disk(final)
    to_disk(final.parent)


def damage(directory: Path) -> str:
    """What is wrong with a checkpoint, by its manifest; an empty string where nothing is."""
    try:
        expected = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))["sha256"]
        for name, sha in expected.items():
            if sha256_of(directory / name) != sha:
                return f"{directory / name}: its content is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{directory}: {error}"
    return ""


def newest_intact(out_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that holds what was written; a damaged one is named and passed over."""
    for path in reversed(list_states(out_dir)):
        if not (problem := damage(path)):
            return path
        warn(f"warning: damaged checkpoint passed over: {problem}")
    return None


def read_state(directory: Path) -> dict[str, Any]:
    """state.json of a checkpoint. Raises UserError where the checkpoint is not whole."""
    if problem := damage(directory):
        raise UserError(f"{problem}; name another checkpoint with --resume DIR")
    return json.loads((directory / "state.json").read_text(encoding="utf-8"))


def slice_reader(directory: Path, number: int, total: int) -> Callable[[str, int, int], Tensor]:
    """read(name, start, stop): a stretch of flat vector `number` of a checkpoint, whoever wrote it. `total`: its length."""
    pieces = [
        (int(path.stem.rsplit("-", 1)[1]), read_safetensors(path))
        for path in directory.glob(f"state-{number}-*.safetensors")
    ]
    if (held := sum(entries["m"].shape[0] for _, entries in pieces)) != total:
        raise UserError(
            f"{directory}: holds {held:,} trained numbers, this run has {total:,}; it belongs to another run"
        )

    def read(name: str, start: int, stop: int) -> Tensor:
        result = torch.empty(max(0, stop - start), dtype=torch.float32)
        for begin, entries in pieces:
            entry = entries[name]
            first, last = max(start, begin), min(stop, begin + entry.shape[0])
            if first < last:
                result[first - start : last - start] = entry.read_part(first - begin, last - begin)
        return result

    return read
