"""`minillama.evaluate` from Python returns what eval.py writes and prints."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from minillama import UserError, evaluate, load
from minillama.generation.output_file import without_digest

GOLDEN = Path(__file__).parents[1] / "golden/model"


def without_time(summary: dict) -> dict:
    return {key: value for key, value in summary.items() if key != "seconds"}


def test_the_result_is_what_the_command_writes_and_prints(
    main: Callable,
    boolq: list[str],
    checkpoint: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    main([*boolq, "--limit", "4", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    result = evaluate("boolq", load(checkpoint), data=data / "dev.jsonl", limit=4)
    assert printed.endswith(f"{result}\n")
    assert capsys.readouterr().out == ""
    written = json.loads((tmp_path / "summary.json").read_text())
    assert without_time(result.summary) == without_time(written)
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert result.predictions == [without_digest(json.loads(line)) for line in lines]


def test_the_demo_and_two_runs_are_evaluated_too(tmp_path: Path) -> None:
    model = load(GOLDEN, template="llama_factory_default")
    result = evaluate("demo", model, limit=7, subjects=["larger"])
    assert result.summary["subjects"]["larger"]["n"] == 7
    assert str(result).splitlines()[0].split()[-1] == "untrained"
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n')
    assert evaluate("loss", data=path, compare=path).summary["mean_relative"] == 0.0


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("bolq", {}, "did you mean 'boolq'"),
        ("boolq", {"dta": "x"}, "did you mean 'data'"),
        ("boolq", {"data": "x"}, "--ckpt missing"),
        ("demo", {"data": "x"}, "--data has no meaning for --task demo"),
    ],
)
def test_mistakes_are_user_errors(task: str, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(task, **options)
