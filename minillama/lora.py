"""LoRA: train two thin matrices beside each frozen one (Hu et al. 2021).

    y = x W^T + s (x A^T) B^T       s = alpha / R  (rsLoRA: alpha / sqrt(R))

    W (out, in)   frozen: it needs no gradient and no optimizer state
    A (R, in)     starts random
    B (out, R)    starts at zero, so the new model computes what the old one did

Merging adds s B A to W once, in fp32. The factors are fp32 whatever the model's dtype.

`add_lora` changes a finished model from outside: each named linear is replaced by a `LoraLinear`
that shares its weight. `load_adapter` does the same for a PEFT adapter, and can be called again
for a second one. The layers are in lora_layers.py, the files in peft_adapters.py.
"""

import math
import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from minillama.errors import UserError, closest, listed
from minillama.lora_layers import ADAPTED, LoraEmbedding, LoraLinear
from minillama.model import Llama
from minillama.peft_adapters import (
    Adapter,
    LoraConfig,
    LoraFactors,
    read_adapter,
    write_adapter,
)
from minillama.tensor_files import TensorRef

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Megatron's and AscendSpeed's names; their fused modules are several of ours.
MEGATRON = {
    "query_key_value": ("q_proj", "k_proj", "v_proj"),
    "dense": ("o_proj",),
    "proj": ("gate_proj", "up_proj"),
    "dense_h_to_4h": ("up_proj",),
    "dense_4h_to_h": ("down_proj",),
    "word_embeddings": ("embed_tokens",),
    "lm_head.lm_head": ("lm_head",),
    "all": LINEARS,
}
# What modules_to_save may name, and where it is in the model.
WHOLE = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def resolve_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Replace Megatron's module names and `all` by ours; keep the order, each name once."""
    resolved: dict[str, None] = {}
    for name in names:
        resolved |= dict.fromkeys(MEGATRON.get(name, (name,)))
    return tuple(resolved)


def add_lora(
    model: nn.Module, config: LoraConfig, generator: torch.Generator | None = None
) -> None:
    """Freeze `model` and give each linear that config.targets names an adapter.

    Modules in config.modules_to_save stay trainable, whole, and get no adapter, as in PEFT. A is
    sampled from U(-1/sqrt(in), 1/sqrt(in)), as there. Raises UserError for a target that names no
    linear.
    """
    model.requires_grad_(False)
    linears = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not isinstance(module, LoraLinear):
            linears[name] = module
    _check_targets(config, linears)
    for name, linear in linears.items():
        if not is_adapted(config, name):
            continue
        rank = config.rank_of(name)
        adapted = LoraLinear(linear, rank, config.scale_of(name), config.dropout)
        nn.init.kaiming_uniform_(adapted.lora_A, a=math.sqrt(5), generator=generator)
        model.set_submodule(name, adapted)
    for name in config.modules_to_save:
        if name not in WHOLE:
            choices = ", ".join(WHOLE)
            raise UserError(
                f"modules_to_save: {name!r}{closest(name, WHOLE)}; choose from {choices}"
            )
        model.get_submodule(WHOLE[name]).requires_grad_(True)
    if _is_tied(model) and len(set(config.modules_to_save)) == 1:
        raise UserError(
            f"modules_to_save: {config.modules_to_save[0]} alone cannot be trained whole: this "
            "model's embedding and head are tied; name both, embed_tokens,lm_head"
        )


def is_adapted(config: LoraConfig, linear: str) -> bool:
    """Whether `add_lora` gives the linear of this name an adapter."""
    is_whole = linear in {WHOLE.get(name) for name in config.modules_to_save}
    return _is_target(config, linear) and not is_whole


def merge_lora(model: nn.Module) -> None:
    """Add every adapter to its weight and put plain modules back."""
    for name, module in list(model.named_modules()):
        if isinstance(module, ADAPTED):
            model.set_submodule(name, module.plain(module.merged_weight()))


def save_adapter(model: nn.Module, config: LoraConfig, directory: Path, base: str) -> None:
    """Write a PEFT adapter directory. base: where its base model is."""
    write_adapter(directory, config, adapter_weights(model, config), base)


def adapter_weights(model: nn.Module, config: LoraConfig) -> dict[str, nn.Parameter]:
    """Return what an adapter's file holds: the factors, and the weights that are trained whole."""
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, ADAPTED):
            for factor, parameter in module.factors().items():
                weights[f"{name}.{factor}"] = parameter
    for name in config.modules_to_save:
        weight = f"{WHOLE[name]}.weight"
        weights[weight] = model.get_parameter(weight)
    return weights


def load_adapter(model: Llama, directory: Path, dropout: float | None = None) -> LoraConfig:
    """Add the adapter in a PEFT directory to `model`, unmerged; returns its configuration.

    The model may have adapters already. A larger embedding and head replace the model's, and a
    tied head becomes a weight of its own where the adapter's differs from its embedding.

    dropout: in place of the one that the adapter was trained with.
    Raises UserError unless every tensor fits one module, and every target has its tensors.
    """
    adapter = read_adapter(directory)
    config = adapter.config
    modules_to_save = list(config.modules_to_save)
    for name, module in WHOLE.items():
        if f"{module}.weight" in adapter.whole and name not in modules_to_save:
            modules_to_save.append(name)
    config = replace(config, modules_to_save=tuple(modules_to_save))
    if dropout is not None:
        config = replace(config, dropout=dropout)
    problems = _misfits(model, adapter, config)
    if problems:
        raise UserError(f"{directory}: does not fit this model: {listed(problems)}")

    model.requires_grad_(False)
    _load_whole(model, adapter.whole)
    for factors in adapter.factors:
        _load_factors(model, factors, config.dropout)
    return config


