"""Files as streams of records: JSON arrays, JSON lines, Parquet and text, never more than a block of one in memory.

A JSON array is the awkward one: Python's parser wants all of it. Here a window slides over the file; the parser takes a record
off its front, and when the window ends inside a record, it grows.

    [ {"instruction": …}, {"instruction": …}, {"instr      window
      └── taken ───────┘  └─ next ─────────┘  └─ needs the next block

A place is "record 3", or "record 3 (line 5)" where lines matter. A line that is not JSON costs that line alone: it comes as an
error in the record's stead. An array that breaks off cannot be trusted further, and raises.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from minillama.errors import UserError

TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = (".json", ".jsonl", ".parquet", *TEXT_SUFFIXES)
BLOCK = 1 << 18  # characters read at a time


@dataclass(frozen=True)
class Part:
    """A stretch of a long text, cut after a line break."""

    text: str
    is_first: bool = True
    is_last: bool = True


def kind_of(path: Path) -> str:
    """The container, from its content: array, jsonl, parquet or text. A .txt or .md file is text whatever it begins with."""
    with open(path, "rb") as file:
        head = file.read(1024)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: a git-lfs pointer, not the file; run `git lfs pull` or download it again")
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if path.suffix in TEXT_SUFFIXES or (path.suffix not in (".json", ".jsonl") and first not in (b"[", b"{")):
        return "text"
    return "array" if first == b"[" else "jsonl"


def records(path: Path, text_as: str = "text") -> Iterator[tuple[str, Any]]:
    """(place, record) of every record. Raises UserError where there is none.

    text_as: what a text file gives: "text": itself; "lines": its lines that are not blank; "parts": `Part`s, a block each.
    """
    kind, empty = kind_of(path), True
    readers = {"array": _array, "jsonl": _json_lines, "parquet": _parquet, "text": _text, "lines": _lines, "parts": _parts}
    try:
        for placed in readers[text_as if kind == "text" else kind](path):
            empty = False
            yield placed
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from None
    if empty:
        raise UserError(f"{path}: holds no records")


def _open(path: Path) -> TextIO:
    return open(path, encoding="utf-8-sig", newline="\n")


def _text(path: Path) -> Iterator[tuple[str, str]]:
    with _open(path) as file:
        text = file.read()
    if text.strip():
        yield "", text


def _parts(path: Path) -> Iterator[tuple[str, Part]]:
    with _open(path) as file:
        text, is_first = file.read(BLOCK) + file.readline(), True
        while text.strip() or (text and not is_first):
            following = file.read(BLOCK) + file.readline()
            yield "", Part(text, is_first, not following)
            text, is_first = following, False


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    with _open(path) as file:
        yield from ((f"line {number}", line.rstrip("\n")) for number, line in enumerate(file, 1) if line.strip())


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, (line_number, line) in enumerate(_lines(path), 1):
        place = f"record {number} ({line_number})"
        try:
            yield place, json.loads(line)
        except json.JSONDecodeError as error:
            yield place, UserError(f"not valid JSON: {error.msg} at column {error.colno}")


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: needs the package `pyarrow`; pip install 'minillama[parquet]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(batch_size=256) for row in batch.to_pylist())
            yield from ((f"record {number}", row) for number, row in enumerate(rows, 1))
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None


def _array(path: Path) -> Iterator[tuple[str, Any]]:
    with _open(path) as file:
        yield from ((f"record {number}", value) for number, value in enumerate(_elements(path, file), 1))


def _elements(path: Path, file: TextIO) -> Iterator[Any]:
    text, at, ended, marks = "", 0, False, "["  # the window, the next character in it, and what that may be
    line, column = 1, 0                         # where the window begins
    while True:
        try:
            value, end = _element(text, at, marks)
            is_whole = end < len(text) or ended  # what touches the window's end may go on
        except json.JSONDecodeError as error:
            if ended or not (error.msg.startswith("Unterminated string") or error.pos > len(text) - 16):
                row, at = line + error.lineno - 1, error.colno + (column if error.lineno == 1 else 0)
                raise UserError(f"{path}: not valid JSON: {error.msg} at line {row} column {at}") from None
            is_whole = False
        if is_whole:
            if value is END:
                return
            yield value
            at, marks = end, ",]"
        else:  # drop what is parsed, read a block on: as much again as there is, so a long record is not parsed over and over
            line += (breaks := text.count("\n", 0, at))
            column = at - text.rfind("\n", 0, at) - 1 if breaks else column + at
            block = file.read(max(BLOCK, len(text) - at))
            text, at, ended = text[at:] + block, 0, not block


END, SPACE, DECODER = object(), re.compile(r"[ \t\r\n]*"), json.JSONDecoder()


def _element(text: str, at: int, marks: str) -> tuple[Any, int]:
    """(value, where it ends) behind one of `marks`; END behind the closing one. Raises JSONDecodeError, also where text is lacking."""
    at = SPACE.match(text, at).end()
    mark, inside = text[at:at + 1], SPACE.match(text, at + 1).end()
    if not mark or mark not in marks:
        raise json.JSONDecodeError(f"expected {' or '.join(marks)}, found {mark or 'the end of the file'}", text, at)
    if mark == "[" and text[inside:inside + 1] == "]":
        mark, inside = "]", SPACE.match(text, inside + 1).end()
    if mark != "]":
        return DECODER.raw_decode(text, inside)
    if inside < len(text):
        raise json.JSONDecodeError("more text after the array", text, inside)
    return END, inside
