"""Meta's layout: the names of its tensors, how they are sharded, their rotary order, params.json.

Meta's files consolidated.00.pth, consolidated.01.pth, … each hold a slice of every matrix, one file
for each of the ranks of model parallelism. The axes are those of parallel/shards.py, but for the
embedding, which Meta cuts by columns:

    cut along axis 0 (rows)        wq wk wv w1 w3 output
    cut along axis 1 (columns)     wo w2 tok_embeddings
    whole in every file            the norms

Rotary order: Meta rotates neighbouring rows, Hugging Face rotates the first half of a head against
the second half. So the rows of each query and key head are reordered:

    Meta   a0 b0 a1 b1 a2 b2   ──to_halves──▶   a0 a1 a2 b0 b1 b2   Hugging Face

Pair i is (a_i, b_i) in both, and is rotated by angle i in both. Scores are dot products within a
head, so one reordering of both q and k changes no score. The heads of k are its own n_kv_heads, not
n_heads. Values are not rotated, so v and o keep their order.

Shapes: H query heads, K key/value heads, D head size, C model width.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from minillama.errors import UserError
from minillama.files import read_json
from minillama.llama_config import LlamaConfig, ffn_width
from minillama.parallel.shards import COLUMNS, axis_of


class MetaTensor(NamedTuple):
    """A tensor in Meta's layout."""

    name: str
    axis: int | None  # along which the shards cut it; None: every shard holds all of it


# Hugging Face's module -> Meta's module
LAYER_MODULES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
NUM_SHARDS = {5120: 2, 6656: 4, 8192: 8}  # Meta's own, by model width; 1 for smaller models


def meta_tensors(n_layers: int) -> dict[str, MetaTensor]:
    """Return Meta's tensor for each of Hugging Face's names, in the model's order."""
    tensors = {"model.embed_tokens.weight": MetaTensor("tok_embeddings.weight", COLUMNS)}
    for layer in range(n_layers):
        for hf_module, meta_module in LAYER_MODULES.items():
            name = f"model.layers.{layer}.{hf_module}.weight"
            meta_name = f"layers.{layer}.{meta_module}.weight"
            tensors[name] = MetaTensor(meta_name, axis_of(name))
    tensors["model.norm.weight"] = MetaTensor("norm.weight", None)
    tensors["lm_head.weight"] = MetaTensor("output.weight", axis_of("lm_head.weight"))
    return tensors


def rotary_heads(name: str, config: LlamaConfig) -> int:
    """Return the number of heads whose rows have a rotary order: 0 for all but q and k.

    name: Hugging Face's name of the tensor.
    """
    module = name.split(".")[-2]
    if module == "q_proj":
        return config.n_heads
    if module == "k_proj":
        return config.n_kv_heads
    return 0


