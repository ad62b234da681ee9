"""What a run will need, printed before it starts: parameters, bytes per rank, tokens per step.

`estimate` computes the bytes; nothing is allocated. What cannot fit a device is refused, with a
division of the model that fits.
"""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from minillama import comm
from minillama.checkpoint.template_files import resolve_template
from minillama.data.show import show_batch
from minillama.device_list import count_devices, refuse_too_many
from minillama.errors import UserError
from minillama.grid import check_ranks, make_grid
from minillama.llama_config import LlamaConfig
from minillama.lora import check_targets
from minillama.parallel.shards import layers_of_stage
from minillama.parallel.tensor import cut_sizes, refuse_uncuttable
from minillama.train_config import TrainConfig
from minillama.training.architecture import find_base, model_config, pretrained
from minillama.training.data_building import (
    build_data,
    build_tokenizer,
    length_problem,
    planned_vocabulary,
    row_length,
    with_embedded_data,
)
from minillama.training.estimate import (
    FP32,
    MOST_TENSOR_RANKS,
    Estimate,
    Place,
    activation_bytes,
    bytes_per_weight,
    contents,
    estimate,
    layers_at,
    linear_shapes,
    places_of,
    weight_bytes,
)
from minillama.training.model_building import growth_problem, lora_config
from minillama.training.summary import gigabytes

LARGEST_ON_DEVICE = 40 * 10**9  # bytes of weights that one device holds beside its activations


@dataclass(frozen=True)
class Need:
    """What one place in the model needs: the state of a step, and activations."""

    place: Place
    state: Estimate
    activations: int
    micro_batches: int  # that the activations are of

    @property
    def total(self) -> int:
        return self.state.total + self.activations


def needs_of(llama: LlamaConfig, config: TrainConfig, world_size: int) -> list[Need]:
    """What each stage needs, or each device of a process."""
    tokens = config.per_device_train_batch_size * row_length(config, llama)
    width = bytes_per_weight(config)
    recompute = config.gradient_checkpointing
    needs = []
    for place in places_of(config):
        state = estimate(llama, config, world_size, place)
        kept = place.micro_batches_kept(config.gradient_accumulation_steps)
        activations = activation_bytes(llama, tokens, width, recompute, place, kept)
        needs.append(Need(place, state, activations, kept))
    return needs


def check_division(llama: LlamaConfig, config: TrainConfig) -> None:
    """Raise UserError if the model cannot be divided as the settings say."""
    refuse_uncuttable(llama, config.tensor_parallel)
    layers_of_stage(llama.n_layers, config.pipeline_parallel, 0)
    refuse_too_many(count_devices(config.devices), llama.n_layers)


def refuse_what_cannot_fit(llama: LlamaConfig, config: TrainConfig) -> None:
    """Raise UserError if the weights that a device would hold are too many for it."""
    check_division(llama, config)
    weights = _most_weights(llama, config)
    if weights <= LARGEST_ON_DEVICE:
        return
    remedy = _division_that_fits(llama, config)
    raise UserError(
        f"the model's weights alone are {weights:,} bytes ({gigabytes(weights)}) on a device, and "
        f"{gigabytes(LARGEST_ON_DEVICE)} is the most; {remedy}"
    )


def _most_weights(llama: LlamaConfig, config: TrainConfig) -> int:
    """Bytes of weights on the device that holds most of them."""
    return max(weight_bytes(llama, config, place) for place in places_of(config))


def _division_that_fits(llama: LlamaConfig, config: TrainConfig) -> str:
    """What to type: the fewest tensor ranks that suffice, else the most of them and stages."""
    most_cuts = math.gcd(*cut_sizes(llama).values(), MOST_TENSOR_RANKS)
    tensors = [count for count in range(1, most_cuts + 1) if most_cuts % count == 0]
    grids = [(count, 1) for count in tensors]
    grids += [(most_cuts, stages) for stages in range(2, llama.n_layers + 1)]
    for count, stages in grids:
        grid = replace(config, tensor_parallel=count, pipeline_parallel=stages, devices="")
        if _most_weights(llama, grid) > LARGEST_ON_DEVICE:
            continue
        ranks = count * stages
        flags = f"--tensor_parallel {count}"
        if stages > 1:
            flags += f" --pipeline_parallel {stages}"
        remedy = f"use {flags} on {ranks} ranks or a multiple"
        if _fits_on_devices(llama, config, ranks):
            remedy += f", or --devices {ranks} in one process"
        return remedy
    return "no grid of ranks makes them fit"


def _fits_on_devices(llama: LlamaConfig, config: TrainConfig, count: int) -> bool:
    """Whether the weights fit on so many devices of one process."""
    if count > llama.n_layers:
        return False
    spread = replace(config, tensor_parallel=1, pipeline_parallel=1, devices=str(count))
    return _most_weights(llama, spread) <= LARGEST_ON_DEVICE


def planned_model(config: TrainConfig) -> tuple[LlamaConfig, str]:
    """The architecture of a run, with the vocabulary that its tokenizer makes of it.

    Returns also why the run refuses the tokenizer; an empty string if it does not.
    """
    base = find_base(config)
    vocab_size, problem = planned_vocabulary(config, base)
    llama = model_config(config, base, vocab_size)
    if pretrained(config, base) and vocab_size > llama.vocab_size:
        problem = growth_problem(config, llama, Path(config.tokenizer), vocab_size)
        llama = replace(llama, vocab_size=vocab_size)  # the embedding and the head grow
    return llama, problem


