"""The bytes that a rank needs, computed from shapes before anything is allocated.

AdamW with fp32 masters keeps, in bytes per trainable parameter:

                            weight    gradient              master    two moments
    16-bit model            2         2 (4: accumulated)    4         8
    fp32 model, LoRA        4         4                     -         8

A 32-bit parameter is its own master. A frozen parameter costs its weight alone. ZeRO stage 1 shares
the last two columns out over the data ranks, stage 2 the gradients too.

On a grid of ranks, all this is counted over the parameters that a rank holds: the layers of its
stage, and of each of them the rows or columns of its tensor rank. The first stage holds the
embedding, the last one the norm and the head; if these are tied, the last has a copy of the
embedding. The devices of one process hold layers as stages do, without the copy.

Left out: messages under way, buckets, what torch's allocator keeps for itself.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from minillama.adapter_checks import EMBEDDING, HEAD
from minillama.device import DTYPES
from minillama.device_list import count_devices
from minillama.llama_config import LlamaConfig
from minillama.lora import WHOLE, LoraConfig, is_adapted
from minillama.parallel.parts import Part
from minillama.parallel.shards import axis_of, is_on_stage, layers_of_stage, part_of
from minillama.train_config import TrainConfig
from minillama.training.model_building import planned_adapter

FP32 = 4  # bytes
MOST_TENSOR_RANKS = 8  # that are proposed: those of one machine, since they send most


@dataclass(frozen=True)
class Place:
    """Which part of the model a rank holds, or one device of a process."""

    stage: int = 0
    stages: int = 1
    tensor: int = 0
    tensors: int = 1
    is_device: bool = False  # the stages are devices of one process

    @property
    def ranks_of_model(self) -> int:
        """How many ranks hold the model together."""
        return self.tensors if self.is_device else self.tensors * self.stages

    def micro_batches_kept(self, per_step: int) -> int:
        """Of how many micro-batches the activations are kept at a time (`parallel.pipeline`)."""
        return 1 if self.is_device else min(self.stages - self.stage, per_step)


@dataclass(frozen=True)
class Estimate:
    """Trained parameters of the whole model, and the bytes that one rank holds."""

    trainable: int
    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def places_of(config: TrainConfig) -> list[Place]:
    """The place of one rank of each stage, or of each device of a process.

    It is the last tensor rank, which holds most where the vocabulary is no multiple of the ranks.
    """
    devices = count_devices(config.devices)
    stages = max(devices, config.pipeline_parallel)
    tensors = config.tensor_parallel
    return [
        Place(stage, stages, tensors - 1, tensors, is_device=devices > 1) for stage in range(stages)
    ]


def bytes_per_weight(config: TrainConfig) -> int:
    """Of the weights that are no LoRA factors."""
    return DTYPES[config.precision].itemsize


def parts_at(llama: LlamaConfig, lora: LoraConfig | None, place: Place) -> list[Part]:
    """The parameters that a rank holds, LoRA's factors among them."""
    shapes = llama.parameter_shapes()
    if lora is not None:
        shapes |= dict(_factor_shapes(llama, lora))
    parts = []
    for name, shape in shapes.items():
        if place.stage not in _stages_of(name, llama, place):
            continue
        axis = axis_of(name) if place.tensors > 1 else None
        held = range(0)
        if axis is not None:
            held = part_of(shape[axis], place.tensor, place.tensors)
        parts.append(Part(name, shape, axis, held.start, held.stop))
    return parts


