"""Raw files that tests write and read."""

import json
from pathlib import Path
from typing import Any

from minillama.data.formats import Document, detect, parse
from minillama.data.records import read_records
from minillama.data.sources import Source

ALPACA = {"instruction": "Q", "input": "I", "output": "A"}


def write(path: Path, content: Any) -> Path:
    """Write a string as it is, and anything else as JSON."""
    if not isinstance(content, str):
        content = json.dumps(content, ensure_ascii=False)
    path.write_text(content, encoding="utf-8")
    return path


def documents(sources: list[Source]) -> list[Document]:
    """The documents of all records."""
    found: list[Document] = []
    for source in sources:
        for record in read_records(source):
            found += parse(source, record).documents
    return found


def read(path: Path, data_format: str = "auto") -> list[Document]:
    """The documents of a file, in its detected format or in the given one."""
    if data_format == "auto":
        data_format = detect(path)
    return documents([Source(path, data_format)])
