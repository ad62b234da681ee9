"""The optimizer that the trainer calls: loss scale, skipped steps, nothing to train."""

import math

import pytest
import torch
from torch import nn

from minillama import comm
from minillama.comm import Mesh
from minillama.errors import UserError
from minillama.grid import make_grid
from minillama.parallel.loss_scale import LossScale
from minillama.parallel.sharded_optimizer import ShardedOptimizer
from tests.conftest import random_model, random_tokens
from tests.ranks import run_on_ranks
from tests.test_zero import SETTINGS, settings_of


def test_an_overflow_on_one_rank_is_skipped_by_all():
    def run():
        with comm.start("cpu", timeout_minutes=1) as mesh:
            net = nn.Linear(3, 2, bias=False)
            nn.init.ones_(net.weight)
            optimizer = ShardedOptimizer(net.named_parameters(), make_grid(mesh), settings_of(1))
            optimizer.loss_scale = LossScale(scale=8.0, hysteresis_left=1)
            x = torch.full((1, 3), math.inf if mesh.rank == 1 else 1.0)
            optimizer.zero_grad()
            optimizer.backward(net(x).sum(), mesh.size)
            _, updated = optimizer.step(1e-2, 1.0)
            return updated, optimizer.loss_scale.scale, float(net.weight.sum())

    assert run_on_ranks(2, run) == [(False, 4.0, 6.0), (False, 4.0, 6.0)]


def test_the_loss_scale_halves_after_its_hysteresis_and_doubles_after_its_window():
    scale = LossScale(scale=8.0, window=3, hysteresis=2, minimum=2.0, hysteresis_left=2)
    scale.on_overflow()
    assert scale.scale == 8.0
    scale.on_overflow()
    assert scale.scale == 4.0
    for _ in range(3):
        scale.on_success()
    assert (scale.scale, scale.hysteresis_left) == (8.0, 2)
    for _ in range(3):
        scale.on_overflow()
    assert scale.scale == 2.0
    with pytest.raises(UserError, match="smallest loss scale"):
        scale.on_overflow()


def test_an_overflow_starts_the_window_anew_and_the_scale_stays_above_its_minimum():
    scale = LossScale(scale=8.0, window=3, hysteresis=1, minimum=3.0, hysteresis_left=1)
    scale.on_success()
    scale.on_success()
    scale.on_overflow()
    scale.on_success()
    assert scale.scale == 4.0
    scale.on_overflow()
    assert scale.scale == 3.0


def test_a_scaled_loss_makes_the_same_update():
    def update(loss_scale):
        net = random_model()
        optimizer = ShardedOptimizer(net.named_parameters(), make_grid(Mesh()), SETTINGS)
        optimizer.loss_scale = loss_scale
        batch = random_tokens(1, 9)
        optimizer.backward(net.loss_sum(batch, batch.roll(-1, 1)), 1)
        norm, _ = optimizer.step(1e-2, 1.0)
        return norm, net.lm_head.weight.detach()

    (norm, weight), (scaled_norm, scaled_weight) = update(None), update(LossScale(scale=1024.0))
    assert scaled_norm == pytest.approx(norm, rel=1e-6)
    torch.testing.assert_close(scaled_weight, weight, rtol=1e-5, atol=1e-6)


def test_nothing_to_train_is_said():
    with pytest.raises(UserError, match="every parameter is frozen"):
        frozen = random_model().requires_grad_(False)
        ShardedOptimizer(frozen.named_parameters(), make_grid(Mesh()), SETTINGS)
