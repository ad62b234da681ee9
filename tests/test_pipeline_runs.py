"""Runs on pipeline stages that are stopped, resumed on another grid, skipped or refused."""

import math
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minillama import comm
from minillama.errors import UserError
from minillama.loss_curves import read_metrics
from minillama.train_config import TrainConfig
from minillama.training import model_building
from minillama.training.summary import Stopped, Summary
from minillama.training.trainer import Trainer, train
from tests.ranks import run_on_ranks
from tests.runs import losses_of
from tests.state_runs import STEPS, fingerprint, train_here

Settings = Callable[..., TrainConfig]
IN_FP16 = {"precision": "fp16", "initial_scale_power": 8}


def test_a_run_goes_on_on_any_grid(
    run_settings: TrainConfig, uninterrupted: str, tmp_path: Path
) -> None:
    """Two stages, then one rank, then two data ranks, then two of each."""
    run = replace(run_settings, out_dir=str(tmp_path / "run"))
    stages = replace(run, pipeline_parallel=2)
    assert run_on_ranks(2, train_here, stages, 2) == [2, 2]
    assert run_on_ranks(1, train_here, run, 3) == [3]
    assert run_on_ranks(2, train_here, replace(run, zero_stage=2), 5) == [5, 5]
    assert run_on_ranks(4, train_here, replace(stages, zero_stage=1)) == [STEPS] * 4
    assert fingerprint(run) == uninterrupted


def train_on_rank(config: TrainConfig) -> Summary | Stopped | str:
    torch.set_num_threads(1)
    with comm.start("cpu", timeout_minutes=1) as mesh:
        try:
            return train(config, mesh)
        except UserError as error:
            return str(error)


def stop_within_a_step(config: TrainConfig) -> Summary | Stopped | str:
    """The last stage gets a signal in its third forward of the second step."""
    original = Trainer.seeded_loss_sum

    def interrupted(self: Trainer, batch, index: int) -> torch.Tensor:
        if self.step == 1 and index == 2 and self.run.stage.is_last:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, index)

    Trainer.seeded_loss_sum = interrupted
    return train_on_rank(config)


def test_a_signal_within_a_step_ends_the_run_after_it_on_all_stages(
    settings_for: Settings,
) -> None:
    config = settings_for(pipeline_parallel=2, gradient_accumulation_steps=4)
    outcomes = run_on_ranks(2, stop_within_a_step, config)
    assert outcomes == [Stopped("SIGTERM", step=2, is_saved=True)] * 2
    assert run_on_ranks(1, train_on_rank, replace(config, pipeline_parallel=1))[0]["steps"] == 6


def train_in_fp16(config: TrainConfig, poisoned_stage: int) -> Summary | Stopped | str:
    """Train in fp16. In steps 1 and 2 a gradient of one stage overflows, and no other."""
    model_building.compute_dtype = lambda precision, device: (torch.float16, "")
    return train_poisoned(config, poisoned_stage, {1, 2})


def train_poisoned(
    config: TrainConfig, poisoned_stage: int, steps: set[int]
) -> Summary | Stopped | str:
    original = Trainer.__init__

    def poisoned(self: Trainer, *arguments) -> None:
        original(self, *arguments)
        if self.grid.stage.rank == poisoned_stage:
            layer = self.model.model.layers[poisoned_stage]
            layer.mlp.up_proj.weight.register_hook(
                lambda gradient: gradient * math.inf if self.step in steps else gradient
            )

    Trainer.__init__ = poisoned
    return train_on_rank(config)


@pytest.mark.parametrize("poisoned_stage", [0, 1])
def test_all_stages_skip_an_overflow_of_one_and_have_one_loss_scale(
    poisoned_stage: int, settings_for: Settings
) -> None:
    config = settings_for(**IN_FP16, pipeline_parallel=2, gradient_accumulation_steps=2)
    summaries = run_on_ranks(2, train_in_fp16, config, poisoned_stage)
    assert [summary["skipped_steps"] for summary in summaries] == [2, 2]
    records = read_metrics(Path(config.out_dir) / "metrics.jsonl")
    assert [record["loss_scale"] for record in records] == [256, 256, 128, 128, 128, 128]
    assert [record["grad_norm"] is None for record in records] == [
        step in (1, 2) for step in range(6)
    ]


def test_fp16_stages_train_as_one_rank_does(settings_for: Settings) -> None:
    """A stage's gradient is scaled once, by the last stage."""
    one = settings_for(**IN_FP16, reduction="exact")
    two = replace(one, pipeline_parallel=2, out_dir=one.out_dir + "2")
    run_on_ranks(1, train_in_fp16, one, -1)
    run_on_ranks(2, train_in_fp16, two, -1)
    assert losses_of(two.out_dir) == losses_of(one.out_dir)


def test_all_stages_name_the_parameter_whose_gradient_is_not_finite(
    settings_for: Settings,
) -> None:
    config = settings_for(pipeline_parallel=2, max_steps=9)
    messages = run_on_ranks(2, train_poisoned, config, 1, set(range(9)))
    assert messages[0] == messages[1]
    assert (
        "(first: model.layers.1.mlp.up_proj.weight) was not finite 5 steps in a row" in messages[0]
    )


@pytest.mark.parametrize(
    ("ranks", "changes", "message"),
    [
        (2, {"n_layers": 1}, "n_layers = 1 cannot fill 2 pipeline stages; use at most 1"),
        (3, {}, "3 ranks cannot hold .*pipeline_parallel = 2; start a multiple of 2 ranks"),
    ],
    ids=["too few layers", "no multiple"],
)
def test_what_stages_cannot_do_is_refused(
    ranks: int, changes: dict, message: str, settings_for: Settings
) -> None:
    config = settings_for(pipeline_parallel=2, **changes)
    for found in run_on_ranks(ranks, train_on_rank, config):
        assert re.search(message, found)
