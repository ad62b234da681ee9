"""Which files to read: files, folders, and names in a LLaMA-Factory `dataset_info.json`.

    "a.json"            that file, as dataset_info.json beside it describes it, if it does
    "corpus/"           the files in the folder, in order of name, without a README or licence
    "alpaca_gpt4_zh"    the entry of that name in DATASET_DIR/dataset_info.json: a file and what it
                        calls its columns and tags

An entry can give the sha1 of its file; a file with other content is refused. So is an entry that
names a file outside its folder, or has a key that would change what is read and is not known here:
a data set that was downloaded decides neither of them. Addresses on the
Hugging Face Hub are left out, because nothing here uses a network.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from minillama.errors import UserError, closest
from minillama.files import read_json
from minillama.hub import hub_hint

SUFFIXES = (".json", ".jsonl", ".parquet", ".txt", ".md")  # the files of a folder that are read
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar", ".tgz")
TABLES = (".csv", ".tsv", ".arrow", ".xls", ".xlsx")
# Texts about a data set, which many data folders hold beside the data.
CARD = re.compile(
    r"(readme|licen[cs]e|changelog|contributing|citation|notice)(?![a-z]).*\.(md|txt)",
    re.IGNORECASE,
)
INFO_NAME = "dataset_info.json"
NAME_TABLES = ("columns", "tags")  # the tables of an entry that say what the file calls things

# LLaMA-Factory's names of columns and tags, and what files call them unless dataset_info.json says
# otherwise.
COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": "history",
    "system": "system",
    "messages": "conversations",
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "system_tag": "system",
}
# Tags of messages that are an error wherever they occur, so that their name changes nothing.
HARMLESS_TAGS = ("observation_tag", "function_tag")
ENTRY_KEYS = ("file_name", "file_sha1", "formatting", "ranking", *NAME_TABLES)
# Where an entry's data is on a hub. A local file is read, so nothing is fetched from there.
HUB_KEYS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "subset", "split", "folder")


@dataclass(frozen=True)
class Source:
    """A file and how to read it.

    columns: what the file calls its columns and tags, by LLaMA-Factory's names for them (the keys
    of COLUMNS). A name that is not listed has its usual value.
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
        hint = hub_hint(path, is_dataset=True)
        remedy = hint or "; nothing is downloaded here: give the path of a file"
        raise UserError(
            f"{name}: no such file or folder, and no {info_path} to look the name up in{remedy}"
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
        if _is_read(path):
            sources.append(_source_of_file(path))
        elif path.suffix.lower() in (*COMPRESSED, *TABLES):
            raise UserError(
                f"{path}: a {path.suffix} file is not read; unpack it or convert it to JSON lines, "
                "or move it out of the folder"
            )
    if not sources:
        hint = hub_hint(folder, is_dataset=True)
        raise UserError(f"{folder}: the folder holds no {', '.join(SUFFIXES)} file{hint}")
    return sources


def _is_read(path: Path) -> bool:
    """Whether a file of a folder is one of its data files."""
    if path.name == INFO_NAME or path.name.startswith(".") or CARD.fullmatch(path.name):
        return False
    return path.suffix.lower() in SUFFIXES


def find_unread(names: Sequence[str | Path]) -> list[str]:
    """What lies in the folders among `names` and is not read. Subfolders are not read either."""
    unread = []
    for folder in filter(Path.is_dir, map(Path, names)):
        for path in sorted(folder.iterdir()):
            if path.name != INFO_NAME and not _is_read(path):
                unread.append(str(path))
    return unread


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
    place = f"{info_path}: {name}"
    path = _path_of_entry(info_path, place, entry)
    _refuse_unknown(place, entry, (*ENTRY_KEYS, *HUB_KEYS))
    formatting = entry.get("formatting", "alpaca")
    is_ranking = bool(entry.get("ranking"))
    if is_ranking or formatting not in ("alpaca", "sharegpt"):
        kind = f"of formatting {formatting!r}"
        if is_ranking:
            kind = "ranking data, for reward models"
        raise UserError(
            f"{place} is {kind}; known are alpaca and sharegpt, for supervised training"
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
        names = {key: value or "" for key, value in entry.get(table, {}).items()}
        _refuse_unknown(f"{place}: {table}", names, (*COLUMNS, *HARMLESS_TAGS))
        columns |= {key: value for key, value in names.items() if key in COLUMNS}
    for column, name_in_file in columns.items():
        if not isinstance(name_in_file, str):
            raise UserError(f"{place}: {column} is {name_in_file!r}, expected the name of a column")
    return Source(path, formatting, columns)


def _path_of_entry(info_path: Path, place: str, entry: dict[str, Any]) -> Path:
    """The file of an entry. It must lie in the folder of dataset_info.json, or below it."""
    if "file_name" not in entry:
        raise UserError(f"{place} has no file_name; download its data and add the file's name")
    file_name = entry["file_name"]
    if not isinstance(file_name, str):
        raise UserError(f"{place}: file_name is {file_name!r}, expected the name of a file")
    if Path(file_name).is_absolute() or ".." in Path(file_name).parts:
        raise UserError(
            f"{place}: file_name {file_name!r} is outside {info_path.parent}; move the file into "
            "that folder, or give its path to --data"
        )
    path = info_path.parent / file_name
    if not path.is_file():
        raise UserError(f"{path}: no such file; named by {place}")
    return path


def _refuse_unknown(place: str, values: dict[str, Any], known: Sequence[str]) -> None:
    """Raise UserError for a key with a value that is not known: it would change what is read."""
    for key, value in values.items():
        if value and key not in known:
            raise UserError(
                f"{place}: the key {key!r} is not known here{closest(key, known)}; take it out if "
                "the data is right without it"
            )


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
