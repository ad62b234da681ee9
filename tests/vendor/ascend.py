"""torch_npu's fused kernels, emulated.

The schemas are the true ones (npu_schemas.json, as the 2.13.0 wheel registers them). Behind each is
the formula and the limits of its manual page, in differentiable torch. A call outside a limit
raises ValueError, as the vendor's checks would.

Written from the manual, not from `minillama.ops`: nothing of that package is used here. What is
emulated is what the manual says; whether the chip agrees is not known here.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.vendor.ascend_attention import (
    FLOATS,
    fusion_attention,
    incre_flash_attention,
    need,
    prompt_flash_attention,
)

SCHEMAS = json.loads((Path(__file__).parent / "npu_schemas.json").read_text())["schemas"]
CALLS: list[str] = []  # names of the kernels called so far
_KEPT: list[torch.library.Library] = []


def rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    need(
        x.dtype in FLOATS and gamma.dtype == x.dtype,
        f"npu_rms_norm: x is {x.dtype}, gamma {gamma.dtype}",
    )
    need(2 <= x.dim() <= 8, f"npu_rms_norm: {x.dim()} dimensions")
    rstd = (x.float().pow(2).mean(-1, keepdim=True) + epsilon).rsqrt()
    return (x.float() * rstd * gamma.float()).to(x.dtype), rstd


def rotary_mul(
    x: Tensor, cos: Tensor, sin: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    need(rotary_mode == "half" and rotate is None, "npu_rotary_mul: only half is emulated")
    need(x.dim() == cos.dim() == sin.dim() == 4, "npu_rotary_mul: 4 dimensions")
    B, S, N, D = x.shape  # BSND
    need(D % 2 == 0 and D < 896 and B < 1000 and N < 1000, f"npu_rotary_mul: {tuple(x.shape)}")
    need(x.dtype == cos.dtype == sin.dtype, "npu_rotary_mul: one dtype")
    for table in (cos, sin):
        need(
            tuple(table.shape) in {(1, S, 1, D), (B, S, 1, D), (B, S, N, D)},
            f"npu_rotary_mul: {tuple(x.shape)}, {tuple(table.shape)}",
        )
    x1, x2 = x.float().chunk(2, -1)
    return (x.float() * cos.float() + torch.cat((-x2, x1), -1) * sin.float()).to(x.dtype)


def swiglu(x: Tensor, dim: int = -1) -> Tensor:
    need(x.dtype in FLOATS and 1 <= x.dim() <= 8, "npu_swiglu: dtype or dimensions")
    a, b = x.chunk(2, dim)
    return (a.float() * a.float().sigmoid() * b.float()).to(x.dtype)


def scaled_masked_softmax(
    x: Tensor, mask: Tensor, scale: float = 1.0, fixed_triu_mask: bool = False
) -> Tensor:
    need(not fixed_triu_mask, "npu_scaled_masked_softmax: fixed_triu_mask is reserved")
    need(x.dtype in FLOATS and mask.dtype == torch.bool, "npu_scaled_masked_softmax: dtypes")
    sides = x.shape[-2:]
    need(
        x.dim() == 4 and all(32 <= side <= 4096 and side % 32 == 0 for side in sides),
        f"npu_scaled_masked_softmax: {tuple(x.shape)}",
    )
    return (x.float() * scale).masked_fill(mask.expand_as(x), -10000.0).softmax(-1).to(x.dtype)


def apply_adam_w(
    beta1_power: float,
    beta2_power: float,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    grad: Tensor,
    max_grad_norm: Tensor | None,
    amsgrad: bool | None,
    maximize: bool | None,
    *,
    out: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """The manual: beta^t = beta_power * beta, so the powers given are those of the step before."""
    var, m, v = out
    need(not amsgrad and not maximize and max_grad_norm is None, "npu_apply_adam_w: not emulated")
    need(
        var.dtype == m.dtype == v.dtype == grad.dtype and var.shape == grad.shape,
        "npu_apply_adam_w: dtypes or shapes",
    )
    m.copy_(beta1 * m + (1 - beta1) * grad)
    v.copy_(beta2 * v + (1 - beta2) * grad * grad)
    m_hat, v_hat = m / (1 - beta1_power * beta1), v / (1 - beta2_power * beta2)
    var.copy_(var - lr / (v_hat.sqrt() + epsilon) * m_hat - lr * weight_decay * var)
    return var, m, v


KERNELS: dict[str, Callable] = {
    "npu_rms_norm": rms_norm,
    "npu_rotary_mul": rotary_mul,
    "npu_swiglu": swiglu,
    "npu_scaled_masked_softmax": scaled_masked_softmax,
    "npu_fusion_attention": fusion_attention,
    "npu_prompt_flash_attention": prompt_flash_attention,
    "npu_incre_flash_attention": incre_flash_attention,
    "npu_apply_adam_w.out": apply_adam_w,
}


def _counted(name: str, kernel: Callable) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        CALLS.append(name)
        return kernel(*args, **kwargs)

    return call


def install() -> None:
    """Register the kernels under `torch.ops.npu`, for tensors of any device.

    Does nothing the second time.
    """
    if _KEPT:
        return
    library = torch.library.Library("npu", "DEF")
    for name, kernel in KERNELS.items():
        library.define(SCHEMAS[name].removeprefix("npu::"))
        library.impl(name, _counted(name, kernel), "CompositeImplicitAutograd")
    _KEPT.append(library)
