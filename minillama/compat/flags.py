"""Flags of other systems: FastChat, LLaMA-Factory, Chinese-LLaMA-Alpaca, AscendSpeed, transformers.

Their command lines can be pasted after ours. What a training flag of theirs means, the tables of
training_flags.py say; here is what needs more than a table:

    their flags -> values of our keys         translate
                -> the accumulation           with_global_batch_size
                -> checks of the settings     refuse_contradictions
                -> checks of the model        model_claims.py

Any other flag is unknown, and an error. Nothing that would change a result is accepted and ignored;
ignored_keys.py says the same of our own keys.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from minillama.cli import Parser
from minillama.compat.flag_tables import whole_number
from minillama.compat.lora_load import continued_adapter
from minillama.compat.model_claims import size_of
from minillama.compat.training_flags import TABLE
from minillama.errors import UserError
from minillama.ignored_keys import NO_EVAL_DATA
from minillama.launch import read_launch
from minillama.train_config import PRECISIONS, TrainConfig

DEFAULT_SPLIT = "969,30,1"  # AscendSpeed's shares for training, validation and test
PACKED_IDS = "_packed_input_ids_document"  # what AscendSpeed appends to the prefix of its sets
PLAIN_TEXT = "_text_document"
RECOMPUTATION = (
    "checkpoint_activations",
    "recompute_activations",
    "recompute_granularity",
    "deepspeed_activation_checkpointing",
)
RESUME = {"true": "auto", "false": "none"}  # of --resume_from_checkpoint; else a directory


def add_flags(parser: Parser) -> None:
    """Let a parser accept the other systems' flags for training, which `--help` leaves out."""
    TABLE.add_to(parser)


