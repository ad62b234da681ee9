"""What a LLaMA is made of: its numbers, the published sizes, and the two spellings of `config.json`.

Every member of the family (LLaMA 1/2/3, Vicuna, CodeLlama, Chinese-LLaMA-Alpaca) is the same network with other numbers.
Two of them, `rope_theta` and `norm_eps`, leave no trace in the weights: with a wrong one a model still talks, only worse.
So they are read from the checkpoint's own file and never guessed from a size or a path, and a `config.json` that asks for
something this network does not do is refused by name.

Left out on purpose: sliding windows, experts, quantized weights, attention dropout.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minillama.errors import UserError, closest, parsing, read_json


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are scale_rope beyond the trained context; `ops.reference.rope_frequencies` has the formulas."""

    kind: str
    factor: float
    original_max_seq_len: int | None = None  # the context the base model was trained with
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # None: from factor and the two mscales
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


# What each kind of scaling needs to know beside its factor.
ROPE_KINDS = {
    "linear": (),
    "dynamic": (),
    "llama3": ("original_max_seq_len", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "original_max_seq_len",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}


@dataclass(frozen=True)
class LlamaConfig:
    """The numbers of one LLaMA. Shapes: C = dim, H = n_heads, K = n_kv_heads, D = head_dim, F = ffn_dim, V = vocab_size."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    max_seq_len: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    attention_bias: bool = False  # biases on q, k, v and o
    mlp_bias: bool = False  # biases on gate, up and down
    initializer_range: float = 0.02
    bos_id: int = 1
    eos_ids: tuple[int, ...] = (2,)

    def __post_init__(self) -> None:
        for name in (
            "dim",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "head_dim",
            "ffn_dim",
            "vocab_size",
            "max_seq_len",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or not 0 < value < 2**31:
                raise UserError(f"{name} = {value!r}: expected a whole number from 1 to 2^31 - 1")
        if self.n_heads % self.n_kv_heads:
            raise UserError(
                f"n_heads = {self.n_heads} is not a multiple of n_kv_heads = {self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise UserError(
                f"head_dim = {self.head_dim} is odd; rotary embeddings turn pairs, use an even number"
            )
        if not self.rope_theta > 0 or not self.norm_eps > 0:
            raise UserError(
                f"rope_theta = {self.rope_theta} and norm_eps = {self.norm_eps} must be above 0"
            )

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's Hugging Face name and shape, in the model's order. Allocates nothing."""
        C, F, q, kv = (
            self.dim,
            self.ffn_dim,
            self.n_heads * self.head_dim,
            self.n_kv_heads * self.head_dim,
        )
        linears = {
            "self_attn.q_proj": (q, C),
            "self_attn.k_proj": (kv, C),
            "self_attn.v_proj": (kv, C),
            "self_attn.o_proj": (C, q),
            "mlp.gate_proj": (F, C),
            "mlp.up_proj": (F, C),
            "mlp.down_proj": (C, F),
        }
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, C)}
        for layer in (f"model.layers.{i}" for i in range(self.n_layers)):
            for name, shape in linears.items():
                shapes[f"{layer}.{name}.weight"] = shape
                if self.attention_bias if name.startswith("self_attn") else self.mlp_bias:
                    shapes[f"{layer}.{name}.bias"] = shape[:1]
            shapes[f"{layer}.input_layernorm.weight"] = shapes[
                f"{layer}.post_attention_layernorm.weight"
            ] = (C,)
        shapes["model.norm.weight"] = (C,)
        return shapes if self.tie_embeddings else shapes | {"lm_head.weight": (self.vocab_size, C)}

    def parameter_count(self) -> int:
        return sum(math.prod(shape) for shape in self.parameter_shapes().values())


def ffn_width(dim: int, multiple_of: int, multiplier: float | None = None) -> int:
    """Meta's rule for F: 8/3 of the width, times a multiplier, rounded up to a multiple. The truncations come in this order."""
    width = int(8 * dim / 3)
    width = width if multiplier is None else int(multiplier * width)
    return multiple_of * -(-width // multiple_of)


def _published(
    dim,
    n_layers,
    n_heads,
    ffn_dim,
    n_kv_heads=None,
    vocab_size=32000,
    context=4096,
    eps=1e-5,
    theta=1e4,
):
    return LlamaConfig(
        dim,
        n_layers,
        n_heads,
        n_kv_heads or n_heads,
        dim // n_heads,
        ffn_dim,
        vocab_size,
        context,
        eps,
        theta,
    )


# One line a model: width, layers, heads, F; then what differs from LLaMA-2.
PUBLISHED = {
    "7b": _published(4096, 32, 32, 11008),
    "13b": _published(5120, 40, 40, 13824),
    "33b": _published(6656, 60, 52, 17920, context=2048, eps=1e-6),
    "34b": _published(8192, 48, 64, 22016, n_kv_heads=8, context=16384, theta=1e6),
    "65b": _published(8192, 80, 64, 22016, context=2048),
    "70b": _published(8192, 80, 64, 28672, n_kv_heads=8),
    "llama1-7b": _published(4096, 32, 32, 11008, context=2048, eps=1e-6),
    "llama1-13b": _published(5120, 40, 40, 13824, context=2048, eps=1e-6),
    "chinese-7b": _published(4096, 32, 32, 11008, vocab_size=55296),
    "chinese-13b": _published(5120, 40, 40, 13824, vocab_size=55296),
    "15m": _published(288, 6, 6, 768, context=256),
    "110m": _published(768, 12, 12, 2048, context=1024),
    "1.1b": _published(2048, 22, 32, 5632, n_kv_heads=4, context=2048),
}


def published(name: str) -> LlamaConfig:
    """The config of a published size ("7b"), or of a `config.json` (a file, or a directory that holds one)."""
    if name in PUBLISHED:
        return PUBLISHED[name]
    if Path(name).exists():
        return read_config(Path(name))
    raise UserError(
        f"model {name!r} is neither a published size nor a config.json{closest(name, PUBLISHED)}; "
        f"known sizes: {', '.join(PUBLISHED)}"
    )


def read_config(path: Path) -> LlamaConfig:
    """Read `config.json`, given as the file or the directory that holds it."""
    path = path / "config.json" if path.is_dir() else path
    return from_hf(
        read_json(path, "a checkpoint is a directory with config.json and model*.safetensors"), path
    )


# Our names of the numbers, and those of Hugging Face's config.json.
SAME_NAMES = (
    "head_dim",
    "vocab_size",
    "rope_theta",
    "attention_bias",
    "mlp_bias",
    "initializer_range",
)
HF_NAMES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "ffn_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "bos_id": "bos_token_id",
} | dict(zip(SAME_NAMES, SAME_NAMES, strict=True))


