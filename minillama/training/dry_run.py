"""What a run will need, computed before it starts: parameters, bytes per rank, tokens per step.

Nothing is allocated. AdamW with fp32 masters keeps, in bytes per trainable parameter:

                            weight    gradient              master    two moments
    16-bit model            2         2 (4: accumulated)    4         8
    fp32 model, LoRA        4         4                     -         8

A 32-bit parameter is its own master. A frozen parameter costs its weight alone. ZeRO stage 1 shares
the last two columns out over the ranks, stage 2 the gradients too.
"""

import math
import sys
from dataclasses import dataclass

from minillama import comm
from minillama.data.show import show_batch
from minillama.errors import UserError
from minillama.grid import make_grid
from minillama.llama_config import LlamaConfig
from minillama.lora import EMBEDDING, HEAD, WHOLE, LoraConfig, is_adapted
from minillama.train_config import TrainConfig
from minillama.training.data_building import (
    build_data,
    build_tokenizer,
    row_length,
    with_embedded_data,
)
from minillama.training.model_building import find_base, lora_config, model_config
from minillama.training.settings import refuse_unfinished
from minillama.training.summary import gigabytes

LARGEST_REPLICATED = 40 * 10**9  # bytes of weights that one device holds beside its activations
FP32 = 4  # bytes


@dataclass(frozen=True)
class Estimate:
    """What one rank holds: trained parameters, and bytes."""

    trainable: int
    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def trainable_count(llama: LlamaConfig, lora: LoraConfig | None) -> int:
    """How many parameters are trained: all, or the adapters' and the modules trained whole."""
    if lora is None:
        return llama.parameter_count()
    whole_modules = WHOLE.keys() & lora.modules_to_save
    num_whole = min(len(whole_modules), 1 if llama.tie_embeddings else 2)
    return _factor_count(llama, lora) + num_whole * llama.vocab_size * llama.dim


def _factor_count(llama: LlamaConfig, lora: LoraConfig) -> int:
    """Parameters of the factors A (R, in) and B (out, R) of all adapted linears."""
    shapes = llama.parameter_shapes()
    shapes[HEAD] = (llama.vocab_size, llama.dim)  # a tied head is not among them
    count = 0
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        is_linear = len(shape) == 2 and name != EMBEDDING
        if is_linear and is_adapted(lora, module):
            count += lora.rank_of(module) * sum(shape)
    return count


def bytes_per_weight(config: TrainConfig) -> int:
    return FP32 if config.precision == "fp32" else 2


def estimate(llama: LlamaConfig, config: TrainConfig, world_size: int = 1) -> Estimate:
    """Bytes that a rank keeps through a step, without activations and communication buckets."""
    lora = lora_config(config) if config.lora else None
    trainable = trainable_count(llama, lora)
    factors = _factor_count(llama, lora) if lora else 0  # in fp32
    others = trainable - factors  # in the model's dtype
    width = bytes_per_weight(config)
    is_exact = config.reduction == "exact"
    accumulates = config.gradient_accumulation_steps > 1 or is_exact

    weights = llama.parameter_count() * width + factors * FP32
    gradients = others * (FP32 if accumulates else width) + factors * FP32
    masters = others * FP32 if width < FP32 else 0
    optimizer = masters + trainable * 2 * FP32

    shards_optimizer = config.zero_stage >= 1
    shards_gradients = config.zero_stage == 2 or (is_exact and shards_optimizer)
    return Estimate(
        trainable=trainable,
        weights=weights,
        gradients=math.ceil(gradients / (world_size if shards_gradients else 1)),
        optimizer=math.ceil(optimizer / (world_size if shards_optimizer else 1)),
    )


def activation_bytes(llama: LlamaConfig, tokens: int, width: int, recompute: bool = False) -> int:
    """Bytes that a micro-batch keeps for backward with the fused ops, at `width` bytes an element.

    A layer keeps nine tensors of width C (its input, both norms' outputs, the stream between its
    halves, the rotated queries, keys and values of every query head, attention's output before and
    after the heads are put side by side) and three of width F (gate, up, their product); and in
    fp32 the log-sum-exp of each head and the statistics of two norms. Recomputation keeps the input
    of every layer, and one layer whole at a time.
    """
    C = llama.dim
    all_heads = llama.n_heads * llama.head_dim
    statistics = llama.n_heads + 2
    layer = (4 * C + 5 * all_heads + 3 * llama.ffn_dim) * width + statistics * FP32
    layers = llama.n_layers * layer
    if recompute:
        layers = llama.n_layers * C * width + layer
    input_of_last_norm = C * width
    return tokens * (layers + input_of_last_norm)


