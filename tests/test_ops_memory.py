"""What each op keeps for backward, in bytes: no more than its docstring says."""

import pytest
import torch
from torch import Tensor

from minillama import ops
from minillama.ops import IGNORE, fused_attention, fused_elementwise, fused_loss, reference
from tests.conftest import random_model, random_tokens
from tests.parity import BOUNDS, angles, bytes_kept, randn

EPS = 1e-5


def test_rms_norm_keeps_its_inputs_and_one_number_a_row() -> None:
    N, C = 10, 24
    x, weight = randn(N, C).requires_grad_(), randn(C, seed=1).requires_grad_()
    assert bytes_kept(lambda: fused_elementwise.rms_norm(x, weight, EPS)) == 4 * (N * C + C + N)
    assert bytes_kept(lambda: reference.rms_norm(x, weight, EPS)) > 2 * 4 * N * C


def test_cross_entropy_keeps_two_gradients_and_no_logits() -> None:
    """dh and dW. The formula keeps N x V log-probabilities."""
    N, C, V = 10, 3, 50
    hidden, weight = randn(N, C).requires_grad_(), randn(V, C, seed=1).requires_grad_()
    labels = torch.arange(N)
    labels[:4] = IGNORE
    assert bytes_kept(lambda: fused_loss.linear_cross_entropy(hidden, weight, labels)) == 4 * (
        N * C + V * C
    )
    assert bytes_kept(lambda: reference.linear_cross_entropy(hidden, weight, labels)) > 4 * N * V


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


def bytes_a_model_keeps(spec: str) -> int:
    """The storages that autograd saves in one forward pass, parameters aside."""
    model = random_model(dim=48, head_dim=8, ffn_dim=128)
    tokens = random_tokens(2, 128)
    storages = {}

    def keep(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    ops.choose(spec)
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model.loss_sum(tokens, tokens.roll(-1))
    finally:
        ops.choose("")
    for parameter in model.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in storages.values())


def test_a_whole_model_keeps_about_half_as_much_for_backward_as_with_the_formulas() -> None:
    assert bytes_a_model_keeps("fused") <= 0.56 * bytes_a_model_keeps("reference")
