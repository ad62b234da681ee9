"""Cambricon: AdamW by a kernel of torch_mlu, RMSNorm and SwiGLU by kernels of torch_mlu_ops.

The kernels of torch_mlu_ops are for inference. Attention is torch's own
scaled_dot_product_attention, which the plug-in implements. No other kernel there has a backward.

Transcribed from the vendor's public code (torch_mlu d578002; torch_mlu_ops as vllm-mlu calls it),
never executed. Arguments of torch_mlu_ops changed their order between releases, so they are passed
by name, and a release without those names is not used.
"""

import importlib
import importlib.util
import inspect
from types import ModuleType

import torch
from torch import Tensor

from minillama.ops.reference import needs_grad

RMS_NORM = {"x", "residual", "gamma", "beta", "bias", "eps", "store_output_before_norm"}
ACTIVE = {"input", "act_mode", "is_gated"}


def _mlu_ops() -> ModuleType:
    return importlib.import_module("torch_mlu_ops")


def _has_function(name: str, parameters: set[str]) -> bool:
    """Whether torch_mlu_ops is installed, and its function `name` has these parameters."""
    if importlib.util.find_spec("torch_mlu_ops") is None:
        return False
    function = getattr(_mlu_ops(), name, None)
    return function is not None and parameters <= set(inspect.signature(function).parameters)


def _is_inference(x: Tensor, other: Tensor) -> bool:
    """Whether the data is 16-bit and nothing needs a gradient."""
    return x.dtype == other.dtype != torch.float32 and not needs_grad(x, other)


def has_rms_norm() -> bool:
    return _has_function("fused_rms_norm", RMS_NORM)


def supports_rms_norm(x: Tensor, weight: Tensor, eps: float) -> bool:
    return _is_inference(x, weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _mlu_ops().fused_rms_norm(
        x=x,
        residual=None,
        gamma=weight,
        beta=None,
        bias=None,
        eps=eps,
        store_output_before_norm=False,
    )


def has_swiglu() -> bool:
    return _has_function("active", ACTIVE)


def supports_swiglu(gate: Tensor, up: Tensor) -> bool:
    return _is_inference(gate, up)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The kernel takes one tensor, [gate | up]."""
    return _mlu_ops().active(input=torch.cat((gate, up), dim=-1), act_mode="silu", is_gated=True)


def has_adamw() -> bool:
    return hasattr(torch.ops.torch_mlu, "fused_adam")


def supports_adamw(
    weight: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: int, **settings: float
) -> bool:
    return weight.dtype == grad.dtype == m.dtype == v.dtype == torch.float32


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
    overflow = torch.zeros(1, dtype=torch.int32, device=weight.device)
    decoupled_decay = 1
    bias_correction = 1
    torch.ops.torch_mlu.fused_adam(
        overflow,
        [grad],
        [weight],
        [m],
        [v],
        learning_rate,
        beta1,
        beta2,
        epsilon,
        step,
        decoupled_decay,
        bias_correction,
        weight_decay,
    )