def refuse_what_cannot_fit(llama: LlamaConfig, config: TrainConfig) -> None:
    """Raise UserError if the weights, which every rank holds whole, are too many for a device."""
    weights = estimate(llama, config).weights
    if weights > LARGEST_REPLICATED:
        raise UserError(
            f"the model's weights alone are {weights:,} bytes ({gigabytes(weights)}) on every "
            "rank: data parallelism replicates them, and tensor parallelism does not exist here "
            f"yet; {gigabytes(LARGEST_REPLICATED)} is the most"
        )


def describe(config: TrainConfig, world_size: int) -> str:
    """The plan of a run: what --dry_run prints."""
    refuse_unfinished(config)
    llama = model_config(config, find_base(config))
    needed = estimate(llama, config, world_size)
    lines = [
        *_describe_model(llama, needed),
        *_describe_memory(llama, needed, config, world_size),
        *_describe_steps(llama, config, world_size),
    ]
    return "\n".join(lines)


def _describe_model(llama: LlamaConfig, needed: Estimate) -> list[str]:
    total = llama.parameter_count()
    share = needed.trainable / total
    return [
        f"model       {llama.n_layers} layers, width {llama.dim}, {llama.n_heads} heads "
        f"({llama.n_kv_heads} key/value), MLP {llama.ffn_dim}, vocabulary {llama.vocab_size:,}",
        f"parameters  {total:,}; trained: {needed.trainable:,} ({share:.2%})",
    ]


def _describe_memory(
    llama: LlamaConfig, needed: Estimate, config: TrainConfig, world_size: int
) -> list[str]:
    plural = "s" if world_size > 1 else ""
    width = bytes_per_weight(config)
    tokens = config.per_device_train_batch_size * row_length(config, llama)
    recompute = config.gradient_checkpointing
    activations = activation_bytes(llama, tokens, width, recompute)
    how = "recomputed" if recompute else "kept"
    model_on_disk = 0 if config.lora else llama.parameter_count() * width
    state_on_disk = needed.trainable * 3 * FP32  # master and two moments
    return [
        f"per rank    weights {gigabytes(needed.weights)} "
        f"+ gradients {gigabytes(needed.gradients)} + optimizer {gigabytes(needed.optimizer)} "
        f"= {gigabytes(needed.total)}, before activations "
        f"({config.precision}, ZeRO stage {config.zero_stage}, {world_size} rank{plural})",
        f"activations {gigabytes(activations)} a micro-batch ({how})",
        f"disk        {gigabytes(model_on_disk + state_on_disk)} a checkpoint",
    ]


def _describe_steps(llama: LlamaConfig, config: TrainConfig, world_size: int) -> list[str]:
    rows_per_rank = config.per_device_train_batch_size * config.gradient_accumulation_steps
    rows = rows_per_rank * world_size
    length = row_length(config, llama)
    duration = f"{config.num_train_epochs:g} epochs"
    if config.max_steps:
        duration = f"{config.max_steps} steps"
    warmup = f"{config.warmup_ratio:.0%}"
    if config.warmup_steps:
        warmup = f"{config.warmup_steps} steps"
    return [
        f"a step      {rows} rows of up to {length:,} tokens "
        f"= up to {rows * length:,} tokens on all ranks",
        f"schedule    {duration}, {config.lr_scheduler_type} from {config.learning_rate:g}, "
        f"warm-up {warmup}, seed {config.seed}",
    ]


def show_first_batch(config: TrainConfig, mesh: comm.Mesh) -> str:
    """The text of step 0's first micro-batch, with the trained tokens marked: --show_batch."""
    base = find_base(config)
    config = with_embedded_data(config, mesh)
    tokenizer = build_tokenizer(config, base)
    llama = model_config(config, base, tokenizer.size)
    data = build_data(config, base, tokenizer, llama, make_grid(mesh))
    first_batch = data.train_batches.micro_batches(0)[0]
    return show_batch(tokenizer, first_batch, color=sys.stdout.isatty())
