"""Cambricon: AdamW as torch_mlu's fused kernel, and two inference kernels of torch_mlu_ops. Attention is torch's own SDPA, which the
plug-in implements; nothing else there has a backward.

Transcribed from the vendor's public code (torch_mlu d578002; torch_mlu_ops as vllm-mlu calls it), never executed. Arguments of
torch_mlu_ops changed their order between releases, so they are passed by name, and a release without those names is not used.
"""

import importlib
import importlib.util
import inspect

import torch
from torch import Tensor

from minillama.ops.reference import needs_grad


def has_fused_adam() -> bool:
    return hasattr(torch.ops.torch_mlu, "fused_adam")


def has_rms_norm() -> bool:
    return _takes(
        "fused_rms_norm",
        "x",
        "residual",
        "gamma",
        "beta",
        "bias",
        "eps",
        "store_output_before_norm",
    )


def has_active() -> bool:
    return _takes("active", "input", "act_mode", "is_gated")


def _takes(name: str, *parameters: str) -> bool:
    """Whether torch_mlu_ops is installed, and its function `name` takes parameters of these names."""
    function = (
        getattr(importlib.import_module("torch_mlu_ops"), name, None)
        if importlib.util.find_spec("torch_mlu_ops")
        else None
    )
    return function is not None and set(parameters) <= set(inspect.signature(function).parameters)


def can_infer(x: Tensor, other: Tensor, eps: float = 0.0) -> bool:
    """Whether nothing needs a gradient, and the data is 16-bit."""
    return x.dtype == other.dtype != torch.float32 and not needs_grad(x, other)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    kernel = importlib.import_module("torch_mlu_ops").fused_rms_norm
    return kernel(
        x=x,
        residual=None,
        gamma=weight,
        beta=None,
        bias=None,
        eps=eps,
        store_output_before_norm=False,
    )


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return importlib.import_module("torch_mlu_ops").active(
        input=torch.cat((gate, up), dim=-1), act_mode="silu", is_gated=True
    )


def can_adamw(
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
    decoupled_decay, bias_correction = 1, 1
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
