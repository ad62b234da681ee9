"""PEFT adapter directories: the only reader and writer of them.

    adapter_config.json            rank, alpha, target modules, …
    adapter_model.safetensors      base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight, …

Adapters of every age are read: adapter_model.bin too, and pytorch_model.bin, the raw state of a
training run, in which PEFT's wrappers have left their names (`.default.`, `.modules_to_save.`,
`.base_layer.`). `read_adapter` turns all of them into one description:

    factors     for each adapted module: B (rows, R), A (R, columns) and s; its weight is W + s B A
    whole       tensors that replace the model's, for example a larger embedding

Only headers are read for it; a tensor is read when its `read()` is called. Every tensor of the
file is used exactly once, or it is an error. A key of the configuration that would change the
arithmetic and is not known here is refused by name.

Left out: DoRA (its merge rescales columns), and adapters on parameters that are no modules.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillama.errors import UserError
from minillama.files import parsing, read_json, write_json
from minillama.hub import hub_hint
from minillama.tensor_files import POSITIONS, TensorRef, read_tensors
from minillama.tensor_writers import write_safetensors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
WEIGHTS_FILES = (WEIGHTS_FILE, "adapter_model.bin", "pytorch_model.bin")
PREFIX = "base_model.model."  # of every name in an adapter's file

# Keys that change the arithmetic, with the values at which they do nothing. Other values of
# init_lora_weights (pissa, olora, loftq, …) also change the base weights, which an adapter's file
# does not hold.
NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "use_bdlora": (False, None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "enable_lora": (None,),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
}

# What wrappers have added to a name: at its front, inside a whole tensor's name, and in a factor's.
WRAPPERS = re.compile(r"^(?:base_model\.model\.|module\.)+")
WHOLE_WRAPPERS = re.compile(r"\.modules_to_save(\.[^.]+)?(?=\.weight$)|\.base_layer(?=\.)")
FACTOR = re.compile(
    r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?:\.weight)?$"
)


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

    def rank_of(self, module: str) -> int:
        """The rank R of a module's factors."""
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """s = alpha / R, or alpha / sqrt(R) for rsLoRA."""
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        rank = self.rank_of(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


@dataclass(frozen=True)
class LoraFactors:
    """What an adapter adds to a module's weight (rows, columns): scale * B @ A."""

    module: str  # such as model.layers.0.self_attn.q_proj
    a: TensorRef  # (R, columns)
    b: TensorRef  # (rows, R)
    scale: float

    @property
    def weight_name(self) -> str:
        return f"{self.module}.weight"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.b.shape[0], self.a.shape[1])


@dataclass(frozen=True)
class Adapter:
    """An adapter directory: what it adds to weights, and which tensors it replaces."""

    path: Path
    config: LoraConfig
    factors: list[LoraFactors]  # at most one per module
    whole: dict[str, TensorRef]  # by the name of the model's tensor
    names_all_targets: bool  # every module that config.targets matches has factors


def read_adapter(directory: Path) -> Adapter:
    """Read the description of an adapter; see the module's docstring.

    Raises UserError for an adapter that is not LoRA, for DoRA, for a tensor that is neither one of
    two factors nor a whole tensor, and for two different values of one tensor.
    """
    config = read_adapter_config(directory)
    raw = _raw_config(directory)
    pairs, whole = _sort_tensors(directory)
    factors = []
    for (module, is_embedding), pair in pairs.items():
        if len(pair) == 1:
            present = next(iter(pair))
            raise UserError(f"{directory}: {module} has lora_{present} without its other half")
        a, b = pair["A"], pair["B"]
        _check_rank(directory, module, a, b, config.rank_of(module))
        if is_embedding or raw.get("fan_in_fan_out"):
            a, b = b.transposed(), a.transposed()  # made for a weight that lies as (columns, rows)
        factors.append(LoraFactors(module, a, b, config.scale_of(module)))
    names_all_targets = not raw.get("layers_to_transform") and not raw.get("exclude_modules")
    if not names_all_targets:
        modules = [entry.module for entry in factors]
        config = replace(config, targets=tuple(sorted(modules)))
    return Adapter(directory, config, factors, whole, names_all_targets)


