"""Slices of the flat vector: every rank decays, checks, saves and loads its own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from minillama import comm
from minillama.grid import make_grid
from minillama.parallel.sharded_optimizer import ShardedOptimizer
from minillama.parallel.zero import CHUNK
from minillama.train_config import TrainConfig
from tests.ranks import run_on_ranks

CONFIG = TrainConfig(weight_decay=0.5, adam_epsilon=1e-6)


def parameters(matrix_chunks: float, vector_chunks: float) -> list[tuple[str, nn.Parameter]]:
    """A matrix, which is decayed, and a 1-D parameter, which is not; sizes in chunks."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(int(matrix_chunks * CHUNK) // 8, 8, generator=generator)
    vector = torch.randn(int(vector_chunks * CHUNK), generator=generator)
    return [("matrix", nn.Parameter(matrix)), ("vector", nn.Parameter(vector))]


def loss_of(named: list[tuple[str, nn.Parameter]]) -> torch.Tensor:
    return sum((p.sin() * torch.arange(p.numel()).view(p.shape).cos()).sum() for _, p in named)


def two_updates(stage: int, matrix_chunks: float, vector_chunks: float) -> list[np.ndarray]:
    with comm.start("cpu", timeout_minutes=1) as mesh:
        named = parameters(matrix_chunks, vector_chunks)
        optimizer = ShardedOptimizer(named, make_grid(mesh), replace(CONFIG, zero_stage=stage))
        for _ in range(2):
            optimizer.zero_grad()
            optimizer.backward(loss_of(named) / mesh.size, mesh.size)
            optimizer.step(1e-2, max_norm=0.0)
        return [p.detach().numpy().copy() for _, p in named]


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("matrix_chunks", [1.5, 2.5], ids=["border in rank 1", "border in rank 2"])
def test_decay_ends_at_the_first_1d_parameter_on_whichever_rank_it_lies(stage, matrix_chunks):
    """The last matrix and the first 1-D parameter meet in the slice of rank 1, then of rank 2."""
    vector_chunks = 3.8 - matrix_chunks  # four ranks, one chunk each
    matrix, vector = (p for _, p in parameters(matrix_chunks, vector_chunks))
    groups = [
        {"params": [matrix], "weight_decay": 0.5},
        {"params": [vector], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1e-2, eps=1e-6)
    for _ in range(2):
        adamw.zero_grad()
        loss_of([("matrix", matrix), ("vector", vector)]).backward()
        adamw.step()
    for weights in run_on_ranks(4, two_updates, stage, matrix_chunks, vector_chunks):
        np.testing.assert_allclose(weights[0], matrix.detach(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(weights[1], vector.detach(), rtol=1e-5, atol=1e-6)


def test_a_gradient_that_is_not_finite_is_found_by_its_owner_and_named_by_all_ranks():
    """Rank 1 owns the second chunk, which is part of `c`; rank 0 sees no bad value."""

    def run() -> tuple[str, str]:
        with comm.start("cpu", timeout_minutes=1) as mesh:
            named = [
                (name, nn.Parameter(torch.ones(CHUNK // 16, 8))) for name in ("a", "b", "c", "d")
            ]
            optimizer = ShardedOptimizer(named, make_grid(mesh), replace(CONFIG, zero_stage=1))
            optimizer.zero_grad()
            factor = torch.ones(CHUNK // 16, 8)
            factor[-1, -1] = torch.nan
            values = [p if name != "c" else p * factor for name, p in named]
            optimizer.backward(sum(value.sum() for value in values), mesh.size)
            result = optimizer.step(1e-2, 1.0)
            assert not result.updated
            own_name = optimizer.vectors[0].first_non_finite()
            return own_name, optimizer.first_non_finite()

    assert run_on_ranks(2, run) == [("", "c"), ("c", "c")]
