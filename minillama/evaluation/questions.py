"""Questions from files in their published layouts. A row that is not as it should be is an error with its file and line."""

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from minillama.errors import UserError, closest


@dataclass(frozen=True)
class Task:
    """What a task reads, and where from; {} in a file's name stands for the subject."""

    about: str
    layout: str
    command: str  # what to type after `python eval.py --task NAME`
    published: str = ""
    test: str = ""
    dev: str = ""  # the solved examples that serve as shots
    split: str = "test"
    header: bool = True


TASKS = {
    "boolq": Task("BoolQ: yes/no questions about a passage", 'dev.jsonl: {"question", "passage", "answer": true or false} a line',
                  "--ckpt LLAMA_DIR --data boolq/dev.jsonl", "https://github.com/google-research-datasets/boolean-questions", split="dev"),
    "mmlu": Task("MMLU: 57 subjects in English, four choices", "DIR/test/SUBJECT_test.csv, DIR/dev/SUBJECT_dev.csv: question,A,B,C,D,answer "
                 "without a header", "--ckpt LLAMA_DIR --data mmlu/data", "https://github.com/hendrycks/test",
                 "test/{}_test.csv", "dev/{}_dev.csv", header=False),
    "ceval": Task("C-Eval: 52 subjects in Chinese, four choices", "DIR/val/SUBJECT_val.csv, DIR/dev/SUBJECT_dev.csv: "
                  "id,question,A,B,C,D,answer", "--ckpt LLAMA_DIR --data ceval", "https://huggingface.co/datasets/ceval/ceval-exam",
                  "val/{}_val.csv", "dev/{}_dev.csv", "val"),
    "cmmlu": Task("CMMLU: 67 subjects in Chinese, four choices", "DIR/test/SUBJECT.csv, DIR/dev/SUBJECT.csv: ,Question,A,B,C,D,Answer",
                  "--ckpt LLAMA_DIR --data cmmlu", "https://huggingface.co/datasets/haonan-li/cmmlu", "test/{}.csv", "dev/{}.csv"),
    "perplexity": Task("how well a text is predicted", 'a .txt file (one document), or .jsonl with "text" (a document a line)',
                       "--ckpt LLAMA_DIR --data book.txt", split="whole"),
    "demo": Task("the questions `python train.py` learns to answer", "embedded; reads no data",
                 "--ckpt runs/demo   (after `python train.py`)"),
    "loss": Task("the losses of two training runs, side by side", "two metrics.jsonl, as train.py writes them",
                 "--data runs/a/metrics.jsonl --compare runs/b/metrics.jsonl"),
}


@dataclass(frozen=True)
class Question:
    """fields: what protocols' texts are made of; gold: the right answer, one of the protocol's choices."""

    id: str
    subject: str
    fields: dict[str, str]
    gold: str


def read_subjects(task: str, path: Path, wanted: tuple[str, ...], limit: int) -> tuple[dict[str, list[Question]], dict[str, Path]]:
    """(the questions of each subject, the file each subject was read from). limit: of each subject, the first so many; 0: all."""
    files = find_files(task, path)
    unknown = [name for name in wanted if name not in files]
    if unknown:
        raise UserError(f"no subject {unknown[0]!r}{closest(unknown[0], files)}; {path} has: {', '.join(files)}")
    files = {name: file for name, file in files.items() if not wanted or name in wanted}
    found = {name: read_questions(task, name, file)[:limit or None] for name, file in files.items()}
    for name, questions in found.items():
        if not questions:
            raise UserError(f"{files[name]}: holds no questions")
    return found, files


def find_files(task: str, path: Path) -> dict[str, Path]:
    """The file of each subject, in order of name."""
    layout = TASKS[task]
    if not layout.test:
        file = path / "dev.jsonl" if path.is_dir() else path
        files = {task: file} if file.is_file() else {}
    else:
        before, after = layout.test.split("{}")
        files = {file.name.removesuffix(after): file for file in sorted(path.glob(before + "*" + after))}
    if not files:
        raise UserError(f"{path}: holds no questions; --task {task} reads {layout.layout}, published at {layout.published}")
    return files


def read_shots(task: str, subject: str, path: Path, count: int) -> list[dict[str, str]]:
    """The fields of a subject's first `count` solved examples."""
    file = path / TASKS[task].dev.format(subject) if TASKS[task].dev else None
    if not count:
        return []
    if file is None or not file.is_file():
        raise UserError(f"{file or task}: no solved examples there, so no shots; use --n_shots 0")
    shots = [question.fields for question in read_questions(task, subject, file)]
    if len(shots) < count:
        raise UserError(f"{file}: {len(shots)} solved examples, {count} shots were asked for; use --n_shots {len(shots)}")
    return shots[:count]


def read_questions(task: str, subject: str, file: Path) -> list[Question]:
    """Every question of a file. Raises UserError with file and line for a row that lacks a field or has an impossible answer."""
    found = []
    for line, row in read_jsonl(file) if task == "boolq" else _read_csv(file, TASKS[task].header):
        try:
            if task == "boolq":
                gold = {True: "yes", False: "no"}[row["answer"]]
                row = {name: row[name] + "" for name in ("question", "passage")}
            else:
                gold = row["answer"].strip()
                row = {name: row[name] + "" for name in ("question", "A", "B", "C", "D")}
                if gold not in (*"ABCD",):
                    raise KeyError(gold)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} line {line}: a malformed row ({error}); expected {TASKS[task].layout}") from None
        texts = {"stripped": row["question"].strip(), "subject": subject.replace("_", " "), "key": subject, "answer": gold}
        found.append(Question(f"{subject}/{len(found)}", subject, row | texts, gold))
    return found


def read_jsonl(file: Path) -> Iterator[tuple[int, dict]]:
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
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 ({error.reason} at byte {error.start})") from None


def _read_csv(file: Path, header: bool) -> Iterator[tuple[int, dict[str, str]]]:
    """(line a row ends on, its fields by name in lower case, the choices by letter)."""
    reader = csv.reader(io.StringIO(read_text(file), newline=""), strict=True)
    names = ["question", *"ABCD", "answer"]
    try:
        for number, row in enumerate(reader):
            if number == 0 and header:
                names = [name if name in (*"ABCD",) else name.lower() for name in row]
            elif row:
                if len(row) != len(names):
                    raise csv.Error(f"{len(row)} fields, expected {len(names)}: {','.join(names)}")
                yield reader.line_num, dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{file} line {reader.line_num}: a malformed row ({error})") from None


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
