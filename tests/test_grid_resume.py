"""A run that goes on on another grid of ranks: its state is the same state."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minillama.loss_curves import read_metrics
from minillama.train_config import TrainConfig
from tests.ranks import run_on_ranks
from tests.runs import losses_of
from tests.state_runs import STEPS, fingerprint, train_here

# What a phase runs on: the number of ranks, and keys.
Phase = tuple[int, dict[str, Any]]
ONE: Phase = (1, {})
DATA: Phase = (4, {"zero_stage": 2})
STAGES: Phase = (4, {"pipeline_parallel": 4})
DATA_STAGES: Phase = (4, {"pipeline_parallel": 2, "zero_stage": 2})
TENSOR: Phase = (2, {"tensor_parallel": 2})
DATA_TENSOR: Phase = (4, {"tensor_parallel": 2, "zero_stage": 1})
STAGES_TENSOR: Phase = (4, {"tensor_parallel": 2, "pipeline_parallel": 2})


@pytest.fixture(scope="module")
def never_stopped(
    run_settings: TrainConfig, tmp_path_factory: pytest.TempPathFactory
) -> TrainConfig:
    """A run of one rank that nothing stops."""
    out_dir = tmp_path_factory.mktemp("whole") / "run"
    run = replace(run_settings, n_layers=4, n_heads=4, n_kv_heads=2, out_dir=str(out_dir))
    run_on_ranks(1, train_here, run)
    return run


def figures_of(run: TrainConfig) -> list[float]:
    """The losses and the norms of all steps."""
    norms = [record["grad_norm"] for record in read_metrics(Path(run.out_dir) / "metrics.jsonl")]
    return losses_of(run.out_dir) + norms


def run_in_phases(run: TrainConfig, phases: tuple[Phase, ...]) -> None:
    """Stop after the first step, then after the third, and go on each time on another grid."""
    for (ranks, keys), stop in zip(phases, (1, 3, 0), strict=True):
        run_on_ranks(ranks, train_here, replace(run, **keys), stop)


@pytest.mark.parametrize(
    "phases",
    [(STAGES, ONE, DATA_STAGES), (DATA, DATA_STAGES, STAGES)],
    ids=["stages first", "data first"],
)
def test_a_run_that_changes_its_stages_twice_ends_at_the_bytes_of_one_never_stopped(
    phases: tuple[Phase, ...], never_stopped: TrainConfig, tmp_path: Path
) -> None:
    run = replace(never_stopped, out_dir=str(tmp_path / "run"))
    run_in_phases(run, phases)
    assert figures_of(run) == figures_of(never_stopped)
    assert fingerprint(run) == fingerprint(never_stopped)


@pytest.mark.parametrize(
    "phases",
    [(TENSOR, DATA, STAGES_TENSOR), (STAGES_TENSOR, ONE, DATA_TENSOR)],
    ids=["tensor first", "both first"],
)
def test_a_run_that_changes_its_tensor_ranks_twice_is_as_if_never_stopped(
    phases: tuple[Phase, ...], never_stopped: TrainConfig, tmp_path: Path
) -> None:
    """Up to rounding: another number of tensor ranks adds in another order."""
    run = replace(never_stopped, out_dir=str(tmp_path / "run"))
    run_in_phases(run, phases)
    figures = figures_of(run)
    assert len(figures) == 2 * STEPS
    assert figures == pytest.approx(figures_of(never_stopped), rel=2e-6)