def read_adapter_config(directory: Path) -> LoraConfig:
    """Read adapter_config.json. Raises UserError for a key that would change the arithmetic."""
    raw = _raw_config(directory)
    path = directory / CONFIG_FILE
    for key, values in NO_EFFECT.items():
        if key in raw and raw[key] not in values:
            raise UserError(
                f"{path}: {key} = {raw[key]!r} is not supported; "
                "merge the adapter with peft, and use the result"
            )
    targets = raw.get("target_modules") or []
    is_pattern = isinstance(targets, str)
    with parsing(path):
        return LoraConfig(
            rank=int(raw["r"]),
            alpha=float(raw["lora_alpha"]),
            dropout=float(raw.get("lora_dropout") or 0.0),
            targets=(f"re:{targets}",) if is_pattern else tuple(sorted(targets)),
            modules_to_save=tuple(raw.get("modules_to_save") or ()),
            use_rslora=bool(raw.get("use_rslora")),
            rank_pattern=raw.get("rank_pattern") or {},
            alpha_pattern=raw.get("alpha_pattern") or {},
        )


def base_model_of(directory: Path) -> str:
    """Return where an adapter's base model is, by its configuration; "" if it is not given."""
    return _raw_config(directory).get("base_model_name_or_path") or ""


def adapter_tensors(directory: Path) -> dict[str, TensorRef]:
    """Return the tensors of an adapter directory, under the names they have in its file."""
    for name in WEIGHTS_FILES:
        if (directory / name).is_file():
            return read_tensors(directory / name)
    raise UserError(f"{directory}: holds no {WEIGHTS_FILES[0]}, {' or '.join(WEIGHTS_FILES[1:])}")


def write_adapter(
    directory: Path, config: LoraConfig, tensors: Mapping[str, Tensor], base_model: str
) -> None:
    """Write an adapter directory. `tensors` have the model's names, without PEFT's prefix.

    base_model: where the base model is, for adapter_config.json.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {PREFIX + name: tensor for name, tensor in tensors.items()}
    # The order of safetensors' own writer: wide dtypes first, then by name.
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    write_safetensors(directory / WEIGHTS_FILE, {name: tensors[name] for name in order})
    patterns = [target[3:] for target in config.targets if target.startswith("re:")]
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": patterns[0] if patterns else list(config.targets),
        "modules_to_save": list(config.modules_to_save) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": config.use_rslora,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    write_json(directory / CONFIG_FILE, content)


def _raw_config(directory: Path) -> dict[str, Any]:
    remedy = f"an adapter is a directory with {CONFIG_FILE} and {WEIGHTS_FILE}{hub_hint(directory)}"
    return read_json(directory / CONFIG_FILE, remedy)


Pairs = dict[tuple[str, bool], dict[str, TensorRef]]  # (module, is embedding) -> "A" and "B"


def _sort_tensors(directory: Path) -> tuple[Pairs, dict[str, TensorRef]]:
    """Sort an adapter's tensors into factors by module, and whole tensors by name."""
    pairs: Pairs = defaultdict(dict)
    whole: dict[str, TensorRef] = {}
    for key, tensor in adapter_tensors(directory).items():
        name = WRAPPERS.sub("", key)
        if "lora_magnitude_vector" in name:
            raise UserError(
                f"{directory}: {key}: DoRA is not supported; "
                "merge the adapter with peft, and use the result"
            )
        is_frozen_copy = ".original_module." in name  # beside a module that was trained whole
        if is_frozen_copy or POSITIONS.search(name):
            continue
        match = FACTOR.match(name)
        if match is not None:
            pair = pairs[match["module"], bool(match["embedding"])]
            if match["factor"] in pair:
                raise _second_value(directory, key, name)
            pair[match["factor"]] = tensor
            continue
        if "lora_" in name:
            raise UserError(f"{directory}: {key}: not a LoRA key that is known here")
        name = WHOLE_WRAPPERS.sub("", name)
        if name in whole and not _are_equal(tensor, whole[name]):
            raise _second_value(directory, key, name)
        whole[name] = tensor
    return pairs, whole


def _second_value(directory: Path, key: str, name: str) -> UserError:
    return UserError(
        f"{directory}: {key}: a second value for {name}; the file holds more than one adapter"
    )


def _are_equal(one: TensorRef, other: TensorRef) -> bool:
    """PEFT may write a whole tensor under several names; then their values are equal."""
    same_kind = (one.dtype, one.shape) == (other.dtype, other.shape)
    return same_kind and torch.equal(one.read(), other.read())


def _check_rank(directory: Path, module: str, a: TensorRef, b: TensorRef, rank: int) -> None:
    are_matrices = len(a.shape) == 2 and len(b.shape) == 2
    if not are_matrices or a.shape[0] != rank or b.shape[1] != rank:
        raise UserError(
            f"{directory}: {module}: lora_A is {a.shape} and lora_B {b.shape}, "
            f"{CONFIG_FILE} says rank {rank}"
        )


def _by_pattern(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """Return the value of the first pattern that matches a module's name or a dotted tail of it."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
