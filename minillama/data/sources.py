"""Which files to read: files, folders, and names in a LLaMA-Factory `dataset_info.json`.

    "a.json"            that file, as dataset_info.json beside it describes it, if it does
    "corpus/"           the files in the folder, in order of name
    "alpaca_gpt4_zh"    the entry of that name in DATASET_DIR/dataset_info.json: a file and what it
                        calls its columns and tags

An entry can give the sha1 of its file; a file with other content is refused. Addresses on the
Hugging Face Hub are left out on purpose: nothing here uses a network.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from minillama.errors import UserError, closest
from minillama.files import read_json

SUFFIXES = (".json", ".jsonl", ".parquet", ".txt", ".md")  # the files of a folder that are read
INFO_NAME = "dataset_info.json"
NAME_TABLES = ("columns", "tags")  # the tables of an entry that say what the file calls things


@dataclass(frozen=True)
class Source:
    """A file and how to read it.

    columns: what the file calls its columns and tags, by LLaMA-Factory's names for them (the keys
    of formats.COLUMNS). A name that is not listed has its usual value.
    """

    path: Path
    data_format: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)


def find_sources(
    names: Sequence[str | Path], data_format: str = "auto", dataset_dir: str | Path = ""
) -> list[Source]:
    """The sources of files, folders and names of data sets.

    data_format: unless it is "auto", it replaces the format that dataset_info.json gives.
    """
    info_path = Path(dataset_dir) / INFO_NAME
    sources = []
    for name in names:
        for source in _find(str(name), info_path):
            if data_format != "auto":
                source = replace(source, data_format=data_format)
            sources.append(source)
    return sources


def _find(name: str, info_path: Path) -> list[Source]:
    path = Path(name)
    if path.is_file():
        return [_source_of_file(path)]
    if path.is_dir():
        return _sources_of_folder(path)
    if Path(f"{path}.bin").is_file():
        raise UserError(f"{path}: a tokenized data set; give it alone, not among raw files")
    if not info_path.is_file():
        raise UserError(
            f"{name}: no such file or folder, and no {info_path} to look the name up in"
        )
    info = _read_info(info_path)
    if name not in info:
        known = ", ".join(sorted(info)[:20])
        raise UserError(
            f"{info_path}: has no data set {name!r}{closest(name, info)}; it has: {known}"
        )
    return [_source_of_entry(info_path, name, info[name])]


def _sources_of_folder(folder: Path) -> list[Source]:
    sources = []
    for path in sorted(folder.iterdir()):
        if path.suffix in SUFFIXES and path.name != INFO_NAME:
            sources.append(_source_of_file(path))
    if not sources:
        raise UserError(f"{folder}: the folder holds no {', '.join(SUFFIXES)} file")
    return sources


def _source_of_file(path: Path) -> Source:
    """A file, with the columns and tags of its entry in dataset_info.json beside it, if any."""
    info_path = path.parent / INFO_NAME
    if info_path.is_file():
        for name, entry in _read_info(info_path).items():
            if entry.get("file_name") == path.name:
                return _source_of_entry(info_path, name, entry)
    return Source(path)


def _source_of_entry(info_path: Path, name: str, entry: dict[str, Any]) -> Source:
    """The source that an entry describes.

    The columns `history` and `system` are not read unless the entry names them, as in
    LLaMA-Factory.
    """
    if "file_name" not in entry:
        raise UserError(
            f"{info_path}: {name} has no file_name; download its data and add the file's name"
        )
    path = info_path.parent / entry["file_name"]
    if not path.is_file():
        raise UserError(f"{path}: no such file; {info_path} names it for {name}")
    formatting = entry.get("formatting", "alpaca")
    is_ranking = bool(entry.get("ranking"))
    if is_ranking or formatting not in ("alpaca", "sharegpt"):
        kind = f"of formatting {formatting!r}"
        if is_ranking:
            kind = "ranking data, for reward models"
        raise UserError(
            f"{info_path}: {name} is {kind}; known are alpaca and sharegpt, for supervised training"
        )
    expected_sha1 = entry.get("file_sha1")
    if expected_sha1:
        sha1 = _sha1_of(path)
        if sha1 != expected_sha1:
            raise UserError(
                f"{path}: its sha1 is {sha1}, {info_path} says {expected_sha1} for {name}; "
                "get the file again"
            )
    columns = {"history": "", "system": ""}
    for table in NAME_TABLES:
        for column, name_in_file in entry.get(table, {}).items():
            columns[column] = name_in_file or ""
    return Source(path, formatting, columns)


def _read_info(path: Path) -> dict[str, Any]:
    info = read_json(path)
    if not all(map(_is_entry, info.values())):
        raise UserError(
            f"{path}: expected an object that maps data set names to objects, and their "
            f"{' and '.join(NAME_TABLES)} to objects too"
        )
    return info


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    return all(isinstance(entry.get(table, {}), dict) for table in NAME_TABLES)


def _sha1_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha1").hexdigest()
