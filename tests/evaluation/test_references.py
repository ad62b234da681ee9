"""--compare: what may be a reference, and that it is checked before the first question."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from minillama.errors import UserError
from minillama.evaluation import runner
from minillama.evaluation.options import EvalOptions
from minillama.evaluation.references import read_reference
from minillama.evaluation.report import Record


def read(path: Path, content: str, task: str = "mmlu") -> Record:
    """The reference that a file with this content is."""
    path.write_text(content)
    reference = read_reference(EvalOptions(task=task, compare=str(path)))
    assert reference is not None
    return reference


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '{"anatomy": 0.459, "virology": "43.9%", "Other": 0.45, "total": 0.469}'),
        ("a.csv", "anatomy,0.459\nvirology,43.9%\nOther,0.45\nAll,0.469\n"),
        (
            "b.csv",
            "number,Subject,questions,Accuracy\n48,anatomy,135,0.459\n46,virology,166,43.9%\n"
            ",Other,9,0.45\n,total,14042,0.469\n",
        ),
    ],
)
def test_a_list_written_by_hand_is_a_reference(name: str, content: str, tmp_path: Path) -> None:
    assert read(tmp_path / name, content) == {
        "accuracy": 0.469,
        "subjects": {"anatomy": {"accuracy": 0.459}, "virology": {"accuracy": 0.439}},
        "groups": {"Other": {"accuracy": 0.45}},
    }


def test_percents_of_subjects_in_their_summary_are_fractions_here(tmp_path: Path) -> None:
    theirs = {
        "law": {"score": 25.0, "num": 24, "correct": 6.0},
        "grouped": {"Humanities": {"correct": 6.0, "num": 24, "score": 0.25}},
        "All": {"score": 0.25, "num": 24, "correct": 6.0},
    }
    assert read(tmp_path / "summary.json", json.dumps(theirs), "ceval") == {
        "accuracy": 0.25,
        "subjects": {"law": {"accuracy": 0.25}},
        "groups": {"Humanities": {"accuracy": 0.25}},
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"anatomy": 45.9}', "anatomy is 45.9; write a fraction such as 0.459, or 45.9"),
        ("a.json", '{"anatomy": "459%"}', "anatomy is 459%; write a fraction"),
        ("a.json", '{"anatmy": 0.4}', "mmlu has no subject 'anatmy' .did you mean 'anatomy'"),
        ("a.json", '{"anatomy": true}', "anatomy is True; expected a number"),
        ("a.json", '{"anatomy": null}', "anatomy is None; expected a number"),
        ("a.json", '{"task": "boolq", "accuracy": 1}', "not a summary of --task mmlu, but of 'boo"),
        ("a.json", '{"task": "mmlu", "accuracy": null}', "accuracy is None; expected a number"),
        ("a.json", '{"task": "mmlu", "accuracy": 0.4, "subjects": {"law": {}}}', "'accuracy' is m"),
        ("a.json", "[]", "holds no JSON object"),
        ("a.csv", "anatomy,0.4,3\n", "'anatomy,0.4,3' has not 2 columns"),
        ("a.csv", "\n", "holds no rows; expected subject,accuracy"),
        ("a.csv", "anatomy,good\n", "anatomy is 'good'; expected a number"),
    ],
)
def test_a_mistake_in_a_reference_is_named(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"{name}: .*{message}"):
        read(tmp_path / name, content)


def test_a_reference_is_checked_before_the_model_is_loaded(
    main: Callable, boolq: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_engine(*arguments: object, **keywords: object) -> None:
        raise AssertionError("loaded before the reference was checked")

    monkeypatch.setattr(runner, "load_engine", load_engine)
    (tmp_path / "a.json").write_text('{"boolq": 80}')
    with pytest.raises(UserError, match="the accuracy of boolq is 80"):
        main([*boolq, "--compare", str(tmp_path / "a.json")])


def test_a_table_has_the_reference_that_was_written_by_hand(
    main: Callable, boolq: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "a.csv").write_text("boolq,0.824\n")
    main([*boolq, "--compare", str(tmp_path / "a.csv"), "--csv", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out.splitlines()
    subject, total = (line.split() for line in printed if line.startswith(("boolq ", "total")))
    assert subject[5] == "82.40%"
    assert total[5] == "-"  # the list has no total
    table = (tmp_path / "out/summary.csv").read_text().splitlines()
    assert table[0] == "subject,questions,accuracy,stderr,majority,reference,difference"
    assert table[1].split(",")[5] == "0.824"


def test_a_perplexity_is_compared_with_the_metrics_that_are_known(
    main: Callable, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on the mat")
    (tmp_path / "a.json").write_text('{"perplexity": 5.47}')
    command = ["--task", "perplexity", "--ckpt", str(checkpoint), "--data", str(tmp_path / "a.txt")]
    main([*command, "--compare", str(tmp_path / "a.json")])
    assert capsys.readouterr().out.count("reference") == 1
    (tmp_path / "a.json").write_text('{"acc": 5.47}')
    with pytest.raises(UserError, match=r"a\.json: has none of perplexity, loss, bits_per_byte"):
        main([*command, "--compare", str(tmp_path / "a.json")])
