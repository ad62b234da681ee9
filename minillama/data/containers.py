"""Files as streams of records: JSON arrays, JSON lines, Parquet and text, never more than a block of one in memory.

A JSON array is the awkward one: Python's parser wants all of it. Here a window slides over the file; the parser takes a record
off its front, and when the window ends inside a record, it grows.

    [ {"instruction": …}, {"instruction": …}, {"instr      window
      └── taken ───────┘  └─ next ─────────┘  └─ needs the next block

A place is "record 3", or "record 3 (line 5)" where lines matter. A line that is not JSON costs that line alone: it comes as an
error in the record's stead. An array that breaks off cannot be trusted further, and raises.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from minillama.errors import UserError

TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = (".json", ".jsonl", ".parquet", *TEXT_SUFFIXES)
BLOCK = 1 << 18  # characters read at a time


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


def records(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, record) of every record; a text file is one record. Raises UserError where there is none."""
    reader = {"array": _array, "jsonl": _json_lines, "parquet": _parquet, "text": _whole}[kind_of(path)]
    return _checked(path, reader(path))


def lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, line) of every line of a text file that is not blank."""
    return _checked(path, ((f"line {number}", text.rstrip("\n")) for number, text in _numbered_lines(path)))


def _checked(path: Path, found: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    empty = True
    try:
        for placed in found:
            empty = False
            yield placed
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from None
    if empty:
        raise UserError(f"{path}: holds no records")


def _open(path: Path) -> TextIO:
    return open(path, encoding="utf-8-sig", newline="\n")


def _whole(path: Path) -> Iterator[tuple[str, str]]:
    with _open(path) as file:
        text = file.read()
    if text.strip():
        yield "", text


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    with _open(path) as file:
        yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, (line_number, line) in enumerate(_numbered_lines(path), 1):
        place = f"record {number} (line {line_number})"
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
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield f"record {number}", row
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None


@dataclass(frozen=True)
class Part:
    """A stretch of a long text, cut after a line break."""

    text: str
    is_first: bool
    is_last: bool


def text_parts(path: Path) -> Iterator[tuple[str, Any]]:
    """A text file as its parts, for a tokenizer that splits at lines: no more than a block is in memory."""
    return _checked(path, _parts(path))


def _parts(path: Path) -> Iterator[tuple[str, Part]]:
    with _open(path) as file:
        text, is_first = file.read(BLOCK) + file.readline(), True
        while text.strip() or (text and not is_first):
            following = file.read(BLOCK) + file.readline()
            yield "", Part(text, is_first, not following)
            text, is_first = following, False


class _Window:
    """The part of a JSON text under the parser: `at` is the next character, `line` and `column` say where the text begins."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self.path, self.file = path, file
        self.text, self.at, self.line, self.column, self.ended = "", 0, 1, 1, False
        self.decoder = json.JSONDecoder()

    def grow(self) -> None:
        """Drop what is parsed, read a block on: as much again as there is, so a long record is not parsed over and over."""
        self.line, self.column = self.place(self.at)
        self.text, self.at = self.text[self.at:], 0
        block = self.file.read(max(BLOCK, len(self.text)))
        self.text, self.ended = self.text + block, not block

    def place(self, at: int) -> tuple[int, int]:
        """(line, column) of a position in the text."""
        breaks = self.text.count("\n", 0, at)
        return self.line + breaks, at - self.text.rfind("\n", 0, at) if breaks else self.column + at

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text) or self.ended:
                return self.text[self.at:self.at + 1]
            self.grow()

    def expect(self, characters: str) -> str:
        found = self.peek()
        if not found or found not in characters:
            self.fail(f"expected {' or '.join(characters)}, found {found or 'the end of the file'}", self.at)
        self.at += 1
        return found

    def value(self) -> Any:
        """The next JSON value."""
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - 16
                if self.ended or not cut_off:
                    self.fail(error.msg, error.pos)
            else:
                if end < len(self.text) or self.ended:  # a number that touches the window's end may go on
                    self.at = end
                    return value
            self.grow()

    def fail(self, what: str, at: int) -> None:
        line, column = self.place(at)
        raise UserError(f"{self.path}: not valid JSON: {what} at line {line} column {column}")


def _array(path: Path) -> Iterator[tuple[str, Any]]:
    with _open(path) as file:
        window, number = _Window(path, file), 0
        window.expect("[")
        if window.peek() == "]":
            return
        mark = ","
        while mark == ",":
            window.peek()
            number += 1
            yield f"record {number}", window.value()
            mark = window.expect(",]")
        if window.peek():
            window.fail("more text after the array", window.at)
