"""Sophgo: RMSNorm by torch_tpu's kernels.

The kernels write into the tensors they are given and have no autograd. AdamW is torch's fused
kernel, which the plug-in implements (`fused_elementwise.adamw`). The other ops have no kernel here.

Transcribed from the vendor's public code (sophgo/torch-tpu fe9b478), never executed.
"""

from typing import Any

import torch
from torch import Tensor


def has_rms_norm() -> bool:
    kernels = torch.ops.my_ops
    return hasattr(kernels, "rmsnorm_forward") and hasattr(kernels, "rmsnorm_backward")


def supports_rms_norm(x: Tensor, weight: Tensor, eps: float) -> bool:
    return x.dtype == weight.dtype and x.is_contiguous()


class _RMSNorm(torch.autograd.Function):
    """The formulas are those of `fused_elementwise._RMSNorm`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        y = torch.empty_like(x)
        bias = None
        last_dim = x.dim() - 1
        torch.ops.my_ops.rmsnorm_forward(x, weight, bias, y, last_dim, eps)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        rms = torch.zeros_like(x)
        dx = torch.zeros_like(x)
        dw = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        bias = dbias = None
        last_dim = x.dim() - 1
        torch.ops.my_ops.rmsnorm_backward(
            dy.contiguous(), x, weight, bias, rms, dx, dw, dbias, last_dim, ctx.eps
        )
        return dx, dw, None


rms_norm = _RMSNorm.apply
