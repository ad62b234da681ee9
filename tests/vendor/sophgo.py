"""Sophgo's kernels, emulated.

RMSNorm as the wrappers in its repository call it (sophgo/torch-tpu fe9b478, `my_ops`), results
written into arguments, no autograd; and the options of its process group. Transcribed, not
verified: the wheels are not public.
"""

import sys
from types import ModuleType

import torch
from torch import Tensor

CALLS: list[str] = []
_KEPT: list[torch.library.Library] = []


def rmsnorm_forward(
    input: Tensor, scale: Tensor | None, bias: Tensor | None, output: Tensor, axis: int, eps: float
) -> None:
    CALLS.append("rmsnorm_forward")
    if axis != input.dim() - 1 or bias is not None or not input.is_contiguous():
        raise ValueError(f"rmsnorm_forward: axis {axis} of {tuple(input.shape)}")
    output.copy_(
        input.float()
        * (input.float().pow(2).mean(-1, keepdim=True) + eps).rsqrt()
        * (1 if scale is None else scale)
    )


def rmsnorm_backward(
    grad_output: Tensor,
    input: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    rms: Tensor,
    grad_input: Tensor | None,
    grad_scale: Tensor | None,
    grad_bias: Tensor | None,
    axis: int,
    eps: float,
) -> None:
    CALLS.append("rmsnorm_backward")
    if rms.shape != input.shape or axis != input.dim() - 1:
        raise ValueError("rmsnorm_backward: rms has the shape of the input")
    with torch.enable_grad():
        x, w = input.detach().float().requires_grad_(), scale.detach().float().requires_grad_()
        y = x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * w
        dx, dw = torch.autograd.grad(y, (x, w), grad_output.float())
    grad_input.copy_(dx)
    if grad_scale is not None:
        grad_scale.copy_(dw)


class ProcessGroupSCCLOptions:
    chip_map: list[int]


def install() -> None:
    """Register the kernels, for tensors of any device, and put `torch_tpu` among the modules."""
    library = torch.library.Library("my_ops", "DEF")
    library.define(
        "rmsnorm_forward(Tensor input, Tensor? scale, Tensor? bias, Tensor(a!) output, int axis, "
        "float eps) -> ()"
    )
    library.define(
        "rmsnorm_backward(Tensor grad_output, Tensor input, Tensor? scale, Tensor? bias, "
        "Tensor(a!) rms, "
        "Tensor(b!)? grad_input, Tensor(c!)? grad_scale, Tensor(d!)? grad_bias, int axis, float "
        "eps) -> ()"
    )
    library.impl("rmsnorm_forward", rmsnorm_forward, "CompositeImplicitAutograd")
    library.impl("rmsnorm_backward", rmsnorm_backward, "CompositeImplicitAutograd")
    _KEPT.append(library)
    module = ModuleType("torch_tpu")
    module.__spec__ = torch.__spec__
    module.ProcessGroupSCCLOptions = ProcessGroupSCCLOptions
    sys.modules["torch_tpu"] = module
