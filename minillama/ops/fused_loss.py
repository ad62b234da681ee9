"""The language-model loss without the logits: linear layer and cross entropy as one op.

The logits of N positions are (N, V), by far the largest tensor of a step: 262 MB for 2048 positions
and a vocabulary of 32,000. But the loss needs them one row at a time, and so does its gradient:

    z = h W^T        p = softmax(z)        loss = sum of -log p[label]
    d = p - onehot(label)                  dh = d W        dW = d^T h

So the positions are processed in chunks. The upstream gradient of a loss is one number, which only
scales dh and dW: both are computed in forward, while the logits of the chunk exist, and backward
multiplies. Positions without a label are skipped.

The products are fp32. CUDA computes fp32 products without its tensor cores, many times slower than
those of 16 bits, unless the inputs may be rounded to TF32: 11 significant bits. Values of 16 bits
have no more than that. So if h and W are 16-bit, TF32 is used: z is not rounded at all, and only d
is, by less than dh is afterwards.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from minillama.ops.reference import IGNORE

LOGIT_CHUNK = 6 << 20  # elements of logits that exist at a time: 24 MiB in fp32


@contextmanager
def _tf32_products(hidden: Tensor, weight: Tensor) -> Iterator[None]:
    """In the body, CUDA's fp32 products round to TF32 if both tensors are 16-bit."""
    before = torch.backends.cuda.matmul.allow_tf32
    are_16_bit = hidden.element_size() == 2 and weight.element_size() == 2
    torch.backends.cuda.matmul.allow_tf32 = before or are_16_bit
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class _LinearCrossEntropy(torch.autograd.Function):
    """z, log p, p and d share one buffer. hidden (N, C), weight (V, C), labels (N,)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        with _tf32_products(hidden, weight):
            return _LinearCrossEntropy.compute(ctx, hidden, weight, labels)

    @staticmethod
    def compute(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """The loss; keeps dh and dW in ctx."""
        needs_dh, needs_dw = ctx.needs_input_grad[:2]
        V = len(weight)
        weight32 = weight.float()
        targets = (labels != IGNORE).nonzero().squeeze(1)  # positions that have a label
        chunk = chunk_size(len(targets), *weight.shape)
        buffer = torch.empty(chunk, V, dtype=torch.float32, device=weight.device)
        loss = torch.zeros((), dtype=torch.float32, device=weight.device)
        dh = torch.zeros_like(hidden) if needs_dh else None
        dw = torch.zeros_like(weight32) if needs_dw else None
        for rows in targets.split(max(1, chunk)):
            h = hidden[rows].float()  # (chunk, C)
            label = labels[rows].unsqueeze(1)  # (chunk, 1)
            z = torch.mm(h, weight32.T, out=buffer[: len(rows)])  # (chunk, V)
            log_p = torch.log_softmax(z, 1, out=z)
            loss -= log_p.gather(1, label).sum()
            if not (needs_dh or needs_dw):
                continue
            minus_one = h.new_full(label.shape, -1.0)
            d = log_p.exp_().scatter_add_(1, label, minus_one)  # p - onehot
            if dh is not None:
                dh[rows] = (d @ weight32).to(dh.dtype)
            if dw is not None:
                dw.addmm_(d.T, h)
        ctx.save_for_backward(dh, dw)
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """In place, so autograd refuses a second backward."""
        dh, dw = ctx.saved_tensors
        if dh is not None:
            dh = dh.mul_(dloss)
        if dw is not None:
            dw = dw.mul_(dloss).to(ctx.dtype)
        return dh, dw, None


def chunk_size(num_targets: int, V: int, C: int) -> int:
    """Positions per chunk: LOGIT_CHUNK elements of logits, but at least C/8 positions.

    Each chunk reads and writes all of dW, (V, C). With C/8 positions or more the logits are at
    least an eighth of that, and the traffic is worth it.
    """
    return min(num_targets, max(1, LOGIT_CHUNK // V, C // 8))


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """`reference.linear_cross_entropy`. Keeps dh and dW for backward, and no logits."""
    return _LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, labels.flatten())