def from_hf(raw: dict[str, Any], path: Path | None = None) -> LlamaConfig:
    """Hugging Face's `config.json` (either generation's spelling), read from `path`, as a `LlamaConfig`.
    Raises UserError for whatever this network cannot honour, by key and value."""
    with parsing(path):
        _refuse_what_is_not_llama(raw)
        values = {
            ours: raw[theirs] for ours, theirs in HF_NAMES.items() if raw.get(theirs) is not None
        }
        wanted = ("dim", "n_layers", "n_heads", "ffn_dim", "vocab_size", "norm_eps")
        if missing := [HF_NAMES[name] for name in wanted if name not in values]:
            raise UserError(f"key {missing[0]!r} is missing; is this the config.json of a LLaMA?")
        dim, n_heads, eos = values["dim"], values["n_heads"], raw.get("eos_token_id", 2)
        values = {"n_kv_heads": n_heads, "head_dim": dim // n_heads, "max_seq_len": 2048} | values
        values["norm_eps"] = float(values["norm_eps"])
        values["rope_theta"], values["rope_scaling"] = _read_rope(raw)
        return LlamaConfig(
            **values, eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
        )


def _refuse_what_is_not_llama(raw: dict[str, Any]) -> None:
    honoured = {
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_dropout": 0,
        "partial_rotary_factor": 1,
        "num_experts": 0,
        "num_local_experts": 0,
        "sliding_window": None,
        "quantization_config": None,
    }
    for key, value in honoured.items():
        if raw.get(key) not in (value, None):
            raise UserError(
                f"{key} = {raw[key]!r} is not supported (supported: {'no such key' if value is None else value!r})"
            )
    if any(kind != "full_attention" for kind in raw.get("layer_types") or []):
        raise UserError(
            f"layer_types = {raw['layer_types']!r} is not supported (supported: 'full_attention')"
        )


def _read_rope(raw: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from `rope_theta` + `rope_scaling` (transformers 4) or from `rope_parameters` (transformers 5)."""
    spec = (raw.get("rope_scaling") or {}) | (raw.get("rope_parameters") or {})
    theta, kind, old_kind = (spec.pop(key, None) for key in ("rope_theta", "rope_type", "type"))
    theta, kind = float(theta or raw.get("rope_theta") or 10000.0), kind or old_kind or "default"
    if kind == "default":
        return theta, None
    if kind not in ROPE_KINDS:
        raise UserError(
            f"rope scaling {kind!r} is not supported (supported: {', '.join(ROPE_KINDS)})"
        )
    for key in ("factor", *(["original_max_position_embeddings"] if kind == "llama3" else [])):
        if not float(spec.get(key) or 0) > 0:
            raise UserError(f"rope scaling {kind!r} has no {key} above 0 (found {spec.get(key)})")
    values = {
        key.replace("max_position_embeddings", "max_seq_len"): value for key, value in spec.items()
    }
    if unknown := sorted(set(values) - set(RopeScaling.__dataclass_fields__)):
        raise UserError(f"rope scaling {kind!r}: unknown key {unknown}")
    return theta, RopeScaling(kind, **values | {"factor": float(values["factor"])})


def to_hf(config: LlamaConfig, dtype: str = "float32") -> dict[str, Any]:
    """`config.json` as transformers 4 writes it, and transformers 4 and 5 read it."""
    s = config.rope_scaling
    scaling = s and {"rope_type": s.kind, "factor": s.factor} | {
        key.replace("max_seq_len", "max_position_embeddings"): getattr(s, key)
        for key in ROPE_KINDS[s.kind]
        if getattr(s, key) is not None
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        **{theirs: getattr(config, ours) for ours, theirs in HF_NAMES.items()},
        "rope_scaling": scaling,
        "eos_token_id": config.eos_ids[0]
        if len(config.eos_ids) == 1
        else list(config.eos_ids) or None,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def with_layers(config: LlamaConfig, n_layers: int) -> LlamaConfig:
    """The same model with its first `n_layers` layers only."""
    if not 1 <= n_layers <= config.n_layers:
        raise UserError(f"n_layers = {n_layers}: the model has layers 1 to {config.n_layers}")
    return replace(config, n_layers=n_layers)
