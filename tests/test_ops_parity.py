"""Every implementation of every op that runs on a CPU, in every cell of the parity matrix."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minillama.ops import fused_attention, fused_elementwise, reference
from tests import flash
from tests.parity import BOUNDS, CASES, Case, angles, cells, check, implementations, randn

CELLS = [
    pytest.param(op, case, function, id=f"{op}-{name}-{case.name}")
    for op in CASES
    for name, function in implementations(op).items()
    for case in cells(op)
]
CELLS += [
    pytest.param("attention", case, flash.attention, id=f"attention-by hand-{case.name}")
    for case in cells("attention")
]


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("op", "case", "function"), CELLS)
def test_an_implementation_is_its_formula_forward_and_backward(
    op: str, case: Case, function: Callable, dtype: torch.dtype, strided: bool
) -> None:
    check(op, case, function, dtype, strided)


@pytest.mark.parametrize("case", CASES["rms_norm"], ids=lambda case: case.name)
def test_rows_are_normed_in_blocks_of_any_height(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows at a time, and less than a row's worth, which is one."""
    for elements in (2 * case.shapes[0][-1], 1):
        monkeypatch.setattr(fused_elementwise, "CACHE_BLOCK", elements)
        check("rms_norm", case, fused_elementwise.rms_norm, torch.float32, strided=False)
        check("rms_norm", case, fused_elementwise.rms_norm, torch.float32, strided=True)


@pytest.mark.parametrize("case", CASES["rope"], ids=lambda case: case.name)
def test_positions_are_turned_in_blocks_of_any_length(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two positions at a time, and less than one's worth, which is one."""
    B, _, H, D = case.shapes[0]
    for elements in (2 * B * H * D, 1):
        monkeypatch.setattr(fused_elementwise, "CACHE_BLOCK", elements)
        for dtype in BOUNDS:
            check("rope", case, fused_elementwise.rope, dtype, strided=False)
            check("rope", case, fused_elementwise.rope, dtype, strided=True)


def double(*shape: int, seed: int = 0) -> Tensor:
    return randn(*shape, seed=seed).double().requires_grad_()


def test_gradients_are_the_slopes_of_finite_differences() -> None:
    """Ops that compute in the precision they are given: in float64 against finite differences."""
    torch.autograd.gradcheck(fused_elementwise.swiglu, (double(3, 5), double(3, 5, seed=1)))
    torch.autograd.gradcheck(
        fused_elementwise.rope, (double(2, 3, 2, 6), *(t.double() for t in angles(3, 3)))
    )
    torch.autograd.gradcheck(
        fused_attention.attention,
        (double(1, 4, 4, 3), double(1, 4, 2, 3, seed=1), double(1, 4, 2, 3, seed=2)),
    )


def test_a_frozen_norm_or_half_of_a_gate_leaves_the_other_gradient_as_it_is() -> None:
    x, weight = randn(5, 24, seed=0).requires_grad_(), randn(24, seed=1)
    (alone,) = torch.autograd.grad(fused_elementwise.rms_norm(x, weight, 1e-5).sum(), x)
    both = torch.autograd.grad(
        fused_elementwise.rms_norm(x, weight.clone().requires_grad_(), 1e-5).sum(), x
    )[0]
    assert torch.equal(alone, both)
    gate, up = randn(5, 24, seed=2), randn(5, 24, seed=3).requires_grad_()
    (of_up,) = torch.autograd.grad(fused_elementwise.swiglu(gate, up).sum(), up)
    assert torch.equal(of_up, torch.nn.functional.silu(gate))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_formula_of_a_norm_rounds_where_transformers_does(dtype: torch.dtype) -> None:
    """The normed x is rounded to 16 bits before it is multiplied by the weight."""
    transformers = pytest.importorskip("transformers")
    norm = transformers.models.llama.modeling_llama.LlamaRMSNorm(70, 1e-5).to(dtype)
    norm.weight.data = randn(70, seed=1).to(dtype)
    x = randn(33, 70).to(dtype)
    assert torch.equal(reference.rms_norm(x, norm.weight, 1e-5), norm(x))
