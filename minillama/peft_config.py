"""adapter_config.json of PEFT: what an adapter is, which modules it adapts, and what is refused.

    target_modules, …     which modules are adapted: peft_targets.py
    modules_to_save       trained whole, and so never adapted
    rank_pattern, alpha_pattern   a pattern of a name's tail -> another rank or alpha

The rules are PEFT's. Every key of PEFT 0.21 is honoured, changes nothing at its value, or is
refused by name; so is a key that is not known here, unless it is empty. Patterns are matched by
name_patterns.py, because the file is somebody else's.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minillama.errors import UserError
from minillama.files import parsing, read_json
from minillama.hub import hub_hint
from minillama.name_patterns import matches, matches_tail
from minillama.output_directory import restore
from minillama.peft_targets import TargetRule

CONFIG_FILE = "adapter_config.json"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EMPTY: tuple[Any, ...] = (None, False, [], "")

# Keys that change the arithmetic, with the values at which they do nothing. Other values of
# init_lora_weights (pissa, olora, loftq, …) also change the base weights, which an adapter's file
# does not hold.
NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
# Keys that another part of this file reads.
HONOURED = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "ensure_weight_tying",
}
# Keys that change nothing of what a finished adapter computes.
HARMLESS = {
    "auto_mapping",  # where PEFT finds the class of the base
    "base_model_name_or_path",  # --base is in its place, and it is the default
    "revision",  # of the base, on a hub
    "task_type",  # a head for it would be a tensor that fits nowhere
    "inference_mode",
    "peft_version",
    "fan_in_fan_out",  # of GPT-2's layers; PEFT ignores it if a layer is a linear
    "merge_weights",  # of the first versions: when to merge
    "bias",  # biases that were trained are tensors of the file
    "loftq_config",  # of how A, B and the base start; init_lora_weights says whether it was used
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "velora_config",  # what backward keeps
    "megatron_core",  # the name of a library
    "qalora_group_size",  # of use_qalora, which is refused
}


@dataclass(frozen=True)
class LoraConfig:
    """The shape of an adapter; `patterns` give some modules a rank or alpha of their own."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    modules_to_save: tuple[str, ...] = ()
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_copy: tuple[str, ...] = ()  # saved whole too, but not trained

    def rank_of(self, module: str) -> int:
        """The rank R of a module's factors."""
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """s = alpha / R, or alpha / sqrt(R) for rsLoRA."""
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        rank = self.rank_of(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def read_adapter_config(directory: Path) -> LoraConfig:
    """Read adapter_config.json. Raises UserError for a key that would change the arithmetic."""
    raw = raw_config(directory)
    path = directory / CONFIG_FILE
    _refuse_other_kinds(raw, path)
    with parsing(path):
        rank_pattern = _patterns(raw, "rank_pattern")
        alpha_pattern = _patterns(raw, "alpha_pattern")
        dropout = _finite(raw.get("lora_dropout") or 0.0, "lora_dropout")
        if not 0 <= dropout < 1:
            raise UserError(f"lora_dropout is {dropout}, expected 0 to below 1")
        return LoraConfig(
            rank=_rank(raw["r"], "r"),
            alpha=_finite(raw["lora_alpha"], "lora_alpha"),
            dropout=dropout,
            targets=_module_names(raw, "target_modules"),
            modules_to_save=_names(raw, "modules_to_save"),
            use_rslora=_flag(raw, "use_rslora"),
            rank_pattern={name: _rank(rank, name) for name, rank in rank_pattern.items()},
            alpha_pattern={name: _finite(alpha, name) for name, alpha in alpha_pattern.items()},
        )


def read_target_rule(directory: Path) -> TargetRule:
    """Read from adapter_config.json which modules an adapter adapts."""
    raw = raw_config(directory)
    with parsing(directory / CONFIG_FILE):
        layer_patterns = raw.get("layers_pattern") or []
        if isinstance(layer_patterns, str):
            layer_patterns = [layer_patterns]
        for pattern in _checked_names(layer_patterns, "layers_pattern"):
            matches(pattern, "")  # a wrong pattern is refused here
        return TargetRule(
            targets=_module_names(raw, "target_modules"),
            excluded=_module_names(raw, "exclude_modules"),
            layers=_layers(raw),
            layer_patterns=tuple(layer_patterns),
            modules_to_save=_names(raw, "modules_to_save"),
            ties_pair=_flag(raw, "ensure_weight_tying"),
        )


def refuse_tied_factors(directory: Path) -> None:
    """Raise UserError if an adapter cannot be trained further.

    With ensure_weight_tying PEFT trains the factors of a tied embedding and head as one. Here each
    of them would go its own way.
    """
    rule = read_target_rule(directory)
    if rule.ties_pair and rule.includes("lm_head"):
        raise UserError(
            f"{directory / CONFIG_FILE}: ensure_weight_tying with factors on the embedding is not "
            "supported in training; merge the adapter into its base, and train a new one"
        )


def base_model_of(directory: Path) -> str:
    """Return where an adapter's base model is, by its configuration; "" if it is not given."""
    name = raw_config(directory).get("base_model_name_or_path") or ""
    if not isinstance(name, str):
        path = directory / CONFIG_FILE
        raise UserError(f"{path}: base_model_name_or_path is {name!r}, expected a name")
    return name


def raw_config(directory: Path) -> dict[str, Any]:
    """Return what adapter_config.json holds."""
    restore(directory)
    files = f"{CONFIG_FILE} and adapter_model.safetensors"
    remedy = f"an adapter is a directory with {files}{hub_hint(directory)}"
    if (directory / "final" / CONFIG_FILE).is_file():
        remedy = f"this is the directory of a run; its adapter is {directory / 'final'}"
    return read_json(directory / CONFIG_FILE, remedy)


def _refuse_other_kinds(raw: dict[str, Any], path: Path) -> None:
    for key, value in raw.items():
        if key in HONOURED or key in HARMLESS or value in NO_EFFECT.get(key, EMPTY):
            continue
        raise UserError(
            f"{path}: {key} = {value!r} is not supported; "
            "merge the adapter with peft, and use the result"
        )


def _layers(raw: dict[str, Any]) -> tuple[int, ...]:
    key = "layers_to_transform"
    value = raw.get(key)
    if value is None:
        return ()
    layers = [value] if _is_whole(value) else value
    if not isinstance(layers, list) or not all(map(_is_whole, layers)):
        raise UserError(f"{key} is {value!r}, expected whole numbers")
    return tuple(layers)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _rank(value: Any, key: str) -> int:
    if not _is_whole(value) or value < 1:
        raise UserError(f"{key} is {value!r}, expected a rank: a whole number above 0")
    return int(value)


def _finite(value: Any, key: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise UserError(f"{key} is {value!r}, expected a finite number")
    return float(value)


def _flag(raw: dict[str, Any], key: str) -> bool:
    value = raw.get(key)
    if value not in (None, False, True):
        raise UserError(f"{key} is {value!r}, expected true or false")
    return bool(value)


def _module_names(raw: dict[str, Any], key: str) -> tuple[str, ...]:
    """Names, sorted, or one pattern, as `re:…`."""
    value = raw.get(key)
    if not isinstance(value, str) or not value:
        return tuple(sorted(_checked_names(value or [], key)))
    if key == "target_modules" and value == "all-linear":
        return LINEARS
    with parsing(key):
        matches(value, "")  # a wrong pattern is refused here
    return (f"re:{value}",)


def _names(raw: dict[str, Any], key: str) -> tuple[str, ...]:
    return tuple(_checked_names(raw.get(key) or [], key))


def _checked_names(value: Any, key: str) -> list[str]:
    is_list = isinstance(value, list)
    if not is_list or not all(isinstance(name, str) and name for name in value):
        raise UserError(f"{key} is {value!r}, expected a list of names")
    return value


def _patterns(raw: dict[str, Any], key: str) -> dict[str, Any]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"{key} is {value!r}, expected patterns with their values")
    for pattern in value:
        with parsing(key):
            matches(pattern, "")
    return value


def _by_pattern(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """Return the value of the first pattern that matches a module's name or a dotted tail of it."""
    for pattern, value in patterns.items():
        if matches_tail(pattern, module):
            return value
    return default
