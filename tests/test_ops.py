"""The ops: every implementation is the formula, forward and backward, and keeps no more for backward than it says."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minillama import ops
from minillama.ops import IGNORE, Documents, cpu_linear, fused_elementwise, fused_loss
from tests.parity import attention64

EPS = 1e-5


def implementations(op: str) -> pytest.MarkDecorator:
    """The forms of an op that run on any device."""
    forms = [form for form in ops.TABLE[op].implementations if not form.device]
    return pytest.mark.parametrize(
        "implementation", [form.function for form in forms], ids=[form.name for form in forms]
    )


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_same(
    fast: Callable, formula: Callable, *inputs: Tensor, tolerance: float = 1e-5
) -> None:
    """Values and gradients of `fast` on the inputs are those of `formula` on the same numbers in float64 under autograd."""
    ours, exact = (
        [x.clone().requires_grad_() for x in inputs],
        [x.double().requires_grad_() for x in inputs],
    )
    y, y64 = fast(*ours), formula(*exact)
    upstream = randn(*y.shape, seed=9)
    y.backward(upstream.to(y.dtype))
    y64.backward(upstream.to(y.dtype).double())
    for mine, true in ((y, y64), *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True))):
        assert mine.shape == true.shape
        assert (mine.double() - true).abs().max() <= tolerance * true.abs().max().clamp(min=1.0)


# The formulas once more, in float64.


def rms_norm64(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def cross_entropy64(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    log_p = (hidden @ weight.T).log_softmax(-1).flatten(0, -2)
    return -sum(
        (log_p[i, label] for i, label in enumerate(labels.flatten().tolist()) if label != IGNORE),
        0 * log_p.sum(),
    )


@implementations("rms_norm")
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (2, 3, 24), (64, 33)], ids=str)
def test_rms_norm_is_its_formula(implementation: Callable, shape: tuple[int, ...]) -> None:
    assert_same(
        lambda x, w: implementation(x, w, EPS), rms_norm64, randn(*shape), randn(shape[-1], seed=1)
    )


@implementations("rms_norm")
def test_rms_norm_ignores_scale_but_for_epsilon(implementation: Callable) -> None:
    x, weight = randn(4, 24), torch.ones(24)
    assert torch.allclose(
        implementation(1000 * x, weight, EPS), implementation(x, weight, EPS), atol=1e-4
    )
    assert float(implementation(torch.zeros(1, 24), weight, EPS).abs().max()) == 0.0


@implementations("rms_norm")
def test_rms_norm_takes_its_statistics_in_fp32(implementation: Callable) -> None:
    """In fp16 the square of 300 is already infinite."""
    x = torch.full((1, 24), 300.0, dtype=torch.float16)
    assert torch.equal(
        implementation(x, torch.ones(24, dtype=torch.float16), EPS),
        torch.ones(1, 24, dtype=torch.float16),
    )


@implementations("linear")
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_linear_is_its_formula(implementation: Callable, bias: bool) -> None:
    x, weight = randn(2, 5, 7), randn(11, 7, seed=1)
    if bias:
        assert_same(implementation, lambda x, w, b: x @ w.T + b, x, weight, randn(11, seed=2))
    else:
        assert_same(implementation, lambda x, w: x @ w.T, x, weight)


@implementations("linear")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("units", [True, False], ids=["16-bit units", "none"])
def test_linear_in_16_bits_rounds_once(
    implementation: Callable, dtype: torch.dtype, units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a unit in the last place of the exact result, up to the two roundings of an exact tie: 2^-8 for bf16's 8 bits."""
    monkeypatch.setattr(cpu_linear, "has_bf16_units", lambda: units)
    inputs = [
        randn(2, 5, 64).to(dtype),
        randn(11, 64, seed=1).to(dtype),
        randn(11, seed=2).to(dtype),
    ]
    assert_same(
        implementation, lambda x, w, b: x @ w.T + b, *inputs, tolerance=torch.finfo(dtype).eps
    )


@implementations("attention")
@pytest.mark.parametrize(
    ("T", "S", "H", "K"),
    [
        (9, 9, 6, 6),
        (9, 9, 6, 3),
        (9, 9, 6, 2),
        (9, 9, 6, 1),
        (3, 9, 6, 2),
        (1, 9, 6, 2),
        (1, 1, 6, 3),
        (8, 9, 4, 4),
    ],
)
def test_attention_is_its_formula(implementation: Callable, T: int, S: int, H: int, K: int) -> None:
    """Whole texts, the last T of S positions (cached decoding) and a single query; heads shared by groups."""
    assert_same(
        implementation,
        attention64,
        randn(2, T, H, 8),
        randn(2, S, K, 8, seed=1),
        randn(2, S, K, 8, seed=2),
    )


@implementations("attention")
@pytest.mark.parametrize("lengths", [[12], [1] * 12, [5, 1, 6], [1, 7, 3, 1], [2, 10]], ids=str)
def test_attention_over_packed_documents_is_attention_over_each(
    implementation: Callable, lengths: list[int]
) -> None:
    def each_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(x.view(1, 12, -1, 4).split(lengths, dim=1) for x in (q, k, v)), strict=True)
        return torch.cat([attention64(*part) for part in parts], dim=1).view(q.shape)

    q, k, v = randn(1, 12, 6, 4), randn(1, 12, 3, 4, seed=1), randn(1, 12, 3, 4, seed=2)
    assert_same(lambda *x: implementation(*x, Documents(lengths)), each_alone, q, k, v)
    in_two_rows = [x.view(2, 6, -1, 4) for x in (q, k, v)]  # rows are only a way to lay the run out
    assert_same(lambda *x: implementation(*x, Documents(lengths)), each_alone, *in_two_rows)


