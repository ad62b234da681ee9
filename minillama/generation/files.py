"""A file of answers: a record for each prompt, in the prompts' order, and a run that was cut off goes on where it stopped.

Records are appended to FILE.partial as they are finished, in whatever order, after a first line that says which prompts and settings
they belong to. At the end they are put in order, and FILE appears by one rename: it is complete or absent.
"""

import json
import os
from pathlib import Path
from typing import Any

from minillama.errors import UserError, parsing


class AnswerFile:
    """FILE.jsonl in the making; `done` holds the finished records by their prompt's number."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Raises UserError where FILE is there already, or FILE.partial was begun with other settings."""
        if path.exists():
            raise UserError(f"{path}: already exists; name another --output, or delete it")
        self.path, self.partial, self.done = path, path.with_name(path.name + ".partial"), {}
        path.parent.mkdir(parents=True, exist_ok=True)
        head, lines = {"settings": json.loads(json.dumps(settings))}, []
        if self.partial.is_file():
            with parsing(self.partial):  # cut at line feeds alone: a text may hold other kinds of line break
                lines = [dict(json.loads(line)) for line in self.partial.read_text(encoding="utf-8").split("\n")[:-1]]
        if lines and lines[0] != head:
            old, new = lines[0].get("settings", {}), head["settings"]
            changed = next(key for key in (*new, *old) if old.get(key) != new.get(key))
            raise UserError(f"{self.partial}: was begun with {changed} = {old.get(changed)!r}, now it is {new.get(changed)!r}; "
                            "repeat the first command to go on, or delete this file to start over")
        for record in lines[1:]:
            self.done[record.pop("number")] = record
        kept = [head, *({"number": number} | record for number, record in self.done.items())]
        self.partial.write_text("".join(map(_line, kept)), encoding="utf-8")  # without a last line that was cut off

    def add(self, number: int, record: dict[str, Any]) -> None:
        self.done[number] = record
        with open(self.partial, "a", encoding="utf-8") as file:
            file.write(_line({"number": number} | record))

    def finish(self) -> None:
        """All records in order under the file's own name."""
        self.partial.write_text("".join(_line(self.done[number]) for number in sorted(self.done)), encoding="utf-8")
        os.replace(self.partial, self.path)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
