"""Which settings may differ: between a run and its continuation, and between the ranks of a run.

A run is continued with the settings that it began with, and its ranks are started with the same.
Keys that leave the result as it is may differ. Keys that name files may differ if the content is
the same: inputs.py compares that.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minillama import comm
from minillama.checkpoint import train_state
from minillama.checkpoint.template_files import read_about
from minillama.errors import UserError
from minillama.files import read_json
from minillama.train_config import TrainConfig
from minillama.training.inputs import have_files_changed, read_inputs

# Keys that may change when a run is continued: they leave its result as it is. The global batch is
# kept, so the accumulation may change too.
MAY_CHANGE = {
    "out_dir",
    "resume",
    "device",
    "devices",
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
    "tensor_parallel",
    "pipeline_parallel",
}
# Keys that name files. Their content is compared, by fingerprint.
PATHS = {"ckpt", "tokenizer", "adapter", "data", "eval_data", "dataset_dir"}
# Keys that may differ between the ranks of a run, because machines differ.
MAY_DIFFER = PATHS | {"resume", "device", "devices", "threads", "workers", "cache_dir"}


def refuse_two_divisions(config: TrainConfig, mesh: comm.Mesh) -> None:
    """Raise UserError if layers are to be divided among devices of a process and among ranks."""
    for name in ("tensor_parallel", "pipeline_parallel"):
        value = getattr(config, name)
        if value > 1 and len(mesh.devices) > 1:
            raise UserError(
                f"devices = {config.devices} and {name} = {value} both divide the model; "
                "leave one of them out"
            )


def refuse_unlike_ranks(config: TrainConfig, overwrite: bool, mesh: comm.Mesh) -> None:
    """Raise UserError, on every rank, if ranks were started with different settings."""
    values: dict[str, Any] = {"overwrite_output_dir": overwrite}
    for name, value in asdict(config).items():
        if name not in MAY_DIFFER:
            values[name] = value
    comm.refuse_differences(mesh, values, "start every rank with the same command")


def reads_recorded_files(config: TrainConfig) -> bool:
    """Whether a run names the files that it began with, and none of them has changed."""
    out_dir = Path(config.out_dir)
    before = _recorded_settings(out_dir)
    now = _as_json(config)
    if any(before.get(name) != now[name] for name in PATHS):
        return False
    return not have_files_changed(read_inputs(out_dir).files)


def _recorded_settings(out_dir: Path) -> dict[str, Any]:
    """The settings of the run in out_dir; {} if no file in it has the settings.

    A damaged train_config.json is made again from what the model's directories say.
    """
    path = out_dir / "train_config.json"
    try:
        return read_json(path)
    except UserError as error:
        problem = error
    for directory in (out_dir / "final", *reversed(train_state.list_states(out_dir))):
        settings = read_about(directory).get("settings")
        if settings is not None:
            print(f"warning: {problem}; the settings were read from {directory}", file=sys.stderr)
            return settings
    return {}


def _as_json(config: TrainConfig) -> dict[str, Any]:
    """The settings as train_config.json holds them: tuples become lists."""
    return json.loads(json.dumps(asdict(config)))


def refuse_changed_settings(config: TrainConfig, out_dir: Path) -> None:
    """Raise UserError if a key that changes the result differs from that of the run there."""
    before = _recorded_settings(out_dir)
    ignored = MAY_CHANGE
    if read_inputs(out_dir).fingerprints:
        ignored = MAY_CHANGE | PATHS
    changes = _changes(before, config, ignored)
    if changes:
        raise UserError(
            f"{out_dir}: holds a run with other settings: {', '.join(changes)}; "
            "choose another --out_dir, or --overwrite_output_dir"
        )


def warn_of_changed_settings(config: TrainConfig, checkpoint: Path, mesh: comm.Mesh) -> None:
    """Print how a run differs from the one whose checkpoint it goes on from.

    The checkpoint may be of another run, so nothing is refused. But other documents may be held
    out, or come in another order.
    """
    before = read_about(checkpoint).get("settings") or {}
    changes = _changes(before, config, MAY_CHANGE | PATHS)
    if changes:
        mesh.print(f"WARNING: {checkpoint} began with other settings: {', '.join(changes)}")


def _changes(before: dict[str, Any], config: TrainConfig, ignored: set[str]) -> list[str]:
    changes = []
    for name, value in _as_json(config).items():
        if name not in ignored and name in before and before[name] != value:
            changes.append(f"{name} was {before[name]!r}, is {value!r}")
    return changes
