"""Question files: rows are read whole, and a malformed one is named with its file and line."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from minillama.errors import UserError
from minillama.evaluation.protocols import TASKS
from minillama.evaluation.questions import read_questions

VALID = '{"question": "q", "passage": "", "answer": true}\n'
MAYBE = '{"question": "q", "passage": "p", "answer": "maybe"}\n'


@pytest.mark.parametrize(
    ("task", "name", "text", "message"),
    [
        ("boolq", "dev.jsonl", f'{VALID}\n{{"question": "q"}}\n', r"line 3\).*malformed"),
        ("boolq", "dev.jsonl", MAYBE, r"line 1\).*maybe"),
        ("boolq", "dev.jsonl", '{"question": "q"\n', r"line 1\): malformed: not valid JSON"),
        ("boolq", "dev.jsonl", "{}\n", r"line 1\): malformed"),
        ("boolq", "dev.jsonl", "\n", "holds no records"),
        (
            "mmlu",
            "test/law_test.csv",
            "q,a,b,c,d,A\nq,a,b,c,A\n",
            "line 2: malformed: .*expected DIR/test",
        ),
        ("mmlu", "test/law_test.csv", '"q\nq",a,b,c,d,A\nq,a,b,c,d,E\n', "line 3: malformed: .*E"),
        ("ceval", "val/law_val.csv", "id,question,A,B,C,D\n0,q,a,b,c,d\n", "line 2: malformed"),
        (
            "cmmlu",
            "test/law.csv",
            ",Question,A,B,C,D,Answer\n0,q,a,b,c,d,A\n1,q,a,b,c,d\n",
            "line 3",
        ),
        ("mmlu", "test/law_test.csv", 'q,a,b,c,d,A\n"q,a\n', "line [23]: not CSV"),
        ("mmlu", "test/law_test.csv", "\n", "holds no questions"),
        ("mmlu", "elsewhere.csv", "", "no questions there; --task mmlu reads .*hendrycks"),
    ],
)
def test_a_malformed_row_is_an_error_with_file_and_line(
    task: str, name: str, text: str, message: str, tmp_path: Path, benchmark: Callable
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    with pytest.raises(UserError, match=f"(?s)(?:{path.name}|{tmp_path.name}).*{message}"):
        benchmark(task, data=str(tmp_path), n_shots=0)


def test_fields_with_line_breaks_quotes_and_rare_separators_are_read_whole(tmp_path: Path) -> None:
    question = 'one\u2028"two"\nthree, four'
    csv_path = tmp_path / "x.csv"
    with open(csv_path, "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerow([question, "", "b", "c", "d", "A"])
    assert read_questions(TASKS["mmlu"], "x", csv_path)[0]["question"] == question
    record = {"question": question, "passage": "p\x85p", "answer": False}
    json_path = tmp_path / "x.jsonl"
    json_path.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_questions(TASKS["boolq"], "boolq", json_path)[0]["question"] == question


def test_subjects_and_limit_choose_questions(benchmark: Callable) -> None:
    test = benchmark("mmlu", subjects=("virology",), limit=2)
    assert list(test.queries) == ["virology/0", "virology/1"]
    with pytest.raises(UserError, match="did you mean 'anatomy'"):
        benchmark("mmlu", subjects=("anatmy",))


def test_more_shots_than_there_are_solved_examples_are_refused(benchmark: Callable) -> None:
    with pytest.raises(UserError, match="5 solved examples there; use --n_shots 5, not 6"):
        benchmark("mmlu", n_shots=6)
    with pytest.raises(UserError, match=r"0 solved examples there; use --n_shots 0, not 1"):
        benchmark("boolq", n_shots=1)


def write_parquet(path: Path, rows: list[dict]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_the_parquet_folders_of_the_hub_hold_the_same_questions(
    benchmark: Callable, data: Path, tmp_path: Path
) -> None:
    """Its folder of all subjects together is left out."""
    for subject in ("anatomy", "astronomy", "all"):
        for split in ("dev", "test"):
            source = data / "mmlu" / split / f"{subject}_{split}.csv"
            rows = []
            if subject != "all":
                for question in read_questions(TASKS["mmlu"], subject, source):
                    row = {
                        "question": question["question"],
                        "subject": subject,
                        "choices": [question[letter] for letter in "ABCD"],
                        "answer": "ABCD".index(question["answer"]),
                    }
                    rows.append(row)
            folder = tmp_path / "mmlu" / subject
            write_parquet(folder / split / "x", rows or [{"question": "q"}])
            (folder / split / "x").rename(folder / f"{split}-00000-of-00001.parquet")
    hub = benchmark("mmlu", data=str(tmp_path / "mmlu"))
    csv_files = benchmark("mmlu", subjects=("anatomy", "astronomy"))
    assert hub.queries == csv_files.queries
    for id, question in hub.questions.items():
        assert question["answer"] == csv_files.questions[id]["answer"]


def test_the_parquet_file_of_boolq_is_found_and_read(
    benchmark: Callable, data: Path, tmp_path: Path
) -> None:
    lines = (data / "dev.jsonl").read_text().splitlines()
    write_parquet(
        tmp_path / "boolq/data/validation-00000-of-00001.parquet",
        [json.loads(line) for line in lines],
    )
    hub = benchmark("boolq", data=str(tmp_path / "boolq"))
    assert hub.queries == benchmark("boolq").queries
