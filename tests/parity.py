"""The parity matrix: every form of an op against its formula in float64 under autograd, forward and every gradient.

    for each op     CASES: inputs of odd sizes, one row, tiny numbers, all labels ignored, shared heads, …
    for each form   the formula, the hand-derived one, a kernel in an interpreter, a vendor's on an emulated device
    for each dtype  fp32, fp16, bf16: BOUNDS on |form - exact| / |exact|, in the 2-norm
    laid out        contiguous, or with gaps between elements and the upstream gradient transposed

`check(op, case, form, dtype, strided)` is one cell; `cells(op)` names an op's cases for parametrize. `form` takes and returns
CPU tensors: a form that lives on another device is wrapped by the caller.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minillama import ops
from minillama.ops import IGNORE

BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """`shapes` of the differentiable inputs, drawn from N(0, scale²) in the dtype under test; `rest` follows them as it is."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    rest: tuple[Any, ...] = ()
    scale: float = 1.0


def angles(*shape: int) -> tuple[Tensor, Tensor]:
    """Rotary tables (..., T, 1, D) of random angles (..., T, D/2)."""
    return wide_tables((3 * randn(*shape, seed=7)).cos(), (3 * randn(*shape, seed=7)).sin())


def wide_tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat((cos, cos), -1).unsqueeze(-2), torch.cat((-sin, sin), -1).unsqueeze(-2)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_masked(*shape: int) -> Tensor:
    """About a third of the positions, and the whole of the first row."""
    mask = randn(*shape, seed=8) > 0.4
    mask.view(-1, shape[-1])[0] = True
    return mask


def labelled(N: int, V: int, ignored: int) -> Tensor:
    """N labels, the first `ignored` of them ignored, both ends of the vocabulary among the others."""
    labels = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(5))
    labels[-1], labels[-2:-1], labels[:ignored] = V - 1, 0, IGNORE
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


# The formulas once more, in float64 and in other words than the reference's.


def rms_norm64(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt() * weight


def rope64(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A pair is a complex number, and turning it is a product."""
    pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.complex(
        cos[..., cos.shape[-1] // 2 :], sin[..., sin.shape[-1] // 2 :]
    )
    return torch.cat((pairs.real, pairs.imag), dim=-1)


def swiglu64(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + (-gate).exp()) * up


def scaled_masked_softmax64(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    e = torch.where(mask, -10000.0, scale * x)
    e = (e - e.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def attention64(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Query head h reads key head h // (H / K); query t of T stands at position S - T + t."""
    (_, T, H, D), (_, S, K, _) = q.shape, k.shape
    heads = []
    for h in range(H):
        scores = q[:, :, h] @ k[:, :, h * K // H].transpose(1, 2) / math.sqrt(D)  # (B, T, S)
        future = torch.arange(S)[None, :] > torch.arange(S - T, S)[:, None]
        heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[:, :, h * K // H])
    return torch.stack(heads, dim=2)


def linear64(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.einsum("...i,oi->...o", x, weight) + (0 if bias is None else bias)


def linear_cross_entropy64(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    kept = labels.flatten() != IGNORE
    log_p = (hidden @ weight.T).log_softmax(-1).flatten(0, -2)[kept]
    return -log_p[torch.arange(len(log_p)), labels.flatten()[kept]].sum()


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


def check(op: str, case: Case, form: Callable, dtype: torch.dtype, strided: bool) -> None:
    """One cell of the matrix: the value and each gradient of `form` lie within the bound."""
    drawn = [
        (randn(*shape, seed=seed) * case.scale).to(dtype) for seed, shape in enumerate(case.shapes)
    ]
    ours = [(with_gaps(x) if strided else x.clone()).detach().requires_grad_() for x in drawn]
    exact = [x.double().requires_grad_() for x in drawn]
    rest = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in case.rest]
    y, y64 = form(*ours, *case.rest), EXACT[op](*exact, *rest)
    assert y.dtype == (torch.float32 if op == "linear_cross_entropy" else dtype)
    upstream = randn(*y.shape, seed=9).to(y.dtype)
    laid_out = (
        upstream.transpose(0, -1).contiguous().transpose(0, -1) if strided and y.dim() else upstream
    )
    gradients, gradients64 = (
        torch.autograd.grad(y, ours, laid_out),
        torch.autograd.grad(y64, exact, upstream.double()),
    )
    compared = zip(
        ("value", "first gradient", "second gradient", "third gradient"),
        (y, *gradients),
        (y64, *gradients64),
        strict=False,
    )
    for name, mine, true in compared:
        assert mine.shape == true.shape
        error, size = (
            (mine.detach().double() - true).norm(),
            true.norm() or y64.norm(),
        )  # a gradient of 0 is measured by the value
        assert error <= BOUNDS[dtype] * size, (
            f"{op}, {case.name}, {name}: off by {error:.3g} of {size:.3g}, {error / size:.2g}"
        )
    with torch.no_grad():
        untracked = form(*ours, *case.rest).double()
    assert (untracked - y64).norm() <= BOUNDS[dtype] * y64.norm(), (
        f"{op}, {case.name}: another value where no gradient is asked for"
    )
