"""Reads the files of a Megatron checkpoint as whole tensors under Hugging Face's names.

    mp_rank_00_000 ┐
    mp_rank_01_000 ┼─ the module's rows of a fused tensor ─▶ joined along the axis of the cut
    …              ┘

Releases and training checkpoints are read, of Megatron and of DeepSpeed, in all layouts of names.
Only headers are read at first. Of a training checkpoint the weights are taken, and nothing in it is
executed (torch_files.py). A LoRA run saves its adapter alone; its factors are cut as their module
is, and the adapter of query_key_value has one A for q, k and v.

Left out: virtual stages, and the weights of a distributed optimizer.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillama.conversion.megatron_layout import (
    DEEPSPEED_TRACKER,
    QKV,
    TRACKER,
    VERSION,
    Heads,
    LazyModel,
    MegatronGrid,
    Place,
    place_of,
    split,
)
from minillama.conversion.writer import LazyTensor
from minillama.errors import UserError, listed
from minillama.files import read_text
from minillama.hub import hub_hint
from minillama.output_directory import restore
from minillama.parallel.shards import axis_of, join
from minillama.torch_files import Unknown, map_state

ENTRY = re.compile(r"mp_rank_(?P<rank>\d+)(?:_(?P<stage>\d+))?(?P<deepspeed>_model_states\.pt)?")
# Rotary positions, and the frozen copy of a module that a LoRA run trained whole.
IGNORED = re.compile(r"rotary_emb\.inv_freq$|\.original_module\.")


@dataclass(frozen=True)
class MegatronFiles:
    """The files of a checkpoint."""

    folder: Path  # of the iteration, or of the release
    grid: MegatronGrid

    @property
    def stages(self) -> list[list[Path]]:
        """The paths of the ranks of each stage."""
        stages = []
        for stage in range(self.grid.pipeline_parallel):
            names = [self.grid.file_of(rank, stage) for rank in range(self.grid.tensor_parallel)]
            stages.append([self.folder / name for name in names])
        return stages


@dataclass(frozen=True)
class MegatronCheckpoint:
    """What the files hold."""

    model: LazyModel  # of a LoRA run: the adapter's tensors alone
    is_lora: bool
    is_merged: bool  # gate and up are one tensor
    arguments: dict[str, Any]  # of the training run


def find_files(directory: Path) -> MegatronFiles:
    """Find the files of a checkpoint, given its directory or the folder of an iteration.

    Raises UserError if files of the grid are missing.
    """
    folder = _folder_of(directory)
    entries = [ENTRY.fullmatch(path.name) for path in folder.glob("mp_rank_*")]
    matches = [match for match in entries if match is not None]
    if not matches:
        raise UserError(
            f"{folder}: holds no mp_rank_* of a Megatron checkpoint{hub_hint(directory)}"
        )
    grid = MegatronGrid(
        tensor_parallel=1 + max(int(match["rank"]) for match in matches),
        pipeline_parallel=1 + max(int(match["stage"] or 0) for match in matches),
        deepspeed=any(match["deepspeed"] for match in matches),
    )
    files = MegatronFiles(folder, grid)
    missing = []
    for paths in files.stages:
        missing += [f"{path} is missing" for path in paths if not path.is_file()]
    if missing:
        raise UserError(listed(missing))
    return files


def _folder_of(directory: Path) -> Path:
    """Return the folder that the tracker of a directory names; without one, the directory."""
    restore(directory)
    if (directory / TRACKER).is_file():
        name = read_text(directory / TRACKER).strip()
        return directory / (f"iter_{int(name):07d}" if name.isdecimal() else name)
    if (directory / DEEPSPEED_TRACKER).is_file():
        return directory / read_text(directory / DEEPSPEED_TRACKER).strip()
    return directory


def read_megatron(files: MegatronFiles, heads: Heads) -> MegatronCheckpoint:
    """Read the headers of a checkpoint.

    Raises UserError for damaged files, and for names and shapes that do not belong together.
    """
    names_of_stages = [_names_of(paths) for paths in files.stages]
    all_names = list(chain(*names_of_stages))
    is_lora = any(".lora_" in name for name in all_names)
    if is_lora and any("norm" in name for name in all_names):
        raise UserError(f"{files.folder}: holds LoRA factors and the weights of their base")
    is_merged = not is_lora and not any(".mlp.gate_proj." in name for name in all_names)
    is_flat = any(".attention.query_key_value." in name for name in all_names)
    if is_flat and heads.group > 1 and heads.n_kv_heads > files.grid.tensor_parallel:
        raise UserError(
            f"{files.folder}: written by an AscendSpeed of before 2023-11-28, which mixed the "
            "heads of a rank with several key/value heads; convert the original model again"
        )

    tensors: dict[str, LazyTensor] = {}
    n_layers = 0
    for paths, names in zip(files.stages, names_of_stages, strict=True):
        last_layer = -1
        for name in names:
            place = place_of(name, is_merged)
            if place is None:
                raise UserError(f"{paths[0]}: {name} is no tensor of Megatron's LLaMA")
            if place.layer is not None:
                last_layer = max(last_layer, place.layer)
            parts = _RankParts(paths, name, place, heads)
            tensors |= _split_by_module(parts, n_layers)
        n_layers += last_layer + 1
    return MegatronCheckpoint(
        model=LazyModel(tensors, n_layers, heads),
        is_lora=is_lora,
        is_merged=is_merged,
        arguments=_arguments_of(files.stages[0][0]),
    )


def _names_of(paths: Sequence[Path]) -> list[str]:
    """Return the names of the tensors of a stage, which are the same for all of its ranks."""
    names_of_rank = []
    for path in paths:
        state = map_state(path)
        version = state.others.get("checkpoint_version")
        if version != VERSION:
            raise UserError(
                f"{path}: checkpoint_version = {version}: only {VERSION} is supported; others "
                "order q, k and v in another way, or have virtual stages"
            )
        names = [name for name in state.weights if not IGNORED.search(name)]
        names_of_rank.append(names)
    for path, names in zip(paths, names_of_rank, strict=True):
        different = set(names) ^ set(names_of_rank[0])
        if different:
            raise UserError(f"{min(different)}: only in one of {paths[0]} and {path}")
    return names_of_rank[0]


@dataclass(frozen=True)
class _RankParts:
    """What the ranks of a stage hold under one name."""

    paths: Sequence[Path]
    name: str
    place: Place
    heads: Heads

    def of_module(self, index: int) -> list[Tensor]:
        """Return the part of one module of `place`, for each rank, as views of the files."""
        modules = self.place.modules
        if self.place.parameter == "lora_A.weight":  # one A for all modules
            modules = modules[:1]
        groups, rest = divmod(self.heads.n_kv_heads, len(self.paths))
        parts = []
        for path in self.paths:
            fused = map_state(path).weights[self.name]
            fits = rest == 0 and fused.shape[0] % (groups * (self.heads.group + 2)) == 0
            if modules == QKV and not fits:
                raise UserError(
                    f"{path}: {self.name} of {fused.shape[0]} rows does not hold a part of "
                    f"{self.heads}; --config names another model"
                )
            parts.append(split(fused, index, len(modules), groups, self.heads.group))
        return parts


def _split_by_module(parts: _RankParts, first_layer: int) -> dict[str, LazyTensor]:
    """Return the whole tensors that lie under a name. first_layer: of the stage."""
    tensors = {}
    prefix = ""
    if parts.place.layer is not None:
        prefix = f"model.layers.{first_layer + parts.place.layer}."
    for index, module in enumerate(parts.place.modules):
        name = f"{prefix}{module}.{parts.place.parameter}"
        tensors[name] = _join_lazily(name, parts, index)
    return tensors


def _join_lazily(name: str, parts: _RankParts, index: int) -> LazyTensor:
    axis = axis_of(name)
    views = parts.of_module(index)
    shape = list(views[0].shape)
    if axis is not None:
        shape[axis] = sum(view.shape[axis] for view in views)

    def read() -> Tensor:
        tensors = parts.of_module(index)
        if axis is None and any(not torch.equal(tensors[0], tensor) for tensor in tensors[1:]):
            raise UserError(
                f"{name}: differs between the tensor-parallel ranks, which should all hold it"
            )
        return join(tensors, axis)

    return LazyTensor(views[0].dtype, tuple(shape), read)


def _arguments_of(path: Path) -> dict[str, Any]:
    """Return the settings of the training run that wrote a file; {} for a release."""
    arguments = map_state(path).others.get("args")
    if isinstance(arguments, Unknown) and isinstance(arguments.state, dict):
        return arguments.state
    return {}
