"""What to read: files, folders, and the names in a LLaMA-Factory `dataset_info.json`.

    "a.json"            that file, as dataset_info.json beside it says, if it is in there
    "corpus/"           the files in the folder, in order of name
    "alpaca_gpt4_zh"    the entry of that name in DATASET_DIR/dataset_info.json: its file, columns and tags

An entry may pin its file by sha1; another content is refused. Hub addresses are not followed: nothing here uses a network.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from minillama.errors import UserError, closest, read_json

SUFFIXES = (".json", ".jsonl", ".parquet", ".txt", ".md")  # what is read of a folder
INFO = "dataset_info.json"
PARTS = ("columns", "tags")  # of an entry: what the file calls things


@dataclass(frozen=True)
class Source:
    """A file, how to read it, and what its columns and tags are called, by LLaMA-Factory's words, where it is not the usual."""

    path: Path
    data_format: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)


def find_sources(
    names: Sequence[str | Path], data_format: str = "auto", dataset_dir: str | Path = ""
) -> list[Source]:
    """The sources of files, folders and data set names. An explicit `data_format` wins over what dataset_info.json says."""
    found = [source for name in names for source in _find(str(name), Path(dataset_dir) / INFO)]
    return (
        found
        if data_format == "auto"
        else [replace(source, data_format=data_format) for source in found]
    )


def _find(name: str, info_path: Path) -> list[Source]:
    path = Path(name)
    if path.is_file():
        return [_described(path)]
    if path.is_dir():
        if inside := [
            file for file in sorted(path.iterdir()) if file.suffix in SUFFIXES and file.name != INFO
        ]:
            return [_described(file) for file in inside]
        raise UserError(f"{path}: the folder holds no {', '.join(SUFFIXES)} file")
    if Path(f"{path}.bin").is_file():
        raise UserError(f"{path}: a tokenized data set; give it alone, not among raw files")
    if not info_path.is_file():
        raise UserError(
            f"{name}: no such file or folder, and no {info_path} to look the name up in"
        )
    info = _read_info(info_path)
    if name not in info:
        raise UserError(
            f"{info_path}: has no data set {name!r}{closest(name, info)}; it has: {', '.join(sorted(info)[:20])}"
        )
    return [_entry(info_path, name, info[name])]


def _described(path: Path) -> Source:
    """A file, with the columns and tags dataset_info.json beside it gives, if it does."""
    info_path = path.parent / INFO
    info = _read_info(info_path) if info_path.is_file() else {}
    named = next(
        (name for name, entry in info.items() if entry.get("file_name") == path.name), None
    )
    return Source(path) if named is None else _entry(info_path, named, info[named])


def _entry(info_path: Path, name: str, entry: dict[str, Any]) -> Source:
    """The source an entry describes. Columns it does not name are not read: history and system are off unless named."""
    if "file_name" not in entry:
        raise UserError(
            f"{info_path}: {name} has no file_name; download its data and add the file's name"
        )
    path, formatting, sha1 = (
        info_path.parent / entry["file_name"],
        entry.get("formatting", "alpaca"),
        entry.get("file_sha1"),
    )
    if not path.is_file():
        raise UserError(f"{path}: no such file; {info_path} names it for {name}")
    if formatting not in ("alpaca", "sharegpt") or entry.get("ranking"):
        kind = (
            "ranking data, for reward models"
            if entry.get("ranking")
            else f"of formatting {formatting!r}"
        )
        raise UserError(
            f"{info_path}: {name} is {kind}; known are alpaca and sharegpt, for supervised training"
        )
    if sha1 and (found := hash_of(path, "sha1")) != sha1:
        raise UserError(
            f"{path}: its sha1 is {found}, {info_path} says {sha1} for {name}; get the file again"
        )
    named = {word: given or "" for part in PARTS for word, given in entry.get(part, {}).items()}
    return Source(path, formatting, {"history": "", "system": ""} | named)


def _read_info(path: Path) -> dict[str, Any]:
    info = read_json(path)
    if not all(
        isinstance(entry, dict) and all(isinstance(entry.get(part, {}), dict) for part in PARTS)
        for entry in info.values()
    ):
        raise UserError(
            f"{path}: expected an object that maps data set names to objects, and their {' and '.join(PARTS)} to objects too"
        )
    return info


def hash_of(path: Path, algorithm: str = "sha256") -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
