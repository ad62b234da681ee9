"""Comparisons of a call of an Ascend kernel with its formula in float64.

Each takes the call to compare as a function with our arguments. `test_npu.py` gives ours,
`test_npu_mistakes.py` gives wrong ones, which the comparison must catch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from minillama.ops import Documents, npu, reference
from tests.formulas64 import (
    attention64,
    packed_attention64,
    rms_norm64,
    rope64,
    scaled_masked_softmax64,
    swiglu64,
)
from tests.parity import randn, wide_tables

BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # relative, by norm
EPS = 1e-5


def assert_same(
    call: Callable, formula: Callable, *inputs: Tensor, bound: float, trains: bool = True
) -> None:
    """Output and gradients are those of the formula in float64 on the same numbers."""
    leaves = [x.detach().clone().requires_grad_(trains) for x in inputs]
    leaves64 = [x.detach().double().requires_grad_(trains) for x in inputs]
    y = call(*leaves)
    y64 = formula(*leaves64)
    pairs = [(y, y64)]
    if trains:
        dy = randn(*y.shape, seed=9).to(y.dtype)
        gradients = torch.autograd.grad(y, leaves, dy)
        gradients64 = torch.autograd.grad(y64, leaves64, dy.double())
        pairs += zip(gradients, gradients64, strict=True)
    for computed, exact in pairs:
        assert computed.shape == exact.shape
        assert float((computed.double() - exact).detach().norm()) <= bound * float(
            exact.detach().norm()
        )


def check_rms_norm(call: Callable, dtype: torch.dtype = torch.float32) -> None:
    for size in (1.0, 1e-3):  # small inputs, where epsilon is most of the sum
        x, w = (size * randn(2, 3, 33)).to(dtype), randn(33, seed=1).to(dtype)
        assert npu.supports_rms_norm(x, w, EPS)
        assert_same(
            lambda x, w: call(x, w, EPS),
            lambda x, w: rms_norm64(x, w, EPS),
            x,
            w,
            bound=BOUNDS[dtype],
        )


def check_rope(call: Callable, dtype: torch.dtype = torch.float32) -> None:
    tables = wide_tables(randn(5, 4, seed=1).clamp(-1, 1), randn(5, 4, seed=2).clamp(-1, 1))
    for cos, sin in (tables, [t.expand(2, 5, 1, 8) + 0 * randn(2, 1, 1, 1) for t in tables]):
        x = randn(2, 5, 3, 8).to(dtype)
        assert npu.supports_rope(x, cos, sin)
        assert_same(
            lambda x, c=cos, s=sin: call(x, c, s),
            lambda x, c=cos, s=sin: rope64(x, c, s),
            x,
            bound=BOUNDS[dtype],
        )


def check_swiglu(call: Callable, dtype: torch.dtype = torch.float32) -> None:
    gate, up = randn(2, 7, 11).to(dtype), randn(2, 7, 11, seed=1).to(dtype)
    assert npu.supports_swiglu(gate, up)
    assert_same(call, swiglu64, gate, up, bound=BOUNDS[dtype])


def check_softmax(call: Callable, dtype: torch.dtype = torch.float32) -> None:
    x, mask = randn(2, 3, 32, 64).to(dtype), torch.ones(32, 64, dtype=torch.bool).triu(33)
    assert npu.supports_scaled_masked_softmax(x, mask, 0.3)
    assert_same(
        lambda x: call(x, mask, 0.3),
        lambda x: scaled_masked_softmax64(x, mask, 0.3),
        x,
        bound=BOUNDS[dtype],
    )


def check_attention(call: Callable, dtype: torch.dtype = torch.float32) -> None:
    for H, K in ((6, 6), (6, 3), (6, 1)):
        for T, S in ((9, 9), (3, 9)):
            qkv = [
                randn(2, T, H, 8).to(dtype),
                randn(2, S, K, 8, seed=1).to(dtype),
                randn(2, S, K, 8, seed=2).to(dtype),
            ]
            assert_same(call, attention64, *qkv, bound=BOUNDS[dtype])
        d = Documents([4, 1, 7])
        qkv = [randn(1, 12, heads, 8, seed=i).to(dtype) for i, heads in enumerate((H, K, K))]
        assert npu.supports_attention(*qkv, d)
        assert_same(
            lambda q, k, v, d=d: call(q, k, v, d),
            lambda q, k, v, d=d: packed_attention64(q, k, v, d.lengths),
            *qkv,
            bound=BOUNDS[dtype],
        )


def check_inference(call: Callable, dtype: torch.dtype = torch.float16) -> None:
    """Prompt, continuation and single query, over a cache that is part of a longer buffer."""
    for T, S in ((9, 9), (3, 9), (1, 9)):
        cache = [randn(2, 20, 3, 16, seed=i).to(dtype) for i in (1, 2)]
        q = randn(2, T, 6, 16).to(dtype)
        with torch.no_grad():
            assert npu.supports_attention(q, *(x[:, :S] for x in cache))
            y = call(q, *(x[:, :S] for x in cache))
        exact = attention64(q.double(), *(x[:, :S].double() for x in cache))
        assert y.shape == q.shape
        assert float((y.double() - exact).norm()) <= BOUNDS[dtype] * float(exact.norm())


def check_adamw(call: Callable, dtype: torch.dtype = torch.float32) -> None:
    settings = {
        "learning_rate": 1e-2,
        "beta1": 0.9,
        "beta2": 0.95,
        "epsilon": 1e-6,
        "weight_decay": 0.1,
    }
    mine, theirs = (
        [randn(40).to(d), torch.zeros(40, dtype=d), torch.zeros(40, dtype=d)]
        for d in (dtype, torch.float64)
    )
    for step in (1, 2, 3):
        grad = randn(40, seed=step).to(dtype)
        assert npu.supports_adamw(mine[0], grad, *mine[1:], step, **settings)
        call(mine[0], grad, *mine[1:], step, **settings)
        reference.adamw(theirs[0], grad.double(), *theirs[1:], step, **settings)
    for a, b in zip(mine, theirs, strict=True):
        assert float((a.double() - b).norm()) <= BOUNDS[dtype] * float(b.norm())
