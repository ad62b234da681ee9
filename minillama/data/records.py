"""Files to records: a stream that never holds a whole file in memory.

A record is a JSON value with its place in the file, such as "record 3 (line 5)". What its keys mean
is the topic of formats.py. Here a file is one of five *containers*, told apart by its content:

    array      a JSON array; each element is a record
    jsonl      a JSON value on each line
    parquet    a table; each row is a record
    text       the whole file is one record
    lines      the same file, if the format `lines` was asked for: each line is a record

A file with a suffix that is not known is only read if its content is JSON or Parquet, or if plain
text was asked for: a table, such as .csv, or a compressed file is not trained on as if it were one.

A JSON array is the difficult one, because Python's parser takes all of it or nothing. So a window
slides over the file. The parser takes one element and the comma behind it from its beginning. If
the window ends before that comma, more of the file is read.

    file      [{"instruction": …}, {"instruction": …}, {"instruction": …}]
    window                         {"instruction": …}, {"instr
"""

import json
import re
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from minillama.data.sources import COMPRESSED, SUFFIXES, Source
from minillama.errors import UserError
from minillama.files import numbered_lines, open_text
from minillama.json_values import check_json, json_limits

BLOCK = 1 << 18  # characters read at a time
HEAD = 1024  # bytes, or characters, that tell what a file is
JSON_SUFFIXES = (".json", ".jsonl")
TEXT_SUFFIXES = (".txt", ".md")
SPACE = re.compile(r"[ \t\r\n]*")
DECODER = json.JSONDecoder()


class TextBlock(NamedTuple):
    """A part of a plain text. It ends after a line break, unless it is the last one."""

    text: str
    is_first: bool = True
    is_last: bool = True


class InputRecord(NamedTuple):
    """A record of a file: its place, to be named in errors, and its value.

    The value is a UserError for a line that is not JSON. So a bad line costs only itself.
    """

    place: str
    value: Any


def read_records(source: Source, split_text: bool = False) -> Iterator[InputRecord]:
    """The records of a file, in order.

    split_text: yield a long plain text as several TextBlocks, and not as one string.
    Raises UserError if the file holds no record, or cannot be read on.
    """
    container = _container_of(source)
    is_empty = True
    with open_text(source.path) as file:
        if container == "text" and split_text:
            records = _read_blocks(file)
        else:
            records = CONTAINERS[container](file)
        for record in records:
            is_empty = False
            yield record
    if is_empty:
        raise UserError(f"{source.path}: holds no records")


def _container_of(source: Source) -> str:
    """A key of CONTAINERS. A .txt or .md file is plain text, whatever it begins with.

    Raises UserError for a file that nothing says how to read.
    """
    path = source.path
    suffix = path.suffix.lower()
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if head.startswith(b"PAR1") or suffix == ".parquet":
        return "parquet"
    if head.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path}: a git-lfs pointer, not the file; run `git lfs pull` or download it again"
        )
    first_byte = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    looks_like_json = first_byte in (b"[", b"{")
    if suffix in JSON_SUFFIXES or (looks_like_json and suffix not in TEXT_SUFFIXES):
        return "array" if first_byte == b"[" else "jsonl"
    is_text_asked_for = source.data_format in ("text", "lines")
    if suffix not in ("", *TEXT_SUFFIXES) and not is_text_asked_for:
        raise UserError(_unknown_suffix(path))
    return "lines" if source.data_format == "lines" else "text"


def _unknown_suffix(path: Path) -> str:
    """The message of the error for a file that is neither JSON, Parquet nor named as a text."""
    known = ", ".join(SUFFIXES)
    if path.suffix.lower() in COMPRESSED:
        return f"{path}: a compressed file is not read; unpack it first (known: {known})"
    return (
        f"{path}: a {path.suffix} file is not read; known: {known}; convert it to JSON lines; "
        "if it is a text, name it .txt or choose its format (--data_format; convert.py: --format)"
    )


def _read_text(file: TextIO) -> Iterator[InputRecord]:
    text = file.read()
    if text.strip():
        yield InputRecord("", text)


def _read_blocks(file: TextIO) -> Iterator[InputRecord]:
    """A text in blocks of some BLOCK characters. A text of one block comes as a string."""
    text = file.read(BLOCK) + file.readline()
    is_first = True
    while text.strip() or (text and not is_first):
        next_text = file.read(BLOCK) + file.readline()
        is_last = not next_text
        if is_first and is_last:
            yield InputRecord("", text)
        else:
            yield InputRecord("", TextBlock(text, is_first, is_last))
        text = next_text
        is_first = False


def _read_lines(file: TextIO) -> Iterator[InputRecord]:
    for number, line in numbered_lines(file):
        yield InputRecord(f"line {number}", line)


