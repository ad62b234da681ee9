"""Merging LoRA adapters into their base (Hu et al. 2021): W' = W + s·B·A, with s = alpha / R, or alpha / sqrt(R) for rsLoRA.

The product and the sum are fp32 and are rounded once, to the output's dtype, however many adapters there are. Whole tensors in an
adapter (`modules_to_save`: a grown vocabulary lives there) replace the base's, and all that earlier adapters made of it.

An adapter whose names do not match would merge without effect, so every key must find its tensor, exactly once. Every merge reports
how much W changed, |W' - W| / |W|, and whether W'x equals W x + s·B(A x) on random x, up to the rounding of W'.

Left out on purpose: DoRA (its merge rescales columns), and merging into quantized weights.

Shapes: a linear is (out, in); A is (R, in), B is (out, R).
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from minillama import peft_adapters
from minillama.checkpoint.hf_format import (
    EMBEDDING,
    HEAD,
    check_names,
    has_tokenizer,
    open_weights,
)
from minillama.conversion.meta import write_meta
from minillama.conversion.writer import LazyTensor, Output, write_checkpoint, write_companions
from minillama.errors import UserError, closest, read_json
from minillama.hf_config import read_config
from minillama.tensor_files import TensorRef
from minillama.tokenizer import open_tokenizer

PROBES = 4  # random hidden states in the check
Product = tuple[
    TensorRef, TensorRef, float
]  # s·B·A as B (rows, R), A (R, columns) and s; or as Aᵀ and Bᵀ where weights lie as (in, out)


@dataclass(frozen=True)
class Adapter:
    path: Path
    products: dict[str, Product]  # by the base tensor's name
    replacements: dict[str, TensorRef]


@dataclass(frozen=True)
class Merged:
    """What merging did to a tensor. change: |W' - W| / |W|; deviation: max |W'x - (Wx + s·BAx)| / max |W'x|."""

    name: str
    change: float
    deviation: float


