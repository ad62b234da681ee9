"""Linear layer and cross entropy as one op: the formula, whatever the chunks and the labels."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minillama import ops
from minillama.ops import IGNORE, fused_loss
from tests.formulas64 import linear_cross_entropy64
from tests.parity import BOUNDS, CASES, Case, check, check_max, each_implementation, randn


@each_implementation("linear_cross_entropy")
@pytest.mark.parametrize(
    "chunk", [1, 3 * 13, 1 << 23], ids=["one row a chunk", "three rows a chunk", "one chunk"]
)
@pytest.mark.parametrize(
    "labels",
    [
        [[4, IGNORE, 0, 12, IGNORE], [1, 1, 12, 7, 3]],
        [[IGNORE] * 5] * 2,
        [[IGNORE] * 5, [IGNORE] * 4 + [12]],
    ],
    ids=str,
)
def test_cross_entropy_is_its_formula_in_any_chunks(
    implementation: Callable, chunk: int, labels: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some, none or one position has a label; both ends of the vocabulary of 13 are among them."""
    monkeypatch.setattr(fused_loss, "LOGIT_CHUNK", chunk)
    labels = torch.tensor(labels)
    hidden, weight = randn(2, 5, 7), randn(13, 7, seed=1)
    check_max(
        lambda h, w: implementation(h, w, labels),
        lambda h, w: linear_cross_entropy64(h, w, labels),
        hidden,
        weight,
    )


@each_implementation("linear_cross_entropy")
def test_cross_entropy_of_a_frozen_head_has_a_gradient_for_the_hidden_state_only(
    implementation: Callable,
) -> None:
    hidden, weight, labels = (
        randn(3, 7).requires_grad_(),
        randn(13, 7, seed=1),
        torch.tensor([1, 2, 3]),
    )
    (2 * implementation(hidden, weight, labels)).backward()
    assert weight.grad is None
    exact = hidden.detach().double().requires_grad_()
    (2 * linear_cross_entropy64(exact, weight.double(), labels)).backward()
    assert torch.allclose(hidden.grad.double(), exact.grad, atol=1e-5)


@each_implementation("linear_cross_entropy")
def test_cross_entropy_survives_logits_that_overflow_exp(implementation: Callable) -> None:
    loss = implementation(torch.tensor([[100.0]]), torch.tensor([[1.0], [-1.0]]), torch.tensor([1]))
    assert float(loss) == pytest.approx(200.0)


def test_losses_of_16_bit_data_are_fp32() -> None:
    hidden, weight = randn(4, 7).bfloat16(), randn(13, 7, seed=1).bfloat16()
    labels = torch.tensor([1, 2, 3, 4])
    loss = ops.linear_cross_entropy(hidden, weight, labels)
    assert loss.dtype == torch.float32
    exact = F.cross_entropy(hidden.float() @ weight.float().T, labels, reduction="sum")
    assert float(loss) == pytest.approx(float(exact), rel=1e-6)


@pytest.mark.parametrize("logits", [1, 3 * 70, 1 << 23], ids=["one row", "three rows", "all rows"])
@pytest.mark.parametrize("case", CASES["linear_cross_entropy"], ids=lambda case: case.name)
def test_logits_come_in_chunks_of_any_height(
    case: Case, logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_loss, "LOGIT_CHUNK", logits)
    for dtype in BOUNDS:
        check("linear_cross_entropy", case, fused_loss.linear_cross_entropy, dtype, strided=False)


def test_a_second_backward_through_the_loss_is_refused_rather_than_wrong() -> None:
    """Its gradients are scaled in place."""
    hidden, weight = randn(3, 7, seed=0).requires_grad_(), randn(13, 7, seed=1).requires_grad_()
    loss = fused_loss.linear_cross_entropy(hidden, weight, torch.tensor([1, 2, 3]))
    (loss / 3).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        (loss / 3).backward()


def test_logits_exist_for_some_positions_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 positions with 13 logits each. At most so many are computed at a time, but at least C/8
    positions.
    """

    class CountProducts(TorchDispatchMode):
        """Counts the products that make logits."""

        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten.mm.out
            return function(*args, **(kwargs or {}))

    for limit, width, num_chunks in ((4 * 13, 7, 3), (10 * 13, 7, 1), (1, 7, 10), (1, 40, 2)):
        monkeypatch.setattr(fused_loss, "LOGIT_CHUNK", limit)
        with CountProducts() as products:
            fused_loss.linear_cross_entropy(
                randn(10, width), randn(13, width, seed=1), torch.arange(10)
            )
        assert products.count == num_chunks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tf32_is_allowed_for_16_bit_inputs_alone_and_forbidden_again(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It rounds fp32 inputs, and no 16-bit ones. After an error too, the flag is as it was."""
    matmul = torch.backends.cuda.matmul
    product = torch.mm
    allowed = []

    def mm(*arguments: Any, **keywords: Any) -> Tensor:
        allowed.append(matmul.allow_tf32)
        if len(allowed) == 2:
            raise RuntimeError("out of memory")
        return product(*arguments, **keywords)

    monkeypatch.setattr(torch, "mm", mm)
    hidden = torch.randn(5, 8).to(dtype)
    weight = torch.randn(20, 8).to(dtype)
    labels = torch.arange(5)
    fused_loss.linear_cross_entropy(hidden, weight, labels)
    with pytest.raises(RuntimeError):
        fused_loss.linear_cross_entropy(hidden, weight, labels)
    assert allowed == [dtype == torch.bfloat16] * 2
    assert not matmul.allow_tf32
