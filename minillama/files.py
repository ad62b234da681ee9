"""Files: the only module that opens a file for writing, and the readers of text and JSON.

A program can be killed at any moment, and a disk can be full at any write. A file that is written
in place is then cut short, and the next run cannot read it. So a file is complete or absent:

    write    .NAME.partial, in the same directory      an old NAME is still there
    fsync    the content is on the disk
    rename   .NAME.partial becomes NAME                the old NAME is gone, in the same instant
    fsync    of the directory: the new name is on the disk

Only records that grow, such as metrics.jsonl, are appended to; their reader leaves out a last line
that was cut short. Readers accept regular files up to a limit. One process
at a time writes a path; locks, and directories that are complete or absent, are in
output_directory.py.
"""

import csv
import hashlib
import io
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from minillama.errors import UserError
from minillama.json_values import parse_json

MAX_BYTES = 2**30  # of a file that is read as a whole


def read_text(path: Path, remedy: str = "", max_bytes: int = MAX_BYTES) -> str:
    """Return the text of a UTF-8 file, without its byte order mark, with "\\n" as line end.

    Raises UserError if the file is missing (followed by `remedy`), not a regular file, larger than
    `max_bytes`, or not UTF-8.
    """
    return _decode(_read_bytes(path, remedy, max_bytes), path)


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a UTF-8 file as `read_text` reads it, for one that is too long to be read as a whole."""
    _regular_size(path)
    try:
        with named_errors(path), open(path, encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from None


def numbered_lines(file: TextIO) -> Iterator[tuple[int, str]]:
    """Yield number and text of the lines that are not blank, of a file open for reading.

    Only "\\n", "\\r\\n" and "\\r" end a line: JSON may hold other line breaks, such as U+2028.
    """
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield number, line.rstrip("\n")


def read_json(
    path: Path, remedy: str = "", keys: Mapping[str, type] | None = None, what: str = ""
) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Raises UserError if the file is missing (followed by `remedy`), damaged, or not `what` it should
    be: an object with values of the given types under `keys`.
    """
    content = parse_json(read_text(path, remedy), path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object")
    for key, kind in (keys or {}).items():
        if not isinstance(content.get(key), kind):
            raise UserError(f"{path}: not {what} ({key} is {content.get(key, 'missing')})")
    return content


def read_json_lines(path: Path, remedy: str = "") -> list[dict[str, Any]]:
    """Return the records of a file with one JSON object a line.

    A last line without a line end was cut short and is left out. Raises UserError as `read_text`
    does, and for any other line that is not a JSON object.
    """
    content = _read_bytes(path, remedy, MAX_BYTES)
    complete = content[: content.rfind(b"\n") + 1]  # before decoding: a character may be cut too
    lines = _decode(complete, path).split("\n")[:-1]
    records = []
    for number, line in enumerate(lines, start=1):
        record = parse_json(line, f"{path}: line {number}")
        if not isinstance(record, dict):
            raise UserError(f"{path}: line {number}: holds no JSON object")
        records.append(record)
    return records


@contextmanager
def parsing(where: Path | str = "") -> Iterator[None]:
    """Turn a wrong value found by the block into a UserError that begins with `where`."""
    place = f"{where}: " if where else ""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}{error}") from None
    except KeyError as error:
        raise UserError(f"{place}key {error.args[0]!r} is missing") from None
    except (ArithmeticError, TypeError, ValueError) as error:
        raise UserError(f"{place}a value is wrong or of the wrong type ({error})") from None


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's content, as hexadecimal digits."""
    _regular_size(path)
    with named_errors(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class OutputFile(io.FileIO):
    """An unbuffered binary file whose `write` is complete and whose errors name the file."""

    def write(self, content: Any) -> int:
        """Write a bytes-like object. One system call may write only a part of it."""
        view = memoryview(content)
        if view.nbytes == 0:
            return 0
        rest = view.cast("B")
        with named_errors(Path(str(self.name))):
            while len(rest) > 0:
                rest = rest[super().write(rest) :]
        return view.nbytes


def create_file(path: Path) -> OutputFile:
    """Create an empty file, and its directory, and open it for writing.

    What had this name is removed, and a link is not followed. The file is visible at once, so this
    is for files in the directory of `new_directory`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    return OutputFile(path, "xb")


def append_file(path: Path) -> OutputFile:
    """Open a file, created with its directory if it is missing, for writing at its end.

    Raises UserError for a symbolic link, which would lead to another file.
    """
    refuse_link(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return OutputFile(path, "ab")


def refuse_link(path: Path) -> None:
    """Raise UserError if `path`, which is about to be written, is a symbolic link."""
    if path.is_symlink():
        raise UserError(f"{path}: a symbolic link in the place of a file to write; remove it")


@contextmanager
def new_file(path: Path) -> Iterator[OutputFile]:
    """Open a file that becomes `path` when the block ends.

    After an exception in the block, `path` is as before.
    """
    partial = hidden_sibling(path, "partial")
    with named_errors(path):
        try:
            with create_file(partial) as file:
                yield file
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        flush_to_disk(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file. At any moment the path holds the old content or the new one."""
    with new_file(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file. At any moment the path holds the old text or the new one."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, indented by two spaces. At any moment it is the old or the new one."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def json_line(record: dict[str, Any]) -> str:
    """Return a record as one line of JSON, with its line end."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def write_json_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write one record a line. At any moment the path holds the old records or the new ones."""
    write_text(path, "".join(map(json_line, records)))


def write_csv(path: Path, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV file with a header. At any moment the path holds the old rows or the new ones."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def flush_to_disk(path: Path) -> None:
    """Wait until the content of a file, or the names in a directory, are on the disk."""
    if os.name == "nt":  # Windows flushes neither directories nor files opened for reading
        return
    with named_errors(path):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def hidden_sibling(path: Path, state: str) -> Path:
    """Return the temporary name .NAME.STATE beside `path`.

    Raises UserError if `path` has no name, such as the root directory.
    """
    if path.name in ("", ".."):
        raise UserError(f"{path}: cannot be written; name a file or directory below it")
    return path.with_name(f".{path.name}.{state}")


def is_temporary(path: Path) -> bool:
    """Tell whether `path` is what a process that was killed leaves of a file."""
    return path.name.startswith(".") and path.name.endswith(".partial")


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Add `path` to an OSError of the block that names no file, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def _regular_size(path: Path, remedy: str = "") -> int:
    """Return the bytes of a file. Raises UserError if it is missing, or endless like /dev/zero."""
    try:
        status = path.stat()
    except FileNotFoundError:
        advice = f"; {remedy}" if remedy else ""
        raise UserError(f"{path}: no such file{advice}") from None
    except ValueError as error:
        raise UserError(f"{path}: not the name of a file ({error})") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path}: not a regular file")
    return status.st_size


def _read_bytes(path: Path, remedy: str, max_bytes: int) -> bytes:
    size = _regular_size(path, remedy)
    if size > max_bytes:
        raise UserError(f"{path}: has {size:,} bytes; at most {max_bytes:,} are read")
    with named_errors(path):
        return path.read_bytes()


def _decode(content: bytes, path: Path) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")