def merge_lora(
    base: Path,
    adapters: list[Path],
    output: Output,
    meta: bool = False,
    shards: int = 0,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> list[Merged]:
    """Merge `adapters`, in order, into `base`, and write a Hugging Face directory, or Meta's layout in `shards` files.
    Raises UserError for an adapter that does not fit, before anything is written."""
    config, entries = read_config(base), open_weights(base)
    check_names(config, entries, base)
    opened = [read_adapter(path) for path in adapters]
    if config.tie_embeddings and any(
        HEAD in adapter.replacements | adapter.products for adapter in opened
    ):
        entries, config = (
            entries | {HEAD: entries[EMBEDDING]},
            replace(config, tie_embeddings=False),
        )
    recipes, products = dict(entries), defaultdict(list)
    for adapter in opened:
        _stack(adapter, recipes, products)
    config = replace(config, vocab_size=recipes[EMBEDDING].shape[0])
    check_names(config, recipes, base)
    dtypes = {name: output.dtype or entry.dtype for name, entry in entries.items()}
    report: list[Merged] = []
    for name, entry in recipes.items():
        read = (
            partial(_merge, name, entry, products[name], dtypes[name], report, device, seed)
            if products[name]
            else entry.read
        )
        recipes[name] = LazyTensor(dtypes[name], entry.shape, read)
    sources = [*reversed(adapters), base]
    if meta:
        write_meta(output, recipes, config, next(filter(has_tokenizer, sources), base), shards)
    else:
        write_checkpoint(
            output,
            recipes,
            lambda path: write_companions(path, base, config, dtypes[EMBEDDING], sources),
        )
    _show(report, opened)
    return report


def read_adapter(path: Path) -> Adapter:
    """A PEFT adapter directory of any age, or a raw training state with PEFT's names."""
    adapter = peft_adapters.read_adapter(path)
    products = {
        factors.weight_name: (factors.b, factors.a, factors.scale) for factors in adapter.factors
    }
    return Adapter(path, products, adapter.whole)


def _stack(
    adapter: Adapter, final: dict[str, TensorRef], products: dict[str, list[Product]]
) -> None:
    """Put one more adapter on top: `final` is where each whole tensor comes from, `products` what is added to it."""
    if strange := [name for name in adapter.replacements | adapter.products if name not in final]:
        raise UserError(
            f"{adapter.path}: {strange[0]}: the base has no such tensor{closest(strange[0], final)}"
        )
    for name, entry in adapter.replacements.items():
        old = final[name].shape
        grows = (
            name in (EMBEDDING, HEAD) and entry.shape[1:] == old[1:] and entry.shape[0] >= old[0]
        )
        if entry.shape != old and not grows:
            raise UserError(
                f"{adapter.path}: {name} is {entry.shape}, in the base {old}; it was trained on another base"
            )
        final[name], products[name] = entry, []
    for name, product in adapter.products.items():
        made = product[0].shape[0], product[1].shape[1]
        if made != final[name].shape:
            raise UserError(
                f"{adapter.path}: {name}: the adapter makes {made}, the base has {final[name].shape}"
            )
        products[name].append(product)
    if (adapter.path / "tokenizer.model").is_file():
        _check_vocabulary(adapter, final[EMBEDDING].shape[0])


def _check_vocabulary(adapter: Adapter, rows: int) -> None:
    """Pieces of tokenizer.model, and the tokens that the JSON files beside it add (Chinese-Alpaca's [PAD]), against the embedding."""
    path, tokens = adapter.path / "tokenizer.model", []
    for name, part in (("added_tokens.json", dict.keys), ("special_tokens_map.json", dict.values)):
        if (adapter.path / name).is_file():
            tokens += part(read_json(adapter.path / name))
    texts = {
        token["content"] if isinstance(token, dict) else token
        for token in tokens
        if isinstance(token, (dict, str))
    }
    model = open_tokenizer(path).model
    pieces = len(texts.union(map(model.id_to_piece, range(model.get_piece_size()))))
    if EMBEDDING in adapter.replacements and pieces != rows:
        raise UserError(
            f"{path}: {pieces} pieces, but the adapter's embedding has {rows} rows; a tokenizer of another model "
            "(LLaMA's has 32000, Chinese-LLaMA's 49953, Chinese-Alpaca's 49954, Chinese-LLaMA-2's 55296)"
        )
    if pieces > rows:
        raise UserError(
            f"{path}: {pieces} pieces, but the embedding has {rows} rows and the adapter brings no larger one "
            "(modules_to_save: embed_tokens, lm_head); was it saved whole?"
        )


def _merge(
    name: str,
    entry: TensorRef,
    products: list[Product],
    dtype: torch.dtype,
    report: list[Merged],
    device: torch.device | str,
    seed: int,
) -> Tensor:
    """W' for one tensor, and its line of the report."""
    left = torch.cat([left.read().float() * scale for left, _, scale in products], 1).to(
        device
    )  # several adapters are
    right = torch.cat([right.read().float() for _, right, _ in products], 0).to(
        device
    )  # one of their summed rank
    x = torch.randn(entry.shape[1], PROBES, generator=torch.Generator().manual_seed(seed)).to(
        device
    )  # (in, P)
    weight = entry.read().to(device).float()
    norm, unmerged = (
        weight.norm(dim=1).norm().item(),
        weight @ x + left @ (right @ x),
    )  # by rows, so fp32 is enough; (out, P)
    merged = weight.addmm_(left, right).to(dtype)
    seen = weight.copy_(merged) @ x  # in the fp32 copy, so that there is only one
    # |B·A|² = Σ (BᵀB) ∘ (AAᵀ): R×R numbers in place of out×in
    change = (
        ((left.T.double() @ left.double()) * (right.double() @ right.T.double()))
        .sum()
        .clamp(min=0)
        .sqrt()
        .item()
    )
    deviation, largest = (seen - unmerged).abs().max().item(), seen.abs().max().item()
    report.append(
        Merged(name, change / norm if norm else math.inf, deviation / largest if largest else 0.0)
    )
    return merged


def _show(report: list[Merged], adapters: list[Adapter]) -> None:
    layers: dict[str, list[Merged]] = defaultdict(list)
    for merged in report:
        layer = re.match(r"model\.layers\.(\d+)\.", merged.name)
        layers[layer[1] if layer else merged.name.split(".")[-2]].append(merged)
    print(f"{'layer':>12} {'modules':>8} {'relative change':>16} {'merged - unmerged':>18}")
    for layer, group in layers.items():
        change, deviation = (
            sum(merged.change for merged in group) / len(group),
            max(merged.deviation for merged in group),
        )
        print(f"{layer:>12} {len(group):8} {change:16.2e} {deviation:18.1e}")
    for adapter in adapters:
        print(
            f"{adapter.path}: {len(adapter.products)} products and {len(adapter.replacements)} whole tensors, each used once"
        )
    if unchanged := [merged.name for merged in report if merged.change == 0]:
        print(
            f"warning: {len(unchanged)} of {len(report)} modules did not change ({unchanged[0]}, …); was the adapter trained?"
        )
