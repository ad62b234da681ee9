"""RMSNorm, linear, SwiGLU and AdamW: every implementation is the formula, forward and backward."""

from collections.abc import Callable

import pytest
import torch

from minillama import ops
from minillama.ops import Documents, cpu_linear
from tests.conftest import random_model, random_tokens
from tests.formulas64 import linear64, rms_norm64, swiglu64
from tests.parity import check_max, each_implementation, randn

EPS = 1e-5


@each_implementation("rms_norm")
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (2, 3, 24), (64, 33)], ids=str)
def test_rms_norm_is_its_formula(implementation: Callable, shape: tuple[int, ...]) -> None:
    check_max(
        lambda x, w: implementation(x, w, EPS),
        lambda x, w: rms_norm64(x, w, EPS),
        randn(*shape),
        randn(shape[-1], seed=1),
    )


@each_implementation("rms_norm")
def test_rms_norm_ignores_scale_but_for_epsilon(implementation: Callable) -> None:
    x, weight = randn(4, 24), torch.ones(24)
    assert torch.allclose(
        implementation(1000 * x, weight, EPS), implementation(x, weight, EPS), atol=1e-4
    )
    assert float(implementation(torch.zeros(1, 24), weight, EPS).abs().max()) == 0.0


@each_implementation("rms_norm")
def test_rms_norm_takes_its_statistics_in_fp32(implementation: Callable) -> None:
    """In fp16 the square of 300 is already infinite."""
    x = torch.full((1, 24), 300.0, dtype=torch.float16)
    assert torch.equal(
        implementation(x, torch.ones(24, dtype=torch.float16), EPS),
        torch.ones(1, 24, dtype=torch.float16),
    )


@each_implementation("linear")
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_linear_is_its_formula(implementation: Callable, bias: bool) -> None:
    x, weight = randn(2, 5, 7), randn(11, 7, seed=1)
    if bias:
        check_max(implementation, linear64, x, weight, randn(11, seed=2))
    else:
        check_max(implementation, linear64, x, weight)


@each_implementation("linear")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("units", [True, False], ids=["16-bit units", "none"])
def test_linear_in_16_bits_rounds_once(
    implementation: Callable, dtype: torch.dtype, units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a unit in the last place, up to the two roundings of a tie: 2^-8 for bf16's 8 bits."""
    monkeypatch.setattr(cpu_linear, "has_bf16_units", lambda: units)
    inputs = [
        randn(2, 5, 64).to(dtype),
        randn(11, 64, seed=1).to(dtype),
        randn(11, seed=2).to(dtype),
    ]
    check_max(implementation, linear64, *inputs, tolerance=torch.finfo(dtype).eps)


@each_implementation("adamw")
def test_adamw_is_torchs(implementation: Callable) -> None:
    weight, m, v = randn(5, 7), torch.zeros(5, 7), torch.zeros(5, 7)
    theirs = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW(
        [theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1, foreach=False, fused=False
    )
    for step in range(1, 8):
        theirs.grad = randn(5, 7, seed=step)
        optimizer.step()
        implementation(
            weight,
            theirs.grad,
            m,
            v,
            step,
            learning_rate=1e-2,
            beta1=0.9,
            beta2=0.95,
            epsilon=1e-6,
            weight_decay=0.1,
        )
    assert torch.allclose(weight, theirs, rtol=1e-5, atol=1e-7)


@each_implementation("adamw")
def test_the_first_adamw_update_is_the_learning_rate_whatever_the_gradient(
    implementation: Callable,
) -> None:
    """By hand: m / (1 - beta1) = g and v / (1 - beta2) = g², so the step is lr g / |g|.

    Before it, weight decay takes lr · wd · w.
    """
    weight = torch.tensor([1.0, 1.0, 1.0])
    grad = torch.tensor([1e-3, -5.0, 700.0])
    m = torch.zeros(3)
    v = torch.zeros(3)
    implementation(
        weight,
        grad,
        m,
        v,
        1,
        learning_rate=0.1,
        beta1=0.9,
        beta2=0.999,
        epsilon=1e-12,
        weight_decay=0.5,
    )
    assert torch.allclose(weight, torch.tensor([0.85, 1.05, 0.85]))


def test_a_model_computes_the_same_with_either_choice() -> None:
    tokens = random_tokens(1, 12)
    losses = []
    try:
        for spec in ("fused", "reference"):
            ops.choose(spec)
            loss = random_model().loss_sum(tokens, tokens.roll(-1), Documents([5, 7]))
            losses.append(float(loss.detach()))
    finally:
        ops.choose("")
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_swiglu_gates_with_silu() -> None:
    gate, up = randn(3, 5), randn(3, 5, seed=1)
    check_max(ops.swiglu, swiglu64, gate, up)
    assert not torch.allclose(ops.swiglu(gate, up), ops.swiglu(up, gate))