def to_halves(weight: Tensor, heads: int) -> Tensor:
    """Meta's rotary order to Hugging Face's, for the rows of q_proj (H heads) or k_proj (K heads).

    (heads * D, C) -> (heads * D, C)
    """
    rows, C = weight.shape
    pairs = weight.view(heads, rows // heads // 2, 2, C)  # (heads, D/2, 2, C)
    return pairs.transpose(1, 2).reshape(rows, C)  # (heads, 2, D/2, C) -> (heads * D, C)


def to_pairs(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `to_halves`."""
    rows, C = weight.shape
    halves = weight.view(heads, 2, rows // heads // 2, C)  # (heads, 2, D/2, C)
    return halves.transpose(1, 2).reshape(rows, C)  # (heads, D/2, 2, C) -> (heads * D, C)


@dataclass(frozen=True)
class MetaParams:
    """What params.json holds. It has no F and often no vocabulary; the shapes of tensors do."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    norm_eps: float
    rope_theta: float
    vocab_size: int | None  # None: as the tokenizer has


def read_params(path: Path) -> MetaParams:
    """Read params.json. Raises UserError if a value is missing, wrong, or not supported."""
    raw = read_json(path, "Meta's directory has one beside the weights")
    raw = raw.get("model", raw)
    types = {"dim": int, "n_layers": int, "n_heads": int, "norm_eps": float}
    for key, expected_type in types.items():
        value = raw.get(key)
        has_type = type(value) is expected_type
        if not has_type or not 0 < value < 2**20:
            raise UserError(
                f"{path}: {key} = {value!r} is missing or makes no sense; is this Meta's own file?"
            )
    if raw.get("use_scaled_rope"):
        raise UserError(
            f"{path}: use_scaled_rope: LLaMA 3.1 and later scale the rotary frequencies by numbers "
            "that Meta's files do not hold; take the Hugging Face release"
        )
    vocab_size = raw.get("vocab_size")
    return MetaParams(
        dim=raw["dim"],
        n_layers=raw["n_layers"],
        n_heads=raw["n_heads"],
        n_kv_heads=raw.get("n_kv_heads") or raw["n_heads"],
        norm_eps=raw["norm_eps"],
        rope_theta=float(raw.get("rope_theta") or 10000.0),
        vocab_size=None if vocab_size == -1 else vocab_size,
    )


def config_from_params(params: MetaParams, vocab_size: int, ffn_dim: int) -> LlamaConfig:
    """Return the config of a model of Meta's. vocab_size, ffn_dim: from the tensors' shapes."""
    is_llama3 = vocab_size >= 128_000
    return LlamaConfig(
        dim=params.dim,
        n_layers=params.n_layers,
        n_heads=params.n_heads,
        n_kv_heads=params.n_kv_heads,
        head_dim=params.dim // params.n_heads,
        ffn_dim=ffn_dim,
        vocab_size=vocab_size,
        max_seq_len=_context_length(params, is_llama3),
        norm_eps=params.norm_eps,
        rope_theta=params.rope_theta,
        bos_id=128_000 if is_llama3 else 1,
        eos_ids=(128_001,) if is_llama3 else (2,),
    )


def _context_length(params: MetaParams, is_llama3: bool) -> int:
    """Transformers' rule: Meta's files do not hold the context length."""
    if is_llama3:
        return 8192
    if params.rope_theta > 10000:  # CodeLlama
        return 16384
    # LLaMA-1's norm_eps is 1e-6, except that of 65B. 65B has as many key/value heads as query
    # heads; LLaMA-2's 70B of the same width has fewer.
    is_65b = params.dim == 8192 and params.n_kv_heads == params.n_heads
    is_llama1 = params.norm_eps < 5e-6 or is_65b
    return 2048 if is_llama1 else 4096


class FfnRule(NamedTuple):
    """How params.json gives F; `ffn_width` has the formula."""

    multiple_of: int
    ffn_dim_multiplier: float | None


# LLaMA 1 and 2, 70B, LLaMA 3 8B
PUBLISHED_FFN_RULES = (FfnRule(256, None), FfnRule(4096, 1.3), FfnRule(1024, 1.3))


def find_ffn_rule(dim: int, ffn_dim: int) -> FfnRule:
    """Return the rule for which `ffn_width` gives `ffn_dim`: a published one, if one does."""
    for rule in PUBLISHED_FFN_RULES:
        if ffn_width(dim, rule.multiple_of, rule.ffn_dim_multiplier) == ffn_dim:
            return rule
    # Half a row is added because `ffn_width` rounds down.
    return FfnRule(1, (ffn_dim + 0.5) / int(8 * dim / 3))


def params_of(config: LlamaConfig) -> dict[str, Any]:
    """Return the content of params.json."""
    rule = find_ffn_rule(config.dim, config.ffn_dim)
    params: dict[str, Any] = {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "norm_eps": config.norm_eps,
        "vocab_size": -1,  # as the tokenizer has
        "multiple_of": rule.multiple_of,
    }
    if rule.ffn_dim_multiplier is not None:
        params["ffn_dim_multiplier"] = rule.ffn_dim_multiplier
    if config.n_kv_heads != config.n_heads:
        params["n_kv_heads"] = config.n_kv_heads
    if config.rope_theta != 10000.0:
        params["rope_theta"] = config.rope_theta
    return params
