"""Files of records, a line of JSON each, that grow while they are computed: a run that was cut off goes on where it stopped.

Lines are appended to an unfinished file in whatever order they come. At the end they are put in order, and the file appears by one
rename: it is complete or absent. An unfinished file belongs to the settings it was begun with, and is refused under others.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minillama.errors import UserError, parsing

Record = dict[str, Any]


def read_lines(path: Path) -> list[Record]:
    """The records of a file, without a last line that was cut short."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def line_of(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def replace_lines(path: Path, records: Iterable[Record]) -> None:
    """Let a file hold these records; at any moment it holds the old ones or the new ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text("".join(map(line_of, records)), encoding="utf-8")
    os.replace(unfinished, path)


def refuse_other_settings(old: Record, new: Record, remedy: str) -> None:
    """Raises UserError where a file was begun with other settings than those now; `parsing` adds its name."""
    for name in {**new, **old}:
        if old.get(name) != new.get(name):
            raise UserError(
                f"was begun with {name} = {old.get(name)!r}, now it is {new.get(name)!r}; {remedy}"
            )


class CompletionFile:
    """FILE.jsonl in the making, as FILE.jsonl.partial, whose first line holds the settings; `done`: finished records by their number."""

    def __init__(self, path: Path, settings: Record) -> None:
        """Raises UserError where FILE holds something already, or FILE.partial was begun with other settings."""
        if path.exists() and (path.is_dir() or path.stat().st_size):
            raise UserError(f"{path}: already exists; name another --output, or delete it")
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        head = {"settings": json.loads(json.dumps(settings))}
        with parsing(self.partial):
            begun, *records = (read_lines(self.partial) if self.partial.is_file() else []) or [head]
            refuse_other_settings(
                begun["settings"],
                head["settings"],
                "repeat the first command to go on, or delete it to start over",
            )
        replace_lines(self.partial, [head, *records])
        self.done = {record.pop("number"): record for record in records}

    def add(self, number: int, record: Record) -> None:
        self.done[number] = record
        with open(self.partial, "a", encoding="utf-8") as file:
            file.write(line_of({"number": number} | record))

    def finish(self) -> None:
        """All records in order under the file's own name."""
        replace_lines(self.path, [self.done[number] for number in sorted(self.done)])
        self.partial.unlink()
