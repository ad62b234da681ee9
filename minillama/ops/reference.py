"""The formulas of LLaMA, one function each. They specify what every faster implementation computes.

    rms_norm               x / sqrt(mean(x^2) + eps) * weight
    rope                   rotate the pair (x_i, x_{i + D/2}) by the angle of its position
    attention              softmax(q k^T / sqrt(D)) v, causal
    swiglu                 silu(gate) * up
    linear                 x W^T + b
    linear_cross_entropy   sum of -log softmax(h W^T)[label]
    adamw                  one step of AdamW, in place

Statistics, rotations, softmax and losses are computed in fp32 whatever the dtype of the data, and
rounded once.

Shapes: B batch, T query positions, S key positions, C model width, H query heads, K key/value
heads, D head size, F MLP width, V vocabulary, N rows of anything.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from minillama.ops.packing import Documents

IGNORE = -100  # the label of a position that is not trained on
MASKED = -10000.0  # score of a masked position; finite, so that a row masked whole has no 0/0


def needs_grad(*inputs: Tensor) -> bool:
    """Whether autograd will ask for a gradient. Without one, as in decoding, nothing is saved."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension (Zhang & Sennrich 2019, eq. 4).

    x (..., C), weight (C,). The normalized x is rounded to x's dtype before it is multiplied by
    the weight, as in Hugging Face's LLaMA.
    """
    x32 = x.float()
    r = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)  # (..., 1), is 1 / rms(x)
    return (x32 * r).to(x.dtype) * weight


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, eq. 6 without biases). Both (..., F)."""
    return F.silu(gate) * up


def scaled_masked_softmax(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(scale x) over the last dimension, where scores at True positions of `mask` are
    MASKED.

    This is what Megatron's and Ascend's kernels of this name compute: a row that is masked whole
    comes out uniform. `attention` below masks by -inf instead. mask is broadcast to x.
    """
    return (x.float() * scale).masked_fill(mask, MASKED).softmax(-1).to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b. x (..., in), weight (out, in), bias (out,)."""
    return F.linear(x, weight, bias)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i + D/2}) of every head: Hugging Face's "rotate half" layout.

        (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)      x1, x2: the halves of a head

    x (B, T, H, D). cos and sin come from `rotary.rope_tables`, where sin has the sign of its half:
    (T, 1, D), or (B, T, 1, D) if the sequences of the batch stand at different positions.
    """
    x32 = x.float()
    halves_swapped = x32.roll(x.shape[-1] // 2, dims=-1)  # (x2, x1)
    return (x32 * cos + halves_swapped * sin).to(x.dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Causal softmax(q k^T / sqrt(D)) v (Vaswani et al. 2017, eq. 1). Returns (B, T, H, D).

    q (B, T, H, D); k, v (B, S, K, D). Each key/value head is shared by H/K query heads (GQA).
    S >= T: the queries stand at the last T of the S positions.
    documents: the B·T positions are these documents end to end, and none sees another (then S = T).
    lengths: row b has lengths[b] <= S keys, the last T of them at its queries. The keys after them
    are hidden, but must be finite.
    """
    B, T, H, D = q.shape
    S, K = k.shape[1], k.shape[2]
    if documents is not None:
        visible = document_mask(documents).to(q.device)  # (B·T, B·T)
        q = q.reshape(1, B * T, H, D)
        k = k.reshape(1, B * T, K, D)
        v = v.reshape(1, B * T, K, D)
    else:
        visible = causal_mask(T, S, lengths, q.device)  # (T, S) or (B, 1, T, S)
    k = k.repeat_interleave(H // K, dim=2)  # (B, S, H, D)
    v = v.repeat_interleave(H // K, dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q.float(), k.float()) / math.sqrt(D)
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)  # (B, H, T, S)
    y = torch.einsum("bhts,bshd->bthd", weights, v.float())
    return y.to(q.dtype).reshape(B, T, H, D)


def causal_mask(T: int, S: int, lengths: Tensor | None, device: torch.device) -> Tensor:
    """True where a query sees a key. The T queries stand at the last T of the keys.

    (T, S) if all S keys are there, (B, 1, T, S) if row b has lengths[b] keys.
    """
    key = torch.arange(S, device=device)
    query = torch.arange(T, device=device).unsqueeze(1)
    num_keys = S if lengths is None else lengths.view(-1, 1, 1, 1)
    return key <= num_keys - T + query


def document_mask(documents: Documents) -> Tensor:
    """True where a query sees a key: in the same document, and not after the query. (B·T, B·T)."""
    lengths = torch.tensor(documents.lengths)
    document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)  # of each token
    is_same = document[:, None] == document[None, :]
    return is_same.tril()


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The *sum* over labelled positions of -log softmax(hidden W^T)[label]: a scalar, fp32.

    hidden (..., C), weight (V, C), labels (...) with IGNORE if nothing is predicted.
    It is a sum because only the caller knows how many targets the whole global batch has. Without
    any labelled position it is 0, not nan.
    """
    logits = F.linear(hidden.float(), weight.float()).flatten(0, -2)  # (N, V)
    return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum")


def adamw(
    weight: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    step: int,
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
) -> None:
    """One AdamW step in place (Loshchilov & Hutter 2019, algorithm 2).

    All tensors have the same shape and are fp32; step counts from 1.
    """
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    unbiased_m = m / (1 - beta1**step)
    unbiased_v = v / (1 - beta2**step)
    weight.mul_(1 - learning_rate * weight_decay)
    weight.sub_(learning_rate * unbiased_m / (unbiased_v.sqrt() + epsilon))