@implementations("attention")
def test_long_and_short_documents_are_grouped_and_put_back(implementation: Callable) -> None:
    """Lengths far enough apart for several groups, near enough for holes within a group."""
    lengths = [40, 3, 38, 90, 1, 88, 17]
    q, k, v = randn(1, 277, 4, 4), randn(1, 277, 2, 4, seed=1), randn(1, 277, 2, 4, seed=2)
    assert len(Documents(lengths).groups) > 1
    assert len(Documents(lengths).layout.padding) > 0
    whole = implementation(q, k, v, Documents(lengths))
    alone = [
        attention64(*part)
        for part in zip(*(x.double().split(lengths, dim=1) for x in (q, k, v)), strict=True)
    ]
    assert torch.allclose(whole.double(), torch.cat(alone, dim=1), atol=1e-5)


@implementations("linear_cross_entropy")
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
    """Some, none or one position is labelled; the labels include both ends of the vocabulary of 13."""
    monkeypatch.setattr(fused_loss, "LOGIT_CHUNK", chunk)
    labels = torch.tensor(labels)
    hidden, weight = randn(2, 5, 7), randn(13, 7, seed=1)
    assert_same(
        lambda h, w: implementation(h, w, labels),
        lambda h, w: cross_entropy64(h, w, labels),
        hidden,
        weight,
    )


@implementations("linear_cross_entropy")
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
    (2 * cross_entropy64(exact, weight.double(), labels)).backward()
    assert torch.allclose(hidden.grad.double(), exact.grad, atol=1e-5)


@implementations("linear_cross_entropy")
def test_cross_entropy_survives_logits_that_overflow_exp(implementation: Callable) -> None:
    loss = implementation(torch.tensor([[100.0]]), torch.tensor([[1.0], [-1.0]]), torch.tensor([1]))
    assert float(loss) == pytest.approx(200.0)


@implementations("adamw")
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


@implementations("adamw")
def test_the_first_adamw_update_is_the_learning_rate_whatever_the_gradient(
    implementation: Callable,
) -> None:
    """By hand: m / (1 - beta1) = g and v / (1 - beta2) = g², so the step is lr g / |g|; decay takes lr · wd · w before it."""
    weight, grad, m, v = (
        torch.tensor([1.0, 1.0, 1.0]),
        torch.tensor([1e-3, -5.0, 700.0]),
        torch.zeros(3),
        torch.zeros(3),
    )
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


def bytes_kept(run: Callable[[], Tensor]) -> int:
    """The bytes of all tensors that autograd keeps for backward."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        run()
    return sum(x.numel() * x.element_size() for x in kept)


def test_rms_norm_keeps_its_inputs_and_one_number_a_row() -> None:
    N, C = 10, 24
    x, weight = randn(N, C).requires_grad_(), randn(C, seed=1).requires_grad_()
    assert bytes_kept(lambda: fused_elementwise.rms_norm(x, weight, EPS)) == 4 * (N * C + C + N)
    assert bytes_kept(lambda: ops.reference.rms_norm(x, weight, EPS)) > 2 * 4 * N * C


def test_cross_entropy_keeps_two_gradients_and_no_logits() -> None:
    """dh and dW. The formula keeps N x V log-probabilities."""
    N, C, V = 10, 3, 50
    hidden, weight = randn(N, C).requires_grad_(), randn(V, C, seed=1).requires_grad_()
    labels = torch.arange(N)
    labels[:4] = IGNORE
    assert bytes_kept(lambda: fused_loss.linear_cross_entropy(hidden, weight, labels)) == 4 * (
        N * C + V * C
    )
    assert (
        bytes_kept(lambda: ops.reference.linear_cross_entropy(hidden, weight, labels)) > 4 * N * V
    )


def test_a_model_computes_the_same_with_either_choice() -> None:
    """Two processes, since the choice is made once in each."""
    program = (
        "import torch; from tests.conftest import random_model, random_tokens; t = random_tokens(1, 12); "
        "from minillama.ops import Documents; print(float(random_model().loss_sum(t, t.roll(-1), Documents([5, 7]))))"
    )

    def loss(spec: str) -> float:
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            env=os.environ | {"MINILLAMA_OPS": spec},
            check=True,
            timeout=100,
        )
        return float(done.stdout)

    assert loss("fused") == pytest.approx(loss("reference"), rel=1e-6)


def test_swiglu_gates_with_silu() -> None:
    gate, up = randn(3, 5), randn(3, 5, seed=1)
    assert_same(ops.swiglu, lambda g, u: g / (1 + (-g).exp()) * u, gate, up)
    assert not torch.allclose(ops.swiglu(gate, up), ops.swiglu(up, gate))


def test_losses_of_16_bit_data_are_fp32() -> None:
    hidden, weight = randn(4, 7).bfloat16(), randn(13, 7, seed=1).bfloat16()
    labels = torch.tensor([1, 2, 3, 4])
    loss = ops.linear_cross_entropy(hidden, weight, labels)
    assert loss.dtype == torch.float32
    exact = F.cross_entropy(hidden.float() @ weight.float().T, labels, reduction="sum")
    assert float(loss) == pytest.approx(float(exact), rel=1e-6)
