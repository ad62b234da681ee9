"""The model of a run: from the settings and a checkpoint to a `Llama` that is ready to train.

    architecture    as architecture.py says
    weights         the checkpoint's, grown to the tokenizer's vocabulary; from scratch: random
    adapters        LoRA, new or from a PEFT directory; the other weights are then frozen
    recomputation   layers that keep their input alone for backward
    stages          the layers of other ranks are removed

What the parts do is elsewhere: `model`, `lora`, `checkpoint.hf_reader`. Here is only their order,
and what a user can get wrong about it.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from minillama import comm
from minillama.checkpoint.hf_reader import (
    DeviceOf,
    empty_model,
    initialise,
    load_model,
    non_finite_on_any_rank,
)
from minillama.checkpoint.placing import loading_plan, put_on
from minillama.checkpoint.tokenizer_files import contradiction
from minillama.device import compute_dtype
from minillama.errors import UserError
from minillama.grid import Grid
from minillama.llama_config import LlamaConfig
from minillama.lora import WHOLE, LoraConfig, add_lora, load_adapter, resolve_names
from minillama.model import Llama
from minillama.parallel.tensor import connect_ranks
from minillama.peft_config import read_adapter_config, refuse_tied_factors
from minillama.tokenizer import Tokenizer
from minillama.train_config import KEYS, TrainConfig
from minillama.training.architecture import find_adapter, pretrained

if TYPE_CHECKING:
    from minillama.parallel.pipeline import Stage


@dataclass(frozen=True)
class BuiltModel:
    """What a run trains, on this rank."""

    model: Llama
    lora: LoraConfig | None  # None: every parameter is trained
    stage: "Stage | None"  # None: it has all layers


def lora_config(config: TrainConfig) -> LoraConfig:
    """The adapter that the settings describe."""
    return LoraConfig(
        rank=config.lora_rank,
        alpha=config.lora_alpha or 2.0 * config.lora_rank,
        dropout=config.lora_dropout,
        targets=resolve_names(config.lora_targets),
        modules_to_save=resolve_names(config.modules_to_save),
        use_rslora=config.use_rslora,
    )


def planned_adapter(config: TrainConfig) -> LoraConfig | None:
    """The adapter that a run trains: that of --adapter, or a new one; None: all is trained."""
    directory = find_adapter(config)
    if directory:
        return read_adapter_config(directory)
    return lora_config(config) if config.lora else None


def refuse_other_adapter(config: TrainConfig, given: Collection[str]) -> None:
    """Raise UserError if a key differs from the adapter that the run starts from.

    given: the keys to compare; others keep their defaults, and the adapter decides.
    """
    directory = find_adapter(config)
    assert directory, "called for runs with an adapter"
    adapter = read_adapter_config(directory)
    own = lora_config(config)
    pairs = {
        "lora_rank": (own.rank, adapter.rank),
        "lora_alpha": (own.alpha, adapter.alpha),
        "lora_targets": (set(own.targets), set(adapter.targets)),
        "modules_to_save": (set(own.modules_to_save), set(adapter.modules_to_save)),
        "use_rslora": (own.use_rslora, adapter.use_rslora),
    }
    for name, (value, actual) in pairs.items():
        if name in given and value != actual:
            raise UserError(
                f"{name} = {value}, but the adapter {config.adapter} has {actual}; leave it out, "
                "or leave --adapter out to start a new one"
            )


def keys_not_at_default(config: TrainConfig) -> set[str]:
    return {name for name, key in KEYS.items() if getattr(config, name) != key.default}


def build_model(
    config: TrainConfig, base: Path | None, llama: LlamaConfig, tokenizer: Tokenizer, grid: Grid
) -> BuiltModel:
    """The model on its devices, ready to train.

    llama: what `model_config` says. Everything random follows from config.seed.
    grid: a rank makes its part of each parameter of its stage only.
    Raises UserError, on all ranks, if a weight of the checkpoint or adapter is not finite.
    """
    mesh = grid.all
    devices = mesh.devices or (mesh.device,)
    dtype, warning = compute_dtype(config.precision, mesh.device)
    if warning:
        mesh.print(f"warning: {warning}")
    generator = torch.Generator().manual_seed(config.seed)
    weights = pretrained(config, base)
    device_of = loading_plan(llama, devices, grid.stage)
    if weights is not None:
        if config.tokenizer:
            _warn_of_other_tokens(tokenizer, weights, mesh)
        _check_growth(config, llama, tokenizer, mesh)
        model = load_model(
            weights, dtype, config.n_layers, tokenizer.size, device_of, mesh=grid.tensor
        )
    else:
        model = _initial_model(llama, tokenizer, dtype, generator, device_of, grid.tensor)
    lora = _add_adapters(model, config, generator, grid)
    connect_ranks(model, grid.tensor)
    if config.gradient_checkpointing:
        recompute_activations(model.model.layers)
    stage = _keep_stage(model, config, grid.stage)
    name = non_finite_on_any_rank(model, mesh)
    if name:
        raise UserError(
            f"{config.adapter or config.ckpt}: {name} holds NaN or infinity (in {dtype}); "
            "a model that holds them cannot be trained: use an intact copy, or --precision fp32"
        )
    return BuiltModel(put_on(model, devices).train(), lora, stage)


def _keep_stage(model: Llama, config: TrainConfig, stages: comm.Mesh) -> "Stage | None":
    """Remove what other pipeline stages hold, if the run has any."""
    if stages.size == 1:
        return None
    from minillama.parallel import pipeline

    return pipeline.keep_stage(model, stages, has_dropout=config.lora_dropout > 0)


def _warn_of_other_tokens(tokenizer: Tokenizer, weights: Path, mesh: comm.Mesh) -> None:
    """Warn if the checkpoint was trained with another tokenizer: its rows then mean nothing."""
    problem = contradiction(tokenizer, weights)
    if problem:
        mesh.print(f"WARNING: {problem}; what the model knows of its tokens is lost")


def _warn_of_other_dropout(adapter: Path, dropout: float, mesh: comm.Mesh) -> None:
    """Warn if the run trains with another dropout than the adapter that it starts from."""
    own = read_adapter_config(adapter).dropout
    if own != dropout:
        mesh.print(
            f"WARNING: {adapter} was trained with lora_dropout = {own}, and this run takes "
            f"{dropout}; --lora_dropout {own} keeps it"
        )


def _check_growth(
    config: TrainConfig, llama: LlamaConfig, tokenizer: Tokenizer, mesh: comm.Mesh
) -> None:
    """Print how the vocabulary grows. Raises UserError if nothing asks for that."""
    if problem := growth_problem(config, llama, tokenizer.path, tokenizer.size):
        raise UserError(problem)
    if tokenizer.size > llama.vocab_size:
        growth = _describe_growth(llama, tokenizer.size)
        mesh.print(f"WARNING: {growth}; new rows begin as the mean of the old ones")


def growth_problem(
    config: TrainConfig, llama: LlamaConfig, tokenizer: Path, vocab_size: int
) -> str:
    """Why a run refuses a tokenizer; an empty string if its tokens have rows, or may get them.

    llama: the checkpoint's architecture.
    vocab_size: the number of tokens in `tokenizer`.
    """
    if vocab_size <= llama.vocab_size:
        return ""
    if config.lora and not set(WHOLE) <= _trained_rows(config):
        return (
            f"{tokenizer} has {vocab_size} tokens, more than the checkpoint's embedding "
            "has rows; the new rows would never be trained: "
            "add --modules_to_save embed_tokens,lm_head"
        )
    if not config.lora and not config.grow_vocabulary:
        return (
            f"{tokenizer} has {vocab_size} tokens, {config.ckpt} has {llama.vocab_size}: "
            f"{_describe_growth(llama, vocab_size)}; if this is meant, add --grow_vocabulary; "
            "otherwise take the checkpoint's own tokenizer: leave --tokenizer out"
        )
    return ""


def _describe_growth(llama: LlamaConfig, vocab_size: int) -> str:
    grown = replace(llama, vocab_size=vocab_size)
    return (
        f"the vocabulary grows from {llama.vocab_size:,} to {vocab_size:,} tokens, and the "
        f"model from {llama.parameter_count():,} to {grown.parameter_count():,} parameters"
    )


def _trained_rows(config: TrainConfig) -> set[str]:
    """Which of the embedding and the head are trained whole beside adapters."""
    adapter = find_adapter(config)
    if adapter:
        return set(read_adapter_config(adapter).modules_to_save)
    return set(resolve_names(config.modules_to_save))


def _initial_model(
    llama: LlamaConfig,
    tokenizer: Tokenizer,
    dtype: torch.dtype,
    generator: torch.Generator,
    device_of: DeviceOf,
    mesh: comm.Mesh,
) -> Llama:
    """A model with random weights; device_of, mesh: as `empty_model` takes them."""
    if llama.vocab_size < tokenizer.size:
        raise UserError(
            f"vocab_size = {llama.vocab_size} is below the tokenizer's {tokenizer.size} pieces"
        )
    eos_ids = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    llama = replace(llama, bos_id=tokenizer.bos_id or 0, eos_ids=eos_ids)
    model = empty_model(llama, dtype, device_of, mesh)
    initialise(model, generator, mesh)
    return model


def _add_adapters(
    model: Llama, config: TrainConfig, generator: torch.Generator, grid: Grid
) -> LoraConfig | None:
    if not config.lora:
        return None
    adapter = find_adapter(config)
    if adapter:
        refuse_other_adapter(config, keys_not_at_default(config))
        refuse_tied_factors(adapter)
        _warn_of_other_dropout(adapter, config.lora_dropout, grid.all)
        return load_adapter(model, adapter, config.lora_dropout, grid.tensor, grid.stage)
    lora = lora_config(config)
    add_lora(model, lora, generator, grid.tensor)
    return lora


def recompute_activations(layers: nn.ModuleList) -> None:
    """Make layers keep only their input (T, C), and compute the rest again in backward.

    Chen et al. 2016: one more forward, about a third of a step's time, for many times the memory.
    Gradients are the same to the bit, and parameters keep their names.
    """
    for layer in layers:
        recomputed: Any = partial(checkpoint, layer.forward, use_reentrant=False)
        layer.forward = recomputed
