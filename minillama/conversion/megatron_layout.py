"""Megatron's layout: a file for each rank of a grid of tensor parallelism (TP) × stages (PP).

    OUT/latest_checkpointed_iteration.txt            "release"
    OUT/release/mp_rank_00_000/model_optim_rng.pt    TP rank 0 of stage 0
    OUT/release/mp_rank_01_000/model_optim_rng.pt    TP rank 1 of stage 0
    OUT/release/mp_rank_00_001/model_optim_rng.pt    TP rank 0 of stage 1

With one stage the folders are mp_rank_00, mp_rank_01, … Each rank holds its part of every tensor
(parallel/shards.py has the axes). Layers are numbered from 0 in every stage. Two of Megatron's
linear layers are several of Hugging Face's:

    query_key_value   for each key/value head: the queries of its group, its key, its value
                      4 query heads and 2 key/value heads: q0 q1 k0 v0 q2 q3 k1 v1
    mlp.proj          the gate of the rank, then its up (with --merge_mlp)

Whole tensors are cut first and joined after it: a rank has its own gate and its own up. Rows within
a head stay as they are, since both sides rotate the halves of a head.

There are two layouts of names, and a later one. `place_of` reads all of them; the first is written:

    nested   AscendSpeed from 2023-11-28, ModelLink   {"language_model": {"encoder": {…}}}
    flat     AscendSpeed before it                    {"language_model.layers.0.attention.…": …}
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minillama.conversion.writer import LazyTensors
from minillama.llama_config import LlamaConfig

TRACKER = "latest_checkpointed_iteration.txt"
DEEPSPEED_TRACKER = "latest"
VERSION = 3.0  # of the layout: how q, k and v follow each other
EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")

# Megatron's modules of a layer, in the order of its files -> Hugging Face's modules that they hold
ATTENTION = {
    "self_attention.query_key_value": QKV,
    "self_attention.dense": ("self_attn.o_proj",),
}
SEPARATE_MLP = {"mlp.gate_proj": GATE_UP[:1], "mlp.dense_h_to_4h": GATE_UP[1:]}
MERGED_MLP = {"mlp.proj": GATE_UP}
REST = {
    "mlp.dense_4h_to_h": ("mlp.down_proj",),
    "input_layernorm": ("input_layernorm",),
    "post_attention_layernorm": ("post_attention_layernorm",),
}
# Names in the flat layout and in later versions. A merged MLP may be called dense_h_to_4h there.
OTHER_LAYER_NAMES = {
    "attention.query_key_value": QKV,
    "attention.dense": ("self_attn.o_proj",),
    "mlp.up_proj": GATE_UP[1:],
    "mlp.down_proj": ("mlp.down_proj",),
    "input_norm": ("input_layernorm",),
    "post_attention_norm": ("post_attention_layernorm",),
}
LAYER_MODULES = ATTENTION | SEPARATE_MLP | MERGED_MLP | REST | OTHER_LAYER_NAMES
TOP_MODULES = {
    "embedding.word_embeddings": EMBEDDING,
    "word_embeddings": EMBEDDING,
    "final_layernorm": "model.norm",
    "final_norm": "model.norm",
    "output_layer": HEAD,
    "lm_head.lm_head": HEAD,
    "word_embeddings_for_head": HEAD,  # a tied head, on the last stage
}
NAME = re.compile(
    r"(?:(?:base_model\.model|module|language_model|encoder)\.)*"
    r"(?:layers\.(?P<layer>\d+)\.)?(?P<module>.+?)"
    r"\.(?:modules_to_save\.\w+\.)?"
    r"(?P<parameter>weight|bias|lora_[AB]\.(?:\w+\.)?weight)"
)


@dataclass(frozen=True)
class Heads:
    """The numbers of heads, which no shape of a tensor tells."""

    n_heads: int  # H
    n_kv_heads: int  # K

    @property
    def group(self) -> int:
        """The query heads of a key/value head."""
        return self.n_heads // self.n_kv_heads


@dataclass(frozen=True)
class MegatronGrid:
    """How a model is cut, and how its files are called."""

    tensor_parallel: int
    pipeline_parallel: int
    deepspeed: bool  # DeepSpeed's names of files

    def file_of(self, rank: int, stage: int) -> str:
        """Return the path of a rank's file, below the folder of the iteration."""
        if self.deepspeed:
            return f"mp_rank_{rank:02d}_model_states.pt"
        number = f"{rank:02d}" if self.pipeline_parallel == 1 else f"{rank:02d}_{stage:03d}"
        return f"mp_rank_{number}/model_optim_rng.pt"


