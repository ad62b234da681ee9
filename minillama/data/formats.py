"""Raw files to documents: what each format's records mean.

A document is a `Conversation` (instruction data, rendered by a template later) or a plain string. Readers yield it with its
place in the file, so that every complaint names file and record.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from minillama.chat import Conversation, Turn
from minillama.errors import UserError

Document = Conversation | str
TEXT_SUFFIXES = (".txt", ".md")


class BadRecord(UserError):
    """A record that does not follow its format; `--skip_bad_records` counts these instead of stopping."""


def expand(paths: tuple[str, ...]) -> list[Path]:
    """The files named, folders replaced by the files in them, in order of name."""
    files: list[Path] = []
    for name in paths:
        path = Path(name)
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix in (".json", ".jsonl", *TEXT_SUFFIXES))
            if not inside:
                raise UserError(f"{path}: the folder holds no .json, .jsonl or .txt file")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    return files


def detect(path: Path) -> str:
    """The format of a file, from its content: "alpaca" or "text"."""
    if path.suffix in TEXT_SUFFIXES:
        return "text"
    _, record = next(_json_records(path))
    if isinstance(record, dict) and "instruction" in record and "output" in record:
        return "alpaca"
    shown = sorted(record) if isinstance(record, dict) else type(record).__name__
    raise UserError(f"{path}: record 1 ({shown}) is of no known format; expected the keys instruction, input, output")


def read_documents(path: Path, data_format: str, on_bad: Callable[[BadRecord], None] | None = None) -> Iterator[Document]:
    """The documents of a file. A malformed record goes to `on_bad`, or is raised where there is none."""
    if data_format == "text":
        yield from _text(path)
        return
    for number, record in _json_records(path):
        try:
            yield _alpaca(record)
        except BadRecord as error:
            placed = BadRecord(f"{path}: record {number}: {error}")
            if on_bad is None:
                raise placed from None
            on_bad(placed)


def _json_records(path: Path) -> Iterator[tuple[int, Any]]:
    """(number from 1, record) of a JSON array, or of JSON lines."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    if text.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: not valid JSON: {error.msg} at line {error.lineno} column {error.colno}") from None
        if not records:
            raise UserError(f"{path}: the list of records is empty")
        yield from enumerate(records, 1)
        return
    number = 0
    for line_number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        number += 1
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {line_number} is not valid JSON: {error.msg} at column {error.colno}") from None


def _alpaca(record: Any) -> Conversation:
    """{instruction, input?, output, system?, history?: [[question, answer], …]}."""
    if not isinstance(record, dict):
        raise BadRecord(f"expected an object with instruction and output, found {type(record).__name__}")
    for name in ("instruction", "output"):
        if not isinstance(record.get(name), str):
            raise BadRecord(f"{name!r} is {'missing' if name not in record else 'not text'}")
    for name in ("input", "system"):
        if not isinstance(record.get(name) or "", str):
            raise BadRecord(f"{name!r} is not text")
    history = record.get("history") or []
    if not all(isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in history):
        raise BadRecord("'history' is not a list of [question, answer] pairs")
    turns = [Turn(question, answer) for question, answer in history]
    turns.append(Turn(record["instruction"], record["output"], record.get("input") or ""))
    return Conversation(tuple(turns), record.get("system") or "")


def _text(path: Path) -> Iterator[str]:
    """One document: the whole file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    yield text
