"""Flash attention by hand (Dao et al. 2022), in blocks: the derivation of torch's kernel, checked.

    forward    over blocks of keys, with the maximum m of a row of scores, the sum l of exp(s - m)
               and the weighted values a:
               m' = max(m, max s)
               l' = l exp(m - m') + sum exp(s - m')
               a' = a exp(m - m') + exp(s - m') v
               then o = a / l; of the scores only their log-sum-exp is kept: m + log l
    backward   p = exp(s - lse) again, a block at a time;   dv = p^T do,   dp = do v^T
               softmax's ds = p (dp - sum p dp), and sum p dp = sum do o: one number a row again
               dq = ds k / sqrt(D),   dk = ds^T q / sqrt(D)

No T x S matrix exists at any time; blocks above the diagonal are never visited. Shapes as in
`ops.reference.attention`, without documents. It is no faster than `scaled_dot_product_attention`,
which is why the table of ops has that one.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 8  # positions; small, so that the tests cross block borders


class _Flash(torch.autograd.Function):
    """q (B, K, G, T, D), k and v (B, K, 1, S, D).

    G = H/K query heads share a key head: the 1 of k and v is broadcast to them.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = torch.empty_like(q)
        lse = torch.empty(*q.shape[:-1], 1)
        for rows in _blocks(q):
            m = torch.full_like(lse[..., rows, :], -math.inf)
            l = torch.zeros_like(m)
            a = torch.zeros_like(q[..., rows, :])
            for keys in _blocks(k, below=_last_visible_key(q, k, rows)):
                s = _scores(q, k, rows, keys)
                new_m = torch.maximum(m, s.amax(-1, keepdim=True))
                shrink = (m - new_m).exp()
                p = (s - new_m).exp()
                l = l * shrink + p.sum(-1, keepdim=True)
                a = a * shrink + p @ v[..., keys, :]
                m = new_m
            o[..., rows, :] = a / l
            lse[..., rows, :] = m + l.log()
        ctx.save_for_backward(q, k, v, o, lse)
        return o

    @staticmethod
    def backward(ctx, do: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, o, lse = ctx.saved_tensors
        dq = torch.zeros_like(q)
        dk = torch.zeros_like(k)
        dv = torch.zeros_like(v)
        root = math.sqrt(q.shape[-1])
        sum_p_dp = (do * o).sum(-1, keepdim=True)  # (B, K, G, T, 1)
        for rows in _blocks(q):
            do_rows = do[..., rows, :]
            for keys in _blocks(k, below=_last_visible_key(q, k, rows)):
                p = (_scores(q, k, rows, keys) - lse[..., rows, :]).exp()
                dp = do_rows @ v[..., keys, :].mT
                ds = p * (dp - sum_p_dp[..., rows, :]) / root
                dq[..., rows, :] += ds @ k[..., keys, :]
                dk[..., keys, :] += (ds.mT @ q[..., rows, :]).sum(2, keepdim=True)  # over the group
                dv[..., keys, :] += (p.mT @ do_rows).sum(2, keepdim=True)
        return dq, dk, dv


def _last_visible_key(q: Tensor, k: Tensor, rows: slice) -> int:
    """The block of queries sees keys below this: the queries stand at the last positions."""
    return rows.stop + k.shape[-2] - q.shape[-2]


def _blocks(x: Tensor, below: int | None = None) -> Iterator[slice]:
    length = x.shape[-2]
    return (
        slice(at, min(at + BLOCK, length)) for at in range(0, min(length, below or length), BLOCK)
    )


def _scores(q: Tensor, k: Tensor, rows: slice, keys: slice) -> Tensor:
    """q k^T / sqrt(D) of a block, -inf above the diagonal."""
    s = q[..., rows, :] @ k[..., keys, :].mT / math.sqrt(q.shape[-1])
    position = torch.arange(rows.start, rows.stop).unsqueeze(1) + k.shape[-2] - q.shape[-2]
    return s.masked_fill(torch.arange(keys.start, keys.stop) > position, -math.inf)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`ops.reference.attention` without documents. Keeps inputs, output and a number per row."""
    B, T, H, D = q.shape
    K = k.shape[2]
    q_ = q.float().view(B, T, K, H // K, D).permute(0, 2, 3, 1, 4).contiguous()  # (B, K, G, T, D)
    k_, v_ = (x.float().transpose(1, 2).unsqueeze(2) for x in (k, v))  # (B, K, 1, S, D)
    return _Flash.apply(q_, k_, v_).permute(0, 3, 1, 2, 4).reshape(B, T, H, D).to(q.dtype)