@dataclass(frozen=True)
class MegatronOptions:
    """How a model is written. The names are those of convert.py's flags."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    deepspeed: bool = False
    merge_mlp: bool = False  # gate and up as one tensor
    vocab_multiple: int = 128  # the rows of a rank's vocabulary are a multiple of this
    added_tokens: int = 0  # rows for tokens that will be added

    @property
    def grid(self) -> MegatronGrid:
        return MegatronGrid(self.tensor_parallel, self.pipeline_parallel, self.deepspeed)


@dataclass(frozen=True)
class LazyModel:
    """The tensors of a model, whole, under Hugging Face's names."""

    tensors: LazyTensors
    n_layers: int
    heads: Heads

    @property
    def biases(self) -> list[str]:
        return [name for name in self.tensors if name.endswith(".bias")]


class Place(NamedTuple):
    """What a tensor in a file is: a parameter of a module of Megatron's."""

    layer: int | None  # within the stage; None: outside the layers
    modules: tuple[str, ...]  # Hugging Face's, whose tensors it holds; within the layer if there is
    parameter: str  # weight, bias, lora_A.weight, lora_B.weight


def heads_of(config: LlamaConfig) -> Heads:
    return Heads(config.n_heads, config.n_kv_heads)


def layer_tensors(merge_mlp: bool, bias: bool) -> dict[str, tuple[str, ...]]:
    """Return the tensors of a layer in the order of its file, and those that each one holds."""
    tensors = {}
    for parameter in ("weight", "bias") if bias else ("weight",):
        for module, hf_modules in ATTENTION.items():
            sources = tuple(f"{hf_module}.{parameter}" for hf_module in hf_modules)
            tensors[f"{module}.{parameter}"] = sources
    for module, hf_modules in ((MERGED_MLP if merge_mlp else SEPARATE_MLP) | REST).items():
        tensors[f"{module}.weight"] = tuple(f"{hf_module}.weight" for hf_module in hf_modules)
    return tensors


def place_of(name: str, is_merged: bool) -> Place | None:
    """Return what a tensor of a file is, by its name in any of the layouts; None: not known.

    is_merged: whether gate and up are one tensor, which is then called dense_h_to_4h at times.
    """
    match = NAME.fullmatch(name)
    if match is None:
        return None
    words = match["parameter"].split(".")
    parameter = f"{words[0]}.weight" if words[0].startswith("lora_") else words[0]
    module = match["module"]
    if match["layer"] is None:
        top = TOP_MODULES.get(module)
        return None if top is None else Place(None, (top,), parameter)
    modules = LAYER_MODULES.get(module)
    if module == "mlp.dense_h_to_4h" and is_merged:
        modules = GATE_UP
    return None if modules is None else Place(int(match["layer"]), modules, parameter)


def fuse(parts: Sequence[Tensor], groups: int) -> Tensor:
    """Join q, k and v, or gate and up, as a rank holds them.

    parts: the rank's own, (rows, …). groups: its key/value heads.
    """
    if len(parts) == len(GATE_UP):
        return torch.cat(list(parts))
    grouped = [part.unflatten(0, (groups, -1)) for part in parts]  # (K, rows of the group, …)
    return torch.cat(grouped, 1).flatten(0, 1)


def split(fused: Tensor, index: int, modules: int, groups: int, group: int) -> Tensor:
    """The inverse of `fuse`: return the part of module `index` of `modules`.

    groups: the rank's key/value heads. group: the query heads of each.
    """
    if modules == 1:
        return fused
    if modules == len(GATE_UP):
        return fused.chunk(2)[index]
    heads = fused.unflatten(0, (groups, group + 2, -1))  # (K, H/K + 2, D, …)
    return heads.split([group, 1, 1], dim=1)[index].flatten(0, 2)
