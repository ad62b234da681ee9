"""What can be scored, and questions from files in their published layouts: `tasks.toml` holds both as data.

A protocol is everything that turns a question into a number: the prompt, the shots before it, what is scored, what wins. A row of a file
that is not as it should be is an error with its file and line.
"""

import csv
import io
import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minillama.errors import UserError, closest

TASKS: dict[str, dict[str, Any]] = tomllib.loads(Path(__file__).with_name("tasks.toml").read_text(encoding="utf-8"))
LETTERS = ("A", "B", "C", "D")


@dataclass(frozen=True)
class Protocol:
    """A table of tasks.toml, whose head says what its texts are formatted with."""

    question: str
    choices: dict[str, str] = field(default_factory=lambda: {letter: f" {letter}" for letter in LETTERS})  # answer -> its text
    rule: str = "likelihood"
    header: str = ""
    header_needs_shots: bool = False
    shot: str = ""
    n_shots: int = 0
    around: str = "{}"
    patterns: tuple[str, ...] = ()  # "written": tried in turn at the beginning of what was written

    def prompt(self, question: dict[str, str], shots: list[dict[str, str]]) -> str:
        header = self.header.format(**question) if shots or not self.header_needs_shots else ""
        return self.around.format(header + "".join(self.shot.format(**shot) for shot in shots) + self.question.format(**question))


def find_protocol(task: str, name: str) -> tuple[str, Protocol]:
    """(name, protocol) of a task; "": its default."""
    known = TASKS[task]["protocols"]
    name = name or next(iter(known))
    if name not in known:
        raise UserError(f"{task} has no protocol {name!r}{closest(name, known)}; protocols: {', '.join(known)}")
    return name, Protocol(**known[name])


def find_files(task: str, path: Path, wanted: tuple[str, ...] = ()) -> dict[str, Path]:
    """The file of each subject, in order of name; only those wanted."""
    before, _, after = TASKS[task].get("files", "").partition("{}")
    files = {file.name.removesuffix(after): file for file in sorted(path.glob(f"{before}*{after}"))} if after else {}
    if not after and (file := path / "dev.jsonl" if path.is_dir() else path).is_file():
        files = {task: file}
    if not files:
        raise UserError(f"{path}: no questions there; --task {task} reads {TASKS[task]['layout']}, published at {TASKS[task]['published']}")
    if unknown := [name for name in wanted if name not in files]:
        raise UserError(f"no subject {unknown[0]!r}{closest(unknown[0], files)}; {path} has: {', '.join(files)}")
    return {name: file for name, file in files.items() if not wanted or name in wanted}


def read_shots(task: str, subject: str, path: Path, count: int) -> list[dict[str, str]]:
    """A subject's first `count` solved examples."""
    if not count:
        return []
    if not (file := path / TASKS[task].get("shots", "none for this task").format(subject)).is_file():
        raise UserError(f"{file}: no solved examples there; use --n_shots 0")
    if len(shots := read_questions(task, subject, file)) < count:
        raise UserError(f"{file}: {len(shots)} solved examples; use --n_shots {len(shots)}, not {count}")
    return shots[:count]


def read_questions(task: str, subject: str, file: Path) -> list[dict[str, str]]:
    """The questions of a file, each as the fields that protocols format, its right answer as `answer`."""
    found = []
    for line, row in read_jsonl(file) if task == "boolq" else _read_csv(file, TASKS[task].get("columns")):
        texts = {name: row.get(name) for name in (("question", "passage") if task == "boolq" else ("question", *LETTERS))}
        answer = {True: "yes", False: "no"}.get(row.get("answer")) if task == "boolq" else row["answer"].strip()
        if not all(isinstance(text, str) for text in texts.values()) or answer not in ("yes", "no", *LETTERS):
            raise UserError(f"{file} line {line}: a malformed row, answer {row.get('answer')!r}; expected {TASKS[task]['layout']}")
        found.append({**texts, "answer": answer, "stripped": texts["question"].strip(), "key": subject, "subject": subject.replace("_", " ")})
    if not found:
        raise UserError(f"{file}: holds no questions")
    return found


def read_jsonl(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line that is not blank."""
    for number, line in enumerate(read_text(file).split("\n"), 1):
        try:
            if line.strip():
                yield number, dict(json.loads(line))
        except (ValueError, TypeError) as error:
            raise UserError(f"{file} line {number}: not a JSON object ({error})") from None


def read_text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as UTF-8 text ({error})") from None


def _read_csv(file: Path, names: list[str] | None) -> Iterator[tuple[int, dict[str, str]]]:
    """(line a row ends on, its fields by name); names: of a file without a header."""
    reader = csv.reader(io.StringIO(read_text(file), newline=""), strict=True)
    try:
        for row in filter(None, reader):
            if names is None:
                names = [name if name in LETTERS else name.lower() for name in row]
            elif len(row) != len(names) or "answer" not in names:
                raise csv.Error(f"{len(row)} fields; expected {','.join(names)}, the answer among them")
            else:
                yield reader.line_num, dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{file} line {reader.line_num}: a malformed row: {error}") from None
