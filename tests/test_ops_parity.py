"""Every op in the form of the specification and in the hand-derived one, in every cell of the parity matrix."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minillama.ops import fused_attention, fused_elementwise, fused_loss, reference
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
@pytest.mark.parametrize(("op", "case", "form"), CELLS)
def test_a_form_is_its_formula_forward_and_backward(
    op: str, case: Case, form: Callable, dtype: torch.dtype, strided: bool
) -> None:
    check(op, case, form, dtype, strided)


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
    """Two positions of all rows at a time, and less than one's worth, which is one; tables for all rows, and for each."""
    B, _, H, D = case.shapes[0]
    for elements in (2 * B * H * D, 1):
        monkeypatch.setattr(fused_elementwise, "CACHE_BLOCK", elements)
        for dtype in BOUNDS:
            check("rope", case, fused_elementwise.rope, dtype, strided=False)
            check("rope", case, fused_elementwise.rope, dtype, strided=True)


@pytest.mark.parametrize("logits", [1, 3 * 70, 1 << 23], ids=["one row", "three rows", "all rows"])
@pytest.mark.parametrize("case", CASES["linear_cross_entropy"], ids=lambda case: case.name)
def test_logits_come_in_chunks_of_any_height(
    case: Case, logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_loss, "LOGIT_CHUNK", logits)
    for dtype in BOUNDS:
        check("linear_cross_entropy", case, fused_loss.linear_cross_entropy, dtype, strided=False)


def double(*shape: int, seed: int = 0) -> Tensor:
    return randn(*shape, seed=seed).double().requires_grad_()


def test_gradients_are_the_slopes_of_finite_differences() -> None:
    """Where a form computes in the precision it is given, in float64 against the very definition of a derivative."""
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


def test_a_second_backward_through_the_loss_is_refused_rather_than_wrong() -> None:
    """Its gradients are scaled in place."""
    hidden, weight = randn(3, 7, seed=0).requires_grad_(), randn(13, 7, seed=1).requires_grad_()
    loss = fused_loss.linear_cross_entropy(hidden, weight, torch.tensor([1, 2, 3]))
    (loss / 3).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        (loss / 3).backward()


def bytes_kept(run: Callable[[], Tensor]) -> int:
    """The bytes of all tensors that autograd keeps for backward."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        run()
    return sum(x.numel() * x.element_size() for x in kept)


def test_rope_keeps_the_tables_and_nothing_of_x() -> None:
    B, T, H, D = 3, 7, 5, 10
    x, (cos, sin) = randn(B, T, H, D, seed=0).requires_grad_(), angles(T, D // 2)
    assert bytes_kept(lambda: fused_elementwise.rope(x, cos, sin)) == 4 * 2 * T * D
    assert bytes_kept(lambda: fused_elementwise.rope(x.detach(), cos, sin)) == 0


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_swiglu_keeps_gate_and_up_and_no_silu(dtype: torch.dtype) -> None:
    gate, up = (randn(10, 24, seed=seed).to(dtype).requires_grad_() for seed in (0, 1))
    assert bytes_kept(lambda: fused_elementwise.swiglu(gate, up)) == 2 * 10 * 24 * dtype.itemsize
    assert bytes_kept(lambda: reference.swiglu(gate, up)) == 3 * 10 * 24 * dtype.itemsize
    assert bytes_kept(lambda: fused_elementwise.swiglu(gate.detach(), up.detach())) == 0


def test_the_masked_softmax_keeps_its_output_and_the_mask() -> None:
    x, mask = randn(2, 3, 9, 7, seed=0).requires_grad_(), randn(2, 1, 9, 7, seed=1) > 0
    assert (
        bytes_kept(lambda: fused_elementwise.scaled_masked_softmax(x, mask, 0.5))
        == 4 * x.numel() + mask.numel()
    )


def test_attention_keeps_its_inputs_its_output_and_one_number_a_row_but_no_scores() -> None:
    B, T, H, D = 1, 64, 2, 4
    q, k, v = (randn(B, T, H, D, seed=seed).requires_grad_() for seed in range(3))
    kept = bytes_kept(lambda: fused_attention.attention(q, k, v))
    assert 0 <= kept - 4 * (4 * B * T * H * D + B * T * H) <= 16  # two seeds of 8 bytes beside
    assert bytes_kept(lambda: reference.attention(q, k, v)) > 4 * B * H * T * T


def test_a_whole_model_keeps_about_half_as_much_for_backward_as_with_the_formulas() -> None:
    """Two processes, since the choice is made once in each. Kept: the storages that autograd saves, parameters aside."""
    program = """
import torch
from tests.conftest import random_model, random_tokens
model, tokens, kept = random_model(dim=48, head_dim=8, ffn_dim=128), random_tokens(2, 128), {}
def keep(x):
    kept[x.untyped_storage().data_ptr()] = x
    return x
with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
    model.loss_sum(tokens, tokens.roll(-1))
parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
print(sum(x.untyped_storage().nbytes() for at, x in kept.items() if at not in parameters))
"""

    def kept(spec: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            env=os.environ | {"MINILLAMA_OPS": spec},
            check=True,
            timeout=100,
        )
        return int(done.stdout)

    assert kept("fused") <= 0.56 * kept("reference")
