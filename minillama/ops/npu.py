"""Ascend: the ops as Huawei's fused kernels, called through torch_npu's schemas (2.13.0), each beside the limits its manual states.

`can_…` takes an op's arguments and says whether the kernel takes them, by shapes and dtypes; what it refuses goes to the next form in
the table. docs/devices.md lists the conventions that differ from ours. The loss is not here: `npu_cross_entropy_loss` cannot both
ignore labels and have a gradient; the chunked form in `fused.py` does.
"""

import math
from collections.abc import Callable
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from minillama.ops.packing import Documents
from minillama.ops.reference import needs_grad

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
ATTENTION = ("npu_fusion_attention", "npu_prompt_flash_attention", "npu_incre_flash_attention")
RIGHT_DOWN_CAUSAL = 3  # sparse_mode: the last query sees the last key


def has(*names: str) -> Callable[[], bool]:
    """Whether the plug-in in this process brings these kernels, asked when called."""
    return lambda: all(hasattr(torch.ops.npu, name) for name in names)


@cache
def _triangle(device: torch.device) -> Tensor:
    """True above the diagonal, (2048, 2048): the compressed mask of the causal modes."""
    return torch.ones(2048, 2048, dtype=torch.bool, device=device).triu(1)


def can_rms_norm(x: Tensor, weight: Tensor, eps: float) -> bool:
    return x.dtype in FLOATS and weight.dtype == x.dtype and 2 <= x.dim() <= 8


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.ops.npu.npu_rms_norm(x, weight, epsilon=eps)[
        0
    ]  # not its own default; the other result is rstd


def can_rope(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    B, _, H, D = x.shape
    return (
        x.dtype in FLOATS
        and D % 2 == 0
        and D < 896
        and B < 1000
        and H < 1000
        and not (cos.requires_grad or sin.requires_grad)
    )


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The kernel wants 4 dimensions, and a sine without the minus of its first half. Tables and product stay fp32."""
    sin = torch.cat([sin[..., x.shape[-1] // 2 :]] * 2, dim=-1)
    cos, sin = (
        table.view(-1, x.shape[1], 1, x.shape[-1]) for table in (cos, sin)
    )  # (1 or B, T, 1, D)
    return torch.ops.npu.npu_rotary_mul(x.float(), cos, sin).to(x.dtype)


def can_swiglu(gate: Tensor, up: Tensor) -> bool:
    return (
        gate.dtype in FLOATS
        and gate.dtype == up.dtype
        and gate.shape == up.shape
        and gate.dim() <= 8
    )


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return torch.ops.npu.npu_swiglu(
        torch.cat((gate, up), dim=-1), dim=-1
    )  # one tensor, [gate | up]


def can_scaled_masked_softmax(x: Tensor, mask: Tensor, scale: float) -> bool:
    sides_fit = x.dim() == 4 and all(32 <= side <= 4096 and side % 32 == 0 for side in x.shape[-2:])
    return sides_fit and x.dtype in FLOATS and mask.dtype == torch.bool


def scaled_masked_softmax(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    return torch.ops.npu.npu_scaled_masked_softmax(x, mask, scale, False)  # True masks, by -10000


def can_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents | None = None,
    lengths: Tensor | None = None,
) -> bool:
    B, T, H, D = q.shape
    S, K = k.shape[1], k.shape[2]
    if lengths is not None or not q.dtype == k.dtype == v.dtype or H > 256 or H % K or T > S:
        return False
    if documents is not None:
        return (
            q.dtype in FLOATS and D <= 768 and len(documents.lengths) <= 1024 and B * T <= 1 << 20
        )
    if needs_grad(q, k, v):
        return q.dtype in FLOATS and D <= 768
    return (
        q.dtype in (torch.float16, torch.bfloat16)
        and D <= 512
        and D % 16 == 0
        and H // K <= 64
        and H * D < 65535
        and B <= 65535
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Training: the flash kernel with a backward; documents as one ragged run (TND) by the places they end. Inference: the kernel for
    prompts, or for a single query, over the cache as it lies."""
    B, T, H, D = q.shape
    scale = 1 / math.sqrt(D)
    causal = {"atten_mask": _triangle(q.device), "sparse_mode": RIGHT_DOWN_CAUSAL}
    if documents is not None:
        ends = list(accumulate(documents.lengths))
        run = [x.reshape(B * T, -1, D) for x in (q, k, v)]  # (B·T, heads, D)
        y = torch.ops.npu.npu_fusion_attention(
            *run, H, "TND", scale=scale, actual_seq_qlen=ends, actual_seq_kvlen=ends, **causal
        )[0]
        return y.view(B, T, H, D)
    if needs_grad(q, k, v):
        return torch.ops.npu.npu_fusion_attention(q, k, v, H, "BSND", scale=scale, **causal)[0]
    q, k, v = (x.contiguous() for x in (q, k, v))
    shape = {
        "num_heads": H,
        "num_key_value_heads": k.shape[2],
        "input_layout": "BSND",
        "scale_value": scale,
    }
    if T == 1:
        return torch.ops.npu.npu_incre_flash_attention(q, k, v, inner_precise=0, **shape)
    return torch.ops.npu.npu_prompt_flash_attention(q, k, v, **shape, **causal)


def can_adamw(
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
    torch.ops.npu.npu_apply_adam_w.out(  # which wants beta^(t-1)
        beta1 ** (step - 1),
        beta2 ** (step - 1),
        learning_rate,
        weight_decay,
        beta1,
        beta2,
        epsilon,
        grad,
        None,
        False,
        False,
        out=[weight, m, v],
    )
