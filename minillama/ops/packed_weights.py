"""Weights in the order in which this processor multiplies them.

A matrix product cuts its weight into tiles for the processor's matrix units or registers. Decoding multiplies a few rows by all of it again
and again, and cutting costs more than multiplying: so weights that are only read are cut once, into an order that oneDNN alone knows.
"""

from functools import cache

import torch
from torch import Tensor, nn

LARGE = 1 << 19  # elements from which a few rows in fp32 gain
HINT = 8  # rows for which the order is chosen; it serves others


@cache
def has_bf16_units() -> bool:
    """Does this processor multiply bf16 matrices without first turning them into fp32?"""
    return torch.cpu._is_avx512_bf16_supported()


def gains(weight: Tensor, rows: int) -> bool:
    """Is `weight` better read in this order by so many rows? 16-bit ones always, where there are units for them; a single row of
    fp32 is bound by the memory in either order, and torch's own product of it has less to do besides."""
    if not torch.backends.mkldnn.is_available() or not weight.is_cpu or weight.is_mkldnn:
        return False
    return (
        has_bf16_units()
        if weight.dtype is torch.bfloat16
        else weight.dtype is torch.float32 and rows >= 4 and weight.numel() >= LARGE
    )


@torch.no_grad()
def pack(model: nn.Module, rows: int) -> None:
    """Give the linears of `model` packed weights, one after the other, where that gains for `rows` texts at a time. They are for
    `ops.linear` alone from here on; `to_dense()` gives them back to the bit. A weight that an embedding shares stays."""
    shared = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        if (
            isinstance(module, nn.Linear)
            and id(module.weight) not in shared
            and gains(module.weight, rows)
        ):
            module.weight = nn.Parameter(
                torch.ops.mkldnn._reorder_linear_weight(module.weight, HINT), requires_grad=False
            )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`reference.linear` of a packed weight, which has no backward."""
    assert not (torch.is_grad_enabled() and x.requires_grad), (
        "packed weights are for reading: take gradients before `pack`"
    )
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
