"""What can be scored, under which protocols, from files in which layouts: `tasks.toml` holds all three as data, this file reads it.

A protocol is everything that turns a question into a number: the prompt, the shots before it, what is scored, what wins.
"""

import csv
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minillama.data.records import read_records
from minillama.data.sources import Source
from minillama.errors import UserError, closest

TASKS: dict[str, dict[str, Any]] = tomllib.loads(
    Path(__file__).with_name("tasks.toml").read_text(encoding="utf-8")
)
LETTERS = ("A", "B", "C", "D")


@dataclass(frozen=True)
class Protocol:
    """A table of tasks.toml, whose head explains the keys."""

    question: str
    choices: dict[str, str] = field(
        default_factory=lambda: {letter: f" {letter}" for letter in LETTERS}
    )  # answer -> its text
    rule: str = "likelihood"
    header: str = ""
    header_needs_shots: bool = False
    shot: str = ""
    n_shots: int = 0
    around: str = "{}"
    patterns: tuple[str, ...] = ()

    def prompt(self, question: dict[str, str], shots: list[dict[str, str]]) -> str:
        header = self.header.format(**question) if shots or not self.header_needs_shots else ""
        return self.around.format(
            header
            + "".join(self.shot.format(**shot) for shot in shots)
            + self.question.format(**question)
        )


def find_protocol(task: str, name: str) -> tuple[str, Protocol]:
    """(name, protocol) of a task; "": its default."""
    known = TASKS[task]["protocols"]
    name = name or next(iter(known))
    if name not in known:
        raise UserError(
            f"{task} has no protocol {name!r}{closest(name, known)}; protocols: {', '.join(known)}"
        )
    return name, Protocol(**known[name])


def find_files(task: str, path: Path, wanted: tuple[str, ...] = ()) -> dict[str, Path]:
    """The file of each subject, in order of name; only those wanted."""
    before, _, after = TASKS[task]["files"].partition("{}")
    files = (
        {file.name.removesuffix(after): file for file in sorted(path.glob(f"{before}*{after}"))}
        if after
        else {}
    )
    if not after and (file := path / before if path.is_dir() else path).is_file():
        files = {task: file}
    if not files:
        raise UserError(
            f"{path}: no questions there; --task {task} reads {TASKS[task]['layout']}, published at {TASKS[task]['published']}"
        )
    if unknown := [name for name in wanted if name not in files]:
        raise UserError(
            f"no subject {unknown[0]!r}{closest(unknown[0], files)}; {path} has: {', '.join(files)}"
        )
    return {name: file for name, file in files.items() if not wanted or name in wanted}


def read_shots(task: str, subject: str, path: Path, count: int) -> list[dict[str, str]]:
    """A subject's first `count` solved examples."""
    file = path / TASKS[task].get("shots", "solved examples").format(subject)
    shots = read_questions(task, subject, file) if count and file.is_file() else []
    if len(shots) < count:
        raise UserError(
            f"{file}: {len(shots)} solved examples there; use --n_shots {len(shots)}, not {count}"
        )
    return shots[:count]


def read_questions(task: str, subject: str, file: Path) -> list[dict[str, str]]:
    """The questions of a file, each as the fields that protocols format, its right answer as `answer`.
    Raises UserError with file and line for a row that is not as the layout says."""
    about, found = TASKS[task], []
    names = None if about.get("header") else [*about["columns"], "answer"]
    for place, row in (
        _csv_rows(file, names) if file.suffix == ".csv" else read_records(Source(file))
    ):
        good = isinstance(row, dict) and all(
            isinstance(row.get(name), str) for name in about["columns"]
        )
        answer = str(row.get("answer")).strip() if good else ""
        answer = {"True": "yes", "False": "no"}.get(answer, answer)
        if answer not in about["answers"]:
            raise UserError(f"{file} {place}: malformed: {row!s:.120}; expected {about['layout']}")
        found.append(
            {
                **row,
                "answer": answer,
                "stripped": row["question"].strip(),
                "key": subject,
                "subject": subject.replace("_", " "),
            }
        )
    if not found:
        raise UserError(f"{file}: holds no questions")
    return found


def _csv_rows(file: Path, names: list[str] | None) -> Iterator[tuple[str, Any]]:
    """(line a row ends on, its fields by name, or as they are where there are too many). names: of a file without a header."""
    with open(file, encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, names, strict=True)
        try:
            for row in reader:
                named = {
                    name if name in LETTERS else name.lower(): text
                    for name, text in row.items()
                    if name is not None
                }
                yield f"line {reader.line_num}", list(row.values()) if None in row else named
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(
                f"{file} line {reader.line_num + 1}: not CSV in UTF-8 ({error})"
            ) from None
