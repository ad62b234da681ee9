"""LLaMA on one page.

    tokens ─ embed ─▶ x ─▶ [ x + attention(norm(x)) ─▶ x + mlp(norm(x)) ] × n_layers
                        ─▶ norm ─▶ hidden ─ lm_head ─▶ logits

A decoder of identical layers over a residual stream (Touvron et al. 2023). What makes it a LLaMA:
RMSNorm before each part, rotary positions inside attention, an MLP gated by SiLU, no biases,
key/value heads that may be shared by groups of query heads. Parameters carry Hugging Face's names,
so a released checkpoint loads as it is.

The formulas are in ops/reference.py, and the comment at each call repeats them. `ops` computes them
by the fastest implementation on the device.

The model knows nothing of LoRA, recomputation or parallelism: those change a finished `Llama` from
outside. Attention infers the number of heads from the width of the projections, so a rank of tensor
parallelism that holds some of them runs the same code.

Shapes: B batch, T query positions, S key positions, C model width, H query heads, K key/value
heads, D head size, F MLP width, V vocabulary.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from minillama import ops
from minillama.llama_config import LlamaConfig

# (hidden, weight of the head, labels) -> the sum of -log p(label)
CrossEntropy = Callable[[Tensor, Tensor, Tensor], Tensor]


class KeyValueCache(Protocol):
    """What the model needs of the cache in cached decoding. `generation.cache` has one."""

    config: LlamaConfig  # the model's, or with other rotary settings
    positions: Tensor  # of the tokens in this call: (T,), or (B, T)
    lengths: Tensor | None  # number of keys of each sequence, (B,); None if all have S keys
    capacity: int  # all positions are below it

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values, (B, T, K, D) each. Returns all so far, (B, S, K, D) each."""


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        # ops/reference.py: x W^T + b
        return ops.linear(x, self.weight, self.bias)

    def product(self, x: Tensor) -> Tensor:
        """x W^T. `forward` without the bias, for those who add it later."""
        return ops.linear(x, self.weight)

    def loss_sum(
        self, x: Tensor, labels: Tensor, cross_entropy: CrossEntropy = ops.linear_cross_entropy
    ) -> Tensor:
        """The sum of -log p(label), if this layer is the head. The logits never exist whole."""
        # ops/reference.py: sum of -log softmax(x W^T)[label]
        return cross_entropy(x, self.weight, labels)


class Embedding(nn.Embedding):
    """A vector for each token, (V, C). Uninitialised: `initialise` or a checkpoint sets it."""

    def reset_parameters(self) -> None:
        """Do nothing. torch would sample the vectors here."""


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        # ops/reference.py: x / sqrt(mean(x^2) + eps) * weight
        return ops.rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        C = config.dim
        q_width = config.n_heads * config.head_dim  # H·D
        kv_width = config.n_kv_heads * config.head_dim  # K·D
        self.q_proj = Linear(C, q_width, bias=config.attention_bias)
        self.k_proj = Linear(C, kv_width, bias=config.attention_bias)
        self.v_proj = Linear(C, kv_width, bias=config.attention_bias)
        self.o_proj = Linear(q_width, C, bias=config.attention_bias)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        documents: ops.Documents | None,
        cache: KeyValueCache | None,
    ) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # (B, T, H, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K, D)

        # ops/reference.py: with x1, x2 the halves of a head, (x1 cos - x2 sin, x2 cos + x1 sin)
        q = ops.rope(q, cos, sin)
        k = ops.rope(k, cos, sin)

        lengths = None
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, S, K, D)
            lengths = cache.lengths

        # ops/reference.py: softmax(q k^T / sqrt(D)) v, where a query sees only the keys before it
        y = ops.attention(q, k, v, documents, lengths)  # (B, T, H, D)
        return self.o_proj(y.reshape(B, T, -1))  # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.dim, config.ffn_dim, bias=config.mlp_bias)
        self.up_proj = Linear(config.dim, config.ffn_dim, bias=config.mlp_bias)
        self.down_proj = Linear(config.ffn_dim, config.dim, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        # ops/reference.py: silu(gate) * up, silu(a) = a * sigmoid(a)
        hidden = ops.swiglu(self.gate_proj(x), self.up_proj(x))  # (B, T, F)
        return self.down_proj(hidden)  # (B, T, C)


class Layer(nn.Module):
    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, index)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        documents: ops.Documents | None,
        cache: KeyValueCache | None,
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, documents, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Everything below the head; named `model` in checkpoints."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)


class Llama(nn.Module):
    """A LLaMA with uninitialised parameters.

    `initialise` samples them, `checkpoint.hf_reader.load_model` reads them from a checkpoint.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.rotary = ops.RotaryTables()

    def forward(
        self,
        tokens: Tensor,
        documents: ops.Documents | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """tokens (B, T) -> hidden (B, T, C), normed and ready for `logits` or the loss.

        documents: the B·T tokens are these documents end to end. Positions restart in each, and
        no document sees another.
        cache: keys and values of the tokens before these.
        """
        cos, sin = self.rotary_tables(tokens, documents, cache)  # (T, 1, D) or (B, T, 1, D)
        x = self.model.embed_tokens(tokens)  # (B, T, C)
        for layer in self.model.layers:
            x = layer(x, cos, sin, documents, cache)
        return self.model.norm(x)

    def rotary_tables(
        self, tokens: Tensor, documents: ops.Documents | None, cache: KeyValueCache | None
    ) -> tuple[Tensor, Tensor]:
        """cos and sin at the positions of the tokens: (T, 1, D), or (B, T, 1, D)."""
        B, T = tokens.shape
        if cache is not None:
            cos, sin = self.rotary.get(cache.config, cache.capacity, tokens.device)
            return cos[cache.positions], sin[cache.positions]
        if documents is not None:
            positions = documents.positions.view(B, T)
            longest = max(documents.lengths)
            cos, sin = self.rotary.get(self.config, longest, tokens.device)
            return cos[positions], sin[positions]
        cos, sin = self.rotary.get(self.config, T, tokens.device)
        return cos[:T], sin[:T]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., C) -> logits (..., V)."""
        return self.lm_head(hidden)

    def loss_sum(
        self, tokens: Tensor, labels: Tensor, documents: ops.Documents | None = None
    ) -> Tensor:
        """The sum of -log p(label) over the positions of `labels` (B, T) that are not IGNORE.

        labels[:, t] is the token *after* tokens[:, t]. The logits (B, T, V) never exist as a whole.
        """
        hidden = self(tokens, documents)  # (B, T, C)
        return self.lm_head.loss_sum(hidden, labels)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> "Llama":
        """Sample the parameters as for LLaMA's pre-training.

        Matrices come from N(0, initializer_range^2), biases are 0, norms are 1.
        """
        for name, parameter in self.named_parameters():
            sample_parameter(name, parameter, self.config.initializer_range, generator)
        return self


def sample_parameter(
    name: str, values: Tensor, std: float, generator: torch.Generator | None
) -> None:
    """Fill a parameter as `Llama.initialise` does."""
    if name.endswith("norm.weight"):
        values.fill_(1.0)
    elif name.endswith(".bias"):
        values.zero_()
    else:
        values.normal_(0.0, std, generator=generator)
