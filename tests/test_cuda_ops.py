"""Every op and kernel on an NVIDIA card, beside its formula in float64 on the CPU.

See tests/test_cuda.py.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minillama import ops, self_test
from minillama.ops import IGNORE, Documents, cuda
from tests.card import DEVICE, each_dtype, needs_card, needs_device
from tests.parity import BOUNDS, Case, cells, check, randn

pytestmark = needs_device

# Rows as wide as LLaMA's, and wider and narrower than a Triton program's block.
WIDE = [
    Case("width 3", ((5, 3), (3,)), (1e-5,)),
    Case("width 768", ((33, 768), (768,)), (1e-5,)),
    Case("width 4096", ((1000, 4096), (4096,)), (1e-5,)),
    Case("width 5120", ((7, 5120), (5120,)), (1e-5,)),
    Case("width 16384", ((3, 16384), (16384,)), (1e-5,)),
]


@pytest.fixture(autouse=True)
def bound_of_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some kernels of CUDA add fp32 products of three 16-bit parts: a few units of the last bit."""
    if DEVICE.type == "cuda":
        monkeypatch.setitem(BOUNDS, torch.float32, 5e-6)


def move(argument: Any, device: torch.device) -> Any:
    return argument.to(device) if isinstance(argument, Tensor) else argument


def on_the_card(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of tensors on the host that computes on the card."""

    def call(*arguments: Any) -> Tensor:
        return function(*[move(argument, DEVICE) for argument in arguments]).cpu()

    return call


def implementations() -> list[tuple[str, str, Callable[..., Tensor]]]:
    """(op, name, function) of all that can compute on the card."""
    found = []
    for op in ops.OPS:
        for each in op.implementations:
            if each.device in ("", DEVICE.type) and each.available():
                found.append((op.name, each.name, each.function))
    return found


CELLS = []
for op_name, name, function in implementations():
    if op_name != "adamw":
        for each_case in cells(op_name):
            label = f"{op_name}-{name}-{each_case.name}"
            CELLS.append(pytest.param(op_name, each_case, function, id=label))


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@each_dtype
@pytest.mark.parametrize(("op", "case", "function"), CELLS)
def test_an_implementation_is_its_formula_forward_and_backward(
    op: str, case: Case, function: Callable, dtype: torch.dtype, strided: bool
) -> None:
    check(op, case, on_the_card(function), dtype, strided)


@each_dtype
@pytest.mark.parametrize("case", WIDE, ids=lambda case: case.name)
def test_a_row_of_any_width_is_normed(case: Case, dtype: torch.dtype) -> None:
    check("rms_norm", case, on_the_card(ops.rms_norm), dtype, strided=False)


@each_dtype
def test_a_gate_of_many_blocks_is_applied(dtype: torch.dtype) -> None:
    case = Case("many blocks", ((300, 11008), (300, 11008)))
    check("swiglu", case, on_the_card(ops.swiglu), dtype, strided=False)


@needs_card
def test_tritons_kernels_are_the_ones_in_use_where_triton_is_installed() -> None:
    x = torch.ones(2, 8, device=DEVICE)
    expected = "triton" if cuda.has_triton() else "fused"
    assert ops.rms_norm.select(x, x[0], 1e-5).name == expected
    assert ops.swiglu.select(x, x).name == expected


@pytest.mark.parametrize("dtype", self_test.LIMITS, ids=str)
def test_the_doctor_finds_every_answer_right(dtype: torch.dtype) -> None:
    right = self_test.solve_model(torch.device("cpu"), torch.float32, dtype, "reference")
    for spec in ("", "fused", "reference"):
        found = self_test.solve_model(DEVICE, dtype, dtype, spec)
        assert self_test.relative_error(found, right) <= self_test.LIMITS[dtype], spec
    for case in self_test.cases(dtype):
        assert self_test.check_op(case, DEVICE, dtype), case.name


def test_the_loss_of_16_bits_has_the_logits_of_fp32() -> None:
    """TF32 does not round 16-bit inputs, and the flag is as it was afterwards."""
    hidden = randn(300, 512).bfloat16()
    weight = randn(4000, 512, seed=1).bfloat16()
    labels = torch.arange(300) * 13 % 4000
    labels[::7] = IGNORE
    exact = ops.reference.linear_cross_entropy(hidden.double(), weight.double(), labels)
    loss = ops.linear_cross_entropy(hidden.to(DEVICE), weight.to(DEVICE), labels.to(DEVICE))
    assert float(loss) == pytest.approx(float(exact), rel=1e-5)
    assert not torch.backends.cuda.matmul.allow_tf32


@each_dtype
def test_packed_documents_are_the_documents_alone(dtype: torch.dtype) -> None:
    lengths = [1, 70, 3, 500, 129, 64]
    T = sum(lengths)
    q = randn(1, T, 8, 64).to(DEVICE, dtype)
    k = randn(1, T, 2, 64, seed=1).to(DEVICE, dtype)
    v = randn(1, T, 2, 64, seed=2).to(DEVICE, dtype)
    packed = ops.attention(q, k, v, Documents(lengths, DEVICE))
    parts = zip(*(x.split(lengths, dim=1) for x in (q, k, v, packed)), strict=True)
    for each_q, each_k, each_v, found in parts:
        alone = ops.attention(each_q, each_k, each_v)
        error = (found - alone).float().norm() / alone.float().norm()
        assert float(error) <= BOUNDS[dtype]


def test_fp32_products_are_not_rounded_to_tf32() -> None:
    a = randn(256, 256)
    product = (a.to(DEVICE) @ a.to(DEVICE)).cpu().double()
    exact = a.double() @ a.double()
    assert float((product - exact).norm() / exact.norm()) < 1e-6
