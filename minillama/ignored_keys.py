"""Keys that another key makes meaningless: refused by name, or harmless.

Nothing that would change a result is accepted and ignored. A key of TrainConfig is one of three:

    honoured    whatever the others are                                           all others
    RULES       sometimes ignored; then an error, with the key that is in its way
    HARMLESS    sometimes ignored; the result is the same, for the reason that is given

A flag wins over a file, so a flag may be in the way of a key of the file: this is no mistake. The
keys of a train_config.json were checked when its run was started.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from minillama.errors import UserError
from minillama.train_config import TrainConfig

# Where a value comes from. A key that is not given has level 0.
FROM_RUN = 0  # a train_config.json
FROM_FILE = 1  # a preset or a TOML file
FROM_FLAG = 2

# What an adapter decides. `model_building` compares those that are given with the adapter's own.
ADAPTER_KEYS = ("lora_rank", "lora_alpha", "lora_targets", "modules_to_save", "use_rslora")


class Rule(NamedTuple):
    """When a key is ignored. `because` are the keys that decide it."""

    key: str
    because: tuple[str, ...]
    is_ignored: Callable[[TrainConfig], bool]
    remedy: str


def _has_no_eval_data(config: TrainConfig) -> bool:
    return not config.eval_data and not config.validation_split


def _starts_from_checkpoint(config: TrainConfig) -> bool:
    return bool(config.ckpt) and config.init == "pretrained"


def _has_no_warmup(config: TrainConfig) -> bool:
    return config.lr_scheduler_type == "constant"


NO_EVAL_DATA = "there is nothing to evaluate on: add --validation_split 0.05 or --eval_data FILE"
# fmt: off
RULES = (
    Rule("model", ("ckpt", "init"), _starts_from_checkpoint,
         "the checkpoint has a shape; leave one out, or add --init scratch"),
    Rule("validation_split", ("eval_data",),
         lambda config: bool(config.eval_data) and config.validation_split > 0,
         "eval_data is evaluated in its place; leave one out"),
    Rule("eval_strategy", ("eval_data", "validation_split"),
         lambda config: config.eval_strategy != "no" and _has_no_eval_data(config), NO_EVAL_DATA),
    Rule("eval_steps", ("eval_strategy",), lambda config: config.eval_strategy != "steps",
         "it counts only with --eval_strategy steps"),
    Rule("save_steps", ("save_strategy",), lambda config: config.save_strategy != "steps",
         "it counts only with --save_strategy steps"),
    Rule("adapter", ("lora",), lambda config: bool(config.adapter) and not config.lora,
         "lora is false, so every weight is trained; leave one out, or merge the adapter first "
         "with convert.py merge-lora"),
    Rule("warmup_ratio", ("lr_scheduler_type",),
         lambda config: _has_no_warmup(config) and config.warmup_ratio > 0,
         "the schedule `constant` has no warm-up; use constant_with_warmup, or leave it out"),
    Rule("warmup_steps", ("lr_scheduler_type",),
         lambda config: _has_no_warmup(config) and config.warmup_steps > 0,
         "the schedule `constant` has no warm-up; use constant_with_warmup, or leave it out"),
    Rule("min_learning_rate", ("lr_scheduler_type",),
         lambda config: config.lr_scheduler_type.startswith("constant")
         and config.min_learning_rate > 0,
         "a constant schedule ends at learning_rate; leave it out, or use linear or cosine"),
)
HARMLESS = {
    "initializer_range": "a checkpoint's weights replace the initial ones, in AscendSpeed too",
    "lora_rank": "with lora = false all weights are trained, as the command says",
    "lora_alpha": "the same",
    "lora_dropout": "the same",
    "lora_targets": "the same",
    "modules_to_save": "the same",
    "use_rslora": "the same",
    "num_train_epochs": "max_steps wins, as in transformers; the help says so",
    "warmup_ratio": "warmup_steps wins, as in transformers; the help says so",
    "initial_scale_power": "only fp16 scales the loss; DeepSpeed's files always have it",
    "loss_scale_window": "the same",
    "loss_scale_hysteresis": "the same",
    "min_loss_scale": "the same",
    "tf32": "only CUDA rounds fp32 products to TF32, and only in fp32",
    "per_device_eval_batch_size": "the loss is a mean over targets, however many at a time",
    "save_total_limit": "with save_strategy = no there is nothing to keep",
    "dataset_dir": "it is used for names that are no files",
    "skip_bad_records": "a tokenized data set has no records",
    "grow_vocabulary": "it allows growth; a tokenizer that fits needs none",
    "workers": "a tokenized data set is not tokenized",
    "cache_dir": "a tokenized data set is not cached",
    "zero_stage": "one rank has no other to share with; the updates are the same",
    "bucket_elements": "how gradients are sent, not what they are",
}
# fmt: on


def refuse_ignored(config: TrainConfig, levels: Mapping[str, int]) -> None:
    """Raise UserError for a given key that would be ignored. levels: where each came from."""
    for rule in RULES:
        level = levels.get(rule.key, 0)
        level_in_the_way = max(levels.get(name, 0) for name in rule.because)
        is_superseded = level == FROM_RUN or level < level_in_the_way
        if rule.is_ignored(config) and not is_superseded:
            value = getattr(config, rule.key)
            raise UserError(f"{rule.key} = {value!r} would be ignored: {rule.remedy}")