def _read_json_lines(file: TextIO) -> Iterator[InputRecord]:
    for number, line in enumerate(_read_lines(file), start=1):
        place = f"record {number} ({line.place})"
        yield InputRecord(place, _parse_line(line.value))


def _parse_line(text: str) -> Any:
    """The JSON value of a line; a UserError if it has none."""
    try:
        with json_limits():
            value = json.loads(text)
        check_json(value, text)
    except json.JSONDecodeError as error:
        message = f"not valid JSON: {error.msg} at column {error.colno}"
        if error.pos >= len(text.rstrip()):
            message += (
                "; an object must end on its line: write one object a line, or an array [{…}, {…}] "
                "of all records"
            )
        return UserError(message)
    except UserError as error:
        return error
    return value


def _read_parquet(file: TextIO) -> Iterator[InputRecord]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{file.name}: needs the package `pyarrow`; pip install 'minillama[parquet]'"
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(file.name) as table:
            batches = table.iter_batches(batch_size=256)
            rows = chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, row in enumerate(rows, start=1):
                yield InputRecord(f"record {number}", row)
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file.name}: not a readable Parquet file ({reason})") from None


def _read_array(file: TextIO) -> Iterator[InputRecord]:
    window = ArrayWindow(file)
    number = 0
    while not window.is_array_done:
        try:
            value = window.take_element()
        except json.JSONDecodeError as error:
            is_empty_array = number == 0 and window.text[error.pos : error.pos + 1] == "]"
            if is_empty_array:
                return
            if not (window.is_cut_off(error) and window.grow()):
                raise window.error_at(f"not valid JSON: {error.msg}", error.pos) from None
        except UserError as error:
            value_start = _skip_space(window.text, window.start)
            raise window.error_at(str(error), value_start) from None
        else:
            number += 1
            yield InputRecord(f"record {number}", value)
    window.check_end()


class ArrayWindow:
    """The part of a file with a JSON array that is in memory. text[start:] is not parsed yet."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.text = file.read(HEAD)
        self.start = self.text.index("[") + 1
        self.line = 1  # where text[0] stands in the file
        self.column = 1
        self.is_array_done = False

    def take_element(self) -> Any:
        """The next element, or a UserError for one that cannot be worked with.

        The comma or bracket behind it is taken too. Raises JSONDecodeError, and takes nothing, if
        the text is wrong or the window ends; UserError beyond the limits of Python's parser.
        """
        value_start = _skip_space(self.text, self.start)
        with json_limits():
            value, value_end = DECODER.raw_decode(self.text, value_start)
        end = _skip_space(self.text, value_end)
        delimiter = self.text[end : end + 1]
        if delimiter not in (",", "]"):
            found = delimiter or "the end of the file"
            raise json.JSONDecodeError(f"expected , or ], found {found}", self.text, end)
        self.start = end + 1
        self.is_array_done = delimiter == "]"
        try:
            check_json(value, self.text[value_start:value_end])
        except UserError as error:
            return error
        return value

    def is_cut_off(self, error: json.JSONDecodeError) -> bool:
        """Whether the error can come from the end of the window alone."""
        is_near_end = error.pos > len(self.text) - 16  # within a number, a literal or an escape
        return is_near_end or error.msg.startswith("Unterminated string")

    def grow(self) -> bool:
        """Drop what is parsed and read more of the file. Returns False at the end of the file.

        At least as much as the window holds is read, so a long record is not parsed very often.
        """
        num_unparsed = len(self.text) - self.start
        block = self.file.read(max(BLOCK, num_unparsed))
        if not block:
            return False
        self.line, self.column = self._position(self.start)
        self.text = self.text[self.start :] + block
        self.start = 0
        return True

    def check_end(self) -> None:
        """Raise UserError if there is more than space behind the array."""
        rest = self.text[self.start :] + self.file.read(BLOCK)
        if rest.strip():
            num_spaces = len(rest) - len(rest.lstrip())
            raise self.error_at(
                "not valid JSON: more text after the array", self.start + num_spaces
            )

    def error_at(self, message: str, index: int) -> UserError:
        """The error with the place of text[index]."""
        line, column = self._position(index)
        return UserError(f"{self.file.name}: {message} at line {line} column {column}")

    def _position(self, index: int) -> tuple[int, int]:
        """Line and column of text[index] in the file."""
        num_breaks = self.text.count("\n", 0, index)
        if num_breaks == 0:
            return self.line, self.column + index
        last_break = self.text.rfind("\n", 0, index)
        return self.line + num_breaks, index - last_break


def _skip_space(text: str, index: int) -> int:
    space = SPACE.match(text, index)
    return space.end() if space else index


CONTAINERS: dict[str, Callable[[TextIO], Iterator[InputRecord]]] = {
    "array": _read_array,
    "jsonl": _read_json_lines,
    "parquet": _read_parquet,
    "text": _read_text,
    "lines": _read_lines,
}
