"""Cambricon's kernels, emulated.

torch_mlu's fused Adam by the schema in its repository (Cambricon/torch_mlu d578002), and a
`torch_mlu_ops` module with the signatures that Cambricon's vllm-mlu calls. Transcribed, not
verified: there is no public wheel.
"""

import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

CALLS: list[str] = []
_KEPT: list[torch.library.Library] = []


def fused_adam(
    _dummy_overflow_buf: Tensor,
    grads: list[Tensor],
    params: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> bool:
    """apex's multi_tensor_adam: mode 0 adds the decay to the gradient, mode 1 to the update."""
    CALLS.append("fused_adam")
    if _dummy_overflow_buf.dtype != torch.int32:
        raise ValueError("fused_adam: the overflow buffer is int32")
    for grad, param, m, v in zip(grads, params, exp_avgs, exp_avg_sqs, strict=True):
        if mode == 0:
            grad = grad + weight_decay * param
        m.copy_(beta1 * m + (1 - beta1) * grad)
        v.copy_(beta2 * v + (1 - beta2) * grad * grad)
        first, second = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1, 1)
        update = (m / first) / ((v / second).sqrt() + epsilon)
        param.copy_(param - learning_rate * (update + (weight_decay * param if mode == 1 else 0)))
    return True


def fused_rms_norm(
    x: Tensor,
    residual: Any,
    gamma: Tensor,
    beta: Any,
    bias: Any,
    eps: float,
    store_output_before_norm: bool,
    quant_scale: Any = None,
    out: Any = None,
    dynamic_quant: bool = False,
) -> Tensor:
    CALLS.append("fused_rms_norm")
    assert residual is beta is bias is None
    assert not store_output_before_norm
    return (
        (x.float() * (x.float().pow(2).mean(-1, keepdim=True) + eps).rsqrt() * gamma.float())
        .to(x.dtype)
        .detach()
    )


def active(input: Tensor, act_mode: str = "silu", is_gated: bool = False) -> Tensor:
    CALLS.append("active")
    assert act_mode == "silu"
    assert is_gated
    gate, up = input.float().chunk(2, -1)
    return (gate / (1 + (-gate).exp()) * up).to(input.dtype).detach()


def install() -> None:
    """Register the kernels, for tensors of any device, and the module `torch_mlu_ops`."""
    library = torch.library.Library("torch_mlu", "DEF")
    library.define(
        "fused_adam(Tensor(a!) _dummy_overflow_buf, Tensor[] grads, Tensor(b!)[] params, "
        "Tensor(c!)[] exp_avgs, "
        ""
        "Tensor(d!)[] exp_avg_sqs, float learning_rate, float beta1, float beta2, float epsilon, "
        "int step, int mode, int bias_correction, float weight_decay) -> bool"
    )
    library.impl("fused_adam", fused_adam, "CompositeImplicitAutograd")
    _KEPT.append(library)
    module = ModuleType("torch_mlu_ops")
    module.__spec__ = torch.__spec__  # find_spec wants one
    module.fused_rms_norm, module.active = fused_rms_norm, active
    sys.modules["torch_mlu_ops"] = module
