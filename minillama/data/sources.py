"""What to read: files, folders, and the names in a LLaMA-Factory `dataset_info.json`.

    "a.json"            that file, as dataset_info.json beside it says, if it is in there
    "corpus/"           the files in the folder, in order of name
    "alpaca_gpt4_zh"    the entry of that name in DATASET_DIR/dataset_info.json: its file, columns and tags

An entry may pin its file by sha1; another content is refused. Hub addresses are not followed: nothing here uses a network.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minillama.data.containers import SUFFIXES
from minillama.errors import UserError, closest

INFO = "dataset_info.json"


@dataclass(frozen=True)
class Source:
    """A file, how to read it, and the names of its columns and tags, in LLaMA-Factory's words, where they are not the usual."""

    path: Path
    data_format: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


def find_sources(names: Sequence[str | Path], data_format: str = "auto", dataset_dir: str | Path = "") -> list[Source]:
    """The sources of files, folders and data set names. An explicit `data_format` wins over what dataset_info.json says."""
    found: list[Source] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = [file for file in sorted(path.iterdir()) if file.suffix in SUFFIXES and file.name != INFO]
            if not inside:
                raise UserError(f"{path}: the folder holds no {', '.join(SUFFIXES)} file")
            found += [_described(file, data_format) for file in inside]
        elif path.is_file():
            found.append(_described(path, data_format))
        elif Path(f"{path}.bin").is_file():
            raise UserError(f"{path}: a tokenized data set; give it alone, not among raw files")
        else:
            found.append(_named(str(name), data_format, Path(dataset_dir)))
    if not found:
        raise UserError("no data: name files, folders, or a tokenized data set")
    return found


def _described(path: Path, data_format: str) -> Source:
    """A file, with the columns and tags dataset_info.json beside it gives, if it does."""
    info = _read_info(path.parent / INFO) if (path.parent / INFO).is_file() else {}
    for name, entry in info.items():
        if entry.get("file_name") == path.name:
            return _entry(path.parent / INFO, name, entry, data_format)
    return Source(path, data_format)


def _named(name: str, data_format: str, folder: Path) -> Source:
    info_path = folder / INFO
    if not info_path.is_file():
        raise UserError(f"{name}: no such file or folder, and no {info_path} to look the name up in")
    info = _read_info(info_path)
    if name not in info:
        raise UserError(f"{info_path}: has no data set {name!r}{closest(name, info)}; it has: {', '.join(sorted(info)[:20])}")
    return _entry(info_path, name, info[name], data_format)


def _entry(info_path: Path, name: str, entry: dict[str, Any], data_format: str) -> Source:
    """The source an entry describes. Columns it does not name are not read: history and system are off unless named."""
    if "file_name" not in entry:
        raise UserError(f"{info_path}: {name} has no file_name; download its data and add the file's name")
    path = info_path.parent / entry["file_name"]
    if not path.is_file():
        raise UserError(f"{path}: no such file; {info_path} names it for {name}")
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt"):
        raise UserError(f"{info_path}: {name} has formatting {formatting!r}; known are alpaca and sharegpt")
    if entry.get("ranking"):
        raise UserError(f"{info_path}: {name} is ranking data, for reward models; supervised training cannot use it")
    if entry.get("file_sha1"):
        with open(path, "rb") as file:
            sha1 = hashlib.file_digest(file, "sha1").hexdigest()
        if sha1 != entry["file_sha1"]:
            raise UserError(f"{path}: its sha1 is {sha1}, {info_path} says {entry['file_sha1']} for {name}; get the file again")
    columns = {"history": "", "system": ""} | {key: value or "" for key, value in entry.get("columns", {}).items()}
    return Source(path, formatting if data_format == "auto" else data_format, columns, entry.get("tags", {}))


def _read_info(path: Path) -> dict[str, Any]:
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(info, dict) or not all(isinstance(entry, dict) for entry in info.values()):
        raise UserError(f"{path}: expected an object that maps data set names to objects")
    return info
