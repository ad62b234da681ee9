"""CUDA kernels in Triton for RMSNorm and SwiGLU: the formulas of `fused_elementwise`.

Each row is read from memory once. A program works on one row (RMSNorm) or one block of elements
(SwiGLU), and holds everything between in registers. The gradient of RMSNorm's weight is a sum over
all rows. A fixed number of programs each add up rows of their own and write one partial sum, so no
program waits for another or writes where another does.

Imported by `ops.cuda` alone, where Triton is installed. The tests run these kernels in Triton's
interpreter and compile them for sm_80 and sm_90; they have not been executed on a GPU. Left out:
attention and the loss, where torch's own kernels do as well, and rope.

In the kernels, x, w, y, … are pointers to the first element. C is the width of a row, N the number
of rows (RMSNorm) or elements (SwiGLU), BLOCK the number of elements of a program: a power of two,
so the elements behind the end are masked.
"""

# mypy: disable-error-code="no-untyped-def"
# (the kernels: their arguments are pointers and numbers of Triton's own)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PARTIAL_SUMS = 256  # programs that share RMSNorm's backward
SWIGLU_BLOCK = 1024  # elements of a SwiGLU program
ELEMENTS_PER_WARP = 256  # of a row: 8 for each of its 32 threads
FEWEST_WARPS = 4
MOST_WARPS = 32


def warps_for(block: int) -> int:
    """How many warps share a row of `block` elements, a power of two.

    With few, the values of a wide row do not fit into registers and go through memory.
    """
    return min(MOST_WARPS, max(FEWEST_WARPS, block // ELEMENTS_PER_WARP))


@triton.jit
def _load(pointer, index, inside):
    """The elements at `index` in fp32, 0 where not `inside`."""
    return tl.load(pointer + index, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, index, values, inside):
    """Round to the dtype of the tensor and write where `inside`."""
    tl.store(pointer + index, values.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_forward(x, w, y, r, eps, C, BLOCK: tl.constexpr):
    """y = n w,   n = x r,   r = 1 / sqrt(mean(x^2) + eps), for one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < C
    x_row = _load(x, row * C + column, inside)
    weight = _load(w, column, inside)
    scale = 1.0 / tl.sqrt(tl.sum(x_row * x_row, axis=0) / C + eps)
    n = (x_row * scale).to(y.dtype.element_ty).to(tl.float32)  # rounded, as the reference does
    _store(y, row * C + column, n * weight, inside)
    tl.store(r + row, scale)


@triton.jit
def _rms_norm_backward(dy, x, w, r, dx, partial, N, C, rows, BLOCK: tl.constexpr):
    """dx = r (g - n mean(g n)) with g = dy w, and a partial sum of dw = dy n, for `rows` rows."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    weight = _load(w, column, column < C)
    dw = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(rows):
        row = program * rows + i
        index = row * C + column
        inside = column < tl.where(row < N, C, 0)  # the last program may have rows too many
        scale = tl.load(r + row, mask=row < N, other=0.0)
        n = _load(x, index, inside) * scale
        dy_row = _load(dy, index, inside)
        g = dy_row * weight
        mean_g_n = tl.sum(g * n, axis=0) / C
        _store(dx, index, scale * (g - n * mean_g_n), inside)
        dw += dy_row * n
    tl.store(partial + program * C + column, dw, mask=column < C)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        weight = weight.contiguous()
        C = x.shape[-1]
        N = x.numel() // C
        y = torch.empty_like(x)
        r = torch.empty(N, dtype=torch.float32, device=x.device)
        block = triton.next_power_of_2(C)
        warps = warps_for(block)
        _rms_norm_forward[(N,)](x, weight, y, r, eps, C, BLOCK=block, num_warps=warps)
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, r = ctx.saved_tensors
        C = x.shape[-1]
        N = len(r)
        rows = triton.cdiv(N, PARTIAL_SUMS)  # per program
        programs = triton.cdiv(N, rows)
        dx = torch.empty_like(x)
        partial = torch.empty(programs, C, dtype=torch.float32, device=x.device)
        block = triton.next_power_of_2(C)
        launch = _rms_norm_backward[(programs,)]
        dy = dy.contiguous()
        warps = warps_for(block)
        launch(dy, x, weight, r, dx, partial, N, C, rows, BLOCK=block, num_warps=warps)
        return dx, partial.sum(0).to(weight.dtype), None


@triton.jit
def _swiglu_forward(gate, up, y, N, BLOCK: tl.constexpr):
    """y = a s b with s = sigmoid(a), where a is gate and b is up."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < N
    a = _load(gate, index, inside)
    b = _load(up, index, inside)
    _store(y, index, a * tl.sigmoid(a) * b, inside)


@triton.jit
def _swiglu_backward(dy, gate, up, dgate, dup, N, BLOCK: tl.constexpr):
    """da = dy b s (1 + a (1 - s)),   db = dy a s."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < N
    a = _load(gate, index, inside)
    b = _load(up, index, inside)
    upstream = _load(dy, index, inside)
    s = tl.sigmoid(a)
    da = upstream * b * s * (1.0 + a * (1.0 - s))
    db = upstream * a * s
    _store(dgate, index, da, inside)
    _store(dup, index, db, inside)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate = gate.contiguous()
        up = up.contiguous()
        ctx.save_for_backward(gate, up)
        y = torch.empty_like(gate)
        N = y.numel()
        launch = _swiglu_forward[(triton.cdiv(N, SWIGLU_BLOCK),)]
        launch(gate, up, y, N, BLOCK=SWIGLU_BLOCK)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate = torch.empty_like(gate)
        dup = torch.empty_like(up)
        N = dy.numel()
        launch = _swiglu_backward[(triton.cdiv(N, SWIGLU_BLOCK),)]
        launch(dy.contiguous(), gate, up, dgate, dup, N, BLOCK=SWIGLU_BLOCK)
        return dgate, dup


rms_norm = _RMSNorm.apply
swiglu = _SwiGLU.apply
