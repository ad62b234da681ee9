"""Sophgo: RMSNorm as torch_tpu's kernels, which write into the tensors they are given and know no autograd. AdamW is torch's fused
kernel, which the plug-in implements (`fused.adamw`); the rest are composites.

Transcribed from the vendor's public code (sophgo/torch-tpu fe9b478), never executed.
"""

import torch
from torch import Tensor


def has_rms_norm() -> bool:
    return hasattr(torch.ops.my_ops, "rmsnorm_forward") and hasattr(
        torch.ops.my_ops, "rmsnorm_backward"
    )


def can_rms_norm(x: Tensor, weight: Tensor, eps: float) -> bool:
    return x.dtype == weight.dtype and x.is_contiguous()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        y = torch.empty_like(x)
        torch.ops.my_ops.rmsnorm_forward(x, weight, None, y, x.dim() - 1, eps)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight = ctx.saved_tensors
        rms, dx = torch.zeros_like(x), torch.zeros_like(x)
        dw = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        torch.ops.my_ops.rmsnorm_backward(
            dy.contiguous(), x, weight, None, rms, dx, dw, None, x.dim() - 1, ctx.eps
        )
        return dx, dw, None


rms_norm = _RMSNorm.apply
