"""The learning rate is transformers', for every schedule and warm-up."""

import math

import pytest
import torch

from minillama.train_config import TrainConfig
from minillama.training.schedule import learning_rate


@pytest.mark.parametrize(
    ("kind", "function"),
    [
        ("linear", "get_linear_schedule_with_warmup"),
        ("cosine", "get_cosine_schedule_with_warmup"),
        ("constant", "get_constant_schedule"),
        ("constant_with_warmup", "get_constant_schedule_with_warmup"),
    ],
)
@pytest.mark.parametrize("warmup", [{"warmup_ratio": 0.03}, {"warmup_steps": 7}, {}], ids=str)
def test_the_learning_rate_is_transformers(kind: str, function: str, warmup: dict) -> None:
    transformers = pytest.importorskip("transformers")
    settings, total = TrainConfig(lr_scheduler_type=kind, learning_rate=2e-5, **warmup), 103
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-5)
    steps = (
        {"num_warmup_steps": settings.warmup_steps or math.ceil(total * settings.warmup_ratio)}
        if kind != "constant"
        else {}
    )
    steps |= {"num_training_steps": total} if kind in ("linear", "cosine") else {}
    schedule = getattr(transformers, function)(optimizer, **steps)
    for step in range(total):
        assert learning_rate(step, total, settings) == pytest.approx(
            schedule.get_last_lr()[0], rel=1e-12, abs=1e-20
        )
        optimizer.step()
        schedule.step()


def test_warmup_is_rounded_up_and_the_first_update_is_at_zero() -> None:
    """ceil(100 x 0.021) = 3 updates at 0, 1/3 and 2/3 of the peak, then the peak."""
    settings = TrainConfig(learning_rate=3.0, warmup_ratio=0.021, lr_scheduler_type="cosine")
    assert [learning_rate(step, 100, settings) for step in range(4)] == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_schedules_end_at_min_learning_rate(kind: str) -> None:
    settings = TrainConfig(learning_rate=1.0, min_learning_rate=0.1, lr_scheduler_type=kind)
    rates = [learning_rate(step, 10, settings) for step in range(11)]
    assert rates[0] == 1.0
    assert rates[10] == pytest.approx(0.1)
    assert rates == sorted(rates, reverse=True)
