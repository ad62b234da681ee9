"""Writes tensors with Hugging Face's names as the files of a Megatron checkpoint.

    q, k, v ─▶ cut for each rank ─▶ each rank's parts fused ─┬▶ mp_rank_00_000/model_optim_rng.pt
                                                             ├▶ mp_rank_01_000/model_optim_rng.pt
                                                             └▶ …

The stages are written one after the other. The files of all ranks of a stage are open at once, and
each gets its part of a tensor. A vocabulary is padded to a multiple that the ranks divide. Its k
new rows repeat the last k rows, in embedding and head, as AscendSpeed's converter does. Nothing is
cast.

A tied head is written as a tensor of its own, since AscendSpeed's LLaMA has one.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillama.conversion.megatron_layout import (
    DEEPSPEED_TRACKER,
    EMBEDDING,
    HEAD,
    TRACKER,
    VERSION,
    Heads,
    LazyModel,
    MegatronGrid,
    MegatronOptions,
    fuse,
    layer_tensors,
)
from minillama.conversion.writer import (
    RELEASE,
    Conversion,
    LazyTensor,
    LazyTensors,
    Output,
    write_checkpoint,
)
from minillama.errors import UserError
from minillama.files import write_text
from minillama.parallel.shards import axis_of, check_tensor_parallel, cut, layers_of_stage
from minillama.tensor_files import TensorRef
from minillama.tensor_writers import Append, TensorSpecs, specs_of, torch_writer

ENCODER = "language_model/encoder/"
FIRST_GATE = "model.layers.0.mlp.gate_proj.weight"


def write_megatron(
    output: Output,
    inputs: Sequence[Path],
    model: LazyModel,
    options: MegatronOptions,
    write_companions: Callable[[Path], None] | None,
    notes: Sequence[str] = (),
) -> Conversion:
    """Write the directory of a Megatron checkpoint.

    inputs, notes: as of `write_checkpoint`.
    write_companions: writes what belongs beside the weights, such as the tokenizer.
    Raises UserError if the model cannot be cut like this.
    """
    grid = options.grid
    _check_layout(model, options)
    whole = _with_padded_vocabulary(model.tensors, options)
    tensors = {}
    axes = {}
    for stage in range(grid.pipeline_parallel):
        for name, sources in _tensors_of_stage(model, options, stage).items():
            axis = axis_of(sources[0])
            parts = [whole[source] for source in sources]
            key = f"{stage}/{name}"
            axes[key] = axis
            tensors[key] = _fuse_lazily(parts, axis, grid.tensor_parallel, model.heads)

    def write_other_files(directory: Path) -> None:
        tracker = DEEPSPEED_TRACKER if grid.deepspeed else TRACKER
        write_text(directory / tracker, f"{RELEASE}\n")
        if write_companions is not None:
            write_companions(directory)

    write_tensors = partial(_write_stages, grid, axes)
    return write_checkpoint(output, inputs, tensors, write_other_files, write_tensors, notes)


def _check_layout(model: LazyModel, options: MegatronOptions) -> None:
    grid = options.grid
    if grid.deepspeed and grid.pipeline_parallel > 1:
        raise UserError(
            "DeepSpeed's files have no stages: with --deepspeed use --pipeline_parallel 1"
        )
    if model.n_layers % grid.pipeline_parallel:
        raise UserError(
            f"n_layers = {model.n_layers} cannot be cut into {grid.pipeline_parallel} equal "
            "stages; choose a divisor with --pipeline_parallel"
        )
    sizes = {
        "n_heads": model.heads.n_heads,
        "n_kv_heads": model.heads.n_kv_heads,
        "ffn_dim": model.tensors[FIRST_GATE].shape[0],
    }
    check_tensor_parallel(sizes, grid.tensor_parallel)
    if any(".mlp." in name for name in model.biases):
        raise UserError("Megatron's LLaMA has no biases in its MLP; this model has some")
    if model.biases and model.heads.group > 1:
        raise UserError(
            "AscendSpeed has no biases beside grouped key/value heads; this model has both"
        )


def padded_rows(rows: int, options: MegatronOptions) -> int:
    """Return the rows of the vocabulary that all ranks have together."""
    multiple = options.vocab_multiple * options.tensor_parallel
    return multiple * math.ceil((rows + options.added_tokens) / multiple)


def _with_padded_vocabulary(
    tensors: LazyTensors, options: MegatronOptions
) -> dict[str, TensorRef | LazyTensor]:
    embedding = tensors[f"{EMBEDDING}.weight"]
    head = tensors.get(f"{HEAD}.weight", embedding)
    rows = embedding.shape[0]
    new_rows = padded_rows(rows, options) - rows
    if new_rows > rows:
        raise UserError(
            f"the vocabulary of {rows} tokens would get {new_rows} rows more, which repeat its "
            "last ones; choose a smaller --vocab_multiple"
        )
    padded = {
        f"{EMBEDDING}.weight": _pad_lazily(embedding, new_rows),
        f"{HEAD}.weight": _pad_lazily(head, new_rows),
    }
    return {**tensors, **padded}


def _pad_lazily(source: TensorRef | LazyTensor, new_rows: int) -> TensorRef | LazyTensor:
    """Repeat the last rows of a tensor (V, C)."""
    if new_rows == 0:
        return source
    rows, *rest = source.shape

    def read() -> Tensor:
        tensor = source.read()
        return torch.cat((tensor, tensor[-new_rows:]))

    return LazyTensor(source.dtype, (rows + new_rows, *rest), read)


def _tensors_of_stage(
    model: LazyModel, options: MegatronOptions, stage: int
) -> dict[str, tuple[str, ...]]:
    """Return the tensors of a stage in the order of its file, and the whole ones they hold.

    In their names, a slash separates the keys of dictionaries within each other.
    """
    stages = options.pipeline_parallel
    is_last = stage == stages - 1
    tensors: dict[str, tuple[str, ...]] = {}
    if stage == 0:
        name = "language_model/embedding/word_embeddings/weight"
        tensors[name] = (f"{EMBEDDING}.weight",)
    if is_last:
        tensors[f"{ENCODER}final_layernorm.weight"] = ("model.norm.weight",)
    for number, layer in enumerate(layers_of_stage(model.n_layers, stages, stage)):
        for name, sources in layer_tensors(options.merge_mlp, bool(model.biases)).items():
            whole_names = tuple(f"model.layers.{layer}.{source}" for source in sources)
            tensors[f"{ENCODER}layers.{number}.{name}"] = whole_names
    if is_last:
        tensors["language_model/output_layer/weight"] = (f"{HEAD}.weight",)
    return tensors


def _fuse_lazily(
    sources: Sequence[TensorRef | LazyTensor], axis: int | None, ranks: int, heads: Heads
) -> LazyTensor:
    """Fuse tensors for each rank, and join what the ranks have."""
    first = sources[0]
    if len(sources) == 1:
        return LazyTensor(first.dtype, first.shape, first.read)
    rows = sum(source.shape[0] for source in sources)
    shape = (rows, *first.shape[1:])

    def read() -> Tensor:
        whole = [source.read() for source in sources]
        fused = torch.empty(shape, dtype=first.dtype)
        for rank in range(ranks):
            parts = [cut(tensor, axis, rank, ranks) for tensor in whole]
            cut(fused, axis, rank, ranks).copy_(fuse(parts, heads.n_kv_heads // ranks))
        return fused

    return LazyTensor(first.dtype, shape, read)


def _write_stages(
    grid: MegatronGrid,
    axes: Mapping[str, int | None],
    directory: Path,
    tensors: Iterator[tuple[str, Tensor]],
    specs: TensorSpecs,
) -> None:
    """Write the stages one after the other, each tensor once."""
    arrange = partial(_arrange, grid.deepspeed)
    for stage in range(grid.pipeline_parallel):
        whole = {name: spec for name, spec in specs.items() if name.startswith(f"{stage}/")}
        with ExitStack() as open_files:
            appends = []
            for rank in range(grid.tensor_parallel):
                path = directory / RELEASE / grid.file_of(rank, stage)
                rank_specs = _specs_of_rank(whole, axes, rank, grid.tensor_parallel)
                writer = torch_writer(path, rank_specs, arrange)
                appends.append(open_files.enter_context(writer))
            for _ in whole:
                _append_parts(appends, *next(tensors), axes)


def _append_parts(
    appends: Sequence[Append], name: str, tensor: Tensor, axes: Mapping[str, int | None]
) -> None:
    """Give every rank's file its part of a tensor."""
    for rank, append in enumerate(appends):
        append(name, cut(tensor, axes[name], rank, len(appends)))


def _specs_of_rank(
    whole: TensorSpecs, axes: Mapping[str, int | None], rank: int, ranks: int
) -> TensorSpecs:
    parts = {}
    for name, (dtype, shape) in whole.items():
        tensor = torch.empty(shape, dtype=dtype, device="meta")
        parts[name] = cut(tensor, axes[name], rank, ranks)
    return specs_of(parts)


def _arrange(deepspeed: bool, tensors: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a file. A stage without embedding or head has an empty dictionary."""
    embedding: dict[str, Any] = {"word_embeddings": {"weight": {}}}
    language_model = {"embedding": embedding, "encoder": {}, "output_layer": {}}
    model = {"language_model": language_model}
    for name, tensor in tensors.items():
        _, *keys, last = name.split("/")  # the first one is the stage
        inner: dict[str, Any] = model
        for key in keys:
            inner = inner[key]
        inner[last] = tensor
    if deepspeed:
        return {"checkpoint_version": VERSION, "module": model, "dp_world_size": 0}
    return {"checkpoint_version": VERSION, "model": model}
