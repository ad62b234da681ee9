"""Ascend: the ops as Huawei's fused kernels, called by torch_npu's schemas (2.13.0).

Each `supports_…` states the limits in the kernel's manual, by shapes and dtypes. What it refuses
goes to the next implementation in the table. docs/devices.md lists the conventions that differ from
ours.

The loss is not here: `npu_cross_entropy_loss` cannot both ignore labels and have a gradient.
`fused_loss.linear_cross_entropy` does both.
"""

import math
from collections.abc import Callable
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from minillama.ops.packing import Documents
from minillama.ops.reference import needs_grad

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALVES)
ATTENTION = ("npu_fusion_attention", "npu_prompt_flash_attention", "npu_incre_flash_attention")
RIGHT_DOWN_CAUSAL = 3  # sparse_mode: the last query sees the last key


def has(*kernels: str) -> Callable[[], bool]:
    """A function that tells whether the plug-in in this process has these kernels."""
    return lambda: all(hasattr(torch.ops.npu, kernel) for kernel in kernels)


def supports_rms_norm(x: Tensor, weight: Tensor, eps: float) -> bool:
    return x.dtype in FLOATS and weight.dtype == x.dtype and 2 <= x.dim() <= 8


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """eps is given because the kernel has another default."""
    y, _rstd = torch.ops.npu.npu_rms_norm(x, weight, epsilon=eps)
    return y


def supports_rope(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    B, _, H, D = x.shape
    size_fits = D % 2 == 0 and D < 896 and B < 1000 and H < 1000
    trains_tables = cos.requires_grad or sin.requires_grad
    return x.dtype in FLOATS and size_fits and not trains_tables


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The kernel wants tables of 4 dimensions, and a sine without the minus of its first half.

    Tables and product stay fp32.
    """
    T, D = x.shape[1], x.shape[-1]
    half_sin = sin[..., D // 2 :]  # the half without the minus
    sin = torch.cat((half_sin, half_sin), dim=-1).view(-1, T, 1, D)  # (1 or B, T, 1, D)
    cos = cos.view(-1, T, 1, D)
    return torch.ops.npu.npu_rotary_mul(x.float(), cos, sin).to(x.dtype)


def supports_swiglu(gate: Tensor, up: Tensor) -> bool:
    same_dtype = gate.dtype in FLOATS and gate.dtype == up.dtype
    return same_dtype and gate.shape == up.shape and gate.dim() <= 8


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The kernel takes one tensor, [gate | up]."""
    return torch.ops.npu.npu_swiglu(torch.cat((gate, up), dim=-1), dim=-1)


def supports_scaled_masked_softmax(x: Tensor, mask: Tensor, scale: float) -> bool:
    sides_fit = x.dim() == 4 and all(32 <= side <= 4096 and side % 32 == 0 for side in x.shape[-2:])
    return sides_fit and x.dtype in FLOATS and mask.dtype == torch.bool


def scaled_masked_softmax(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The kernel masks at True, by -10000, as the reference does."""
    generate_mask = False
    return torch.ops.npu.npu_scaled_masked_softmax(x, mask, scale, generate_mask)


def supports_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents | None = None,
    lengths: Tensor | None = None,
) -> bool:
    B, T, H, D = q.shape
    S, K = k.shape[1], k.shape[2]
    if lengths is not None or T > S:
        return False
    if not q.dtype == k.dtype == v.dtype or H > 256 or H % K:
        return False
    if documents is not None or needs_grad(q, k, v):  # the training kernel
        fits = q.dtype in FLOATS and D <= 768
        if documents is not None:
            fits = fits and len(documents.lengths) <= 1024 and B * T <= 1 << 20
        return fits
    heads_fit = D <= 512 and D % 16 == 0 and H // K <= 64 and H * D < 65535
    return q.dtype in HALVES and heads_fit and B <= 65535


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    if documents is not None:
        B, T, H, D = q.shape
        ends = list(accumulate(documents.lengths))  # where each document ends
        q = q.reshape(B * T, H, D)  # one ragged sequence
        k = k.reshape(B * T, -1, D)  # (B·T, K, D)
        v = v.reshape(B * T, -1, D)
        y = _train(q, k, v, "TND", actual_seq_qlen=ends, actual_seq_kvlen=ends)
        return y.view(B, T, H, D)
    if needs_grad(q, k, v):
        return _train(q, k, v, "BSND")
    return _infer(q.contiguous(), k.contiguous(), v.contiguous())


def _train(q: Tensor, k: Tensor, v: Tensor, layout: str, **ends: list[int]) -> Tensor:
    """The flash kernel with a backward."""
    H, D = q.shape[-2:]
    scale = 1 / math.sqrt(D)
    causal = _causal_mask(q.device)
    return torch.ops.npu.npu_fusion_attention(q, k, v, H, layout, scale=scale, **ends, **causal)[0]


def _infer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The kernel for prompts, or that for a single query. They read contiguous tensors only."""
    H, D = q.shape[-2:]
    shape: dict[str, Any] = {
        "num_heads": H,
        "num_key_value_heads": k.shape[2],
        "input_layout": "BSND",
        "scale_value": 1 / math.sqrt(D),
    }
    if q.shape[1] == 1:
        return torch.ops.npu.npu_incre_flash_attention(q, k, v, inner_precise=0, **shape)
    return torch.ops.npu.npu_prompt_flash_attention(q, k, v, **shape, **_causal_mask(q.device))


def _causal_mask(device: torch.device) -> dict[str, Any]:
    return {"atten_mask": _triangle(device), "sparse_mode": RIGHT_DOWN_CAUSAL}


@cache
def _triangle(device: torch.device) -> Tensor:
    """True above the diagonal, (2048, 2048): the compressed mask of the causal modes."""
    return torch.ones(2048, 2048, dtype=torch.bool, device=device).triu(1)


def supports_adamw(
    weight: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: int, **settings: float
) -> bool:
    return weight.dtype in FLOATS and weight.dtype == grad.dtype == m.dtype == v.dtype


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
    """The kernel wants the powers beta^(t-1) of the step before."""
    beta1_power = beta1 ** (step - 1)
    beta2_power = beta2 ** (step - 1)
    max_grad_norm = None
    amsgrad = False
    maximize = False
    torch.ops.npu.npu_apply_adam_w.out(
        beta1_power,
        beta2_power,
        learning_rate,
        weight_decay,
        beta1,
        beta2,
        epsilon,
        grad,
        max_grad_norm,
        amsgrad,
        maximize,
        out=[weight, m, v],
    )
