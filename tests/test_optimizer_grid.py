"""The optimizer on a grid: each parameter is counted once, and what several ranks hold stays equal.

The parameters are made by hand, and so are their gradients. The reference is the optimizer of one
rank that holds everything.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from minillama import comm
from minillama.comm import Mesh
from minillama.grid import Grid, make_grid
from minillama.parallel.loss_scale import LossScale
from minillama.parallel.sharded_optimizer import ShardedOptimizer
from minillama.parallel.shards import axis_of, cut, held
from minillama.train_config import TrainConfig
from tests.ranks import run_on_ranks

EMBEDDING = "model.embed_tokens.weight"
ATTENTION = "model.layers.0.self_attn"
SHAPES = {
    EMBEDDING: (9, 4),  # two tensor ranks: 4 rows and 5
    f"{ATTENTION}.q_proj.weight": (6, 4),
    f"{ATTENTION}.q_proj.lora_A": (2, 4),
    f"{ATTENTION}.q_proj.lora_B": (6, 2),
    f"{ATTENTION}.o_proj.weight": (4, 6),
    f"{ATTENTION}.o_proj.bias": (4,),
    "model.layers.0.input_layernorm.weight": (4,),
    "model.layers.1.mlp.down_proj.weight": (40, 450),  # more than a chunk: two data ranks own some
    "model.norm.weight": (4,),
}
STAGES = {
    2: (list(SHAPES)[:7], [*list(SHAPES)[7:], EMBEDDING]),
    3: (list(SHAPES)[:2], list(SHAPES)[2:7], [*list(SHAPES)[7:], EMBEDDING]),
}
CONFIG = TrainConfig(weight_decay=0.1, gradient_accumulation_steps=2)
STEPS = 3


def values(name: str, step: int) -> Tensor:
    """Random numbers for the whole of a parameter, the same in every process."""
    generator = torch.Generator().manual_seed(1000 * step + list(SHAPES).index(name))
    return torch.randn(SHAPES[name], generator=generator)


def share_of_gradient(name: str, grid: Grid, tied: bool) -> float:
    """Which share of its gradient a rank computes. The shares of a line's ranks are 1 : 2 : 3 …"""
    lines = [grid.data]
    if held(name) == "partial":
        lines.append(grid.tensor)
    if tied and name == EMBEDDING:
        lines.append(grid.ends)
    share = 1.0
    for line in lines:
        share *= (line.rank + 1) / sum(range(1, line.size + 1))
    return share


Named = list[tuple[str, nn.Parameter]]


def make_optimizer(
    grid: Grid, names: list[str], stage: int, tied: bool = False, exact: bool = False
) -> tuple[Named, ShardedOptimizer]:
    """The parts of these parameters that this rank holds, and their optimizer."""
    named = []
    for name in names:
        part = cut(values(name, 0), axis_of(name), grid.tensor.rank, grid.tensor.size)
        named.append((name, nn.Parameter(part.clone())))
    config = replace(CONFIG, zero_stage=stage, reduction="exact" if exact else "fast")
    optimizer = ShardedOptimizer(named, grid, config, tied={EMBEDDING} if tied else ())
    assert optimizer.num_trained == sum(values(name, 0).numel() for name in SHAPES)
    return named, optimizer


def take_step(
    grid: Grid, named: Named, optimizer: ShardedOptimizer, step: int, tied: bool = False
) -> float:
    """A clipped update with this rank's share of step's gradients; returns the norm."""
    optimizer.zero_grad()
    loss = torch.zeros(())
    for name, parameter in named:
        gradient = share_of_gradient(name, grid, tied) * values(name, step)
        part = cut(gradient, axis_of(name), grid.tensor.rank, grid.tensor.size)
        loss = loss + (parameter * part).sum()
    optimizer.backward(loss, grid.data.size)
    return optimizer.step(1e-2, max_norm=1.0).norm


def train(
    grid: Grid, names: list[str], stage: int, tied: bool = False, exact: bool = False
) -> tuple[list[float], dict[str, np.ndarray]]:
    """Three updates of what this rank holds; returns the norms and its weights."""
    named, optimizer = make_optimizer(grid, names, stage, tied, exact)
    norms = [take_step(grid, named, optimizer, step, tied) for step in range(1, STEPS + 1)]
    return norms, {name: parameter.detach().numpy().copy() for name, parameter in named}


