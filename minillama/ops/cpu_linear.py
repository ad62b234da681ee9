"""Linear layers: on a CPU there are four ways to be faster than torch's own product.

    tiles of columns   for decoding one sequence: see `ops.column_tiles`
    packed weights     for decoding several: W is stored in the order in which oneDNN reads it
    oneDNN             for training in fp32 with AVX-512: torch takes MKL's product
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

from minillama.ops import column_tiles

FEW_ROWS = 4  # up to so many rows torch's product of bf16 is faster than copying W to fp32
BLOCK = 600_000  # elements of W that are copied at once; a larger copy is new memory each time
LARGE = 1 << 19  # elements from which packing an fp32 weight gains
PACKED_ROWS = 8  # number of rows for which oneDNN chooses the order; it serves any number


@cache
def has_bf16_units() -> bool:
    """Whether this CPU multiplies bf16 matrices without first turning them into fp32."""
    return torch.cpu._is_avx512_bf16_supported()


@cache
def onednn_gains() -> bool:
    """Whether oneDNN's product of many fp32 rows is faster than MKL's: up to 1.3 times with
    AVX-512; without, neither is.
    """
    has_onednn = torch.backends.mkldnn.is_available()
    return has_onednn and torch.backends.cpu.get_cpu_capability() == "AVX512"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b. x (..., in), weight (out, in), packed, or in tiles; bias (out,)."""
    if weight.is_mkldnn:
        return linear_packed(x, weight, bias)
    if weight.dim() == 3:
        return linear_tiled(x, weight, bias)
    if not x.is_cpu:
        return F.linear(x, weight, bias)
    if x.dtype is torch.float32:
        multiply = linear_by_onednn if onednn_gains() else F.linear
        return multiply(x, weight, bias)
    if x.dtype is torch.bfloat16 and (has_bf16_units() or _decodes_few_rows(x)):
        return F.linear(x, weight, bias)
    return linear_in_fp32(x, weight, bias)


def _decodes_few_rows(x: Tensor) -> bool:
    num_rows = x.numel() // x.shape[-1]
    return num_rows <= FEW_ROWS and not torch.is_grad_enabled()


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b by oneDNN. It has no backward, and would not say so."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def linear_by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """fp32, forward and backward. Keeps x only for a weight that has a gradient."""
    return _Linear32.apply(x, weight, bias)


class _Linear32(torch.autograd.Function):
    """y = x W^T + b in fp32 by oneDNN.

    dx = dy W,   dW = dy^T x,   db = sum over rows of dy.

    dW is torch's product, which is the faster one for it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_dw = ctx.needs_input_grad[1]
        ctx.save_for_backward(x if needs_dw else None, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_dx, needs_dw, needs_db = ctx.needs_input_grad
        dy_rows = dy.flatten(0, -2)  # (rows, out)
        dx = _multiply(dy, weight.T, None) if needs_dx else None
        dw = dy_rows.T @ x.flatten(0, -2) if needs_dw else None
        db = dy_rows.sum(0) if needs_db else None
        return dx, dw, db


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
def pack_weights(model: nn.Module, num_rows: int) -> None:
    """Store the weights of the linear layers of `model` as products of `num_rows` rows read them
    fastest: in tiles for one row, packed for several, where that gains.

    A product cuts its weight into pieces for the CPU's registers. Decoding multiplies a few rows by
    the whole weight again and again, and cutting costs more than multiplying, so it is done once.
    From then on only `linear` can use the weights, for any number of rows, and only without
    gradients. A weight that an embedding shares is left as it is.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for module in model.modules():
        if isinstance(module, nn.Linear) and id(module.weight) not in embeddings:
            packed = _packed_for(module.weight, num_rows)
            if packed is not module.weight:
                module.weight = nn.Parameter(packed, requires_grad=False)


def _packed_for(weight: Tensor, num_rows: int) -> Tensor:
    """The weight in the best form for so many rows; itself if it is in that form."""
    in_tiles = weight.dim() == 3
    if num_rows == 1 and (in_tiles or column_tiles.can_tile(weight)):
        return weight if in_tiles else column_tiles.cut(weight.to_dense())
    if in_tiles:
        weight = column_tiles.join(weight)
    return pack_weight(weight) if packing_gains(weight) else weight


def linear_packed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product with a packed weight."""
    _assert_no_gradient(x)
    return _multiply(x, weight, bias)


def linear_tiled(x: Tensor, tiles: Tensor, bias: Tensor | None) -> Tensor:
    """The product with a weight in tiles. Tiles are for one row; several, such as a prompt's, are
    slower than with a packed weight.
    """
    _assert_no_gradient(x)
    rows = x.flatten(0, -2)  # (rows, in)
    if len(rows) == 1:
        y = column_tiles.multiply_row(rows[0], tiles)
    elif x.dtype is torch.float32 or (x.dtype is torch.bfloat16 and has_bf16_units()):
        y = column_tiles.multiply_rows(rows, tiles)
    else:
        y = torch.cat([linear(rows, tile.T) for tile in tiles], dim=-1)
    y = y.view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def _assert_no_gradient(x: Tensor) -> None:
    assert not (torch.is_grad_enabled() and x.requires_grad), (
        "packed weights are for reading: take gradients before `pack_weights`"
    )
