"""Merging LoRA adapters into their base (Hu et al. 2021):

    W' = W + s·B·A        s = alpha / R, or alpha / sqrt(R) for rsLoRA

The product and the sum are fp32 and are rounded once, to the output's dtype, however many adapters
there are. A whole tensor of an adapter (`modules_to_save`, for example a larger embedding) replaces
the base's tensor, and what earlier adapters have added to it.

An adapter whose names do not match would merge without effect. So every tensor of an adapter must
find its place in the base, exactly once, and every module that it targets must have its tensors.
An embedding and head that are tied in the base become two weights if an adapter changes one.
The report says for each merged weight how much it changed, |W' - W| / |W|, and whether W'x equals
W x + s·B(A x) on random x, up to rounding. merge_check.py then compares the whole models.

This module leaves out DoRA (its merge rescales columns), and merging into quantized weights.

Shapes: a linear is (out, in); A is (R, in), B is (out, R); P random hidden states x are (in, P).
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from minillama.checkpoint.hf_reader import EMBEDDING, HEAD, check_names, open_weights
from minillama.checkpoint.tokenizer_files import has_tokenizer
from minillama.conversion.merge_check import compare, open_written, with_adapters
from minillama.conversion.merge_inputs import check_vocabulary, notes_on_base, notes_on_vocabulary
from minillama.conversion.meta_writer import write_meta
from minillama.conversion.writer import (
    Conversion,
    LazyTensor,
    Output,
    tokenizer_notes,
    write_checkpoint,
    write_companions,
)
from minillama.errors import UserError, closest, listed
from minillama.hf_config import read_config
from minillama.llama_config import LlamaConfig
from minillama.peft_adapters import Adapter, LoraFactors, read_adapter
from minillama.tensor_files import TensorRef, all_finite

NUM_PROBES = 4  # P, the random hidden states of the check


@dataclass(frozen=True)
class MergedWeight:
    """What merging did to a weight."""

    name: str
    change: float  # |W' - W| / |W|
    deviation: float  # max |W'x - (Wx + s·B(Ax))| / max |W'x|


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote and changed. `str()` gives the table for the user."""

    conversion: Conversion
    weights: list[MergedWeight]
    adapters: list[Adapter]
    deviation: float  # max |merged - unmerged logits| / max |unmerged logits|

    def __str__(self) -> str:
        lines = [str(self.conversion)]
        lines.append(f"{'layer':>12}  modules  relative change  merged - unmerged")
        for layer, weights in self._by_layer().items():
            change = sum(weight.change for weight in weights) / len(weights)
            deviation = max(weight.deviation for weight in weights)
            lines.append(f"{layer:>12} {len(weights):8} {change:16.2e} {deviation:18.1e}")
        for adapter in self.adapters:
            numbers = f"{len(adapter.factors)} products and {len(adapter.whole)} whole tensors"
            lines.append(f"{adapter.path}: {numbers}, each used once")
        lines.append(f"whole model: merged - unmerged logits, relative: {self.deviation:.1e}")
        unchanged = [weight.name for weight in self.weights if weight.change == 0]
        if unchanged:
            count = f"{len(unchanged)} of {len(self.weights)} modules"
            example = f"{unchanged[0]}, …"
            lines.append(f"warning: {count} did not change ({example}); was the adapter trained?")
        return "\n".join(lines)

    def _by_layer(self) -> dict[str, list[MergedWeight]]:
        layers = defaultdict(list)
        for weight in self.weights:
            match = re.match(r"model\.layers\.(\d+)\.", weight.name)
            layer = match[1] if match else weight.name.split(".")[-2]
            layers[layer].append(weight)
        return layers


@dataclass
class PlannedTensor:
    """A tensor of the output: `source`, plus s·B·A of each of `factors`."""

    source: TensorRef
    dtype: torch.dtype  # of the base's tensor
    factors: list[LoraFactors] = field(default_factory=list)


Plan = dict[str, PlannedTensor]  # by the tensor's name


