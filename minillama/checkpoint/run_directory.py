"""The checkpoints of a run directory.

out_dir/checkpoints/step-000100/    complete, or absent
out_dir/final/                      the finished model or adapter
"""

import sys
from pathlib import Path

from minillama.checkpoint.hf_reader import open_weights
from minillama.checkpoint.manifest import refuse_damage
from minillama.output_directory import restore

CONFIG_FILES = ("config.json", "adapter_config.json")  # of a model, of an adapter


def checkpoint_path(out_dir: Path, step: int) -> Path:
    """Return the directory of the checkpoint after a step."""
    return out_dir / "checkpoints" / f"step-{step:06d}"


def list_states(out_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    paths = (out_dir / "checkpoints").glob("step-*")
    return sorted((path for path in paths if _number(path).isdigit()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint is named after."""
    return int(_number(checkpoint))


def _number(checkpoint: Path) -> str:
    return checkpoint.name.removeprefix("step-")


def find_checkpoint(path: Path) -> Path:
    """Return the model or adapter directory that `path` means.

    For a run directory that is its final/, else its newest complete checkpoint; otherwise `path`.
    Raises UserError if there is no model, and says what is there instead, and for files that are
    not what its manifest says.
    """
    restore(path)
    restore(path / "final")
    directory = path
    checkpoints = list_states(path)
    if (path / "final").is_dir():
        directory = path / "final"
    elif checkpoints:
        directory = checkpoints[-1]
        print(f"{path}: has no final/; its newest checkpoint is used: {directory}", file=sys.stderr)
    if not any((directory / name).is_file() for name in CONFIG_FILES):
        open_weights(directory)  # its error says what the directory holds
    refuse_damage(directory)
    return directory
