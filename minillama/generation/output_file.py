"""A file of completions that grows while they are computed, one JSON record a line.

Records are appended to FILE.partial in the order in which they are finished. At the end they are
sorted, and FILE appears by one rename: it is complete or absent. An interrupted run goes on from
FILE.partial. That file belongs to the settings it was begun with, and is refused under others.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from minillama.errors import UserError
from minillama.files import append_file, json_line, parsing, read_json_lines, write_json_lines

Record = dict[str, Any]


def refuse_other_settings(old: Record, new: Record, remedy: str) -> None:
    """Raises UserError if a file was begun with settings that differ from those of now.

    The caller adds the file's name, with `parsing`.
    """
    for name in {**new, **old}:
        if old.get(name) != new.get(name):
            raise UserError(
                f"was begun with {name} = {old.get(name)!r}, now it is {new.get(name)!r}; {remedy}"
            )


def with_digest(record: Record) -> Record:
    """A record as it is written to a file from which a run may go on."""
    return {**record, "digest": _digest_of(record)}


def without_digest(record: Record) -> Record:
    """A record as it was. Raises UserError if it was changed since. A file of before has none."""
    content = dict(record)
    digest = content.pop("digest", None)
    if digest is not None and digest != _digest_of(content):
        raise UserError(
            f"the record {json.dumps(content, ensure_ascii=False)[:60]}… is not what was written "
            "(its digest differs); delete its line, and it is computed again"
        )
    return content


def _digest_of(record: Record) -> str:
    """The first 16 hexadecimal digits of the sha256 of a record's line."""
    return hashlib.sha256(json_line(record).encode("utf-8")).hexdigest()[:16]


class CompletionFile:
    """FILE while it is written: FILE.partial, whose first line holds the settings.

    done: the finished records, by the index of their prompt.
    """

    def __init__(self, path: Path, settings: Record) -> None:
        """Raises UserError if FILE is not empty, or FILE.partial has other settings."""
        exists = f"{path}: already exists; name another --output, or delete it"
        if path.is_dir():  # the root directory has no name, so this comes first
            raise UserError(exists)
        self.path = path
        self.partial = path.with_name(f"{path.name}.partial")
        if path.exists() and path.stat().st_size > 0:
            self.partial.unlink(missing_ok=True)  # killed between the two lines of `finish`
            raise UserError(exists)
        settings = json.loads(json.dumps(settings))  # as JSON gives them back: tuples are lists
        lines = read_json_lines(self.partial) if self.partial.is_file() else []
        with parsing(self.partial):
            records = [without_digest(line) for line in lines[1:]]
            if lines:
                remedy = "repeat the first command to go on, or delete it to start over"
                refuse_other_settings(lines[0]["settings"], settings, remedy)
        kept = [with_digest(record) for record in records]
        write_json_lines(self.partial, [{"settings": settings}, *kept])  # no line is cut short
        self.done = {record.pop("number"): record for record in records}

    def add(self, number: int, record: Record) -> None:
        """Append the record of the prompt with this index."""
        self.done[number] = record
        with append_file(self.partial) as file:
            line = json_line(with_digest({"number": number, **record}))
            file.write(line.encode("utf-8"))

    def finish(self) -> None:
        """Publish all records, in the order of the prompts, under the file's own name."""
        write_json_lines(self.path, [self.done[number] for number in sorted(self.done)])
        self.partial.unlink()
