"""Linear layers: on a CPU there are two ways to be faster than torch's own product.

    packed weights     for decoding: W is stored in the order in which oneDNN reads it
    16-bit in fp32     in fp16, and in bf16 on a CPU without bf16 units: products of fp32 copies,
                       rounded once, block by block; decoding takes it from 5 rows on

`linear` chooses among them, and all compute `reference.linear` up to rounding. On other devices it
is torch's own product. benchmarks/cpu_linear.py measures each way beside torch's product;
docs/ops.md has its figures.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS = 4  # up to so many rows torch's product of bf16 is faster than copying W to fp32
BLOCK = 600_000  # elements of W that are copied at once; a larger copy is new memory each time
LARGE = 1 << 19  # elements from which packing an fp32 weight gains
PACKED_ROWS = 8  # number of rows for which oneDNN chooses the order; it serves any number


@cache
def has_bf16_units() -> bool:
    """Whether this CPU multiplies bf16 matrices without first turning them into fp32."""
    return torch.cpu._is_avx512_bf16_supported()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b. x (..., in), weight (out, in) or packed, bias (out,)."""
    if weight.is_mkldnn:
        return linear_packed(x, weight, bias)
    if x.dtype is torch.float32 or not x.is_cpu:
        return F.linear(x, weight, bias)
    if x.dtype is torch.bfloat16 and (has_bf16_units() or _decodes_few_rows(x)):
        return F.linear(x, weight, bias)
    return linear_in_fp32(x, weight, bias)


def _decodes_few_rows(x: Tensor) -> bool:
    num_rows = x.numel() // x.shape[-1]
    return num_rows <= FEW_ROWS and not torch.is_grad_enabled()


def linear_in_fp32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Products of fp32 copies, rounded once, forward and backward. Keeps the 16-bit x and W."""
    return _Linear16.apply(x, weight, bias)


class _Linear16(torch.autograd.Function):
    """y = x W^T + b with 16-bit data and fp32 arithmetic.

    dx = dy W,   dW = dy^T x,   db = sum over rows of dy.

    W is copied to fp32 in blocks of its rows, so a copy of all of it never exists.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        x32 = x.float()
        y = x.new_empty(*x.shape[:-1], len(weight))
        for block in _blocks(weight):
            bias32 = None if bias is None else bias[block].float()
            y[..., block] = F.linear(x32, weight[block].float(), bias32)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_dx, needs_dw, needs_db = ctx.needs_input_grad
        dy_rows = dy.float().flatten(0, -2)  # (rows, out)
        dx = dw = db = None
        if needs_dx:
            dx32 = dy_rows.new_zeros(len(dy_rows), x.shape[-1])  # (rows, in)
            for block in _blocks(weight):
                dx32.addmm_(dy_rows[:, block], weight[block].float())
            dx = dx32.view(x.shape).to(x.dtype)
        if needs_dw:
            x_rows = x.float().flatten(0, -2)  # (rows, in)
            dw = torch.empty_like(weight)
            for block in _blocks(weight):
                dw[block] = dy_rows[:, block].T @ x_rows
        if needs_db:
            db = dy_rows.sum(0).to(weight.dtype)
        return dx, dw, db


def _blocks(weight: Tensor) -> Iterator[slice]:
    """Yield blocks of rows of W (out, in) with about BLOCK elements."""
    num_rows = max(1, BLOCK // weight.shape[1])
    for start in range(0, len(weight), num_rows):
        yield slice(start, start + num_rows)


def packing_gains(weight: Tensor) -> bool:
    """Whether products of a few rows with `weight` are faster when it is packed.

    bf16 weights gain if there are units for them. fp32 weights gain for any number of rows: torch
    multiplies one row by one core, and oneDNN by all of them.
    """
    if not torch.backends.mkldnn.is_available() or not weight.is_cpu or weight.is_mkldnn:
        return False
    if weight.dtype is torch.bfloat16:
        return has_bf16_units()
    return weight.dtype is torch.float32 and weight.numel() >= LARGE


def pack_weight(weight: Tensor) -> Tensor:
    """The same numbers in the order in which oneDNN multiplies them."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)


@torch.no_grad()
def pack_weights(model: nn.Module) -> None:
    """Pack the weights of the linear layers of `model`, if that gains.

    A product cuts its weight into tiles for the CPU's registers. Decoding multiplies a few rows by
    the whole weight again and again, and cutting costs more than multiplying, so it is done once.
    From then on only `linear` can use the weights, and only without gradients; `to_dense()`
    gives the bits back. A weight that an embedding shares is not packed.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for module in model.modules():
        if not isinstance(module, nn.Linear) or id(module.weight) in embeddings:
            continue
        if packing_gains(module.weight):
            module.weight = nn.Parameter(pack_weight(module.weight), requires_grad=False)


def linear_packed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product with a packed weight. oneDNN has no backward for it, and would not say so."""
    assert not (torch.is_grad_enabled() and x.requires_grad), (
        "packed weights are for reading: take gradients before `pack`"
    )
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
