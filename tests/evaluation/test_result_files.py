"""Further files of --out: CSV, and the layout of Chinese-LLaMA-Alpaca's scripts."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from minillama.errors import UserError


def command(task: str, checkpoint: Path, data: Path, out: Path) -> list[str]:
    files = ["--ckpt", str(checkpoint), "--data", str(data / task), "--out", str(out)]
    return ["--task", task, *files]


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_the_csv_files_hold_the_table_and_the_predictions(
    main: Callable, checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    main([*command("mmlu", checkpoint, data, tmp_path), "--csv"])
    summary = json.loads((tmp_path / "summary.json").read_text())
    table = {row["subject"]: row for row in read_csv(tmp_path / "summary.csv")}
    assert list(table)[:3] == ["anatomy", "astronomy", "virology"]
    assert {"STEM", "Other", "total", "unweighted"} <= set(table)
    assert float(table["total"]["accuracy"]) == summary["accuracy"]
    assert table["total"]["questions"] == "15"
    predictions = read_csv(tmp_path / "predictions.csv")
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    for row, line in zip(predictions, lines, strict=True):
        record = json.loads(line)
        assert row["id"] == record["id"]
        assert row["correct"] == str(int(record["gold"] == record["predicted"]))
        assert float(row["B"]) == record["scores"]["B"]
    assert not (tmp_path / "take0").exists()


def test_csv_needs_a_directory_and_a_task_with_answers(main: Callable, boolq: list[str]) -> None:
    with pytest.raises(UserError, match="--csv needs --out DIR"):
        main([*boolq, "--csv"])
    words = ["--task", "perplexity", *boolq[2:], "--csv", "--out", "x"]
    with pytest.raises(UserError, match="--csv has no meaning for --task perplexity"):
        main(words)


@pytest.mark.parametrize("task", ["ceval", "cmmlu"])
def test_take0_has_percents_of_subjects_and_fractions_of_groups(
    task: str, main: Callable, checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    """Their layout, on files of ours whose subjects are in no group of C-Eval."""
    main(command(task, checkpoint, data, tmp_path / "out"))
    records = [
        json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()
    ]
    take = json.loads((tmp_path / "out/take0/summary.json").read_text())
    assert list(take)[:3] == ["anatomy", "astronomy", "virology"]
    anatomy = [record for record in records if record["subject"] == "anatomy"]
    num_correct = sum(record["gold"] == record["predicted"] for record in anatomy)
    assert take["anatomy"] == {
        "score": 100 * num_correct / len(anatomy),
        "num": len(anatomy),
        "correct": num_correct,
    }
    total = sum(record["gold"] == record["predicted"] for record in records)
    assert take["All"] == {"score": total / len(records), "num": len(records), "correct": total}
    groups = {"STEM": 15} if task == "cmmlu" else {}  # all three subjects
    assert {name: group["num"] for name, group in take["grouped"].items()} == groups
    answers = json.loads((tmp_path / "out/take0/submission.json").read_text())
    assert answers["anatomy"] == {str(i): anatomy[i]["predicted"] for i in range(len(anatomy))}


def test_take0_is_a_reference(
    main: Callable, checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """C-Eval's names: a subject of a reference that the task does not know is a mistake."""
    for split in ("dev", "val"):
        folder = tmp_path / "ceval" / split
        folder.mkdir(parents=True)
        source = data / "ceval" / split / f"anatomy_{split}.csv"
        (folder / f"law_{split}.csv").write_bytes(source.read_bytes())
    words = command("ceval", checkpoint, tmp_path, tmp_path / "out")
    main(words)
    capsys.readouterr()
    main([*words, "--compare", str(tmp_path / "out/take0/summary.json")])
    assert capsys.readouterr().out.count("+0.00%") == 3  # law, Humanities, total


@pytest.mark.parametrize("folder", ["mmlu/test", "mmlu", "."])
def test_the_folder_of_a_split_and_the_folder_around_data_are_found(
    folder: str, main: Callable, checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    root = tmp_path / "archive"
    (root / "mmlu").mkdir(parents=True)
    (root / "data").symlink_to(data / "mmlu")
    (root / "mmlu").rmdir()
    (root / "mmlu").symlink_to(data / "mmlu")
    words = ["--task", "mmlu", "--ckpt", str(checkpoint), "--limit", "1", "--out"]
    main([*words, str(tmp_path / "out"), "--data", str(root / folder)])
    assert json.loads((tmp_path / "out/summary.json").read_text())["n"] == 3


def test_the_one_question_file_of_a_folder_is_found(
    main: Callable, boolq: list[str], data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "boolq/data/test"
    folder.mkdir(parents=True)
    (folder / "questions.jsonl").write_bytes((data / "dev.jsonl").read_bytes())
    for path in (folder, folder.parent, tmp_path / "boolq"):
        main([*boolq[:-1], str(path), "--limit", "1"])
    (folder / "more.jsonl").write_bytes((data / "dev.jsonl").read_bytes())
    with pytest.raises(UserError, match=r"no questions there; --task boolq reads dev\.jsonl"):
        main([*boolq[:-1], str(folder)])
