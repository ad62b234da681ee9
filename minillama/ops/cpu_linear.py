"""Linear layers: on a CPU there are three ways to be faster than torch's own product.

    packed weights     for decoding: W is stored in the order in which oneDNN reads it
    row by row         for decoding in bf16 on a CPU without bf16 units, up to 6 rows:
                       a matrix-vector product for each row
    16-bit in fp32     for training in fp16, or in bf16 on a CPU without units for it:
                       products of fp32 copies, rounded once

`linear` chooses among them, and all compute `reference.linear` up to rounding. On other devices it
is torch's own product. benchmarks/cpu_linear.py measures each way beside torch's product;
docs/ops.md has its figures.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MATVEC_ROWS = 6  # up to so many rows a product for each beats a copy of W in fp32
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
    if _is_row_by_row(x):
        return linear_row_by_row(x, weight, bias)
    if x.dtype is torch.bfloat16 and has_bf16_units():
        return F.linear(x, weight, bias)
    return linear_in_fp32(x, weight, bias)


def linear_in_fp32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Products of fp32 copies, rounded once, forward and backward. Keeps the 16-bit x and W."""
    return _Linear16.apply(x, weight, bias)


class _Linear16(torch.autograd.Function):
    """y = x W^T + b with 16-bit data and fp32 arithmetic.

    dx = dy W,   dW = dy^T x,   db = sum over rows of dy.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        bias32 = None if bias is None else bias.float()
        return F.linear(x.float(), weight.float(), bias32).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_dx, needs_dw, needs_db = ctx.needs_input_grad
        dy32 = dy.float()
        dy_rows = dy32.flatten(0, -2)  # (rows, out)
        dx = dw = db = None
        if needs_dx:
            dx = (dy32 @ weight.float()).to(x.dtype)
        if needs_dw:
            x_rows = x.float().flatten(0, -2)  # (rows, in)
            dw = (dy_rows.T @ x_rows).to(weight.dtype)
        if needs_db:
            db = dy_rows.sum(0).to(weight.dtype)
        return dx, dw, db


def _is_row_by_row(x: Tensor) -> bool:
    """Whether one product for each row of x is the fastest way.

    So it is for few rows in bf16, without gradients, on a CPU without bf16 units.
    """
    if x.dtype is not torch.bfloat16 or torch.is_grad_enabled() or has_bf16_units():
        return False
    num_rows = x.numel() // x.shape[-1]
    return num_rows <= MATVEC_ROWS


def linear_row_by_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = []
    for row in x.reshape(-1, x.shape[-1]):
        y = torch.mv(weight, row) if bias is None else torch.addmv(bias, weight, row)
        rows.append(y)
    return torch.stack(rows).view(*x.shape[:-1], -1)


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
