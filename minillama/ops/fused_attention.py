"""Attention by torch's scaled_dot_product_attention ("flash"), which never holds the T x S scores.

Three cases, by what is computed:

    one sequence (S = T)     the kernel as it is
    packed documents         gathered into padded rows, one kernel call per group (`ops.packing`
                             has the picture). The cost is about the sum of the squared lengths,
                             not the square of their sum
    cached decoding (S > T)  the query heads that share a key head are laid out as if they were
                             positions, so keys and values are read once and never repeated

`reference.attention` is the formula. tests/flash.py derives the kernel's backward, block by block.
Shapes: B batch, T query positions, S key positions, H query heads, K key/value heads,
G = H/K query heads that share one, D head size.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minillama.ops.packing import Documents
from minillama.ops.reference import causal_mask


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """`reference.attention`: q (B, T, H, D), k and v (B, S, K, D) -> (B, T, H, D)."""
    B, T = q.shape[:2]
    S = k.shape[1]
    if documents is None:
        if S == T and lengths is None:
            return _causal_attention(q, k, v)
        return _cached_attention(q, k, v, lengths)
    if B == 1 and len(documents.lengths) == 1:
        return _causal_attention(q, k, v)
    return _packed_attention(q, k, v, documents)


def _causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every query sees the keys up to its own position. S = T."""
    G = q.shape[2] // k.shape[2]
    q = q.transpose(1, 2)  # (B, H, T, D)
    k = k.transpose(1, 2)  # (B, K, T, D)
    v = v.transpose(1, 2)
    if G > 1:
        k = k.repeat_interleave(G, dim=1)  # (B, H, T, D)
        v = v.repeat_interleave(G, dim=1)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2)  # (B, T, H, D)


class _Gather(torch.autograd.Function):
    """y = x[index],   dx = dy[inverse].

    inverse: for each row of x, the row of y that counts. Other rows of y are padding, whose
    gradient is 0. So backward is a gather too, where autograd would scatter and add.
    unread: the rows of x that y does not contain, whose gradient is 0; None if there are none.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, unread: Tensor | None
    ) -> Tensor:
        ctx.inverse = inverse
        ctx.unread = unread
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        dx = dy.index_select(0, ctx.inverse)
        if ctx.unread is not None:
            dx.index_fill_(0, ctx.unread, 0)
        return dx, None, None, None


def _packed_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Gather the documents into rows, compute each group of rows, gather the tokens back."""
    B, T, H, D = q.shape
    gather_index, inverse_index, padding = documents.layout
    group_sizes = [group.num_slots for group in documents.groups]

    def rows_by_group(x: Tensor) -> tuple[Tensor, ...]:
        """(B, T, heads, D) -> (slots of the group, heads·D) for each group."""
        tokens = x.reshape(B * T, -1)
        return _Gather.apply(tokens, gather_index, inverse_index, None).split(group_sizes)

    results = []
    parts = zip(rows_by_group(q), rows_by_group(k), rows_by_group(v), strict=True)
    for group, (q_slots, k_slots, v_slots) in zip(documents.groups, parts, strict=True):
        shape = (len(group.documents), group.length, -1, D)  # (rows, length, heads, D)
        y = _causal_attention(q_slots.view(shape), k_slots.view(shape), v_slots.view(shape))
        results.append(y.reshape(-1, H * D))
    slots = torch.cat(results)  # (slots, H·D)
    return _Gather.apply(slots, inverse_index, gather_index, padding).view(B, T, H, D)


def _cached_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
    """The last T of S positions ask; rows may have different lengths."""
    B, T, H, D = q.shape
    S, K = k.shape[1], k.shape[2]
    G = H // K
    k = k.transpose(1, 2)  # (B, K, S, D)
    v = v.transpose(1, 2)
    if T == 1 and lengths is None:  # a step of decoding: one query, which sees all keys
        y = F.scaled_dot_product_attention(q.view(B, K, G, D), k, v)
        return y.view(B, 1, H, D)
    by_key_head = q.view(B, T, K, G, D).permute(0, 2, 3, 1, 4)  # (B, K, G, T, D)
    mask = _score_mask(T, S, lengths, G, q.dtype, q.device)
    y = F.scaled_dot_product_attention(by_key_head.reshape(B, K, G * T, D), k, v, mask)
    return y.view(B, K, G, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)


@lru_cache(maxsize=1)
@torch.inference_mode(False)
def _score_mask(
    T: int, S: int, lengths: Tensor | None, groups: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """-inf at the scores that a query must not see, else 0: (groups·T, S) or (B, 1, groups·T, S).

    The first layer of a step makes it. The other layers ask with the same `lengths` tensor, so
    they get it from the cache. It is a normal tensor, not an inference tensor, for it may also
    serve a step that has gradients.
    """
    visible = causal_mask(T, S, lengths, device)
    visible = torch.cat([visible] * groups, dim=-2)
    mask = torch.zeros(visible.shape, dtype=dtype, device=device)
    return mask.masked_fill_(~visible, -torch.inf)
