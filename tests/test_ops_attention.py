"""Attention is its formula: whole sequences, cached decoding, shared heads, packed documents."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minillama.ops import Documents
from tests.formulas64 import attention64, packed_attention64
from tests.parity import check_max, each_implementation, randn


@each_implementation("attention")
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
    """Whole sequences, the last T of S positions (cached decoding), one query; shared heads."""
    check_max(
        implementation,
        attention64,
        randn(2, T, H, 8),
        randn(2, S, K, 8, seed=1),
        randn(2, S, K, 8, seed=2),
    )


@each_implementation("attention")
@pytest.mark.parametrize("lengths", [[12], [1] * 12, [5, 1, 6], [1, 7, 3, 1], [2, 10]], ids=str)
def test_attention_over_packed_documents_is_attention_over_each(
    implementation: Callable, lengths: list[int]
) -> None:
    def each_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention64(q, k, v, lengths)

    q, k, v = randn(1, 12, 6, 4), randn(1, 12, 3, 4, seed=1), randn(1, 12, 3, 4, seed=2)
    check_max(lambda *x: implementation(*x, Documents(lengths)), each_alone, q, k, v)
    in_two_rows = [x.view(2, 6, -1, 4) for x in (q, k, v)]  # rows are only a way to lay the run out
    check_max(lambda *x: implementation(*x, Documents(lengths)), each_alone, *in_two_rows)


@each_implementation("attention")
def test_long_and_short_documents_are_grouped_and_put_back(implementation: Callable) -> None:
    """Lengths far enough apart for several groups, near enough for holes within a group."""
    lengths = [40, 3, 38, 90, 1, 88, 17]
    q, k, v = randn(1, 277, 4, 4), randn(1, 277, 2, 4, seed=1), randn(1, 277, 2, 4, seed=2)
    assert len(Documents(lengths).groups) > 1
    assert len(Documents(lengths).layout.padding) > 0
    whole = implementation(q, k, v, Documents(lengths))
    alone = packed_attention64(q.double(), k.double(), v.double(), lengths)
    assert torch.allclose(whole.double(), alone, atol=1e-5)