def _load_whole(model: Llama, whole: dict[str, TensorRef]) -> None:
    """Replace the embedding or the head, and what earlier adapters added to it."""
    was_tied = _is_tied(model)
    for name, tensor in whole.items():
        module_name = name.removesuffix(".weight")
        module = model.get_submodule(module_name)
        if isinstance(module, ADAPTED):
            module = module.plain(module.weight)
            model.set_submodule(module_name, module)
        assert isinstance(module, nn.Linear | nn.Embedding)
        module.weight = nn.Parameter(tensor.read().to(module.weight))
        if isinstance(module, nn.Linear):
            module.out_features = tensor.shape[0]
        else:
            module.num_embeddings = tensor.shape[0]
    embedding = model.get_parameter(EMBEDDING)
    if was_tied and torch.equal(embedding, model.lm_head.weight):
        model.lm_head.weight = embedding
    vocab_size = len(embedding)
    model.config = replace(
        model.config, vocab_size=vocab_size, tie_embeddings=was_tied and _is_tied(model)
    )


def _load_factors(model: Llama, factors: LoraFactors, dropout: float) -> None:
    """Add factors to a module, or to the factors that it has from an earlier adapter."""
    module = model.get_submodule(factors.module)
    a = factors.a.read()  # (R, columns)
    b = factors.b.read()  # (rows, R)
    if isinstance(module, ADAPTED):
        module.append(a, b, factors.scale)
        return
    if isinstance(module, nn.Embedding):
        adapted: LoraLinear | LoraEmbedding = LoraEmbedding(module, len(a), factors.scale)
        values = (b.T, a.T)
    else:
        assert isinstance(module, nn.Linear)
        adapted = LoraLinear(module, len(a), factors.scale, dropout)
        values = (a, b)
    with torch.no_grad():
        for parameter, value in zip(adapted.factors().values(), values, strict=True):
            parameter.copy_(value)
    model.set_submodule(factors.module, adapted)


def _misfits(model: Llama, adapter: Adapter, config: LoraConfig) -> list[str]:
    """List the adapter's tensors that fit nowhere, and the places that get none."""
    shapes = {}  # of the weights that an adapter can change
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            shapes[name] = tuple(module.weight.shape)
    problems = _misfits_of_whole(adapter, config, shapes)
    for factors in adapter.factors:
        name = factors.module
        is_known = name in shapes
        if adapter.names_all_targets and not _is_target(config, name):
            is_known = False
        if not is_known:
            problems.append(f"{name}.lora_A.weight fits no module")
            continue
        rows, columns = shapes[name]
        rank = config.rank_of(name)
        for factor, tensor, shape in (
            ("lora_A", factors.a, (rank, columns)),
            ("lora_B", factors.b, (rows, rank)),
        ):
            if tensor.shape != shape:
                problems.append(
                    f"{name}.{factor}.weight is {tensor.shape}, the model wants {shape}"
                )
    if adapter.names_all_targets:
        present = {factors.module for factors in adapter.factors}
        for name in shapes.keys() - present:
            is_whole = f"{name}.weight" in adapter.whole
            if _is_target(config, name) and not is_whole:
                problems.append(f"{name}.lora_A.weight is missing")
    return problems


def _misfits_of_whole(
    adapter: Adapter, config: LoraConfig, shapes: dict[str, tuple[int, ...]]
) -> list[str]:
    """The same for the tensors that replace the model's.

    shapes: of the model's weights; a larger one's new shape is entered.
    """
    problems = []
    for name in config.modules_to_save:
        if name not in WHOLE:
            known = ", ".join(WHOLE)
            problems.append(f"modules_to_save: {name!r} is not one of {known}")
        elif f"{WHOLE[name]}.weight" not in adapter.whole:
            problems.append(f"{WHOLE[name]}.weight is missing")
    for name, tensor in adapter.whole.items():
        module = name.removesuffix(".weight")
        if name not in (EMBEDDING, HEAD):
            problems.append(f"{name} fits no module")
            continue
        rows, columns = shapes[module]
        has_columns = len(tensor.shape) == 2 and tensor.shape[1] == columns
        if not has_columns or tensor.shape[0] < rows:
            problems.append(f"{name} is {tensor.shape}, the model wants {(rows, columns)}")
        else:
            shapes[module] = tensor.shape
    rows = shapes["model.embed_tokens"][0]
    head_rows = shapes["lm_head"][0]
    if not problems and rows != head_rows:
        problems.append(f"{EMBEDDING} has {rows} rows, {HEAD} {head_rows}")
    return problems


def _check_targets(config: LoraConfig, linears: dict[str, nn.Linear]) -> None:
    for target in config.targets:
        if any(_matches(name, target) for name in linears):
            continue
        known = sorted({name.rsplit(".", 1)[-1] for name in linears})
        raise UserError(
            f"lora_targets: {target!r} names no linear of this model{closest(target, known)}; "
            f"linears: {', '.join(known)}"
        )


def _is_target(config: LoraConfig, module: str) -> bool:
    return any(_matches(module, target) for target in config.targets)


def _matches(module: str, target: str) -> bool:
    """PEFT's rule: a target is the name or a dotted tail of it.

    A pattern, which is written `re:…` here, must match the whole name.
    """
    if target.startswith("re:"):
        return re.fullmatch(target[3:], module) is not None
    return module == target or module.endswith(f".{target}")


def _is_tied(model: nn.Module) -> bool:
    return model.get_parameter(HEAD) is model.get_parameter(EMBEDDING)
