"""A run that goes on on another grid of ranks: its state is the same state."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minillama.loss_curves import read_metrics
from minillama.train_config import TrainConfig
from tests.ranks import run_on_ranks
from tests.runs import losses_of
from tests.state_runs import STEPS, train_here

# What a phase runs on: the number of ranks, and keys.
Phase = tuple[int, dict[str, Any]]
ONE: Phase = (1, {})
DATA: Phase = (4, {"zero_stage": 2})
TENSOR: Phase = (2, {"tensor_parallel": 2})
DATA_TENSOR: Phase = (4, {"tensor_parallel": 2, "zero_stage": 1})


@pytest.fixture(scope="module")
def settings_of_grids(run_settings: TrainConfig) -> TrainConfig:
    return replace(run_settings, n_heads=4, n_kv_heads=2)


@pytest.fixture(scope="module")
def never_stopped(
    settings_of_grids: TrainConfig, tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    """The losses and norms of one rank that nothing stops."""
    out_dir = tmp_path_factory.mktemp("whole") / "run"
    run_on_ranks(1, train_here, replace(settings_of_grids, out_dir=str(out_dir)))
    return figures_of(out_dir)


def figures_of(out_dir: Path) -> list[float]:
    norms = [record["grad_norm"] for record in read_metrics(out_dir / "metrics.jsonl")]
    return losses_of(out_dir) + norms


@pytest.mark.parametrize(
    "phases",
    [(TENSOR, DATA, TENSOR), (DATA_TENSOR, ONE, DATA_TENSOR), (ONE, DATA_TENSOR, DATA)],
    ids=["tensor first", "both", "data last"],
)
def test_a_run_that_changes_its_tensor_ranks_twice_is_as_if_never_stopped(
    phases: tuple[Phase, ...],
    settings_of_grids: TrainConfig,
    never_stopped: list[float],
    tmp_path: Path,
) -> None:
    """Up to rounding: another number of tensor ranks adds in another order."""
    run = replace(settings_of_grids, out_dir=str(tmp_path / "run"))
    for (ranks, keys), stop in zip(phases, (1, 3, 0), strict=True):
        run_on_ranks(ranks, train_here, replace(run, **keys), stop)
    figures = figures_of(tmp_path / "run")
    assert len(figures) == 2 * STEPS
    assert figures == pytest.approx(never_stopped, rel=2e-6)
