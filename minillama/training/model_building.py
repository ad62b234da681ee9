"""The model of a run: from the settings and a checkpoint to a `Llama` that is ready to train.

    architecture    config.json of the checkpoint; from scratch: a published size, or the shape keys
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

from minillama import comm, hf_config
from minillama.checkpoint.hf_reader import (
    DeviceOf,
    empty_model,
    initialise,
    load_model,
    non_finite_on_any_rank,
)
from minillama.checkpoint.placing import loading_plan, put_on
from minillama.checkpoint.run_directory import find_checkpoint
from minillama.device import compute_dtype
from minillama.errors import UserError
from minillama.grid import Grid
from minillama.llama_config import LlamaConfig, ffn_width, with_layers
from minillama.lora import WHOLE, LoraConfig, add_lora, load_adapter, resolve_names
from minillama.model import Llama
from minillama.parallel.tensor import connect_ranks, refuse_uncuttable
from minillama.peft_config import read_adapter_config, refuse_tied_factors
from minillama.tokenizer import Tokenizer
from minillama.train_config import KEYS, TrainConfig

if TYPE_CHECKING:
    from minillama.parallel.pipeline import Stage

SHAPE_KEYS = ("n_layers", "dim", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size")
OTHER_SHAPES = "1.1b"  # its context and epsilon are those of a shape that was never published


@dataclass(frozen=True)
class BuiltModel:
    """What a run trains, on this rank."""

    model: Llama
    lora: LoraConfig | None  # None: every parameter is trained
    stage: "Stage | None"  # None: it has all layers


def find_base(config: TrainConfig) -> Path | None:
    """The directory of the checkpoint that a run starts from, or None."""
    return find_checkpoint(Path(config.ckpt)) if config.ckpt else None


def _pretrained(config: TrainConfig, base: Path | None) -> Path | None:
    """The checkpoint that the weights come from; None: they are random."""
    return base if config.init == "pretrained" else None


def model_config(config: TrainConfig, base: Path | None, vocab_size: int = 0) -> LlamaConfig:
    """The architecture that a run trains.

    base: the checkpoint's directory.
    vocab_size: of a model from scratch; 0: as published.
    Raises UserError if the shape keys contradict the checkpoint, or do not make a shape, or if
    tensor ranks cannot divide it.
    """
    llama = _find_shape(config, base, vocab_size)
    refuse_uncuttable(llama, config.tensor_parallel)
    return llama


def _find_shape(config: TrainConfig, base: Path | None, vocab_size: int) -> LlamaConfig:
    """The checkpoint's architecture, or that of the shape keys."""
    keys = {name: getattr(config, name) for name in SHAPE_KEYS}
    keys = {name: value for name, value in keys.items() if value}
    pretrained = _pretrained(config, base)
    if pretrained is not None:
        llama = hf_config.read_config(pretrained)
        _refuse_other_shape(config, llama, keys)
        return with_layers(llama, config.n_layers) if config.n_layers else llama
    if not config.model:
        keys = _complete_shape(keys)
    llama = hf_config.published(config.model or OTHER_SHAPES)
    if "dim" in keys or "n_heads" in keys:
        keys["head_dim"] = _head_dim(keys.get("dim", llama.dim), keys.get("n_heads", llama.n_heads))
    keys.setdefault("vocab_size", vocab_size or llama.vocab_size)
    return replace(
        llama,
        **keys,
        max_seq_len=config.context or llama.max_seq_len,
        initializer_range=config.initializer_range,
    )


def _refuse_other_shape(config: TrainConfig, llama: LlamaConfig, keys: dict[str, int]) -> None:
    """Raise UserError if a shape key differs from the checkpoint; it may be cut."""
    for name, value in keys.items():
        actual = getattr(llama, name)
        if value != actual and name != "n_layers":
            raise UserError(
                f"{name} = {value}, but {config.ckpt} has {actual}; leave it out, "
                "or add --init scratch"
            )
    if config.context not in (0, llama.max_seq_len):
        raise UserError(
            f"context = {config.context}, but {config.ckpt} has {llama.max_seq_len}; leave it out "
            "(max_length is the length of a row), or add --init scratch"
        )


def _complete_shape(keys: dict[str, int]) -> dict[str, int]:
    """Add LLaMA's proportions for the shape keys that were left out."""
    missing = [name for name in ("dim", "n_layers", "n_heads") if name not in keys]
    if missing:
        flags = " --".join(missing)
        raise UserError(f"training from scratch needs a shape: --model 110m, or --{flags}")
    defaults = {"n_kv_heads": keys["n_heads"], "ffn_dim": ffn_width(keys["dim"], 32)}
    return defaults | keys


def _head_dim(dim: int, n_heads: int) -> int:
    if dim % n_heads:
        raise UserError(f"dim = {dim} is not a multiple of n_heads = {n_heads}")
    return dim // n_heads


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


def refuse_other_adapter(config: TrainConfig, given: Collection[str]) -> None:
    """Raise UserError if a key differs from the adapter that the run starts from.

    given: the keys to compare; others keep their defaults, and the adapter decides.
    """
    adapter = read_adapter_config(Path(config.adapter))
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
    pretrained = _pretrained(config, base)
    device_of = loading_plan(llama, devices, grid.stage)
    if pretrained is not None:
        _check_growth(config, llama, tokenizer, mesh)
        model = load_model(
            pretrained, dtype, config.n_layers, tokenizer.size, device_of, mesh=grid.tensor
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


def _check_growth(
    config: TrainConfig, llama: LlamaConfig, tokenizer: Tokenizer, mesh: comm.Mesh
) -> None:
    """Print how the vocabulary grows. Raises UserError if nothing asks for that."""
    if tokenizer.size <= llama.vocab_size:
        return
    trained_rows = _trained_rows(config)
    grown = replace(llama, vocab_size=tokenizer.size)
    growth = (
        f"the vocabulary grows from {llama.vocab_size:,} to {tokenizer.size:,} tokens, and the "
        f"model from {llama.parameter_count():,} to {grown.parameter_count():,} parameters"
    )
    if config.lora and not set(WHOLE) <= trained_rows:
        raise UserError(
            f"{tokenizer.path} has {tokenizer.size} tokens, more than the checkpoint's embedding "
            "has rows; the new rows would never be trained: "
            "add --modules_to_save embed_tokens,lm_head"
        )
    if not config.lora and not config.grow_vocabulary:
        raise UserError(
            f"{tokenizer.path} has {tokenizer.size} tokens, {config.ckpt} has {llama.vocab_size}: "
            f"{growth}; if this is meant, add --grow_vocabulary; "
            "otherwise take the checkpoint's own tokenizer: leave --tokenizer out"
        )
    mesh.print(f"WARNING: {growth}; new rows begin as the mean of the old ones")


def _trained_rows(config: TrainConfig) -> set[str]:
    """Which of the embedding and the head are trained whole beside adapters."""
    if config.adapter:
        return set(read_adapter_config(Path(config.adapter)).modules_to_save)
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
    if config.adapter:
        refuse_other_adapter(config, keys_not_at_default(config))
        refuse_tied_factors(Path(config.adapter))
        directory = Path(config.adapter)
        return load_adapter(model, directory, config.lora_dropout, grid.tensor, grid.stage)
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
