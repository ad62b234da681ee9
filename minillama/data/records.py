"""Files to records: a stream that never holds a whole file in memory.

A record is a JSON value with its place in the file, such as "record 3 (line 5)". What its keys mean
is the topic of formats.py. Here a file is one of five *containers*, told apart by its content:

    array      a JSON array, or an object with nothing else in it: {"data": […]}
    jsonl      a JSON value on each line
    parquet    a table; each row is a record
    text       the whole file is one record
    lines      the same file, if the format `lines` was asked for: each line is a record

A file with a suffix that is not known is only read if its content is JSON or Parquet, or if plain
text was asked for: a table, such as .csv, or a compressed file is not trained on as if it were one.
"""

import json
import re
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from minillama.data.json_array import WRAPPED, read_array
from minillama.data.sources import COMPRESSED, SUFFIXES, Source
from minillama.errors import UserError
from minillama.files import numbered_lines, open_text
from minillama.json_values import check_json, json_limits

BLOCK = 1 << 18  # characters read at a time
HEAD = 1024  # bytes, or characters, that tell what a file is
JSON_SUFFIXES = (".json", ".jsonl")
TEXT_SUFFIXES = (".txt", ".md")
MESSAGE_KEYS = ("conversations", "messages")  # a record, and no data set in an object
END_OF_WRAPPED = re.compile(r"\]\s*\}\s*\Z")


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
        is_array = first_byte == b"[" or _is_wrapped(source, head)
        return "array" if is_array else "jsonl"
    is_text_asked_for = source.data_format in ("text", "lines")
    if suffix not in ("", *TEXT_SUFFIXES) and not is_text_asked_for:
        raise UserError(_unknown_suffix(path))
    return "lines" if source.data_format == "lines" else "text"


def _is_wrapped(source: Source, head: bytes) -> bool:
    """Whether a file is one object that holds a list of records, and nothing else."""
    beginning = WRAPPED.match(head.decode("utf-8-sig", errors="ignore"))
    messages = (*MESSAGE_KEYS, source.columns.get("messages"))
    if beginning is None or beginning["key"] in messages:
        return False
    with open(source.path, "rb") as file:
        file.seek(max(0, source.path.stat().st_size - HEAD))
        tail = file.read().decode(errors="ignore")
    return END_OF_WRAPPED.search(tail) is not None


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
    for number, value in enumerate(read_array(file), start=1):
        yield InputRecord(f"record {number}", value)


CONTAINERS: dict[str, Callable[[TextIO], Iterator[InputRecord]]] = {
    "array": _read_array,
    "jsonl": _read_json_lines,
    "parquet": _read_parquet,
    "text": _read_text,
    "lines": _read_lines,
}
