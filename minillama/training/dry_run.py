"""What a run will need, by arithmetic: parameters, bytes a rank, floating-point operations.

Nothing is allocated. Per trainable parameter of a 16-bit model, AdamW with fp32 masters holds 2 bytes of weight, 2 of gradient (4
where it accumulates), and 4 each of master and two moments; an fp32 parameter is its own master. Frozen weights cost their own bytes.
"""

import math
from dataclasses import dataclass, replace

from minillama.llama_config import LlamaConfig
from minillama.lora import WHOLE, LoraConfig, resolve_names
from minillama.train_config import TrainConfig


@dataclass(frozen=True)
class Estimate:
    """Of one rank: how many numbers it trains, and bytes."""

    trainable: int
    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def trainable_count(config: LlamaConfig, lora: LoraConfig | None) -> int:
    """How many numbers training changes: all, or the adapters' factors and the modules trained whole."""
    if lora is None:
        return config.parameter_count()
    targets = resolve_names(lora.targets)
    factors = sum(
        lora.rank_of(name.removesuffix(".weight")) * sum(shape)
        for name, shape in config.parameter_shapes().items()
        if name.split(".")[-2] in targets and len(shape) == 2
    )
    whole = len(WHOLE.keys() & resolve_names(lora.modules_to_save))
    return factors + config.vocab_size * config.dim * min(whole, 1 if config.tie_embeddings else 2)


def estimate(config: LlamaConfig, settings: TrainConfig, world_size: int = 1) -> Estimate:
    """Bytes a rank needs for state, outside activations and communication buckets."""
    lora = lora_config(settings) if settings.lora else None
    trainable, width = trainable_count(config, lora), 4 if settings.precision == "fp32" else 2
    whole = (
        trainable
        if lora is None
        else trainable - trainable_count(config, replace(lora, modules_to_save=()))
    )
    factors, exact = trainable - whole, settings.reduction == "exact"
    optimizer = math.ceil(
        (trainable * 8 + (whole * 4 if width == 2 else 0))
        / (world_size if settings.zero_stage else 1)
    )  # and masters
    gradient_width = 4 if settings.gradient_accumulation_steps > 1 or exact else width
    shards = world_size if settings.zero_stage == 2 or (exact and settings.zero_stage) else 1
    gradients = math.ceil((whole * gradient_width + factors * 4) / shards)
    return Estimate(trainable, config.parameter_count() * width + factors * 4, gradients, optimizer)


def activation_bytes(config: LlamaConfig, tokens: int, width: int, recompute: bool = False) -> int:
    """Bytes that a micro-batch of `tokens` tokens keeps for backward, with the fused ops and `width` bytes a number.
    A layer keeps nine tensors of width C (its input, both norms' outputs, the stream between its halves, rotated queries, keys and values
    of every query head, attention's output before and after it is put back in order) and three of width F (gate, up, their product).
    Recomputation keeps each layer's input, and one layer whole at a time."""
    C, D, F = config.dim, config.n_heads * config.head_dim, config.ffn_dim
    layer = (4 * C + 5 * D + 3 * F) * width + 4 * (
        config.n_heads + 2
    )  # and in fp32: log-sum-exps, two norms' statistics
    layers = config.n_layers * C * width + layer if recompute else config.n_layers * layer
    return tokens * (layers + C * width)  # and the last norm's input


def lora_config(settings: TrainConfig) -> LoraConfig:
    """The adapter that the settings describe."""
    return LoraConfig(
        settings.lora_rank,
        settings.lora_alpha or 2.0 * settings.lora_rank,
        settings.lora_dropout,
        resolve_names(settings.lora_targets),
        resolve_names(settings.modules_to_save),
        settings.use_rslora,
    )


def training_flops(
    config: LlamaConfig, tokens: float, sequence: float, recompute: bool = False
) -> float:
    """Floating-point operations to train on `tokens` tokens in documents of `sequence` tokens.
    24 F T L C^2 (1 + S/(6 C) + V/(16 L C)), with F = 3 for forward and backward, 4 with activations recomputed: the formula by which
    Megatron and AscendSpeed publish TFLOP/s (Narayanan et al. 2021, appendix). It assumes full-width attention and an MLP of about 8/3 C;
    utilisation always counts F = 3."""
    L, C, V = config.n_layers, config.dim, config.vocab_size
    return (
        24
        * (4 if recompute else 3)
        * tokens
        * L
        * C**2
        * (1 + sequence / (6 * C) + V / (16 * L * C))
    )
