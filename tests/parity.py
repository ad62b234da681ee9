"""The parity matrix: every implementation of an op against its formula in float64 under autograd.

    for each op              CASES: inputs of odd sizes, one row, tiny numbers, all labels ignored,
                             shared heads, …
    for each implementation  the formula, the hand-derived one, a kernel in an interpreter,
                             a vendor's on an emulated device
    for each dtype           fp32, fp16, bf16: BOUNDS on |computed - exact| / |exact| (2-norm),
                             for the value and every gradient
    laid out                 contiguous, or with gaps between elements and dy transposed

`check(op, case, function, dtype, strided)` is one cell; `cells(op)` names an op's cases for
parametrize. `function` takes and returns CPU tensors: an implementation that lives on another
device is wrapped by the caller.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from minillama import ops
from minillama.ops import IGNORE
from tests.formulas64 import (
    attention64,
    linear64,
    linear_cross_entropy64,
    rms_norm64,
    rope64,
    scaled_masked_softmax64,
    swiglu64,
)

BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """The arguments of a call.

    shapes: of the differentiable inputs, sampled from N(0, scale²) in the dtype under test.
    rest: the arguments that follow them, as they are.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    rest: tuple[Any, ...] = ()
    scale: float = 1.0


def angles(*shape: int) -> tuple[Tensor, Tensor]:
    """Rotary tables (..., T, 1, D) of random angles (..., T, D/2)."""
    return wide_tables((3 * randn(*shape, seed=7)).cos(), (3 * randn(*shape, seed=7)).sin())


def wide_tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat((cos, cos), -1).unsqueeze(-2), torch.cat((-sin, sin), -1).unsqueeze(-2)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_masked(*shape: int) -> Tensor:
    """About a third of the positions, and the whole of the first row."""
    mask = randn(*shape, seed=8) > 0.4
    mask.view(-1, shape[-1])[0] = True
    return mask


def labelled(N: int, V: int, ignored: int) -> Tensor:
    """N labels, the first `ignored` of them IGNORE, both ends of the vocabulary among the rest."""
    labels = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(5))
    labels[-1] = V - 1
    labels[-2:-1] = 0
    labels[:ignored] = IGNORE
    return labels


CASES: dict[str, list[Case]] = {
    "rms_norm": [
        Case("odd", ((33, 70), (70,)), (EPS,)),
        Case("one token", ((1, 1, 33), (33,)), (EPS,)),
        Case("three dimensions", ((2, 3, 24), (24,)), (EPS,)),
        Case("tiny", ((33, 70), (70,)), (EPS,), scale=1e-3),
    ],
    "rope": [
        Case("odd", ((2, 7, 3, 10),), angles(7, 5)),
        Case("one token", ((1, 1, 6, 2),), angles(1, 1)),
        Case("a table for each row", ((3, 5, 2, 6),), angles(3, 5, 3)),
        Case("tiny", ((2, 7, 3, 10),), angles(7, 5), scale=1e-3),
    ],
    "swiglu": [
        Case("odd", ((33, 70), (33, 70))),
        Case("one token", ((1, 1, 33), (1, 1, 33))),
        Case("small", ((33, 70), (33, 70)), scale=0.1),
        Case("large", ((33, 70), (33, 70)), scale=20.0),
    ],
    "scaled_masked_softmax": [
        Case("odd", ((2, 3, 33, 70),), (some_masked(2, 1, 33, 70), 0.125)),
        Case("one score", ((2, 1, 1, 1),), (some_masked(2, 1, 1, 1), 0.5)),
        Case("nothing masked", ((1, 2, 5, 7),), (torch.zeros(1, 1, 5, 7, dtype=torch.bool), 3.0)),
        Case("blocks of 32", ((1, 2, 32, 64),), (some_masked(1, 1, 32, 64), 0.125)),
    ],
    "attention": [
        Case("odd", ((2, 33, 6, 14), (2, 33, 6, 14), (2, 33, 6, 14))),
        Case("shared heads", ((2, 9, 6, 8), (2, 9, 3, 8), (2, 9, 3, 8))),
        Case("one key head", ((1, 9, 6, 8), (1, 9, 1, 8), (1, 9, 1, 8))),
        Case("the last positions", ((2, 3, 6, 8), (2, 19, 3, 8), (2, 19, 3, 8))),
        Case("one token", ((2, 1, 6, 8), (2, 1, 3, 8), (2, 1, 3, 8))),
    ],
    "linear": [
        Case("odd", ((2, 33, 70), (11, 70))),
        Case("one token", ((1, 1, 33), (5, 33))),
        Case("bias", ((7, 33), (5, 33), (5,))),
    ],
    "linear_cross_entropy": [
        Case("odd", ((33, 17), (70, 17)), (labelled(33, 70, 9),)),
        Case("one token", ((1, 17), (70, 17)), (labelled(1, 70, 0),)),
        Case("all ignored", ((33, 17), (70, 17)), (labelled(33, 70, 33),)),
        Case("tiny", ((33, 17), (70, 17)), (labelled(33, 70, 9),), scale=1e-3),
    ],
}


