"""How a data set's files get their names, and what follows if that was cut short.

    remove   PREFIX.json                                  the old data set is invalid
    rename   PREFIX.bin.partial, .mask.partial, …         to their names
    rename   PREFIX.json.partial                          the new one is there

Several renames are no single step. But before the first one PREFIX.json.partial has the sha256 of
all files, so whoever comes next can do what is left.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from minillama.errors import UserError
from minillama.files import append_file, read_json, sha256_of
from minillama.output_directory import take_lock

ARRAYS = ("bin", "mask", "idx")


def put_in_place(prefix: Path, parts: list[str]) -> None:
    """Rename the partial files, or those that are left. Until the .json is there, all are invalid.

    parts: of the new data set; others are the old one's.
    """
    Path(f"{prefix}.json").unlink(missing_ok=True)
    for part in ARRAYS:
        if part not in parts:
            Path(f"{prefix}.{part}").unlink(missing_ok=True)
    for part in (*parts, "json"):
        partial = Path(f"{prefix}.{part}.partial")
        if partial.exists():
            os.replace(partial, f"{prefix}.{part}")


def complete_dataset(prefix: Path | str) -> None:
    """Put a data set in place whose writer was killed while it renamed the files.

    Then its .json.partial has the sha256 of all files, and each is there under one of its names.
    Readers call this before they look for a data set. Without such remains it does nothing.
    """
    json_path = Path(f"{prefix}.json.partial")
    if not json_path.is_file():
        return
    with suppress(UserError, KeyError, OSError), append_file(json_path) as file:
        take_lock(file.fileno(), json_path, "its writer is alive")
        meta = read_json(json_path, keys={"sha256": dict})
        for part, expected in meta["sha256"].items():
            partial = Path(f"{prefix}.{part}.partial")
            path = partial if partial.exists() else Path(f"{prefix}.{part}")
            if sha256_of(path) != expected:
                return
        put_in_place(Path(prefix), parts_of(meta))
        for part in ARRAYS:
            Path(f"{prefix}.{part}.partial").unlink(missing_ok=True)


def parts_of(meta: dict[str, Any]) -> list[str]:
    """The files of a data set beside PREFIX.json."""
    all_are_targets = meta["targets"] == meta["tokens"]
    return ["bin", "idx"] if all_are_targets else ["bin", "mask", "idx"]
