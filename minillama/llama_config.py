"""What a LLaMA is made of: its sizes, and the sizes that were published.

All members of the family (LLaMA 1/2/3, Vicuna, CodeLlama, Chinese-LLaMA-Alpaca) are the same
network with other numbers. `hf_config` reads and writes them as `config.json`."""

import math
from dataclasses import dataclass, replace
from typing import Any

from minillama.errors import UserError


def is_finite(value: Any) -> bool:
    """Whether `value` is a number, and neither infinite nor NaN. True and False are no numbers."""
    return type(value) in (int, float) and math.isfinite(value)


def is_whole(value: Any, minimum: int) -> bool:
    """Whether `value` is an integer of at least `minimum`."""
    return type(value) is int and value >= minimum


def require_positive(name: str, value: Any) -> None:
    if not is_finite(value) or value <= 0:
        raise UserError(f"{name} = {value!r}: expected a finite number above 0")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are scaled beyond the trained context.

    `ops.rotary.rope_frequencies` has the formulas.
    """

    kind: str  # linear | dynamic | llama3 | yarn
    factor: float
    original_max_seq_len: int | None = None  # the context the base model was trained with
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # None: computed from factor and the two mscales
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            require_positive(f"rope scaling {self.kind!r}: {name}", getattr(self, name))
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            value = getattr(self, name)
            if value is not None and not is_finite(value):
                raise UserError(
                    f"rope scaling {self.kind!r}: {name} = {value!r}: expected a finite number"
                )
        if not isinstance(self.truncate, bool):
            raise UserError(
                f"rope scaling {self.kind!r}: truncate = {self.truncate!r}: expected true or false"
            )
        context = self.original_max_seq_len
        if context is not None and not is_whole(context, minimum=1):
            raise UserError(
                f"rope scaling {self.kind!r}: original_max_position_embeddings = {context!r}: "
                "expected a whole number above 0"
            )
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise UserError(
                f"rope scaling 'llama3': low_freq_factor = {self.low_freq_factor} must be below "
                f"high_freq_factor = {self.high_freq_factor}"
            )


MAX_LAYERS = 10_000  # more than any LLaMA has: a table of the parameters of so many is still small
SIZES = (
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "ffn_dim",
    "vocab_size",
    "max_seq_len",
)


@dataclass(frozen=True)
class LlamaConfig:
    """The numbers of one LLaMA.

    Shapes: C = dim, H = n_heads, K = n_kv_heads, D = head_dim, F = ffn_dim, V = vocab_size.
    """

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
        for name in SIZES:
            value = getattr(self, name)
            if not is_whole(value, minimum=1) or value >= 2**31:
                raise UserError(f"{name} = {value!r}: expected a whole number from 1 to 2^31 - 1")
        if self.n_layers > MAX_LAYERS:
            raise UserError(f"n_layers = {self.n_layers}: at most {MAX_LAYERS:,} are supported")
        if self.n_heads % self.n_kv_heads:
            raise UserError(
                f"n_heads = {self.n_heads} is not a multiple of n_kv_heads = {self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise UserError(
                f"head_dim = {self.head_dim} is odd; rotary embeddings turn pairs, "
                "use an even number"
            )
        for name in ("rope_theta", "norm_eps"):
            require_positive(name, getattr(self, name))
        if not is_finite(self.initializer_range) or self.initializer_range < 0:
            raise UserError(
                f"initializer_range = {self.initializer_range!r}: expected a number from 0"
            )
        for name in ("tie_embeddings", "attention_bias", "mlp_bias"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} = {getattr(self, name)!r}: expected true or false")
        for token in (self.bos_id, *self.eos_ids):
            if not is_whole(token, minimum=0):
                raise UserError(f"BOS or EOS token id {token!r}: expected a whole number from 0")

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The Hugging Face name and the shape of every parameter, in the model's order.

        Allocates nothing.
        """
        C = self.dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, C)}
        for i in range(self.n_layers):
            for name, shape in self._layer_shapes().items():
                shapes[f"model.layers.{i}.{name}"] = shape
        shapes["model.norm.weight"] = (C,)
        if not self.tie_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, C)
        return shapes

    def _layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """The parameters of one layer."""
        C = self.dim
        F = self.ffn_dim
        q = self.n_heads * self.head_dim
        kv = self.n_kv_heads * self.head_dim
        linears = {
            "self_attn.q_proj": (q, C),
            "self_attn.k_proj": (kv, C),
            "self_attn.v_proj": (kv, C),
            "self_attn.o_proj": (C, q),
            "mlp.gate_proj": (F, C),
            "mlp.up_proj": (F, C),
            "mlp.down_proj": (C, F),
        }
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in linears.items():
            shapes[f"{name}.weight"] = shape
            is_attention = name.startswith("self_attn")
            has_bias = self.attention_bias if is_attention else self.mlp_bias
            if has_bias:
                shapes[f"{name}.bias"] = shape[:1]
        shapes["input_layernorm.weight"] = (C,)
        shapes["post_attention_layernorm.weight"] = (C,)
        return shapes

    def parameter_count(self) -> int:
        return sum(math.prod(shape) for shape in self.parameter_shapes().values())


