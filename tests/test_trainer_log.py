"""trainer_log.jsonl, and the speed of a run in the columns of published tables."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from minillama.comm import Mesh
from minillama.training.messages import closing_message, speed_table
from minillama.training.trainer import train
from minillama.training.trainer_log import progress_entry
from tests.runs import Interruption, interrupt_after

MESH = Mesh()


def entries_of(out_dir: Path) -> list[dict]:
    lines = (out_dir / "trainer_log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_line_says_what_llama_factorys_says() -> None:
    record = {"step": 10, "epoch": 0.254, "loss": 1.9, "learning_rate": 5e-5, "grad_norm": 1.0}
    assert progress_entry(record, total_steps=40, first_step=0, seconds=12.9) == {
        "current_steps": 10,
        "total_steps": 40,
        "loss": 1.9,
        "lr": 5e-5,
        "learning_rate": 5e-5,
        "epoch": 0.25,
        "percentage": 25.0,
        "elapsed_time": "0:00:12",
        "remaining_time": "0:00:38",
    }


def test_the_remaining_time_of_a_continued_run_counts_its_own_steps() -> None:
    """Ten steps of this command took 100 s, so the other twenty take 200 s."""
    record = {"step": 80, "epoch": 1.0, "eval_loss": 2.0}
    entry = progress_entry(record, total_steps=100, first_step=70, seconds=100.0)
    assert entry["remaining_time"] == "0:03:20"
    assert entry["eval_loss"] == 2.0
    assert "loss" not in entry


def test_a_run_writes_a_line_for_each_record_and_a_resumed_one_repeats_none(
    settings_for: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"validation_split": 0.1, "eval_strategy": "steps", "eval_steps": 3}
    settings = settings_for(save_strategy="steps", save_steps=2, **changes)
    interrupt_after(5, monkeypatch)
    with pytest.raises(Interruption):
        train(settings, MESH)
    monkeypatch.undo()
    train(settings, MESH)
    entries = entries_of(tmp_path / "run")
    assert [entry["current_steps"] for entry in entries] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert [entry["current_steps"] for entry in entries if "eval_loss" in entry] == [3, 6]
    assert entries[-1]["percentage"] == 100.0
    assert entries[-1]["remaining_time"] == "0:00:00"


def test_the_speed_is_printed_in_the_columns_of_published_tables(settings_for: Callable) -> None:
    """samples/s × s/step is the global batch; LLaMA2-7B's published row is such a one."""
    summary = train(settings_for(per_device_train_batch_size=2), MESH)
    assert isinstance(summary, dict)
    names, values = [line.split() for line in speed_table(summary)]
    assert names == ["samples/s", "samples/s/p", "tokens/s/p", "s/step", "TFLOP/s"]
    speed = dict(zip(names, map(float, values), strict=True))
    assert speed["samples/s"] * speed["s/step"] == pytest.approx(2.0, rel=0.1)
    assert speed["samples/s/p"] == speed["samples/s"]  # one device
    assert names[0] in closing_message(Path("runs/a"), summary)
    published = {
        "samples_per_second": 5.19,
        "devices": 8,
        "tokens_per_second": 2662.0,
        "step_seconds": 3.08,
        "tflops": 122.39,
    }
    assert speed_table(published)[1].split() == ["5.190", "0.649", "2662.0", "3.0800", "122.3900"]


def test_the_summary_of_an_earlier_version_has_no_such_table() -> None:
    assert speed_table({"steps": 3}) == []
