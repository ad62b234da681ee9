"""A run and its directory: continued, refused or emptied on request, never mixed."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minillama.checkpoint import train_state
from minillama.comm import Mesh
from minillama.errors import UserError
from minillama.loss_curves import read_metrics
from minillama.train_config import TrainConfig
from minillama.training import run_directory
from minillama.training.messages import describe_stop
from minillama.training.summary import Stopped
from minillama.training.trainer import Trainer, train
from tests.runs import Interruption, interrupt_after, losses_of, new_trainer, weights_of

MESH = Mesh()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora": True, "lora_dropout": 0.2},
        {"precision": "bf16"},
        {"max_steps": 0, "num_train_epochs": 0.2},
    ],
    ids=["full", "LoRA with dropout", "bf16", "by epochs"],
)
def test_an_interrupted_run_equals_an_uninterrupted_one_to_the_bit(
    changes: dict, settings_for: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 7,
        "validation_split": 0.05,
        "eval_strategy": "steps",
        "eval_steps": 3,
    } | changes
    straight, broken = (
        settings_for(out_dir=str(tmp_path / name), **changes) for name in ("straight", "broken")
    )
    expected = train(straight, MESH)
    with monkeypatch.context() as patch:
        interrupt_after(5, patch)
        with pytest.raises(Interruption):
            train(broken, MESH)
    assert not (tmp_path / "broken/final").exists()
    summary = train(broken, MESH)
    first, second = (weights_of(tmp_path / name / "final") for name in ("straight", "broken"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses_of(straight.out_dir) == losses_of(broken.out_dir)
    assert [summary[name] for name in ("steps", "tokens", "eval_loss", "last_loss")] == [
        expected[name] for name in ("steps", "tokens", "eval_loss", "last_loss")
    ]


def test_a_named_checkpoint_is_resumed_and_none_starts_over(
    settings_for: Callable, tmp_path: Path
) -> None:
    settings = settings_for(save_strategy="steps", save_steps=2, save_total_limit=0)
    train(settings, MESH)
    final, losses = weights_of(tmp_path / "run/final"), losses_of(settings.out_dir)
    for resume in (str(tmp_path / "run/checkpoints/step-000002"), "none"):
        train(replace(settings, resume=resume), MESH)
        assert all(
            torch.equal(tensor, final[name])
            for name, tensor in weights_of(tmp_path / "run/final").items()
        )
        assert losses_of(settings.out_dir) == losses


def test_a_checkpoint_behind_the_end_of_the_run_is_refused(
    settings_for: Callable, tmp_path: Path
) -> None:
    train(settings_for(save_strategy="steps", save_steps=4, max_steps=5), MESH)
    resume = str(tmp_path / "run/checkpoints/step-000004")
    shorter = settings_for(out_dir=str(tmp_path / "shorter"), resume=resume, max_steps=3)
    with pytest.raises(UserError, match="holds step 4, and this run ends after step 3"):
        train(shorter, MESH)
    assert not (tmp_path / "shorter/final").exists()


def test_a_checkpoint_of_a_run_with_other_settings_is_warned_of(
    settings_for: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train(settings_for(save_strategy="steps", save_steps=2, validation_split=0.2), MESH)
    resume = str(tmp_path / "run/checkpoints/step-000002")
    other = settings_for(out_dir=str(tmp_path / "other"), resume=resume, validation_split=0.5)
    train(other, MESH)
    changes = "validation_split was 0.2, is 0.5"
    assert f"WARNING: {resume} began with other settings: {changes}\n" in capsys.readouterr().out
    train(replace(other, validation_split=0.2, out_dir=str(tmp_path / "third")), MESH)
    assert "other settings" not in capsys.readouterr().out


def test_a_record_cut_off_by_a_power_cut_does_not_stop_the_run_that_goes_on(
    settings_for: Callable, tmp_path: Path
) -> None:
    settings = settings_for(save_strategy="steps", save_steps=2, save_total_limit=0)
    train(settings, MESH)
    metrics = tmp_path / "run/metrics.jsonl"
    losses = losses_of(settings.out_dir)
    metrics.write_text(metrics.read_text()[:-30])
    train(replace(settings, resume=str(tmp_path / "run/checkpoints/step-000004")), MESH)
    assert losses_of(settings.out_dir) == losses


def test_only_the_newest_checkpoints_are_kept(settings_for: Callable, tmp_path: Path) -> None:
    train(settings_for(save_strategy="steps", save_steps=1, save_total_limit=2), MESH)
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == [
        "step-000004",
        "step-000005",
    ]


def test_a_finished_run_returns_its_summary_and_trains_nothing(
    settings_for: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(max_steps=2)
    summary = train(settings, MESH)
    interrupt_after(0, monkeypatch)
    assert train(settings, MESH) == summary
    with pytest.raises(Interruption):
        train(settings, MESH, overwrite=True)


def test_a_changed_key_that_would_change_the_result_is_refused_by_name(
    settings_for: Callable,
) -> None:
    settings = settings_for(max_steps=2)
    train(settings, MESH)
    with pytest.raises(UserError, match=r"learning_rate was 0\.003, is 0\.5"):
        train(replace(settings, learning_rate=0.5), MESH)
    for key, value in {"seed": 7, "weight_decay": 0.5, "max_length": 64, "packing": False}.items():
        with pytest.raises(UserError, match=f"{key} was "):
            train(replace(settings, **{key: value}), MESH)
    train(replace(settings, logging_steps=5, save_total_limit=7), MESH)


def test_a_directory_with_other_files_is_refused_and_left_alone(
    settings_for: Callable, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds files that no run of ours made"):
        train(settings_for(), MESH)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_a_mistake_can_be_mended_and_the_command_typed_again(settings_for: Callable) -> None:
    """A run that never took a step holds nothing worth protecting."""
    with pytest.raises(UserError, match="no such file"):
        train(settings_for(data=("alpaka.json",), max_steps=1), MESH)
    assert train(settings_for(max_steps=1), MESH)["steps"] == 1


def test_a_run_writes_what_the_interface_promises(
    settings_for: Callable, inputs: Path, tmp_path: Path
) -> None:
    settings = settings_for(
        validation_split=0.1, eval_strategy="steps", eval_steps=3, peak_tflops=1.0
    )
    summary = train(settings, MESH)
    out = tmp_path / "run"
    assert json.loads((out / "summary.json").read_text()) == summary
    assert {
        "train_loss",
        "eval_loss",
        "steps",
        "tokens",
        "tokens_per_second",
        "step_seconds",
        "tflops",
        "mfu",
        "peak_memory_bytes",
        "seconds",
    } <= summary.keys()
    records = read_metrics(out / "metrics.jsonl")
    assert {
        "step",
        "epoch",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens",
        "tokens_per_second",
        "mfu",
        "peak_memory_bytes",
    } <= records[0].keys()
    assert [r["step"] for r in records if "eval_loss" in r] == [3, 6]
    for name in ("config.json", "model.safetensors", "tokenizer.model", "minillama.json"):
        assert (out / "final" / name).is_file()
    assert summary["train_loss"] == pytest.approx(sum(losses_of(out)) / 6)


def refused(settings: TrainConfig, message: str, overwrite: bool = False) -> None:
    with pytest.raises(UserError, match=message):
        train(settings, MESH, overwrite)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ("alpaka.json",)}, "no such file"),
        ({"max_length": 129}, "exceeds the model's context"),
        ({"lora": True, "lora_targets": ("q_prj",)}, "q_prj"),
        ({"reduction": "exact", "resume": "nowhere"}, "nowhere"),
    ],
    ids=["data", "max_length", "lora_targets", "resume"],
)
def test_a_refused_run_leaves_no_directory_and_deletes_none(
    changes: dict, message: str, settings_for: Callable, tmp_path: Path
) -> None:
    refused(settings_for(**changes), message)
    assert not (tmp_path / "run").exists()
    train(settings_for(max_steps=1), MESH)
    before = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    refused(settings_for(**changes), message, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == before


@pytest.mark.parametrize("key", ["ckpt", "data", "eval_data", "tokenizer", "adapter", "resume"])
def test_a_directory_is_not_emptied_of_what_the_run_starts_from(
    key: str, settings_for: Callable, tmp_path: Path
) -> None:
    """Also where a symbolic link leads into it."""
    train(settings_for(max_steps=1), MESH)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    name = str(tmp_path / "link/final")
    value = (name,) if key in ("data", "eval_data") else name
    refused(settings_for(max_steps=2, **{key: value}), "lies in .*run", overwrite=True)
    assert (tmp_path / "run/final/model.safetensors").is_file()


def test_overwriting_deletes_the_old_run_and_keeps_the_cache_in_use(
    settings_for: Callable, tmp_path: Path
) -> None:
    settings = settings_for(max_steps=3, cache_dir=str(tmp_path / "run/cache"))
    train(replace(settings, save_strategy="steps", save_steps=1), MESH)
    cache = sorted((tmp_path / "run/cache").iterdir())
    train(replace(settings, max_steps=2, seed=1), MESH, overwrite=True)
    assert not (tmp_path / "run/checkpoints").exists()
    assert len(losses_of(settings.out_dir)) == 2
    assert sorted((tmp_path / "run/cache").iterdir()) == cache


def test_embedded_data_of_a_run_that_never_started_is_not_foreign(
    settings_for: Callable, inputs: Path, tmp_path: Path
) -> None:
    demo = settings_for(max_steps=1, data=("demo_lora",), cache_dir="")
    refused(replace(demo, lora=True, lora_targets=("q_prj",)), "q_prj")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["data"]
    assert train(demo, MESH)["steps"] == 1


@pytest.mark.parametrize("num_written", [0, 1, 2])
def test_a_run_that_was_killed_while_it_started_can_be_started_again(
    num_written: int, settings_for: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What a start leaves is a run's: the same command goes on and finds no foreign files."""
    write_json = run_directory.write_json
    written: list[str] = []

    def write_or_die(path: Path, content: dict) -> None:
        if len(written) == num_written:
            raise KeyboardInterrupt
        written.append(path.name)
        write_json(path, content)

    config = settings_for(max_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(run_directory, "write_json", write_or_die)
        if num_written < 2:
            with pytest.raises(KeyboardInterrupt):
                train(config, MESH)
        else:  # killed after the last file of the start
            run = new_trainer(config).run
            run_directory.start_run(config, run.inputs, None, overwrite=False, in_use=())
    left = {path.name for path in (tmp_path / "run").glob("*.json")}
    assert left == set(written)
    assert train(config, MESH)["steps"] == 1


def test_a_checkpoint_that_could_not_be_written_is_tried_again(
    settings_for: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step counts as saved only when it is: a stop at that step must write it."""
    save_state = train_state.save_state
    problems = ["the disk is full"]

    def save_or_fail(*arguments, **keywords) -> str:
        return problems.pop() if problems else save_state(*arguments, **keywords)

    monkeypatch.setattr(train_state, "save_state", save_or_fail)
    stop = ["SIGTERM"]
    trainer = Trainer(new_trainer(settings_for()).run, stop)
    trainer.step = 2
    outcome = trainer.train()
    assert outcome == Stopped("SIGTERM", step=2, is_saved=False)
    assert "no checkpoint holds that step" in describe_stop(outcome)
    assert "without --overwrite_output_dir goes on" in describe_stop(outcome, overwrite=True)
    assert trainer.train() == Stopped("SIGTERM", step=2, is_saved=True)
    newest = train_state.list_states(trainer.run.out_dir)[-1]
    assert train_state.read_state(newest)["step"] == 2
