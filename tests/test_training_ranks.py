"""Two ranks train on the global batch of one, and all skip an overflow of fp16."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minillama import comm
from minillama.comm import Mesh
from minillama.compat import deepspeed
from minillama.errors import UserError
from minillama.loss_curves import read_metrics
from minillama.train_config import TrainConfig
from minillama.training import model_building
from minillama.training.trainer import Trainer, train
from tests.ranks import run_on_ranks
from tests.runs import losses_of, weights_of

MESH = Mesh()


def train_on_this_rank(settings: TrainConfig) -> dict:
    with comm.start("cpu", timeout_minutes=1) as mesh:
        return train(settings, mesh)


@pytest.mark.parametrize(
    "changes", [{}, {"lora": True, "lora_dropout": 0.1}], ids=["full", "LoRA with dropout"]
)
def test_two_ranks_train_on_the_same_global_batch_as_one(
    changes: dict, settings_for: Callable, tmp_path: Path
) -> None:
    one = settings_for(
        out_dir=str(tmp_path / "one"),
        gradient_accumulation_steps=2,
        validation_split=0.1,
        **changes,
    )
    two = settings_for(
        out_dir=str(tmp_path / "two"),
        gradient_accumulation_steps=1,
        validation_split=0.1,
        **changes,
    )
    expected = train(one, MESH)
    first, second = run_on_ranks(2, train_on_this_rank, two)
    assert losses_of(two.out_dir) == pytest.approx(losses_of(one.out_dir), rel=1e-5)
    assert (
        first["eval_loss"] == second["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    )
    assert first["tokens"] == expected["tokens"]


def train_in_fp16(settings: TrainConfig, overflows: set[int]) -> dict | str:
    """Train in fp16, which our ops can do on the CPU too. In the steps `overflows`, the gradient of
    the last rank overflows, and its loss does not.
    """
    model_building.compute_dtype = lambda precision, where: (torch.float16, "")
    original = Trainer.__init__

    def poisoned(self: Trainer, *arguments) -> None:
        original(self, *arguments)
        last = self.mesh.rank == self.mesh.size - 1
        self.model.model.norm.weight.register_hook(
            lambda grad: grad * math.inf if last and self.step in overflows else grad
        )

    Trainer.__init__ = poisoned
    try:
        return train_on_this_rank(settings)
    except UserError as error:
        return str(error)


def test_fp16_skips_overflows_on_all_ranks_and_scales_as_deepspeeds_file_says(
    settings_for: Callable, tmp_path: Path
) -> None:
    """From 2^10, with hysteresis 2 and window 3: the second overflow halves the scale, and three
    good steps double it and restore the hysteresis.
    """
    (tmp_path / "ds.json").write_text(
        json.dumps(
            {
                "fp16": {
                    "enabled": True,
                    "loss_scale": 0,
                    "initial_scale_power": 10,
                    "loss_scale_window": 3,
                    "hysteresis": 2,
                    "min_loss_scale": 256,
                }
            }
        )
    )
    settings = settings_for(**deepspeed.read(tmp_path / "ds.json").keys, max_steps=8, zero_stage=2)
    first, second = run_on_ranks(2, train_in_fp16, settings, {1, 2, 6})
    assert first["skipped_steps"] == second["skipped_steps"] == 3
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [record["loss_scale"] for record in records] == [
        1024,
        1024,
        512,
        512,
        512,
        1024,
        1024,
        1024,
    ]
    assert [record["skipped"] for record in records] == [0, 1, 2, 2, 2, 2, 3, 3]
    assert [record["grad_norm"] is None for record in records] == [
        step in (1, 2, 6) for step in range(8)
    ]
    assert all(tensor.isfinite().all() for tensor in weights_of(tmp_path / "run/final").values())


def test_fp16_may_look_for_its_scale_for_long_but_not_below_its_minimum(
    settings_for: Callable,
) -> None:
    settings = settings_for(
        precision="fp16", initial_scale_power=10, loss_scale_hysteresis=1, max_steps=9
    )
    assert run_on_ranks(2, train_in_fp16, settings, set(range(7)))[1]["skipped_steps"] == 7
    stopped = run_on_ranks(
        2,
        train_in_fp16,
        replace(settings, min_loss_scale=256.0, out_dir=settings.out_dir + "2"),
        set(range(7)),
    )
    assert all("overflow at the smallest loss scale 256" in message for message in stopped)
