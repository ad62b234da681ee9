"""What else an exact resume needs: the loss scale, the count of updates, the order of writing."""

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minillama.comm import Mesh
from minillama.data.windows import Batch
from minillama.loss_curves import read_metrics
from minillama.train_config import TrainConfig
from minillama.training import model_building
from minillama.training.schedule import learning_rate
from minillama.training.trainer import Trainer, train
from tests.runs import Interruption, interrupt_after, weights_of

MESH = Mesh()


def straight_and_broken(
    config: TrainConfig, folder: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> tuple[Path, Path]:
    """Train once in one go, and once interrupted after `stop` steps. Returns both directories."""
    straight = replace(config, out_dir=str(folder / "straight"))
    broken = replace(config, out_dir=str(folder / "broken"))
    train(straight, MESH)
    with monkeypatch.context() as patch:
        interrupt_after(stop, patch)
        with pytest.raises(Interruption):
            train(broken, MESH)
    train(broken, MESH)
    return Path(straight.out_dir), Path(broken.out_dir)


def are_equal(straight: Path, broken: Path) -> bool:
    """Whether two runs ended with the same weights and recorded the same steps."""
    first = weights_of(straight / "final")
    second = weights_of(broken / "final")
    records = []
    for run in (straight, broken):
        kept = []
        for record in read_metrics(run / "metrics.jsonl"):
            timed = ("tokens_per_second", "tflops", "mfu", "peak_memory_bytes")
            kept.append({name: record[name] for name in record if name not in timed})
        records.append(kept)
    return records[0] == records[1] and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("stop", [3, 5, 7])
def test_an_interrupted_fp16_run_with_overflows_equals_an_uninterrupted_one(
    stop: int, settings_for: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted within the hysteresis, after the scale was halved, and within the window after
    which it is doubled: scale, hysteresis and good steps must all be resumed.
    """
    monkeypatch.setattr(model_building, "compute_dtype", lambda *_: (torch.float16, ""))
    original = Trainer.__init__

    def with_overflows(self: Trainer, *arguments: object) -> None:
        original(self, *arguments)
        self.model.model.norm.weight.register_hook(
            lambda grad: grad * math.inf if self.step in (1, 3) else grad
        )

    monkeypatch.setattr(Trainer, "__init__", with_overflows)
    config = settings_for(
        precision="fp16",
        initial_scale_power=10,
        loss_scale_window=3,
        loss_scale_hysteresis=2,
        max_steps=10,
        save_strategy="steps",
        save_steps=1,
    )
    straight, broken = straight_and_broken(config, tmp_path, monkeypatch, stop)
    scales = [record["loss_scale"] for record in read_metrics(straight / "metrics.jsonl")]
    assert scales == [1024, 1024, 1024, 512, 512, 512, 1024, 1024, 1024, 2048]
    assert are_equal(straight, broken)


def test_after_a_skipped_step_the_moments_are_corrected_for_the_updates_and_not_the_steps(
    settings_for: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss_sum = Trainer.loss_sum

    def poisoned(self: Trainer, batch: Batch) -> torch.Tensor:
        return loss_sum(self, batch) * (math.nan if self.step == 1 else 1.0)

    monkeypatch.setattr(Trainer, "loss_sum", poisoned)
    config = settings_for(save_strategy="steps", save_steps=1)
    straight, broken = straight_and_broken(config, tmp_path, monkeypatch, stop=3)
    assert read_metrics(straight / "metrics.jsonl")[-1]["skipped"] == 1
    assert are_equal(straight, broken)


def test_a_record_has_the_learning_rate_that_its_step_was_taken_with(
    settings_for: Callable, tmp_path: Path
) -> None:
    config = settings_for(warmup_steps=2, lr_scheduler_type="cosine")
    train(config, MESH)
    for record in read_metrics(tmp_path / "run/metrics.jsonl"):
        assert record["learning_rate"] == learning_rate(record["step"] - 1, 6, config)


def test_every_file_of_a_checkpoint_is_on_the_disk_before_the_checkpoint_has_its_name(
    settings_for: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rename may reach the disk before the content does: then a power cut leaves a name alone."""
    flushed: list[int] = []  # inodes: a file keeps its own when it is renamed
    at_rename: list[int] = []
    fsync, replace_file = os.fsync, os.replace

    def recording_fsync(handle: int) -> None:
        flushed.append(os.fstat(handle).st_ino)
        fsync(handle)

    def recording_replace(source: Path, target: Path) -> None:
        if Path(target).name == "step-000003":
            at_rename.extend(flushed)
            flushed.clear()
        replace_file(source, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", recording_replace)
    train(settings_for(save_strategy="steps", save_steps=3), MESH)
    checkpoint = tmp_path / "run/checkpoints/step-000003"
    for path in checkpoint.iterdir():
        assert path.stat().st_ino in at_rename, path.name
    assert checkpoint.parent.stat().st_ino in flushed, "the new name"
