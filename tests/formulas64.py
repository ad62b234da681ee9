"""The formulas of `ops.reference` once more, in other words.

Every test of an op compares with these, computed in float64 under autograd.
Shapes as in `ops.reference`.
"""

import math

import torch
from torch import Tensor

from minillama.ops import IGNORE


def rms_norm64(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt() * weight


def rope64(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A pair is a complex number, and turning it is a product."""
    pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.complex(
        cos[..., cos.shape[-1] // 2 :], sin[..., sin.shape[-1] // 2 :]
    )
    return torch.cat((pairs.real, pairs.imag), dim=-1)


def swiglu64(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + (-gate).exp()) * up


def scaled_masked_softmax64(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    e = torch.where(mask, -10000.0, scale * x)
    e = (e - e.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def attention64(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Query head h reads key head h // (H / K); query t of T stands at position S - T + t."""
    (_, T, H, D), (_, S, K, _) = q.shape, k.shape
    heads = []
    for h in range(H):
        scores = q[:, :, h] @ k[:, :, h * K // H].transpose(1, 2) / math.sqrt(D)  # (B, T, S)
        future = torch.arange(S)[None, :] > torch.arange(S - T, S)[:, None]
        heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[:, :, h * K // H])
    return torch.stack(heads, dim=2)


def packed_attention64(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Each document alone. The B·T positions are documents of these lengths, end to end."""
    D = q.shape[-1]
    one_sequence = [x.reshape(1, sum(lengths), -1, D).split(lengths, dim=1) for x in (q, k, v)]
    documents = [attention64(*document) for document in zip(*one_sequence, strict=True)]
    return torch.cat(documents, dim=1).view(q.shape)


def linear64(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.einsum("...i,oi->...o", x, weight) + (0 if bias is None else bias)


def linear_cross_entropy64(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    kept = labels.flatten() != IGNORE
    log_p = (hidden @ weight.T).log_softmax(-1).flatten(0, -2)[kept]
    return -log_p[torch.arange(len(log_p)), labels.flatten()[kept]].sum()