def merge_lora(
    base: Path,
    adapters: Sequence[Path],
    output: Output,
    meta: bool = False,
    num_shards: int = 0,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> MergeReport:
    """Merge adapters, in order, into the model `base`.

    Args:
        meta: write Meta's layout instead of Hugging Face's.
        num_shards: files of Meta's layout; 0: as many as Meta has for this width.
        device: where B·A is computed.
        seed: of the random hidden states of the check.

    Raises UserError for an adapter that does not fit, before anything is written.
    """
    config = read_config(base)
    base_tensors = open_weights(base)
    check_names(config, base_tensors, base)
    opened = [read_adapter(path) for path in adapters]
    plan, notes = _plan_merge(config, base_tensors, base, opened)
    merged_config = _config_of(plan, config)
    if merged_config.tie_embeddings and HEAD not in base_tensors:
        del plan[HEAD]
    check_names(merged_config, {name: planned.source for name, planned in plan.items()}, base)

    weights: list[MergedWeight] = []  # filled as the tensors are read
    tensors = {}
    for name, planned in plan.items():
        dtype = output.dtype or planned.dtype
        tensors[name] = _merge_lazily(name, planned, dtype, device, seed, weights)

    sources = [*reversed(adapters), base]
    notes += tokenizer_notes(sources)
    if merged_config.vocab_size > config.vocab_size:
        notes += notes_on_vocabulary(sources, merged_config.vocab_size)
    unmerged = with_adapters(config, base_tensors, opened, device)
    deviations: list[float] = []  # filled when the files are written

    def check(directory: Path) -> None:
        written = open_written(directory, meta, device)
        deviations.append(compare(written, unmerged, tensors[EMBEDDING].dtype, seed))

    inputs = [base, *adapters]
    if meta:
        companions = next(filter(has_tokenizer, sources), base)
        conversion = write_meta(
            output, inputs, tensors, merged_config, companions, num_shards, check, notes
        )
    else:

        def write_other_files(directory: Path) -> None:
            write_companions(directory, base, merged_config, tensors[EMBEDDING].dtype, sources)
            check(directory)

        conversion = write_checkpoint(output, inputs, tensors, write_other_files, notes=notes)
    return MergeReport(conversion, weights, opened, deviations[0])


def _plan_merge(
    config: LlamaConfig, base_tensors: dict[str, TensorRef], base: Path, adapters: list[Adapter]
) -> tuple[Plan, list[str]]:
    """What each tensor of the output is made of, and notes for the user.

    A tied head stands under its own name, with the embedding's tensor.
    """
    plan = {name: PlannedTensor(tensor, tensor.dtype) for name, tensor in base_tensors.items()}
    if config.tie_embeddings:
        plan[HEAD] = replace(plan[EMBEDDING], factors=[])
    notes = []
    for adapter in adapters:
        notes += notes_on_base(adapter.path, base, plan[EMBEDDING].source.shape[0])
        _add_to_plan(plan, adapter)
    return plan, notes


def _config_of(plan: Plan, base_config: LlamaConfig) -> LlamaConfig:
    """The configuration of the output: its rows, and whether embedding and head are one weight."""
    embedding = plan[EMBEDDING]
    is_tied = base_config.tie_embeddings
    if is_tied:
        head = plan[HEAD]
        is_same = embedding.source == head.source or embedding.source.equals(head.source)
        is_tied = is_same and not embedding.factors and not head.factors
    vocab_size = embedding.source.shape[0]
    return replace(base_config, vocab_size=vocab_size, tie_embeddings=is_tied)


def _add_to_plan(plan: Plan, adapter: Adapter) -> None:
    """Add one more adapter. Raises UserError if one of its tensors does not fit."""
    names = [*adapter.whole, *(entry.weight_name for entry in adapter.factors)]
    for name in names:
        if name not in plan:
            raise UserError(
                f"{adapter.path}: {name}: the base has no such tensor{closest(name, plan)}"
            )
    for name, tensor in adapter.whole.items():
        shape = plan[name].source.shape
        if adapter.is_copy(name) and tensor.equals(plan[name].source):
            continue
        may_grow = name in (EMBEDDING, HEAD) and tensor.shape[1:] == shape[1:]
        grows = may_grow and tensor.shape[0] >= shape[0]
        if tensor.shape != shape and not grows:
            raise UserError(
                f"{adapter.path}: {name} is {tensor.shape}, in the base {shape}; "
                "it was trained on another base"
            )
        plan[name] = PlannedTensor(tensor, plan[name].dtype)
    for entry in adapter.factors:
        planned = plan[entry.weight_name]
        if entry.weight_shape != planned.source.shape:
            raise UserError(
                f"{adapter.path}: {entry.weight_name}: the adapter makes {entry.weight_shape}, "
                f"the base has {planned.source.shape}"
            )
        planned.factors.append(entry)
    matrices = [name for name, planned in plan.items() if len(planned.source.shape) == 2]
    missing = adapter.missing(name.removesuffix(".weight") for name in matrices)
    if missing:
        raise UserError(f"{adapter.path}: {listed(missing)}; the file is not complete")
    if (adapter.path / "tokenizer.model").is_file():
        check_vocabulary(adapter, plan[EMBEDDING].source.shape[0])


def _merge_lazily(
    name: str,
    planned: PlannedTensor,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
    weights: list[MergedWeight],
) -> LazyTensor:
    """The tensor of the output. Its reading appends to `weights` what merging did to it."""
    source = planned.source

    def read() -> Tensor:
        weight = source.read_finite()
        if not planned.factors:
            return _check_range(name, weight.to(dtype))
        # Several adapters are one adapter of their summed rank.
        b = [entry.b.read_finite().float() * entry.scale for entry in planned.factors]
        a = [entry.a.read_finite().float() for entry in planned.factors]
        scaled_b = torch.cat(b, dim=1).to(device)  # (out, R)
        whole_a = torch.cat(a, dim=0).to(device)  # (R, in)
        merged, report = _merge(name, weight.to(device).float(), scaled_b, whole_a, dtype, seed)
        weights.append(report)
        return _check_range(name, merged)

    return LazyTensor(dtype, source.shape, read)


def _check_range(name: str, weight: Tensor) -> Tensor:
    """Return a weight of the output. Raises UserError if it left the range of its dtype."""
    if not all_finite(weight):
        dtype = str(weight.dtype).removeprefix("torch.")
        raise UserError(
            f"{name}: a value is too large for {dtype}; write another --dtype, such as float32"
        )
    return weight


def _merge(
    name: str, weight: Tensor, scaled_b: Tensor, a: Tensor, dtype: torch.dtype, seed: int
) -> tuple[Tensor, MergedWeight]:
    """Return W' = W + s·B·A in `dtype`, and what merging did to W.

    weight: W in fp32 (out, in), overwritten.
    scaled_b: s·B (out, R).
    a: A (R, in).
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(weight.shape[1], NUM_PROBES, generator=generator).to(weight.device)  # (in, P)
    norm = weight.norm(dim=1).norm().item()  # by rows first, so that fp32 is exact enough
    unmerged = weight @ x + scaled_b @ (a @ x)  # (out, P)
    merged = weight.addmm_(scaled_b, a).to(dtype)  # (out, in)
    output = weight.copy_(merged) @ x  # W'x (out, P); in place: one fp32 copy is enough
    # |B·A|² = Σ (BᵀB) ∘ (AAᵀ): (R, R) in place of (out, in)
    gram_b = scaled_b.T.double() @ scaled_b.double()
    gram_a = a.double() @ a.T.double()
    change = (gram_b * gram_a).sum().clamp(min=0).sqrt().item()
    deviation = (output - unmerged).abs().max().item()
    largest = output.abs().max().item()
    relative_change = change / norm if norm else math.inf
    relative_deviation = deviation / largest if largest else 0.0
    return merged, MergedWeight(name, relative_change, relative_deviation)