def describe(config: TrainConfig, world_size: int) -> str:
    """The plan of a run: what --dry_run prints."""
    llama, tokenizer_problem = planned_model(config)
    check_ranks(world_size, config.tensor_parallel, config.pipeline_parallel)
    check_division(llama, config)
    _check_names(llama, config)
    needs = needs_of(llama, config, world_size)
    lines = [
        *_describe_model(llama, needs[0].state.trainable),
        *_describe_division(llama, config, needs, world_size),
        *_describe_memory(llama, config, needs, world_size),
        *_describe_steps(llama, config, world_size),
    ]
    for problem in (length_problem(config, llama), tokenizer_problem):
        if problem:
            lines.append(_row("refused", f"this run will not start: {problem}"))
    return "\n".join(lines)


def _check_names(llama: LlamaConfig, config: TrainConfig) -> None:
    """Raise UserError for a template or a target of an adapter that does not exist."""
    resolve_template(config.template)
    if config.lora and not config.adapter:
        check_targets(lora_config(config), linear_shapes(llama))


def _row(label: str, text: str) -> str:
    return f"{label:12}{text}"


def _describe_model(llama: LlamaConfig, trained: int) -> list[str]:
    total = llama.parameter_count()
    heads = f"{llama.n_heads} heads ({llama.n_kv_heads} key/value)"
    body = f"{llama.n_layers} layers, width {llama.dim}, {heads}, MLP {llama.ffn_dim}"
    share = f"{trained:,} ({trained / total:.2%})"
    return [
        _row("model", f"{body}, vocabulary {llama.vocab_size:,}"),
        _row("parameters", f"{total:,}; trained: {share}"),
    ]


def _data_ranks(config: TrainConfig, world_size: int) -> int:
    return world_size // (config.tensor_parallel * config.pipeline_parallel)


def _largest(needs: list[Need]) -> Need:
    return max(needs, key=lambda need: need.total)


def _describe_division(
    llama: LlamaConfig, config: TrainConfig, needs: list[Need], world_size: int
) -> list[str]:
    """How the model is divided; nothing if it is not."""
    place = _largest(needs).place
    if place.stages == place.tensors == 1:
        return []
    part = "device" if place.is_device else "stage"
    grid = f"{place.stages} devices in each process"
    if not place.is_device:
        data = _data_ranks(config, world_size)
        grid = f"{data} data × {place.stages} stages × {place.tensors} tensor ranks"
    if place.stages == 1:
        return [_row("grid", grid)]
    layers = ", ".join(str(len(layers_at(llama, need.place))) for need in needs)
    totals = ", ".join(f"{need.total / 1e9:.2f}" for need in needs)
    largest = f"{part} {place.stage}: {contents(llama, place)}"
    return [
        _row("grid", f"{grid}; layers of each {part}: {layers}"),
        _row(f"{part}s", f"{totals} GB with activations; the largest is {largest}"),
    ]


def _describe_memory(
    llama: LlamaConfig, config: TrainConfig, needs: list[Need], world_size: int
) -> list[str]:
    """What the largest part needs, and what a checkpoint does."""
    largest = _largest(needs)
    state = largest.state
    plural = "s" if world_size > 1 else ""
    setting = f"{config.precision}, ZeRO stage {config.zero_stage}, {world_size} rank{plural}"
    terms = [
        f"weights {gigabytes(state.weights)}",
        f"gradients {gigabytes(state.gradients)}",
        f"optimizer {gigabytes(state.optimizer)}",
    ]
    total = f"{' + '.join(terms)} = {gigabytes(state.total)}"
    kept = "a micro-batch"
    if largest.micro_batches > 1:
        kept = f"of {largest.micro_batches} micro-batches"
    how = "recomputed" if config.gradient_checkpointing else "kept"
    model_on_disk = 0 if config.lora else llama.parameter_count() * bytes_per_weight(config)
    state_on_disk = state.trainable * 3 * FP32  # master and two moments
    checkpoint = gigabytes(model_on_disk + state_on_disk)
    holder = "per device" if largest.place.is_device else "per rank"
    return [
        _row(holder, f"{total}, before activations ({setting})"),
        _row("activations", f"{gigabytes(largest.activations)} {kept} ({how})"),
        _row("disk", f"{checkpoint} a checkpoint"),
    ]


def _describe_steps(llama: LlamaConfig, config: TrainConfig, world_size: int) -> list[str]:
    rows_per_rank = config.per_device_train_batch_size * config.gradient_accumulation_steps
    rows = rows_per_rank * _data_ranks(config, world_size)
    length = row_length(config, llama)
    duration = f"{config.num_train_epochs:g} epochs"
    if config.max_steps:
        duration = f"{config.max_steps} steps"
    warmup = f"{config.warmup_ratio:.0%}"
    if config.warmup_steps:
        warmup = f"{config.warmup_steps} steps"
    tokens = f"up to {rows * length:,} tokens on all ranks"
    rate = f"{config.lr_scheduler_type} from {config.learning_rate:g}, warm-up {warmup}"
    return [
        _row("a step", f"{rows} rows of up to {length:,} tokens = {tokens}"),
        _row("schedule", f"{duration}, {rate}, seed {config.seed}"),
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
