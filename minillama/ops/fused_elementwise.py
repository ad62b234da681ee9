"""RMSNorm, RoPE, SwiGLU, the masked softmax and AdamW with their backward derived by hand.

Autograd keeps what each elementary step of a formula touched. The derivative of the whole formula
shows how little is really needed: RMSNorm keeps its input (alive anyway) and one number per row,
RoPE keeps nothing of its input.

Below, dy is the gradient of the loss with respect to y. Means and sums run over a row unless stated
otherwise. `reference.py` has the formulas that each of these must equal.

On a CPU these ops are limited by memory bandwidth. RMSNorm and RoPE work on blocks of rows that fit
the cache, so that every pass but the first reads from the cache. On other devices there is one
block, the whole tensor.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minillama.ops import reference
from minillama.ops.reference import needs_grad

CACHE_BLOCK = 1 << 17  # elements of a block: 512 KiB in fp32, which a second-level cache holds


def row_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of several tensors (..., anything), in blocks that fit the CPU's cache.

    The blocks are views, so writing to one writes to its tensor, which must be contiguous.
    """
    rows = [x.reshape(-1, x.shape[-1]) for x in tensors]
    num_rows, width = rows[0].shape
    block_size = num_rows
    if tensors[0].is_cpu:
        block_size = CACHE_BLOCK // width
    blocks = [x.split(max(1, block_size)) for x in rows]
    return zip(*blocks, strict=True)


class _RMSNorm(torch.autograd.Function):
    """y = n w,   n = x r,   r = 1 / sqrt(mean(x^2) + eps).

    With g = dy w:   dx = r (g - n mean(g n)),   dw = sum over rows of dy n.
    The second term of dx is the path through r, since dr/dx = -r^3 x / C.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        C = x.shape[-1]
        y = torch.empty(x.shape, dtype=torch.result_type(x, weight), device=x.device)
        r = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
        for x_rows, y_rows, r_rows in row_blocks(x, y, r):
            x32 = x_rows.float()
            mean_square = torch.linalg.vecdot(x32, x32).unsqueeze(-1).div_(C)  # (rows, 1)
            torch.rsqrt(mean_square.add_(eps), out=r_rows)
            n = (x32 * r_rows).to(x.dtype)
            torch.mul(n, weight, out=y_rows)
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, r = ctx.saved_tensors
        C = x.shape[-1]
        w = weight.float()
        dw = torch.zeros(weight.shape, dtype=torch.float32, device=x.device)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for dy_rows, x_rows, r_rows, dx_rows in row_blocks(dy, x, r, dx):
            dy32 = dy_rows.float()
            n = x_rows.float() * r_rows
            dy_n = dy32 * n
            if ctx.needs_input_grad[1]:
                dw += dy_n.sum(0)
            mean_g_n = (dy_n @ w).div_(C).unsqueeze(-1)  # (rows, 1), since g n = (dy n) w
            g = torch.mul(dy32, w, out=dy_n)  # in the buffer of dy n, which is done with
            torch.mul(g.addcmul_(n, mean_g_n, value=-1), r_rows, out=dx_rows)
        return dx, dw.to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`. Keeps x and r, (..., 1) fp32."""
    if needs_grad(x, weight):
        return _RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(x1 cos - x2 sin, x2 cos + x1 sin), a block of positions at a time. x (B, T, H, D)."""
    if x.numel() <= CACHE_BLOCK or not x.is_cpu:
        return _rotate_block(x, cos, sin).to(x.dtype)
    T = x.shape[1]
    block_size = max(1, CACHE_BLOCK * T // x.numel())  # positions
    y = torch.empty_like(x)
    blocks = [tensor.split(block_size, dim=-3) for tensor in (y, x, cos, sin)]
    for y_block, x_block, cos_block, sin_block in zip(*blocks, strict=True):
        y_block.copy_(_rotate_block(x_block, cos_block, sin_block))
    return y


def _rotate_block(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation in fp32, in three passes over the block."""
    halves_swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return (x * cos).addcmul_(halves_swapped, sin)


class _Rope(torch.autograd.Function):
    """A rotation's transpose is its inverse:   dx = dy rotated by the opposite angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(dy, cos, -sin), None, None


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`reference.rope`. Keeps the tables, which all layers share."""
    if needs_grad(x):
        return _Rope.apply(x, cos, sin)
    return _rotate(x, cos, sin)


class _SwiGLU(torch.autograd.Function):
    """y = silu(a) b,   silu(a) = a s,   s = sigmoid(a), where a is gate and b is up.

    With silu'(a) = s (1 + a (1 - s)):   da = dy b silu'(a),   db = dy silu(a).
    silu(a) is not kept but computed again.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate = dy * up
        torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)  # times silu'(gate)
        dup = F.silu(gate).mul_(dy)
        return dgate, dup


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`reference.swiglu`. Keeps gate and up."""
    if needs_grad(gate, up):
        return _SwiGLU.apply(gate, up)
    return F.silu(gate).mul_(up)


class _ScaledMaskedSoftmax(torch.autograd.Function):
    """dx = scale y (dy - sum(dy y)), and 0 where masked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scale: float) -> Tensor:
        z = x.float().mul(scale).masked_fill_(mask, reference.MASKED)
        y = torch.softmax(z, -1, out=z).to(x.dtype)
        ctx.save_for_backward(y, mask)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        y, mask = ctx.saved_tensors
        y32 = y.float()
        dx = dy.float() * y32
        row_sum = dx.sum(-1, keepdim=True)
        dx.addcmul_(y32, row_sum, value=-1)
        dx.mul_(ctx.scale).masked_fill_(mask, 0.0)
        return dx.to(y.dtype), None, None


def scaled_masked_softmax(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    """`reference.scaled_masked_softmax` in one buffer. Keeps y and the mask."""
    return _ScaledMaskedSoftmax.apply(x, mask, scale)


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
    """`reference.adamw` by torch's kernel, which reads and writes each tensor once."""
    torch._fused_adamw_(
        [weight],
        [grad],
        [m],
        [v],
        [],
        [torch.full((), float(step), device=weight.device)],  # a copy from the host would wait
        lr=learning_rate,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=epsilon,
        amsgrad=False,
        maximize=False,
    )