def with_layers(config: LlamaConfig, n_layers: int) -> LlamaConfig:
    """The same model with its first `n_layers` layers only."""
    if not 1 <= n_layers <= config.n_layers:
        raise UserError(f"n_layers = {n_layers}: the model has layers 1 to {config.n_layers}")
    return replace(config, n_layers=n_layers)


def ffn_width(dim: int, multiple_of: int, multiplier: float | None = None) -> int:
    """Meta's rule for F: 8/3 of the width, times a multiplier, rounded up to a multiple.

    The truncations come in this order.
    """
    width = int(8 * dim / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * math.ceil(width / multiple_of)


def _published(
    dim: int,
    n_layers: int,
    n_heads: int,
    ffn_dim: int,
    n_kv_heads: int | None = None,
    vocab_size: int = 32000,
    context: int = 4096,
    eps: float = 1e-5,
    theta: float = 1e4,
) -> LlamaConfig:
    return LlamaConfig(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads or n_heads,
        head_dim=dim // n_heads,
        ffn_dim=ffn_dim,
        vocab_size=vocab_size,
        max_seq_len=context,
        norm_eps=eps,
        rope_theta=theta,
    )


def _llama3(
    dim: int,
    n_layers: int,
    n_heads: int,
    ffn_dim: int,
    scaling_factor: float | None = None,
    tied: bool = False,
) -> LlamaConfig:
    """LLaMA 3; scaling_factor: of the rotary frequencies, which 3.1 and later extend by it."""
    llama = _published(
        dim, n_layers, n_heads, ffn_dim, n_kv_heads=8, vocab_size=128256, context=8192, theta=5e5
    )
    llama = replace(llama, tie_embeddings=tied, bos_id=128000, eos_ids=(128001,))
    if scaling_factor is None:
        return llama
    scaling = RopeScaling("llama3", scaling_factor, original_max_seq_len=llama.max_seq_len)
    return replace(llama, rope_scaling=scaling, max_seq_len=131072)


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
    "chinese-alpaca-7b": _published(4096, 32, 32, 11008, vocab_size=49954, context=2048, eps=1e-6),
    "chinese-alpaca-13b": _published(5120, 40, 40, 13824, vocab_size=49954, context=2048, eps=1e-6),
    "chinese-alpaca-33b": _published(6656, 60, 52, 17920, vocab_size=49954, context=2048, eps=1e-6),
    "llama3-8b": _llama3(4096, 32, 32, 14336),
    "llama3-70b": _llama3(8192, 80, 64, 28672),
    "llama3.1-8b": _llama3(4096, 32, 32, 14336, scaling_factor=8.0),
    "llama3.1-70b": _llama3(8192, 80, 64, 28672, scaling_factor=8.0),
    "llama3.2-1b": _llama3(2048, 16, 32, 8192, scaling_factor=32.0, tied=True),
    "llama3.2-3b": _llama3(3072, 28, 24, 8192, scaling_factor=32.0, tied=True),
    "15m": _published(288, 6, 6, 768, context=256),
    "110m": _published(768, 12, 12, 2048, context=1024),
    "1.1b": _published(2048, 22, 32, 5632, n_kv_heads=4, context=2048),
}
