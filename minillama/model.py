"""LLaMA on one page.

    tokens ─ embed ─▶ x ─▶ [ x + attention(norm(x)) ─▶ x + mlp(norm(x)) ] × n_layers ─▶ norm ─▶ hidden ─ lm_head ─▶ logits

A decoder of identical layers over a residual stream (Touvron et al. 2023). What makes it a LLaMA: RMSNorm before each part,
rotary positions inside attention, an MLP gated by SiLU, no biases, key/value heads that may be shared by groups of query heads.
Parameters carry Hugging Face's names, so a released checkpoint loads as it is.

The model knows nothing of LoRA, recomputation or parallelism: those change a finished `Llama` from outside. Attention infers
its heads from the width of the projections, so a rank that holds a part of them runs the same code.

Shapes: B batch, T query positions, S key positions, C model width, H query heads, K key/value heads, D head size,
F MLP width, V vocabulary.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from minillama import ops
from minillama.llama_config import LlamaConfig


class KeyValueCache(Protocol):
    """What cached decoding hands to the model; `generation.cache` has one."""

    config: LlamaConfig  # the model's, or with other rotary settings
    positions: Tensor  # where the next tokens stand: (T,), or (B, T)
    lengths: Tensor | None  # the keys of each row, (B,), where rows are of unlike length
    capacity: int

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values of a layer, (B, T, K, D) each; returns all of it so far, (B, S, K, D) each."""


class Linear(nn.Linear):
    """x W^T + b through the table of ops."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        C, bias = config.dim, config.attention_bias
        self.q_proj = Linear(C, config.n_heads * config.head_dim, bias=bias)
        self.k_proj = Linear(C, config.n_kv_heads * config.head_dim, bias=bias)
        self.v_proj = Linear(C, config.n_kv_heads * config.head_dim, bias=bias)
        self.o_proj = Linear(config.n_heads * config.head_dim, C, bias=bias)

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
        q, k = ops.rope(q, cos, sin), ops.rope(k, cos, sin)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, S, K, D)
        y = ops.attention(
            q, k, v, documents, None if cache is None else cache.lengths
        )  # (B, T, H, D)
        return self.o_proj(y.reshape(B, T, -1))  # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        C, F, bias = config.dim, config.ffn_dim, config.mlp_bias
        self.gate_proj = Linear(C, F, bias=bias)
        self.up_proj = Linear(C, F, bias=bias)
        self.down_proj = Linear(F, C, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


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
        weight = torch.empty(
            config.vocab_size, config.dim
        )  # torch's own first draw would, without storage, load half of torch's compiler
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim, _weight=weight)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)


class Llama(nn.Module):
    """A LLaMA with uninitialised weights; `initialise` draws them, `checkpoint.hf_format.load_model` reads them."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self._rope: tuple[Tensor, Tensor, LlamaConfig] | None = (
            None  # fp32 in any dtype, so neither a buffer nor in a checkpoint
        )

    def forward(
        self,
        tokens: Tensor,
        documents: ops.Documents | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """tokens (B, T) -> hidden (B, T, C), normed and ready for `logits` or the loss.
        documents: the B·T tokens are these documents end to end; positions restart in each and none sees another.
        cache: keys and values of the tokens before these."""
        B, T = tokens.shape
        if cache is not None:
            positions, length = cache.positions, cache.capacity
        elif documents is not None:
            positions, length = documents.positions.view(B, T), max(documents.lengths)
        else:
            positions, length = slice(T), T
        tables = self.rope_tables(length, tokens.device, None if cache is None else cache.config)
        cos, sin = (table[positions] for table in tables)  # (T, 1, D) or (B, T, 1, D)
        x = self.model.embed_tokens(tokens)  # (B, T, C)
        for layer in self.model.layers:
            x = layer(x, cos, sin, documents, cache)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., C) -> logits (..., V)."""
        return self.lm_head(hidden)

    def loss_sum(
        self, tokens: Tensor, labels: Tensor, documents: ops.Documents | None = None
    ) -> Tensor:
        """The sum of -log p(label) over the positions of `labels` (B, T) that are not IGNORE. labels[t] is the token *after* t."""
        return ops.linear_cross_entropy(self(tokens, documents), self.lm_head.weight, labels)

    def rope_tables(
        self, length: int, device: torch.device, config: LlamaConfig | None = None
    ) -> tuple[Tensor, Tensor]:
        """cos and sin for positions below `length`, kept from call to call ("dynamic" scaling depends on the length itself)."""
        config = config or self.config
        dynamic = config.rope_scaling is not None and config.rope_scaling.kind == "dynamic"
        kept = self._rope
        if (
            kept is None
            or kept[0].device != device
            or kept[2] != config
            or len(kept[0]) < length
            or (dynamic and len(kept[0]) != length)
        ):
            grown = length if dynamic else max(length, min(config.max_seq_len, 2 * length))
            cos, sin = ops.rope_tables(config, grown)
            self._rope = kept = cos.to(device), sin.to(device), config
        return kept[:2]

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> "Llama":
        """Draw weights as LLaMA's pre-training does: matrices from N(0, initializer_range), biases 0, norms 1."""
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith(".bias"):
                parameter.zero_()
            else:
                parameter.normal_(0.0, self.config.initializer_range, generator=generator)
        return self
