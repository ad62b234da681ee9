"""PEFT adapter directories: the only reader and writer of them.

    adapter_config.json            rank, alpha, target modules, …
    adapter_model.safetensors      base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight, …

Adapters of every age are read: adapter_model.bin too, and pytorch_model.bin, the raw state of a
training run, in which PEFT's wrappers have left their names (`.default.`, `.modules_to_save.`,
`.base_layer.`). `read_adapter` turns all of them into one description:

    factors     for each adapted module: B (rows, R), A (R, columns) and s; its weight is W + s B A
    whole       tensors that replace the model's, for example a larger embedding

Only headers are read for it; a tensor is read when its `read()` is called. Every tensor of the
file is used exactly once, or it is an error. adapter_config.json is read by peft_config.py.

Left out: DoRA (its merge rescales columns), and adapters on parameters that are no modules.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillama.comm import Mesh
from minillama.errors import UserError
from minillama.files import write_json
from minillama.parallel.parts import WholeParameter
from minillama.parallel.whole import write_joined
from minillama.peft_config import (
    CONFIG_FILE,
    LoraConfig,
    read_adapter_config,
    read_target_rule,
)
from minillama.peft_targets import TargetRule
from minillama.tensor_files import POSITIONS, TensorRef, read_tensors
from minillama.tensor_writers import TensorSpecs, safetensors_writer

WEIGHTS_FILE = "adapter_model.safetensors"
WEIGHTS_FILES = (WEIGHTS_FILE, "adapter_model.bin", "pytorch_model.bin")
PREFIX = "base_model.model."  # of every name in an adapter's file

# What wrappers have added to a name: at its front, inside a whole tensor's name, and in a factor's.
WRAPPERS = re.compile(r"^(?:base_model\.model\.|module\.)+")
WHOLE_WRAPPERS = re.compile(r"\.modules_to_save(\.[^.]+)?(?=\.weight$)|\.base_layer(?=\.)")
FACTOR = re.compile(
    r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?:\.weight)?$"
)


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
    rule: TargetRule

    def is_copy(self, name: str) -> bool:
        """Tell whether a whole tensor is a copy of the base's: it was not trained.

        PEFT saves the embedding and the head with factors on one of them, and with a vocabulary
        that has grown.
        """
        module = name.rpartition(".")[0]
        return not any(module.endswith(saved) for saved in self.config.modules_to_save)

    def missing(self, modules: Iterable[str]) -> list[str]:
        """Return what the file lacks for a model that has these linears and embeddings."""
        present = {entry.module for entry in self.factors}
        problems = []
        for module in modules:
            is_whole = f"{module}.weight" in self.whole
            if self.rule.includes(module) and module not in present and not is_whole:
                problems.append(f"{module}.lora_A.weight is missing")
        for saved in self.config.modules_to_save:
            if not any(name.rpartition(".")[0].endswith(saved) for name in self.whole):
                problems.append(f"{saved}.weight is missing (modules_to_save)")
        return problems


def read_adapter(directory: Path) -> Adapter:
    """Read the description of an adapter; see the module's docstring.

    Raises UserError for an adapter that is not LoRA, for DoRA, for a tensor that is neither one of
    two factors nor a whole tensor, and for two different values of one tensor.
    """
    config = read_adapter_config(directory)
    pairs, whole = _sort_tensors(directory)
    factors = []
    for (module, is_embedding), pair in pairs.items():
        if len(pair) == 1:
            present = next(iter(pair))
            raise UserError(f"{directory}: {module} has lora_{present} without its other half")
        a, b = pair["A"], pair["B"]
        _check_rank(directory, module, a, b, config.rank_of(module))
        if is_embedding:
            a, b = b.transposed(), a.transposed()  # an embedding's weight lies as (columns, rows)
        factors.append(LoraFactors(module, a, b, config.scale_of(module)))
    rule = read_target_rule(directory)
    if rule.excluded or rule.layers or rule.ties_pair:
        modules = [entry.module for entry in factors]
        config = replace(config, targets=tuple(sorted(modules)))
    return Adapter(directory, config, factors, whole, rule)


def adapter_tensors(directory: Path) -> dict[str, TensorRef]:
    """Return the tensors of an adapter directory, under the names they have in its file."""
    for name in WEIGHTS_FILES:
        if (directory / name).is_file():
            return read_tensors(directory / name)
    raise UserError(f"{directory}: holds no {WEIGHTS_FILES[0]}, {' or '.join(WEIGHTS_FILES[1:])}")


def write_adapter(
    directory: Path,
    config: LoraConfig,
    tensors: Mapping[str, Tensor],
    base_model: str,
    mesh: Mesh | None = None,
    stages: Mesh | None = None,
) -> None:
    """Write an adapter directory. `tensors` have the model's names, without PEFT's prefix.

    base_model: where the base model is, for adapter_config.json.
    mesh, stages: lines of tensor ranks and pipeline stages that have the parts of the tensors. Each
    of them calls this, and the first one writes the whole.
    """

    def write(specs: TensorSpecs, whole_tensors: Iterator[tuple[str, Tensor]]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        specs_in_file = {PREFIX + name: spec for name, spec in specs.items()}
        with safetensors_writer(directory / WEIGHTS_FILE, specs_in_file) as append:
            for name, tensor in whole_tensors:
                append(PREFIX + name, tensor)
        write_json(directory / CONFIG_FILE, _config_content(config, base_model))

    def sort_key(name: str, tensor: WholeParameter) -> tuple[int, str]:
        """The order of safetensors' own writer: wide dtypes first, then by name."""
        return -tensor.dtype.itemsize, name

    write_joined(tensors, mesh or Mesh(), write, stages, sort_key)


def _config_content(config: LoraConfig, base_model: str) -> dict[str, Any]:
    """What adapter_config.json holds."""
    patterns = [target[3:] for target in config.targets if target.startswith("re:")]
    return {
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
