"""CUDA kernels in Triton: what `fused.py` derives, with each row read from memory once and everything between in registers.

A program is one row (RMSNorm) or one stretch of elements (SwiGLU). The gradient of RMSNorm's weight is a sum over all rows: each of a
fixed number of programs adds up rows of its own and writes one partial sum, so none waits for or races another.

Imported by `ops.cuda` alone, where Triton is installed. The tests run these kernels in Triton's interpreter and compile them for
sm_80 and sm_90; they have not been executed on a GPU. Left out: attention and the loss, where torch's own kernels
do as well, and rope.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PARTIAL_SUMS = 256  # programs that share RMSNorm's backward
STRETCH = 1024  # elements of a SwiGLU program


@triton.jit
def _rms_norm_forward(x, w, y, r, eps, C, BLOCK: tl.constexpr):
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x32 = tl.load(x + row * C + c, mask=c < C, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x32 * x32, axis=0) / C + eps)
    n = (
        (x32 * scale).to(y.dtype.element_ty).to(tl.float32)
    )  # rounded before the product, as the formula says
    weight = tl.load(w + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(y + row * C + c, (n * weight).to(y.dtype.element_ty), mask=c < C)
    tl.store(r + row, scale)


@triton.jit
def _rms_norm_backward(dy, x, w, r, dx, partial, N, C, rows, BLOCK: tl.constexpr):
    program, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    weight = tl.load(w + c, mask=c < C, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(rows):
        row = program * rows + i
        inside = c < tl.where(row < N, C, 0)
        scale = tl.load(r + row, mask=row < N, other=0.0)
        n = tl.load(x + row * C + c, mask=inside, other=0.0).to(tl.float32) * scale
        upstream = tl.load(dy + row * C + c, mask=inside, other=0.0).to(tl.float32)
        g = upstream * weight
        down = scale * (g - n * (tl.sum(g * n, axis=0) / C))
        tl.store(dx + row * C + c, down.to(dx.dtype.element_ty), mask=inside)
        dw += upstream * n
    tl.store(partial + program * C + c, dw, mask=c < C)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight, C = x.contiguous(), weight.contiguous(), x.shape[-1]
        y, r = (
            torch.empty_like(x),
            torch.empty(x.numel() // C, dtype=torch.float32, device=x.device),
        )
        _rms_norm_forward[(len(r),)](x, weight, y, r, eps, C, BLOCK=triton.next_power_of_2(C))
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight, r = ctx.saved_tensors
        N, C = len(r), x.shape[-1]
        rows = triton.cdiv(N, PARTIAL_SUMS)  # of a program
        dx, partial = (
            torch.empty_like(x),
            torch.empty(triton.cdiv(N, rows), C, dtype=torch.float32, device=x.device),
        )
        _rms_norm_backward[(len(partial),)](
            dy.contiguous(), x, weight, r, dx, partial, N, C, rows, BLOCK=triton.next_power_of_2(C)
        )
        return dx, partial.sum(0).to(weight.dtype), None


@triton.jit
def _swiglu_forward(gate, up, y, N, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(gate + at, mask=at < N, other=0.0).to(tl.float32)
    b = tl.load(up + at, mask=at < N, other=0.0).to(tl.float32)
    tl.store(y + at, (a * tl.sigmoid(a) * b).to(y.dtype.element_ty), mask=at < N)


@triton.jit
def _swiglu_backward(dy, gate, up, dgate, dup, N, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(gate + at, mask=at < N, other=0.0).to(tl.float32)
    b = tl.load(up + at, mask=at < N, other=0.0).to(tl.float32)
    upstream, s = tl.load(dy + at, mask=at < N, other=0.0).to(tl.float32), tl.sigmoid(a)
    tl.store(
        dgate + at,
        (upstream * b * s * (1.0 + a * (1.0 - s))).to(dgate.dtype.element_ty),
        mask=at < N,
    )
    tl.store(dup + at, (upstream * a * s).to(dup.dtype.element_ty), mask=at < N)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        y = torch.empty_like(gate)
        _swiglu_forward[(triton.cdiv(y.numel(), STRETCH),)](gate, up, y, y.numel(), BLOCK=STRETCH)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        _swiglu_backward[(triton.cdiv(dy.numel(), STRETCH),)](
            dy.contiguous(), gate, up, dgate, dup, dy.numel(), BLOCK=STRETCH
        )
        return dgate, dup


rms_norm, swiglu = _RMSNorm.apply, _SwiGLU.apply
