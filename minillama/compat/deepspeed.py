"""A DeepSpeed JSON file (`--deepspeed FILE`) as settings of ours: what it asks for is mapped, or refused by name.

"auto" leaves a value to the command line, as transformers does. Keys that only tune DeepSpeed's own machinery change no result and
are passed over; everything else that is not in the table is an error.
"""

from pathlib import Path
from typing import Any

from minillama.errors import UserError, closest, parsing, read_json

# a key of the file, dotted -> the setting it becomes
MAPPED = {
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
# keys whose values must be among these
FIXED = {
    "optimizer.type": ("Adam", "AdamW"),
    "optimizer.params.torch_adam": (True, False),
    "optimizer.params.adam_w_mode": (True,),
    "fp16.loss_scale": (0,),
    "zero_optimization.offload_optimizer.device": ("none",),
    "zero_optimization.offload_param.device": ("none",),
}
HARMLESS = (
    "steps_per_print",
    "wall_clock_breakdown",
    "zero_optimization.overlap_comm",
    "zero_optimization.contiguous_gradients",
    "zero_optimization.allgather_partitions",
    "zero_optimization.allgather_bucket_size",
    "zero_optimization.reduce_scatter",
    "zero_optimization.round_robin_gradients",
    "zero_allow_untested_optimizer",
    "train_batch_size",
    "fp16.auto_cast",
)


def read(path: Path, world_size: int) -> dict[str, Any]:
    """The settings that the file fixes. Raises UserError for what cannot be honoured, and for batch sizes that disagree."""
    raw, settings = read_json(path, "--deepspeed takes a DeepSpeed JSON file"), {}
    asked = {
        key: value
        for key, value in flattened(raw).items()
        if value != "auto" and key not in HARMLESS
    }
    for key, value in asked.items():
        with parsing(f"{path}: {key} = {value!r}"):
            if key in MAPPED:
                settings[MAPPED[key]] = int(value) if key.endswith(("size", "stage")) else value
            elif key == "optimizer.params.betas":
                settings["adam_beta1"], settings["adam_beta2"] = value
            elif key in ("fp16.enabled", "bf16.enabled"):
                settings |= {"precision": key[:4]} if value else {}
            elif value not in FIXED.get(key, ()):
                hint = (
                    f"; supported: {', '.join(map(repr, FIXED[key]))}"
                    if key in FIXED
                    else closest(key, (*MAPPED, *FIXED, *HARMLESS))
                )
                raise UserError(f"not supported{hint}")
    if settings.get("zero_stage", 0) > 2:
        raise UserError(
            f"{path}: zero_optimization.stage = {settings['zero_stage']}: weights are not sharded here; use stage 1 or 2"
        )
    total, micro = raw.get("train_batch_size"), settings.get("per_device_train_batch_size")
    accumulation = settings.get("gradient_accumulation_steps")
    if (
        total in (None, "auto")
        or not micro
        or not accumulation
        or total == micro * accumulation * world_size
    ):
        return settings
    raise UserError(
        f"{path}: train_batch_size = {total} is not train_micro_batch_size_per_gpu {micro} × gradient_accumulation_steps "
        f"{accumulation} × {world_size} ranks = {micro * accumulation * world_size}"
    )


def flattened(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of a tree by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            flattened(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return flat
