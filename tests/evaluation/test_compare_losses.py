"""The losses of two runs: errors worked by hand, and runs that cannot be compared."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from minillama.errors import UserError
from minillama.evaluation import compare_losses
from minillama.evaluation.compare_losses import (
    LossErrors,
    Losses,
    errors_by_step,
    read_losses,
    summarise,
)


def compare(run: Losses, reference: Losses) -> LossErrors:
    return summarise(errors_by_step(run, reference), len(run.keys() ^ reference.keys()))


@pytest.fixture
def write_metrics(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes losses by step, and one evaluation, as a metrics.jsonl."""

    def write(name: str, losses: dict[int, float | None]) -> Path:
        records: list[dict] = [{"step": step, "loss": loss} for step, loss in losses.items()]
        records.append({"step": 9, "eval_loss": 1})
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


def test_loss_errors_worked_by_hand() -> None:
    errors = compare({1: None, 2: 2.2, 3: 0.9, 4: 1.0, 5: 3.0}, {1: None, 2: 2.0, 3: 1.0, 4: 1.0})
    assert errors.n == 3
    assert errors.only_in_one == 1
    assert errors.mean_relative == pytest.approx(0.0, abs=1e-9)  # +10 % and -10 % cancel
    assert errors.max_relative == pytest.approx(0.1)
    assert errors.mean_absolute == pytest.approx(0.1)
    assert errors.passed == {"mean_relative": True, "mean_absolute": False}


@pytest.mark.parametrize("loss", [0.103, 0.097])
def test_a_drift_of_three_percent_fails_in_both_directions(loss: float) -> None:
    assert compare({2: loss}, {2: 0.1}).passed == {"mean_relative": False, "mean_absolute": True}


def test_losses_are_read_with_those_that_are_not_finite(write_metrics: Callable) -> None:
    assert read_losses(write_metrics("a.jsonl", {1: None, 2: 2.0})) == {1: None, 2: 2.0}


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({1: 1.0, 2: 0.0}, "step 2: the reference's loss is 0"),
        ({1: None, 2: 2.0}, r"step 1: .*only one"),
        ({7: 1.0}, "no step with a loss in common"),
    ],
)
def test_losses_that_cannot_be_compared_are_refused(reference: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        compare({1: 1.0, 2: 1.0}, reference)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": 1, "loss": "low"}', r"a\.jsonl: a value is wrong"),
        ('{"loss": 1}', r"a\.jsonl: key 'step' is missing"),
        ("junk", r"a\.jsonl: line 1: not valid JSON"),
    ],
)
def test_a_damaged_metrics_file_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        read_losses(path)


def test_a_run_compared_with_itself_differs_by_nothing(
    main: Callable, write_metrics: Callable, capsys: pytest.CaptureFixture
) -> None:
    file = str(write_metrics("a.jsonl", {1: 2.0, 2: 1.0}))
    assert main(["--task", "loss", "--data", file, "--compare", file]) == 0
    assert "2 steps in both runs, 0 in only one" in capsys.readouterr().out


def test_runs_that_differ_too_much_fail_the_command(
    main: Callable, write_metrics: Callable, capsys: pytest.CaptureFixture
) -> None:
    run = write_metrics("a.jsonl", {1: 2.0, 2: 1.1})
    reference = write_metrics("b.jsonl", {1: 2.0, 2: 1.0})
    assert main(["--task", "loss", "--data", str(run), "--compare", str(reference)]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_the_losses_of_two_runs_are_compared_and_drawn(
    main: Callable, write_metrics: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("matplotlib")
    run = write_metrics("a.jsonl", {1: 2.001, 2: 1.0})
    reference = write_metrics("b.jsonl", {1: 2.0, 2: 1.0})
    out = tmp_path / "out"
    files = ["--data", str(run), "--compare", str(reference), "--out", str(out)]
    main(["--task", "loss", *files])
    printed = capsys.readouterr().out
    assert printed.count("pass") == 2
    assert "FAIL" not in printed
    plots = ["absolute_error.png", "loss.png", "relative_error.png"]
    for name in plots:
        assert (out / name).stat().st_size > 1000
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["errors.csv", "summary.json", *plots]
    )
    assert (out / "errors.csv").read_text().splitlines()[0] == (
        "step,loss,reference,relative,absolute"
    )
    summary = json.loads((out / "summary.json").read_text())
    assert summary["mean_absolute"] == pytest.approx(0.0005)


def test_without_matplotlib_the_install_command_is_printed_once(
    main: Callable,
    write_metrics: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    file = str(write_metrics("a.jsonl", {1: 2.0, 2: 1.0}))
    out = tmp_path / "out"
    main(["--task", "loss", "--data", file, "--compare", file, "--out", str(out)])
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "plots: not drawn: matplotlib is not installed; pip install matplotlib"
    assert sorted(path.name for path in out.iterdir()) == ["errors.csv", "summary.json"]


def test_the_errors_of_each_step_are_written_and_drawn_as_their_size(
    main: Callable, write_metrics: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = {}

    def draw_curves(path: Path, curves: dict, label: str, may_be_log: bool = True) -> None:
        drawn[path.name] = list(curves.values())

    monkeypatch.setattr(compare_losses, "draw_curves", draw_curves)
    run = str(write_metrics("a.jsonl", {1: 2.2, 2: 0.9}))
    reference = str(write_metrics("b.jsonl", {1: 2.0, 2: 1.0}))
    out = tmp_path / "out"
    main(["--task", "loss", "--data", run, "--compare", reference, "--out", str(out)])
    rows = list(csv.DictReader((out / "errors.csv").read_text().splitlines()))
    assert [float(row["relative"]) for row in rows] == pytest.approx([0.1, -0.1])
    assert [float(row["absolute"]) for row in rows] == pytest.approx([0.2, 0.1])
    sizes = {name: [value for _, value in curves[0]] for name, curves in drawn.items()}
    assert sizes["relative_error.png"] == pytest.approx([0.1, 0.1])
    assert sizes["absolute_error.png"] == pytest.approx([0.2, 0.1])
    assert len(drawn["loss.png"]) == 2
