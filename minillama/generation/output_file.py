"""A file of completions that grows while they are computed, one JSON record a line.

Records are appended to FILE.partial in the order in which they are finished. At the end they are
sorted, and FILE appears by one rename: it is complete or absent. An interrupted run goes on from
FILE.partial. That file belongs to the settings it was begun with, and is refused under others.
"""

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


class CompletionFile:
    """FILE while it is written: FILE.partial, whose first line holds the settings.

    done: the finished records, by the index of their prompt.
    """

    def __init__(self, path: Path, settings: Record) -> None:
        """Raises UserError if FILE is not empty, or FILE.partial has other settings."""
        self.path = path
        self.partial = path.with_name(f"{path.name}.partial")
        if path.exists() and (path.is_dir() or path.stat().st_size > 0):
            if path.is_file():
                self.partial.unlink(missing_ok=True)  # killed between the two lines of `finish`
            raise UserError(f"{path}: already exists; name another --output, or delete it")
        settings = json.loads(json.dumps(settings))  # as JSON gives them back: tuples are lists
        lines = read_json_lines(self.partial) if self.partial.is_file() else []
        records = lines[1:]
        with parsing(self.partial):
            if lines:
                remedy = "repeat the first command to go on, or delete it to start over"
                refuse_other_settings(lines[0]["settings"], settings, remedy)
        write_json_lines(self.partial, [{"settings": settings}, *records])  # no line is cut short
        self.done = {record.pop("number"): record for record in records}

    def add(self, number: int, record: Record) -> None:
        """Append the record of the prompt with this index."""
        self.done[number] = record
        with append_file(self.partial) as file:
            file.write(json_line({"number": number, **record}).encode("utf-8"))

    def finish(self) -> None:
        """Publish all records, in the order of the prompts, under the file's own name."""
        write_json_lines(self.path, [self.done[number] for number in sorted(self.done)])
        self.partial.unlink()
