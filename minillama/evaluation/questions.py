"""Question files: which ones there are, and their rows as the fields that a protocol formats.

boolq/dev.jsonl               a JSON object a line
mmlu/test/anatomy_test.csv    a row a question, here without a header; one file a subject
mmlu/anatomy/test-00000-of-00001.parquet
                              the same on the Hub, with a list of choices and the right one's number
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minillama.data.records import InputRecord, read_records
from minillama.data.sources import Source
from minillama.errors import UserError, closest
from minillama.evaluation.protocols import LETTERS, Question, Task
from minillama.hub import hub_hint

PARQUET = "{}-00000-of-00001.parquet"  # the file of a split on the Hub


def find_files(task: Task, path: Path, subjects: tuple[str, ...] = ()) -> dict[str, Path]:
    """The file of each subject, sorted by name. `subjects` chooses some of them; (): all.

    path: as `find_root` returns it.
    """
    files = _all_files(task, path)
    if not files:
        raise UserError(
            f"{path}: no questions there; --task {task.name} reads {task.layout}, "
            f"published at {task.published}{hub_hint(path, is_dataset=True)}"
        )
    for subject in subjects:
        if subject not in files:
            hint = closest(subject, files)
            raise UserError(f"no subject {subject!r}{hint}; {path} has: {', '.join(files)}")
    if not subjects:
        return files
    return {subject: file for subject, file in files.items() if subject in subjects}


def find_root(task: Task, path: Path) -> Path:
    """The file or folder that `path` means: itself, the folder around it, or one inside it.

    The published archives hold a folder `data`, and other programs are given the folder of a split,
    such as mmlu/data/test, beside which the solved examples are.
    """
    split_folder = Path(task.files).parts[0]
    folders = [path, path / "data", path / "test", path / "data/test"]
    if path.name == split_folder:
        folders.append(path.parent)
    for folder in folders:
        if _all_files(task, folder):
            return folder
    return path


def _all_files(task: Task, path: Path) -> dict[str, Path]:
    """The file of each subject; of a task without subjects, the one file in a folder."""
    if "{}" in task.files:
        suffix = task.files.partition("{}")[2]
        files = sorted(path.glob(task.files.replace("{}", "*")))
        by_subject = {file.name.removesuffix(suffix): file for file in files}
        return by_subject or _parquet_files(task, path)
    files = [path]
    if path.is_dir():
        files = [path / task.files]
        if not files[0].is_file():
            files = [*path.glob("*.jsonl"), *path.glob(PARQUET.format("validation"))]
    is_clear = len(files) == 1 and files[0].is_file()
    return {task.name: files[0]} if is_clear else {}


def _parquet_files(task: Task, path: Path) -> dict[str, Path]:
    """The file of each subject in the layout of the Hub, where each has a folder of its own.

    Other folders, such as that of all subjects together, are left out.
    """
    known = {subject for subjects in task.groups.values() for subject in subjects}
    files = sorted(path.glob(f"*/{PARQUET.format(task.split)}"))
    return {file.parent.name: file for file in files if file.parent.name in known}


def read_shots(task: Task, subject: str, path: Path, count: int) -> list[Question]:
    """The first `count` solved examples of a subject. Raises UserError if there are fewer."""
    if count == 0:
        return []
    file = path / task.shots.format(subject)
    if not file.is_file():
        file = path / subject / PARQUET.format("dev")
    shots = []
    if task.shots and file.is_file():
        shots = read_questions(task, subject, file)
    if len(shots) < count:
        raise UserError(
            f"{file}: {len(shots)} solved examples there; use --n_shots {len(shots)}, not {count}"
        )
    return shots[:count]


def read_questions(task: Task, subject: str, file: Path) -> list[Question]:
    """The questions of a file, each with its correct answer under `answer`.

    Raises UserError with file and line for a row that differs from the task's layout.
    """
    if file.suffix == ".csv":
        column_names = None if task.header else [*task.columns, "answer"]
        rows = _read_csv(file, column_names)
    else:
        rows = read_records(Source(file))
    questions = []
    for place, row in rows:
        question = _parse_row(task, subject, row)
        if question is None:
            problem = f"{file} {place}: malformed: {row!s:.120}"
            raise UserError(f"{problem}; expected {task.layout}")
        questions.append(question)
    if not questions:
        raise UserError(f"{file}: holds no questions")
    return questions


def _parse_row(task: Task, subject: str, row: Any) -> Question | None:
    """The question of a row; None if a column or the answer is missing or wrong."""
    if not isinstance(row, dict):
        return None
    row = _with_letters(row)
    if not all(isinstance(row.get(name), str) for name in task.columns):
        return None
    answer = str(row.get("answer")).strip()
    answer = {"True": "yes", "False": "no"}.get(answer, answer)
    if answer not in task.answers:
        return None
    return {
        **row,
        "answer": answer,
        "stripped": row["question"].strip(),
        "key": subject,
        "subject": subject.replace("_", " "),
    }


def _with_letters(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the Hub's MMLU with a column for each choice, and a letter as the answer.

    It has a list of `choices`, and the position of the right one. Other rows stay as they are.
    """
    choices = row.get("choices")
    position = row.get("answer")
    if not isinstance(choices, list) or not isinstance(position, int):
        return row
    if not 0 <= position < len(LETTERS):
        return row
    columns = dict(zip(LETTERS, choices, strict=False))
    return {**row, **columns, "answer": LETTERS[position]}


def _read_csv(file: Path, column_names: list[str] | None) -> Iterator[InputRecord]:
    """The rows of a CSV file, by column.

    column_names: of a file without a header. The place of a row is the line on which it ends.
    """
    with open(file, encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, column_names, strict=True)
        try:
            for row in reader:
                yield InputRecord(f"line {reader.line_num}", _by_column(row))
        except (csv.Error, UnicodeDecodeError) as error:
            place = f"{file} line {reader.line_num + 1}"
            raise UserError(f"{place}: not CSV in UTF-8 ({error})") from None


def _by_column(row: dict[str, Any]) -> dict[str, str] | list[str]:
    """A row with its columns in lower case, except the letters of the choices.

    A row with more fields than columns, which DictReader keeps under None, becomes a list.
    """
    if None in row:
        return list(row.values())
    return {name if name in LETTERS else name.lower(): text for name, text in row.items()}
