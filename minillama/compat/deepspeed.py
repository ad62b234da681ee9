"""A DeepSpeed JSON file (`--deepspeed FILE`), as values of our keys.

Each entry of the file is in one of three tables, as flags are in compat/flag_tables.py: another
name for a key of ours, an entry that may only have certain values, or one that changes no result.
Any other entry is an error, with the value "auto" as well. "auto" leaves the value of a known entry
to the command line, as in transformers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillama.errors import UserError, closest
from minillama.files import parsing, read_json
from minillama.presets import flatten
from minillama.train_config import KEYS, TrainConfig

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
BETAS = "optimizer.params.betas"
TOTAL_BATCH = "train_batch_size"  # compared with the settings
SWITCHES = {"fp16.enabled": "fp16", "bf16.enabled": "bf16"}  # entry -> precision

# entries that may only have these values
ALLOWED = {
    "optimizer.type": ("Adam", "AdamW"),
    "optimizer.params.torch_adam": (True, False),
    "optimizer.params.adam_w_mode": (True,),
    "fp16.loss_scale": (0,),  # 0: dynamic
    "zero_optimization.offload_optimizer.device": ("none",),
    "zero_optimization.offload_param.device": ("none",),
}
# entry -> why it changes no result
HARMLESS = {
    "steps_per_print": "it only prints",
    "wall_clock_breakdown": "it only prints",
    "zero_allow_untested_optimizer": "the optimizer is AdamW, which is tested",
    "fp16.auto_cast": "the inputs are token ids, which have no precision",
    "zero_optimization.overlap_comm": "when gradients are sent, not what is sent",
    "zero_optimization.contiguous_gradients": "where gradients lie in memory",
    "zero_optimization.allgather_partitions": "how parameters are gathered, not which",
    "zero_optimization.allgather_bucket_size": "how parameters are gathered, not which",
    "zero_optimization.reduce_scatter": "how gradients are sent; --reduction has their order",
    "zero_optimization.round_robin_gradients": "in which order gradients are copied",
    "zero_optimization.sub_group_size": "it counts only at stage 3, which is refused",
}
STAGE3 = "zero_optimization.stage3_"  # entries that count only at stage 3, which is refused
KNOWN = (*KEY_NAMES, BETAS, TOTAL_BATCH, *SWITCHES, *ALLOWED, *HARMLESS)


@dataclass(frozen=True)
class DeepSpeedFile:
    """What a file fixes."""

    path: Path
    keys: dict[str, Any]  # values by key of ours
    total_batch: int | None  # rows of an update on all ranks; None: left open
    switches: dict[str, bool]  # whether each precision is on; none: left open

    def check(self, config: TrainConfig, world_size: int) -> None:
        """Raise UserError if the settings of the run contradict the file."""
        for entry, precision in SWITCHES.items():
            is_on = config.precision == precision
            if self.switches.get(entry, is_on) != is_on:
                raise UserError(
                    f"{self.path}: {entry} = {self.switches[entry]}, but the precision of the run "
                    f"is {config.precision}; change one of them"
                )
        micro_batch = config.per_device_train_batch_size
        accumulation = config.gradient_accumulation_steps
        data_ranks = world_size // (config.tensor_parallel * config.pipeline_parallel)
        product = micro_batch * accumulation * data_ranks
        if self.total_batch not in (None, product):
            raise UserError(
                f"{self.path}: train_batch_size = {self.total_batch} is not "
                f"per_device_train_batch_size {micro_batch} × gradient_accumulation_steps "
                f"{accumulation} × {data_ranks} data ranks = {product}"
            )


def read(path: Path) -> DeepSpeedFile:
    """Read a file. Raises UserError for an entry that cannot be honoured."""
    content = read_json(path, "--deepspeed takes a DeepSpeed JSON file")
    entries = flatten(content)
    keys: dict[str, Any] = {}
    for entry, value in entries.items():
        with parsing(f"{path}: {entry} = {value!r}"):
            keys |= _keys_from(entry, value)
    fixed = {entry: value for entry, value in entries.items() if value != "auto"}
    switches = {entry: fixed[entry] for entry in SWITCHES if entry in fixed}
    if all(switches.get(entry) for entry in SWITCHES):
        raise UserError(f"{path}: fp16.enabled and bf16.enabled exclude each other")
    return DeepSpeedFile(path, keys, fixed.get(TOTAL_BATCH), switches)


def _keys_from(entry: str, value: Any) -> dict[str, Any]:
    """Return what one entry means. Raises UserError, or the error of a wrong type."""
    if entry.startswith(STAGE3):
        return {}
    if entry not in KNOWN:
        raise UserError(f"not supported{closest(entry, KNOWN)}")
    if value == "auto" or entry in HARMLESS:
        return {}
    if entry == TOTAL_BATCH:
        _number(value, is_whole=True)
    if entry in KEY_NAMES:
        return {KEY_NAMES[entry]: _value_of_key(KEY_NAMES[entry], value)}
    if entry == BETAS:
        beta1, beta2 = value
        return {"adam_beta1": _number(beta1), "adam_beta2": _number(beta2)}
    if entry in SWITCHES:
        if not isinstance(value, bool):
            raise UserError('expected true, false or "auto"')
        return {"precision": SWITCHES[entry]} if value else {}
    if entry in ALLOWED and value not in ALLOWED[entry]:
        supported = ", ".join(repr(choice) for choice in ALLOWED[entry])
        raise UserError(f"not supported; supported: {supported}")
    return {}


def _value_of_key(key: str, value: Any) -> int | float:
    number = _number(value, is_whole=isinstance(KEYS[key].default, int))
    if key == "zero_stage" and number == 3:
        return 3  # train.py refuses it, with what to use instead
    KEYS[key].check(key, number)
    return number


def _number(value: Any, is_whole: bool = False) -> int | float:
    """Return a number; a whole one, which files may write as 2e8, as an int."""
    if type(value) not in (int, float):
        raise UserError("a value is wrong: expected a number")
    if not is_whole:
        return float(value)
    if value != int(value):
        raise UserError("a value is wrong: expected a whole number")
    return int(value)