def linear_shapes(llama: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each linear's weight, by the name of the linear."""
    shapes = llama.parameter_shapes()
    shapes[HEAD] = (llama.vocab_size, llama.dim)  # a tied head is not among them
    linears: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if len(shape) == 2 and name != EMBEDDING:
            linears[name.removesuffix(".weight")] = shape
    return linears


def _factor_shapes(llama: LlamaConfig, lora: LoraConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The factors A (R, in) and B (out, R) of all adapted linears, by name."""
    for module, shape in linear_shapes(llama).items():
        if is_adapted(lora, module):
            rank = lora.rank_of(module)
            yield f"{module}.lora_A", (rank, shape[1])
            yield f"{module}.lora_B", (shape[0], rank)


def _is_factor(name: str) -> bool:
    return name.endswith((".lora_A", ".lora_B"))


def _stages_of(name: str, llama: LlamaConfig, place: Place) -> set[int]:
    """The stages that hold a parameter."""
    is_in_layer = name.startswith("model.layers.")
    if place.is_device and llama.tie_embeddings and not is_in_layer:
        return {0}  # the head stays with the embedding, and the last norm with the head
    stages = set()
    for stage in range(place.stages):
        if is_on_stage(name, llama.n_layers, place.stages, stage, llama.tie_embeddings):
            stages.add(stage)
    return stages


def layers_at(llama: LlamaConfig, place: Place) -> range:
    """The layers of a place."""
    return layers_of_stage(llama.n_layers, place.stages, place.stage)


def contents(llama: LlamaConfig, place: Place) -> str:
    """What a place holds, in words."""
    names = {part.name for part in parts_at(llama, None, place)}
    layers = layers_at(llama, place)
    words = ["embedding"] if EMBEDDING in names else []
    words.append(f"layers {layers.start} to {layers.stop - 1}")
    if "model.norm.weight" in names:
        words.append("norm, head")
    return ", ".join(words)


def is_trained(name: str, lora: LoraConfig | None) -> bool:
    """Whether a parameter is trained: all are, or the adapters and the modules trained whole."""
    if lora is None or _is_factor(name):
        return True
    whole_modules = {WHOLE.get(module) for module in lora.modules_to_save}
    return name.removesuffix(".weight") in whole_modules


def trainable_count(llama: LlamaConfig, lora: LoraConfig | None) -> int:
    """How many parameters are trained in the whole model."""
    parts = parts_at(llama, lora, Place())
    return sum(math.prod(part.shape) for part in parts if is_trained(part.name, lora))


def weight_bytes(llama: LlamaConfig, config: TrainConfig, place: Place) -> int:
    """Bytes of the weights that a rank holds, LoRA's factors among them."""
    lora = planned_adapter(config)
    weights = 0
    for part in parts_at(llama, lora, place):
        width = FP32 if _is_factor(part.name) else bytes_per_weight(config)
        weights += math.prod(part.shape) * width
    return weights


def estimate(
    llama: LlamaConfig, config: TrainConfig, world_size: int = 1, place: Place | None = None
) -> Estimate:
    """Bytes that a rank keeps through a step, without activations and communication buckets.

    place: None: a rank that holds the whole model.
    """
    place = place or Place()
    lora = planned_adapter(config)
    is_exact = config.reduction == "exact"
    accumulates = config.gradient_accumulation_steps > 1 or is_exact
    gradients = 0
    optimizer = 0
    for part in parts_at(llama, lora, place):
        if not is_trained(part.name, lora):
            continue
        size = math.prod(part.shape)
        width = FP32 if _is_factor(part.name) else bytes_per_weight(config)
        gradients += size * (FP32 if accumulates else width)
        masters = 0 if width == FP32 else FP32
        optimizer += size * (masters + 2 * FP32)

    data_ranks = max(1, world_size // place.ranks_of_model)
    shards_optimizer = config.zero_stage >= 1
    shards_gradients = config.zero_stage == 2 or (is_exact and shards_optimizer)
    return Estimate(
        trainable=trainable_count(llama, lora),
        weights=weight_bytes(llama, config, place),
        gradients=math.ceil(gradients / (data_ranks if shards_gradients else 1)),
        optimizer=math.ceil(optimizer / (data_ranks if shards_optimizer else 1)),
    )


def activation_bytes(
    llama: LlamaConfig,
    tokens: int,
    width: int,
    recompute: bool = False,
    place: Place | None = None,
    micro_batches: int = 1,
) -> int:
    """Bytes that a rank keeps for backward with the fused ops, at `width` bytes an element.

    tokens: of a micro-batch. micro_batches: in a step, of which a stage keeps several.

    A layer keeps nine tensors of width C (its input, both norms' outputs, the stream between its
    halves, the rotated queries, keys and values of every query head, attention's output before and
    after the heads are put side by side) and three of width F (gate, up, their product); and in
    fp32 the log-sum-exp of each head and the statistics of two norms. Tensor ranks share out those
    of heads and of width F. Recomputation keeps the input of every layer, and one layer whole at a
    time. Stage s of S keeps S - s micro-batches.
    """
    place = place or Place()
    C = llama.dim
    heads = llama.n_heads / place.tensors
    wide = 5 * heads * llama.head_dim + 3 * llama.ffn_dim / place.tensors
    layer = (4 * C + wide) * width + (heads + 2) * FP32
    n_layers = len(layers_at(llama, place))
    kept = n_layers * (C * width if recompute else layer)
    kept *= place.micro_batches_kept(micro_batches)
    if recompute:
        kept += layer
    if place.stage == place.stages - 1:
        kept += C * width  # input of the last norm
    return math.ceil(tokens * kept)
