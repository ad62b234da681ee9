"""A DeepSpeed JSON file (`--deepspeed FILE`), as values of our keys.

Each entry of the file is in one of three tables, as flags are in compat/flags.py: another name for
a key of ours, an entry that may only have certain values, or one that only tunes DeepSpeed itself
and changes no result. Any other entry is an error. "auto" leaves the value to the command line, as
in transformers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minillama.errors import UserError, closest
from minillama.files import parsing, read_json
from minillama.train_config import flatten

# entry of the file, dotted -> our key
KEY_NAMES = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "zero_optimization.stage": "zero_stage",
    "zero_optimization.reduce_bucket_size": "bucket_elements",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "weight_decay",
    "fp16.initial_scale_power": "initial_scale_power",
    "fp16.loss_scale_window": "loss_scale_window",
    "fp16.hysteresis": "loss_scale_hysteresis",
    "fp16.min_loss_scale": "min_loss_scale",
}

# keys that may only have these values
ALLOWED = {
    "optimizer.type": ("Adam", "AdamW"),
    "optimizer.params.torch_adam": (True, False),
    "optimizer.params.adam_w_mode": (True,),
    "fp16.loss_scale": (0,),
    "zero_optimization.offload_optimizer.device": ("none",),
    "zero_optimization.offload_param.device": ("none",),
}
IGNORED = """
    steps_per_print wall_clock_breakdown train_batch_size zero_allow_untested_optimizer
    fp16.auto_cast
    zero_optimization.overlap_comm zero_optimization.contiguous_gradients
    zero_optimization.allgather_partitions zero_optimization.allgather_bucket_size
    zero_optimization.reduce_scatter zero_optimization.round_robin_gradients
""".split()


def read(path: Path, world_size: int) -> dict[str, Any]:
    """Return the values that the file fixes, by key.

    Raises UserError for an entry that cannot be honoured, and for batch sizes that disagree.
    """
    content = read_json(path, "--deepspeed takes a DeepSpeed JSON file")
    keys: dict[str, Any] = {}
    for entry, value in flatten(content).items():
        if value == "auto" or entry in IGNORED:
            continue
        with parsing(f"{path}: {entry} = {value!r}"):
            keys |= keys_from(entry, value)
    stage = keys.get("zero_stage", 0)
    if stage > 2:
        raise UserError(
            f"{path}: zero_optimization.stage = {stage}: weights are not sharded here; "
            "use stage 1 or 2"
        )
    check_batch_size(content.get("train_batch_size"), keys, world_size, path)
    return keys


def keys_from(entry: str, value: Any) -> dict[str, Any]:
    """Return what one entry means. Raises UserError, or the error of a wrong type."""
    if entry in KEY_NAMES:
        is_whole = entry.endswith(("size", "stage"))  # files say 2e8
        return {KEY_NAMES[entry]: int(value) if is_whole else value}
    if entry == "optimizer.params.betas":
        beta1, beta2 = value
        return {"adam_beta1": beta1, "adam_beta2": beta2}
    if entry in ("fp16.enabled", "bf16.enabled"):
        return {"precision": entry.removesuffix(".enabled")} if value else {}
    if entry not in ALLOWED:
        raise UserError(f"not supported{closest(entry, (*KEY_NAMES, *ALLOWED, *IGNORED))}")
    if value not in ALLOWED[entry]:
        supported = ", ".join(repr(choice) for choice in ALLOWED[entry])
        raise UserError(f"not supported; supported: {supported}")
    return {}


def check_batch_size(total: Any, keys: Mapping[str, Any], world_size: int, path: Path) -> None:
    """Raise UserError unless train_batch_size = micro-batch × accumulation × ranks.

    A value that the file leaves open fits any other.
    """
    micro_batch = keys.get("per_device_train_batch_size")
    accumulation = keys.get("gradient_accumulation_steps")
    if total in (None, "auto") or not micro_batch or not accumulation:
        return
    product = micro_batch * accumulation * world_size
    if total != product:
        raise UserError(
            f"{path}: train_batch_size = {total} is not train_micro_batch_size_per_gpu "
            f"{micro_batch} × gradient_accumulation_steps {accumulation} × {world_size} ranks "
            f"= {product}"
        )