def train_on_grid(tensor: int, stages: int, stage: int, tied: bool = True) -> tuple:
    """Returns (norms, weights, tensor rank) of this rank. With stages, it is exact if not tied."""
    torch.set_num_threads(1)
    with comm.start("cpu", timeout_minutes=1) as mesh:
        grid = make_grid(mesh, tensor, stages)
        names = STAGES[stages][grid.stage.rank] if stages > 1 else list(SHAPES)
        if stages > 1 and not tied and grid.stage.rank == stages - 1:
            names = names[:-1]
        norms, weights = train(grid, names, stage, tied, exact=not tied)
        return norms, weights, grid.tensor.rank


@pytest.mark.parametrize(("ranks", "stages"), [(2, 2), (3, 3), (4, 2)], ids=["PP2", "PP3", "DP2"])
def test_with_the_exact_reduction_stages_do_not_change_a_bit(ranks: int, stages: int) -> None:
    """Norms are summed by parameter, and the order of their sum does not matter."""
    data_ranks = ranks // stages
    norms, weights, _ = run_on_ranks(data_ranks, train_on_grid, 1, 1, 0, False)[0]
    seen = set()
    for found_norms, found, _ in run_on_ranks(ranks, train_on_grid, 1, stages, 1, False):
        assert found_norms == norms
        for name, weight in found.items():
            assert np.array_equal(weight, weights[name]), name
            seen.add(name)
    assert seen == set(SHAPES)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(
    ("ranks", "tensor", "stages"),
    [(2, 2, 1), (4, 2, 1), (2, 1, 2), (4, 1, 2), (3, 1, 3), (4, 2, 2)],
    ids=["TP2", "DP2 TP2", "PP2", "DP2 PP2", "PP3", "TP2 PP2"],
)
def test_every_grid_makes_the_updates_of_one_rank(
    ranks: int, tensor: int, stages: int, stage: int
) -> None:
    """A norm weight that is counted twice, or a tied copy, would show in the norm alone."""
    norms, weights = train(make_grid(Mesh()), list(SHAPES), 0)
    copies: dict[tuple[str, int], np.ndarray] = {}
    seen = set()
    for found_norms, found, rank in run_on_ranks(ranks, train_on_grid, tensor, stages, stage):
        assert found_norms == pytest.approx(norms, rel=1e-6)
        for name, weight in found.items():
            seen.add(name)
            axis = axis_of(name)
            expected = cut(torch.from_numpy(weights[name]), axis, rank, tensor)
            np.testing.assert_allclose(weight, expected, rtol=1e-5, atol=1e-6)
            place = (name, rank if axis is not None else 0)
            copy = copies.setdefault(place, weight)
            assert np.array_equal(copy, weight), f"{name} differs between ranks that hold it"
    assert seen == set(SHAPES)


def test_a_middle_stage_sends_nothing_of_a_tied_embedding() -> None:
    """Its ends are this rank alone."""

    def ends_of_this_rank() -> tuple[int, list[int]]:
        with comm.start("cpu", timeout_minutes=1) as mesh:
            ends = make_grid(mesh, 1, 4).ends
            return ends.size, comm.gather_objects(ends, mesh.rank)

    assert run_on_ranks(4, ends_of_this_rank) == [(2, [0, 3]), (1, [1]), (1, [2]), (2, [0, 3])]


def skip_an_overflow(tensor: int, stages: int, bad_rank: int) -> tuple[bool, float, bool]:
    """A step in which the gradients of one rank overflow.

    Returns whether the step updated, the loss scale after it, and whether the weights stayed.
    """
    with comm.start("cpu", timeout_minutes=1) as mesh:
        grid = make_grid(mesh, tensor, stages)
        names = STAGES[stages][grid.stage.rank] if stages > 1 else list(SHAPES)
        named, optimizer = make_optimizer(grid, names, stage=0, tied=True)
        optimizer.loss_scale = LossScale(scale=8.0, hysteresis_left=1)
        before = [parameter.detach().clone() for _, parameter in named]
        loss = torch.stack([parameter.sum() for _, parameter in named]).sum()
        optimizer.backward(loss * (math.inf if mesh.rank == bad_rank else 1.0), grid.data.size)
        step = optimizer.step(1e-2, max_norm=1.0)
        stayed = all(torch.equal(x, p) for x, (_, p) in zip(before, named, strict=True))
        return step.updated, optimizer.loss_scale.scale, stayed


@pytest.mark.parametrize(("tensor", "stages"), [(2, 1), (1, 3), (2, 2)], ids=str)
def test_an_overflow_on_one_rank_of_a_grid_is_skipped_by_all(tensor: int, stages: int) -> None:
    ranks = tensor * stages
    results = run_on_ranks(ranks, skip_an_overflow, tensor, stages, ranks - 1)
    assert results == [(False, 4.0, True)] * ranks