EXACT: dict[str, Callable] = {
    "rms_norm": rms_norm64,
    "rope": rope64,
    "swiglu": swiglu64,
    "scaled_masked_softmax": scaled_masked_softmax64,
    "attention": attention64,
    "linear": linear64,
    "linear_cross_entropy": linear_cross_entropy64,
}


def implementations(op: str) -> dict[str, Callable]:
    """The implementations of an op that run on any device, by name."""
    return {each.name: each.function for each in ops.TABLE[op].implementations if not each.device}


def cells(op: str) -> list[Case]:
    return CASES[op]


def with_gaps(x: Tensor) -> Tensor:
    """The same numbers, every second one in memory."""
    return torch.stack((x, x), dim=-1)[..., 0]


def check(op: str, case: Case, function: Callable, dtype: torch.dtype, strided: bool) -> None:
    """One cell of the matrix: the value and each gradient of `function` lie within the bound."""
    sampled = [
        (randn(*shape, seed=seed) * case.scale).to(dtype) for seed, shape in enumerate(case.shapes)
    ]
    inputs = [(with_gaps(x) if strided else x.clone()).detach().requires_grad_() for x in sampled]
    y = function(*inputs, *case.rest)
    assert y.dtype == (torch.float32 if op == "linear_cross_entropy" else dtype)
    inputs64 = [x.double().requires_grad_() for x in sampled]
    y64 = EXACT[op](*inputs64, *map(in_float64, case.rest))

    dy = randn(*y.shape, seed=9).to(y.dtype)
    gradients64 = torch.autograd.grad(y64, inputs64, dy.double())
    if strided and y.dim() > 0:
        dy = dy.transpose(0, -1).contiguous().transpose(0, -1)
    gradients = torch.autograd.grad(y, inputs, dy)

    names = ("value", "first gradient", "second gradient", "third gradient")
    compared = zip(names, (y, *gradients), (y64, *gradients64), strict=False)
    for name, computed, exact in compared:
        assert computed.shape == exact.shape
        error = (computed.detach().double() - exact).norm()
        size = exact.norm() or y64.norm()  # a gradient of 0 is measured by the value
        assert error <= BOUNDS[dtype] * size, (
            f"{op}, {case.name}, {name}: off by {error:.3g} of {size:.3g}, {error / size:.2g}"
        )
    with torch.no_grad():
        without_gradient = function(*inputs, *case.rest).double()
    assert (without_gradient - y64).norm() <= BOUNDS[dtype] * y64.norm(), (
        f"{op}, {case.name}: another value where no gradient is asked for"
    )


def in_float64(argument: Any) -> Any:
    if isinstance(argument, Tensor) and argument.is_floating_point():
        return argument.double()
    return argument


def check_max(
    function: Callable, formula: Callable, *inputs: Tensor, tolerance: float = 1e-5
) -> None:
    """Value and gradients are within `tolerance` of the largest element, or of 1, everywhere."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    leaves64 = [x.double().requires_grad_() for x in inputs]
    y = function(*leaves)
    y64 = formula(*leaves64)
    dy = randn(*y.shape, seed=9).to(y.dtype)
    gradients = torch.autograd.grad(y, leaves, dy)
    gradients64 = torch.autograd.grad(y64, leaves64, dy.double())
    for computed, exact in zip((y, *gradients), (y64, *gradients64), strict=True):
        assert computed.shape == exact.shape
        error = (computed.double() - exact).abs().max()
        assert error <= tolerance * exact.abs().max().clamp(min=1.0)


def bytes_kept(run: Callable[[], Tensor]) -> int:
    """The bytes of all tensors that autograd keeps for backward."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        run()
    return sum(x.numel() * x.element_size() for x in kept)


def each_implementation(op: str) -> pytest.MarkDecorator:
    """Run a test with every implementation of an op that runs on any device."""
    functions = implementations(op)
    return pytest.mark.parametrize("implementation", functions.values(), ids=functions)
