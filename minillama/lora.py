"""LoRA: train two thin matrices beside each frozen one (Hu et al. 2021).

    y = x W^T + s (x A^T) B^T       s = alpha / R  (rsLoRA: alpha / sqrt(R))

    W (out, in)   frozen: it needs no gradient and no optimizer state
    A (R, in)     starts random
    B (out, R)    starts at zero, so the new model computes what the old one did

Merging adds s B A to W once, in fp32. The factors are fp32 whatever the model's dtype.

`add_lora` changes a finished model from outside: each named linear is replaced by a `LoraLinear`
that shares its weight. `load_adapter` does the same for a PEFT adapter, and can be called again
for a second one. The layers are in lora_layers.py, the files in peft_adapters.py and
peft_config.py, and whether an adapter fits a model is in adapter_checks.py.
"""

import math
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from minillama.adapter_checks import misfits
from minillama.adapter_modules import WHOLE, changed_tensors, is_tied, load_whole, with_modules
from minillama.comm import Mesh
from minillama.errors import UserError, closest, listed
from minillama.lora_layers import ADAPTED, LoraEmbedding, LoraLinear
from minillama.model import Llama
from minillama.parallel.shards import COLUMNS, ROWS, axis_of, cut
from minillama.parallel.whole import read_part
from minillama.peft_adapters import LoraFactors, read_adapter, write_adapter
from minillama.peft_config import LINEARS, LoraConfig
from minillama.peft_targets import is_named

# Megatron's and AscendSpeed's names; their fused modules are several of ours.
MEGATRON = {
    "query_key_value": ("q_proj", "k_proj", "v_proj"),
    "dense": ("o_proj",),
    "proj": ("gate_proj", "up_proj"),
    "dense_h_to_4h": ("up_proj",),
    "dense_4h_to_h": ("down_proj",),
    "word_embeddings": ("embed_tokens",),
    "lm_head.lm_head": ("lm_head",),
    "output_layer": ("lm_head",),
    "all": LINEARS,
}


def resolve_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Replace Megatron's module names and `all` by ours; keep the order, each name once."""
    resolved: dict[str, None] = {}
    for name in names:
        resolved |= dict.fromkeys(MEGATRON.get(name, (name,)))
    return tuple(resolved)


def add_lora(
    model: nn.Module,
    config: LoraConfig,
    generator: torch.Generator | None = None,
    mesh: Mesh | None = None,
) -> None:
    """Freeze `model` and give each linear that config.targets names an adapter.

    Modules in config.modules_to_save stay trainable, whole, and get no adapter, as in PEFT. A is
    sampled from U(-1/sqrt(in), 1/sqrt(in)), as there.

    mesh: a line of tensor ranks that have the parts of the model. An adapter is cut as its linear.
    Raises UserError for a target that names no linear.
    """
    model.requires_grad_(False)
    linears = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not isinstance(module, LoraLinear):
            linears[name] = module
    check_targets(config, linears)
    for name, linear in linears.items():
        if not is_adapted(config, name):
            continue
        rank = config.rank_of(name)
        adapted = LoraLinear(linear, rank, config.scale_of(name), config.dropout)
        _sample_factor(adapted.lora_A, f"{name}.lora_A", generator, mesh or Mesh())
        model.set_submodule(name, adapted)
    for name in config.modules_to_save:
        if name not in WHOLE:
            choices = ", ".join(WHOLE)
            raise UserError(
                f"modules_to_save: {name!r}{closest(name, WHOLE)}; choose from {choices}"
            )
        model.get_submodule(WHOLE[name]).requires_grad_(True)
    if is_tied(model) and len(set(config.modules_to_save)) == 1:
        raise UserError(
            f"modules_to_save: {config.modules_to_save[0]} alone cannot be trained whole: this "
            "model's embedding and head are tied; name both, embed_tokens,lm_head"
        )


@torch.no_grad()
def _sample_factor(
    factor: nn.Parameter, name: str, generator: torch.Generator | None, mesh: Mesh
) -> None:
    """Sample A (R, in). Ranks sample the whole and keep their part, so it is the same on any."""
    axis = axis_of(name) if mesh.size > 1 else None
    shape = list(factor.shape)
    if axis is not None:
        shape[axis] *= mesh.size
    whole = torch.empty(shape)  # on the CPU, as the generator
    nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
    factor.copy_(cut(whole, axis, mesh.rank, mesh.size))


