"""The state of a run: what a resume needs, complete or absent.

    checkpoints/step-000100/    the model (or adapter) as a directory that opens by itself
        optimizer.safetensors   masters, Adam's moments, step count
        state.json              steps done, tokens seen, skipped steps, settings

A checkpoint is written beside its place and renamed there, so a directory without `.partial` in its name is whole. The order of the
data and the seeds of dropout follow from the step, so the step is all there is to know about them.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from minillama.checkpoint.directory import write_json
from minillama.errors import UserError


def save_state(out_dir: Path, step: int, write_model: Callable[[Path], None], optimizer: dict[str, Tensor], state: dict[str, Any],
               keep: int) -> Path:
    """Write checkpoints/step-N and delete all but the newest `keep` (0: none is deleted)."""
    final = out_dir / "checkpoints" / f"step-{step:06d}"
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_model(partial)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in optimizer.items()}, partial / "optimizer.safetensors")
    write_json(partial / "state.json", state)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    for old in list_states(out_dir)[:-keep] if keep else []:
        shutil.rmtree(old)
    return final


def list_states(out_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in (out_dir / "checkpoints").glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def load_state(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(state.json, the optimizer's tensors) of a checkpoint."""
    try:
        return json.loads((directory / "state.json").read_text(encoding="utf-8")), load_file(directory / "optimizer.safetensors")
    except (OSError, ValueError) as error:
        raise UserError(f"{directory}: not a complete checkpoint ({error}); name another with --resume DIR") from None
