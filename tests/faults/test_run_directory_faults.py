"""A run directory after accidents: damaged files, full disks, links, two commands at once."""

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minillama.checkpoint import train_state
from minillama.checkpoint.run_directory import list_states
from minillama.comm import Mesh
from minillama.errors import UserError
from minillama.loss_curves import read_metrics
from minillama.output_directory import lock_directory
from minillama.train_config import TrainConfig
from minillama.training import metrics, trainer
from minillama.training.trainer import Trainer, train
from tests.runs import losses_of, weights_of

MESH = Mesh()


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def damage(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def stopped(settings_for: Callable, tmp_path: Path) -> TrainConfig:
    """A run of six steps with checkpoints of steps 4 and 5, and without final/."""
    config = settings_for(save_strategy="steps", save_steps=1, save_total_limit=2)
    train(config, MESH)
    (tmp_path / "run/final").rename(tmp_path / "expected")
    (tmp_path / "run/summary.json").unlink()
    return config


def finishes_as_expected(config: TrainConfig) -> bool:
    train(config, MESH)
    run = Path(config.out_dir)
    weights = weights_of(run / "final")
    expected = weights_of(run.parent / "expected")
    return all(torch.equal(weights[name], expected[name]) for name in expected)


def test_damaged_checkpoints_are_set_aside_and_not_counted(
    stopped: TrainConfig, tmp_path: Path
) -> None:
    checkpoints = tmp_path / "run/checkpoints"
    for name in names_in(checkpoints):
        damage(checkpoints / name / "model.safetensors")
    assert finishes_as_expected(stopped)
    assert names_in(checkpoints) == [
        "step-000004",
        "step-000004.damaged",
        "step-000005",
        "step-000005.damaged",
    ]
    assert train_state.verify(checkpoints / "step-000005") is None


def test_a_second_damage_of_one_step_is_kept_under_another_name(tmp_path: Path) -> None:
    for _ in range(3):
        (tmp_path / "checkpoints/step-000001").mkdir(parents=True)
        assert train_state.newest_intact(tmp_path, lambda _: None) is None
    assert names_in(tmp_path / "checkpoints") == [
        "step-000001.damaged",
        "step-000001.damaged-2",
        "step-000001.damaged-3",
    ]


@pytest.mark.parametrize("resume", ["none", "step-000004"])
def test_checkpoints_of_steps_that_are_trained_again_do_not_push_out_new_ones(
    resume: str, stopped: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two to be kept, later ones of before would be the two newest for ever."""
    checkpoints = tmp_path / "run/checkpoints"
    start = "none" if resume == "none" else str(checkpoints / resume)
    saved = []
    monkeypatch.setattr(
        trainer,
        "save_checkpoint",
        lambda run, step, *counts: saved.append((step, names_in(checkpoints))),
    )
    train(replace(stopped, resume=start), MESH)
    assert saved[0][0] == (1 if resume == "none" else 5)
    kept = [] if resume == "none" else ["step-000004"]
    assert [name for name in saved[0][1] if not name.endswith(".replaced")] == kept


def test_a_checkpoint_that_is_a_link_is_removed_as_a_link(
    settings_for: Callable, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/thesis.tex").write_text("years of work")
    checkpoints = tmp_path / "run/checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "step-000003.partial").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "run/train_config.json").write_text("{}")
    config = settings_for(save_strategy="steps", save_steps=1, save_total_limit=1, resume="none")
    original = Trainer.save_checkpoint

    def with_links(self: Trainer, log: metrics.TrainingLog) -> bool:
        if self.step == 2:  # the one to be removed, and the one to be written
            (checkpoints / "step-000001").rename(tmp_path / "moved")
            (checkpoints / "step-000001").symlink_to(tmp_path / "moved")
            (checkpoints / "step-000002").symlink_to(tmp_path / "elsewhere")
        return original(self, log)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "save_checkpoint", with_links)
        assert train(config, MESH)["steps"] == 6
    assert names_in(checkpoints) == ["step-000005"]
    assert names_in(tmp_path / "elsewhere") == ["thesis.tex"]
    assert train_state.verify(tmp_path / "moved") is None


@pytest.mark.parametrize("content", ["", '{"ckpt": ', "\x00\x00", "[]"])
@pytest.mark.parametrize("name", ["train_config.json", "summary.json", "inputs.json"])
def test_a_damaged_file_of_the_run_does_not_refuse_it_for_ever(
    name: str, content: str, stopped: TrainConfig, tmp_path: Path
) -> None:
    (tmp_path / "run" / name).write_text(content)
    assert finishes_as_expected(stopped)
    assert json.loads((tmp_path / "run" / name).read_text())


def test_settings_are_compared_though_their_file_is_damaged(
    stopped: TrainConfig, tmp_path: Path
) -> None:
    (tmp_path / "run/train_config.json").write_text("{")
    with pytest.raises(UserError, match=r"learning_rate was 0\.003, is 0\.5"):
        train(replace(stopped, learning_rate=0.5), MESH)


@pytest.mark.parametrize("garbage", ["\x00" * 9, '{"step": 3, "lo', "[1]", '{"loss": 1.0}'])
def test_a_damaged_metrics_file_keeps_its_whole_lines(
    garbage: str, stopped: TrainConfig, tmp_path: Path
) -> None:
    path = tmp_path / "run/metrics.jsonl"
    losses = losses_of(stopped.out_dir)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], garbage, "\n", *lines[2:]]))
    assert finishes_as_expected(stopped)
    assert losses_of(stopped.out_dir) == losses


def test_a_full_disk_at_metrics_loses_a_record_and_not_the_run(
    settings_for: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record that was written in part goes, so that the others stay readable."""
    append_file = metrics.append_file
    records = []

    class FullDisk:
        def __init__(self, path: Path) -> None:
            self.path = path
            self.file = append_file(path)

        def __enter__(self) -> "FullDisk":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, content: bytes) -> None:
            is_metrics = self.path.name == "metrics.jsonl"
            if is_metrics:
                records.append(content)
            is_full = is_metrics and len(records) in (2, 3)
            self.file.write(content[:7] if is_full else content)
            if is_full:
                raise OSError(errno.ENOSPC, "No space left on device")

    printed = []
    monkeypatch.setattr(metrics, "append_file", FullDisk)
    monkeypatch.setattr(metrics.TrainingLog, "print", lambda self, text: printed.append(text))
    train(settings_for(), MESH)
    path = tmp_path / "run/metrics.jsonl"
    assert [record["step"] for record in read_metrics(path)] == [1, 4, 5, 6]
    assert len(printed) == 2
    assert f"{path}: No space left on device" in printed[0]


@pytest.mark.parametrize("phase", ["mkdir", "manifest", "publish"])
def test_a_full_disk_in_any_phase_of_a_save_is_said_with_its_path_and_training_goes_on(
    phase: str, settings_for: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def write_all_but_the_manifest(path: Path, content: dict) -> None:
        if path.name == train_state.MANIFEST:
            full(path)
        write_json(path, content)

    write_json = train_state.write_json
    printed = []
    monkeypatch.setattr(metrics.TrainingLog, "print", lambda self, text: printed.append(text))
    if phase == "mkdir":
        (tmp_path / "run").mkdir()
        (tmp_path / "run/checkpoints").write_text("a file in the place of the directory")
        (tmp_path / "run/train_config.json").write_text("{}")
    elif phase == "manifest":
        monkeypatch.setattr(train_state, "write_json", write_all_but_the_manifest)
    else:
        monkeypatch.setattr(train_state, "publish", full)
    config = settings_for(save_strategy="steps", save_steps=3, resume="none")
    assert train(config, MESH)["steps"] == 6
    assert len(printed) == 1
    assert "step 3: no checkpoint was written" in printed[0]
    assert str(tmp_path / "run/checkpoints") in printed[0]
    assert not list_states(tmp_path / "run")


def test_the_same_command_twice_at_once_is_refused(settings_for: Callable, tmp_path: Path) -> None:
    with (
        lock_directory(tmp_path / "run"),
        pytest.raises(UserError, match="run: another process is writing there"),
    ):
        train(settings_for(), MESH)
    assert train(settings_for(), MESH)["steps"] == 6


def test_the_directory_is_held_while_the_run_trains(
    settings_for: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = []
    original = Trainer.update

    def update(self: Trainer, *arguments: object) -> object:
        with (
            pytest.raises(UserError, match="another process") as refusal,
            lock_directory(tmp_path / "run"),
        ):
            pass
        refusals.append(refusal)
        return original(self, *arguments)

    monkeypatch.setattr(Trainer, "update", update)
    train(settings_for(max_steps=2), MESH, overwrite=True)
    assert len(refusals) == 2


def test_weights_inside_the_directory_behind_a_link_are_not_deleted(
    settings_for: Callable, inputs: Path, tmp_path: Path
) -> None:
    """The checkpoint's directory is elsewhere; its files are links into the run."""
    train(settings_for(max_steps=1), MESH)
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in (tmp_path / "run/final").iterdir():
        (linked / path.name).symlink_to(path)
    with pytest.raises(UserError, match=r"lies in .*run"):
        train(settings_for(ckpt=str(linked)), MESH, overwrite=True)
    assert (tmp_path / "run/final/model.safetensors").is_file()


def test_a_checkpoint_of_another_model_is_refused_before_the_directory_is_written(
    settings_for: Callable, tmp_path: Path
) -> None:
    train(settings_for(save_strategy="steps", save_steps=2, out_dir=str(tmp_path / "a")), MESH)
    named = str(tmp_path / "a/checkpoints/step-000002")
    with pytest.raises(UserError, match="belongs to another run"):
        train(settings_for(resume=named, n_layers=1), MESH)
    assert not (tmp_path / "run").exists()