def is_adapted(config: LoraConfig, linear: str) -> bool:
    """Whether `add_lora` gives the linear of this name an adapter."""
    is_whole = linear in {WHOLE.get(name) for name in config.modules_to_save}
    return _is_target(config, linear) and not is_whole


def merge_lora(model: Llama) -> None:
    """Add every adapter to its weight and put plain modules back.

    Factors on one of a tied pair make two weights of it.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, ADAPTED):
            model.set_submodule(name, module.plain(module.merged_weight()))
    stays_tied = model.config.tie_embeddings and is_tied(model)
    model.config = replace(model.config, tie_embeddings=stays_tied)


def save_adapter(
    model: nn.Module,
    config: LoraConfig,
    directory: Path,
    base: str,
    mesh: Mesh | None = None,
    stages: Mesh | None = None,
) -> None:
    """Write a PEFT adapter directory.

    base: where its base model is.
    mesh, stages: lines of ranks that have the parts of the model: see `write_adapter`.
    """
    write_adapter(directory, config, adapter_weights(model, config), base, mesh, stages)


def adapter_weights(model: nn.Module, config: LoraConfig) -> dict[str, nn.Parameter]:
    """Return what an adapter's file holds: the factors, and the weights that are trained whole.

    Of a pipeline stage, those that it has.
    """
    weights = {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, ADAPTED):
            for factor, parameter in module.factors().items():
                weights[f"{name}.{factor}"] = parameter
    for name in (*config.modules_to_save, *config.modules_to_copy):
        module_name = WHOLE.get(name, name)
        module = modules.get(module_name)
        for kind in ("weight", "bias"):
            value = getattr(module, kind, None)
            if value is not None:
                weights[f"{module_name}.{kind}"] = value
    return weights


def load_adapter(
    model: Llama,
    directory: Path,
    dropout: float | None = None,
    mesh: Mesh | None = None,
    stages: Mesh | None = None,
) -> LoraConfig:
    """Add the adapter in a PEFT directory to `model`, unmerged; returns its configuration.

    The model may have adapters already. A larger embedding and head replace the model's, and a
    tied head becomes a weight of its own if the adapter's differs from its embedding. Parameters
    that the adapter trains need a gradient afterwards, and no others.

    dropout: in place of the one that the adapter was trained with.
    mesh: a line of tensor ranks that have the parts of the model. Each of them calls this, and
    reads its parts of the adapter.
    stages: a line of pipeline stages. What others of them have is on the meta device, and stays.
    Raises UserError unless every tensor fits one module, every target has its tensors, and all
    values are finite.
    """
    adapter = read_adapter(directory)
    problems = misfits(model, adapter)
    if problems:
        raise UserError(f"{directory}: does not fit this model: {listed(problems)}")
    mesh = mesh or Mesh()
    lines = (mesh, stages or Mesh())
    whole = changed_tensors(model, adapter, lines)
    config = with_modules(adapter, whole)
    if dropout is not None:
        config = replace(config, dropout=dropout)

    model.requires_grad_(False)
    load_whole(model, whole, lines)
    for name in config.modules_to_copy:
        model.get_submodule(WHOLE.get(name, name)).requires_grad_(False)
    for factors in adapter.factors:
        if not model.get_parameter(factors.weight_name).is_meta:
            _load_factors(model, factors, config.dropout, mesh)
    return config


def _load_factors(model: Llama, factors: LoraFactors, dropout: float, mesh: Mesh) -> None:
    """Add factors to a module, or to the factors that it has from an earlier adapter."""
    module = model.get_submodule(factors.module)
    # A LoRA factor is cut as its weight is, (rows, columns) = (rows, R) (R, columns).
    axis = axis_of(factors.weight_name)
    a = read_part(factors.a, COLUMNS if axis == COLUMNS else None, mesh)  # (R, columns)
    b = read_part(factors.b, ROWS if axis == ROWS else None, mesh)  # (rows, R)
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


def check_targets(config: LoraConfig, linears: Collection[str]) -> None:
    """Raise UserError for a target that names none of `linears`, the dotted names of a model's."""
    for target in config.targets:
        if any(is_named(name, target) for name in linears):
            continue
        known = sorted({name.rsplit(".", 1)[-1] for name in linears})
        raise UserError(
            f"lora_targets: {target!r} names no linear of this model{closest(target, known)}; "
            f"linears: {', '.join(known)}"
        )


def _is_target(config: LoraConfig, module: str) -> bool:
    return any(is_named(module, target) for target in config.targets)
