"""The layers of LoRA: a linear and an embedding that add a product of two thin matrices.

lora.py has the formula and puts these layers into a model.

Shapes: in and out of a linear, V vocabulary, C model width, R LoRA rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillama import ops
from minillama.model import CrossEntropy


class _NarrowFunction(torch.autograd.Function):
    """low = x A^T in fp32 for a 16-bit x:   dx = dlow A,   dA = dlow^T x.

    Keeps x as it is. Autograd would keep its fp32 copy, twice as large, once for each linear that
    reads the same x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor) -> Tensor:
        ctx.save_for_backward(x, A)
        return x.float() @ A.T

    @staticmethod
    def backward(ctx: Any, dlow: Tensor) -> tuple[Tensor | None, Tensor]:
        x, A = ctx.saved_tensors
        dx = (dlow @ A).to(x.dtype) if ctx.needs_input_grad[0] else None
        dA = dlow.flatten(0, -2).T @ x.flatten(0, -2).float()
        return dx, dA


def _narrow(x: Tensor, A: Tensor) -> Tensor:
    """x A^T in fp32: x (..., in), A (R, in) -> (..., R)."""
    return x @ A.T if x.dtype == A.dtype else _NarrowFunction.apply(x, A)


class LoraLinear(nn.Linear):
    """A linear that shares a frozen weight (out, in) and adds s (x A^T) B^T."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, dropout: float) -> None:
        has_bias = base.bias is not None
        super().__init__(base.in_features, base.out_features, bias=has_bias, device="meta")
        self.base_class = type(base)
        self.weight = base.weight
        self.bias = base.bias
        self.scale = scale
        device = base.weight.device
        A = torch.empty(rank, base.in_features, dtype=torch.float32, device=device)
        B = torch.zeros(base.out_features, rank, dtype=torch.float32, device=device)
        self.lora_A = nn.Parameter(A)  # (R, in)
        self.lora_B = nn.Parameter(B)  # (out, R)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self._add_low_rank(x, ops.linear(x, self.weight, self.bias))

    def product(self, x: Tensor) -> Tensor:
        """As `model.Linear.product`: x (W + s B A)^T without the bias."""
        return self._add_low_rank(x, ops.linear(x, self.weight))

    def _add_low_rank(self, x: Tensor, y: Tensor) -> Tensor:
        """y + s (x A^T) B^T. y (..., out)."""
        low = _narrow(self.dropout(x), self.lora_A)  # (..., R)
        return y + (low @ (self.scale * self.lora_B.T)).to(y.dtype)

    def loss_sum(
        self, x: Tensor, labels: Tensor, cross_entropy: CrossEntropy = ops.linear_cross_entropy
    ) -> Tensor:
        """As `model.Linear.loss_sum`, with the logits of `forward`, by one wider linear:

        [x, x A^T] [W, s B]^T = x W^T + s x A^T B^T
        """
        low = _narrow(self.dropout(x), self.lora_A)  # (..., R)
        wide_x = torch.cat((x, low.to(x.dtype)), dim=-1)  # (..., in + R)
        scaled_b = (self.scale * self.lora_B).to(self.weight.dtype)  # (out, R)
        wide_weight = torch.cat((self.weight, scaled_b), dim=1)  # (out, in + R)
        return cross_entropy(wide_x, wide_weight, labels)

    def factors(self) -> dict[str, nn.Parameter]:
        """The factors, by their names in a PEFT file."""
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}

    @torch.no_grad()
    def append(self, a: Tensor, b: Tensor, scale: float) -> None:
        """Add factors a (R, in) and b (out, R): two adapters are one of their summed rank.

        [s1 B1, s2 B2] [A1; A2] = s1 B1 A1 + s2 B2 A2
        """
        scaled_b = torch.cat((self.scale * self.lora_B, scale * b.to(self.lora_B)), dim=1)
        self.lora_A = nn.Parameter(torch.cat((self.lora_A, a.to(self.lora_A))))
        self.lora_B = nn.Parameter(scaled_b)
        self.scale = 1.0

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + s B A in fp32, rounded once to W's dtype."""
        product = self.scale * (self.lora_B @ self.lora_A)
        return (self.weight.float() + product).to(self.weight.dtype)

    def plain(self, weight: Tensor) -> nn.Linear:
        """A linear with this weight and no adapter, of the class that this one was made from."""
        has_bias = self.bias is not None
        plain = self.base_class(self.in_features, self.out_features, bias=has_bias, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.bias = self.bias
        return plain


class LoraEmbedding(nn.Embedding):
    """An embedding that shares a frozen weight (V, C) and adds s B A[:, token] to each row.

    A (R, V) and B (C, R) have the shapes of PEFT's files.
    """

    def __init__(self, base: nn.Embedding, rank: int, scale: float) -> None:
        super().__init__(base.num_embeddings, base.embedding_dim, _weight=base.weight)
        self.weight = base.weight
        self.scale = scale
        device = base.weight.device
        A = torch.zeros(rank, base.num_embeddings, dtype=torch.float32, device=device)
        B = torch.empty(base.embedding_dim, rank, dtype=torch.float32, device=device)
        self.lora_embedding_A = nn.Parameter(A)  # (R, V)
        self.lora_embedding_B = nn.Parameter(B)  # (C, R)

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.embedding(tokens, self.weight)  # (..., C)
        low = F.embedding(tokens, self.lora_embedding_A.T)  # (..., R)
        return x + (low @ (self.scale * self.lora_embedding_B.T)).to(x.dtype)

    def factors(self) -> dict[str, nn.Parameter]:
        """The factors, by their names in a PEFT file."""
        return {
            "lora_embedding_A": self.lora_embedding_A,
            "lora_embedding_B": self.lora_embedding_B,
        }

    @torch.no_grad()
    def append(self, a: Tensor, b: Tensor, scale: float) -> None:
        """Add factors a (R, C) and b (V, R), as `LoraLinear.append` does."""
        A, B = self.lora_embedding_A, self.lora_embedding_B
        self.lora_embedding_A = nn.Parameter(torch.cat((A, b.T.to(A))))
        self.lora_embedding_B = nn.Parameter(torch.cat((self.scale * B, scale * a.T.to(B)), dim=1))
        self.scale = 1.0

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + s (B A)^T in fp32, rounded once to W's dtype."""
        product = self.scale * (self.lora_embedding_B @ self.lora_embedding_A).T
        return (self.weight.float() + product).to(self.weight.dtype)

    def plain(self, weight: Tensor) -> nn.Embedding:
        """An embedding with this weight and no adapter."""
        plain = nn.Embedding(self.num_embeddings, self.embedding_dim, _weight=weight)
        return plain.requires_grad_(False)


ADAPTED = (LoraLinear, LoraEmbedding)