def translate(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags, and what those of other systems mean as values of our keys.

    A key that was typed itself wins. Raises UserError for a value that is not allowed.
    """
    given = TABLE.given(flags)
    keys = _keys_from(given, flags) | _evaluation_keys(given, flags) | dict(flags)
    if _is_on(given, "is_instruction_dataset"):
        keys["data"] = tuple(_instruction_set(name) for name in flags.get("data", ()))
    return keys


def _keys_from(given: Mapping[str, str], flags: Mapping[str, Any]) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    if "finetuning_type" in given:
        keys["lora"] = given["finetuning_type"].lower() == "lora"
    if "full_finetuning" in given:
        keys["lora"] = not _is_on(given, "full_finetuning")
    if given.get("stage", "").lower() == "pt":
        keys["data_format"] = "text"
    if "neat_packing" in given:
        keys["packing"] = True
    if flags.get("dataset_dir") and not flags.get("data"):
        keys["data"] = (flags["dataset_dir"],)  # Chinese-LLaMA-Alpaca: the folder is the data
    if "type" in given and not _starts_from_checkpoint(flags):
        keys["model"] = size_of(given["type"])
    return keys | _training_keys(given, flags)


def _training_keys(given: Mapping[str, str], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return what flags for memory, precision and continuing a run mean."""
    keys: dict[str, Any] = {}
    if _is_on(given, "disable_gradient_checkpointing"):
        keys["gradient_checkpointing"] = False
    if any(_is_on(given, name) for name in RECOMPUTATION):
        keys["gradient_checkpointing"] = True
    if _is_on(given, "use_distributed_optimizer"):
        keys["zero_stage"] = 1
    if _is_on(given, "zero3_enabled"):
        keys["zero_stage"] = 3  # train.py refuses it, with what to use instead
    if "initial_loss_scale" in given:
        keys["initial_scale_power"] = _power_of_two(given["initial_loss_scale"])
    if "resume_from_checkpoint" in given:
        directory = given["resume_from_checkpoint"]
        keys["resume"] = RESUME.get(directory.lower(), directory)
    if "lora_load" in given:
        keys |= continued_adapter(Path(given["lora_load"]), flags)
    return keys


def _starts_from_checkpoint(flags: Mapping[str, Any]) -> bool:
    return bool(flags.get("ckpt")) and flags.get("init") != "scratch"


def _power_of_two(text: str) -> int:
    scale = _share(text)
    power = math.log2(scale) if scale > 0 else -1.0
    if power < 0 or power != int(power):
        raise UserError(f"--initial_loss_scale {text}: expected a power of 2, such as 65536")
    return int(power)


def _instruction_set(name: str) -> str:
    """Return the data set that AscendSpeed opens by a prefix, for instruction data."""
    if name.endswith(PLAIN_TEXT):
        raise UserError(
            f"--is_instruction_dataset: {name} is text for pre-training; leave the flag out, or "
            "name the prefix of instruction data"
        )
    is_packed = Path(f"{name}{PACKED_IDS}.idx").is_file()
    return f"{name}{PACKED_IDS}" if is_packed else name


def _evaluation_keys(given: Mapping[str, str], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return what AscendSpeed's --split, --eval_interval and --eval_iters mean.

    Its validation and test parts are one part here, which is not trained on. Nothing is evaluated
    if there is no such part, or with --eval_iters 0.
    """
    keys: dict[str, Any] = {}
    split = given.get("split")
    interval = given.get("eval_interval")
    has_eval_data = bool(flags.get("eval_data") or flags.get("validation_split"))
    if interval is not None and split is None and not has_eval_data:
        split = DEFAULT_SPLIT
    if split is not None:
        keys["validation_split"] = _held_out(split)
    if interval is None:
        return keys
    eval_steps = whole_number("eval_interval", interval)
    num_batches = whole_number("eval_iters", given.get("eval_iters", "1"))
    has_part = has_eval_data or keys["validation_split"] > 0
    if has_part and num_batches > 0:
        keys["eval_strategy"] = "steps"
        keys["eval_steps"] = eval_steps
    return keys


def _held_out(split: str) -> float:
    """Return the share of the documents that is not trained on, of a split such as 949,50,1."""
    shares = [_share(word) for word in split.replace("/", ",").replace(" ", ",").split(",")]
    is_valid = len(shares) <= 3 and shares[0] > 0 and min(shares) >= 0
    if not is_valid:
        raise UserError(
            f"--split {split}: expected up to three numbers, for training, validation and test, "
            "such as 949,50,1"
        )
    return sum(shares[1:]) / sum(shares)


def with_global_batch_size(
    flags: Mapping[str, Any], config: TrainConfig, world_size: int
) -> TrainConfig:
    """Return the settings with the accumulation that --global_batch_size asks for, if it is given.

    Raises UserError if no accumulation makes that batch, or the command names another one.
    """
    given = TABLE.given(flags)
    if "global_batch_size" not in given:
        return config
    rows = whole_number("global_batch_size", given["global_batch_size"])
    data_ranks = max(1, world_size // (config.tensor_parallel * config.pipeline_parallel))
    rows_at_once = config.per_device_train_batch_size * data_ranks
    accumulation, rest = divmod(rows, rows_at_once)
    if rest or accumulation == 0:
        raise UserError(
            f"--global_batch_size {rows} is no multiple of per_device_train_batch_size "
            f"{config.per_device_train_batch_size} × {data_ranks} data ranks = {rows_at_once}"
        )
    typed = flags.get("gradient_accumulation_steps", accumulation)
    if typed != accumulation:
        raise UserError(
            f"--global_batch_size {rows} means gradient_accumulation_steps = {accumulation}, the "
            f"command says {typed}; leave one of them out"
        )
    return replace(config, gradient_accumulation_steps=accumulation)


def refuse_contradictions(flags: Mapping[str, Any], config: TrainConfig) -> None:
    """Raise UserError for a flag that says something else than the settings of the run."""
    given = TABLE.given(flags)
    if _is_on(given, "do_eval") and not (config.eval_data or config.validation_split):
        raise UserError(f"--do_eval would be ignored: {NO_EVAL_DATA}")
    dtype = given.get("torch_dtype", "auto").lower()
    if dtype != "auto" and PRECISIONS[dtype] != config.precision:
        raise UserError(
            f"--torch_dtype {dtype} is not the precision {config.precision}: the model has the "
            f"dtype of the computation; use --precision {PRECISIONS[dtype]}, or leave it out"
        )
    local_rank = given.get("local_rank", "-1")
    if local_rank not in ("-1", str(read_launch().local_rank)):
        raise UserError(
            f"--local_rank {local_rank}: not what the launcher says in the environment; "
            "use torchrun --nproc_per_node N train.py"
        )
    decay_steps = given.get("lr_decay_iters", str(config.max_steps))
    if decay_steps != str(config.max_steps):
        raise UserError(
            f"--lr_decay_iters {decay_steps}: the schedule ends with the run; leave it out, or "
            f"give the same to --train_iters"
        )


def _is_on(given: Mapping[str, str], name: str) -> bool:
    """Tell whether a switch was given, and not as false."""
    return given.get(name, "false").lower() != "false"


def _share(text: str) -> float:
    """Return a number from 0, or -1 if it is none."""
    try:
        share = float(text)
    except ValueError:
        return -1.0
    return share if 0 <= share < math.inf else -1.0
