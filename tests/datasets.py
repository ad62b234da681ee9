"""Small inputs and tokenized data sets that several tests make."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minillama.data.memmap import Chunk, Dataset, DatasetWriter
from minillama.data.token_cache import open_data
from minillama.data.tokenize import DataOptions, build_dataset
from minillama.tokenizer import Tokenizer


def alpaca(count: int) -> list[dict[str, str]]:
    """`count` Alpaca records of different lengths; every third one has an input."""
    records = []
    for i in range(count):
        records.append(
            {
                "instruction": f"Say {i}",
                "input": "twice" if i % 3 == 0 else "",
                "output": f"{i} the world " * (i % 7 + 1),
            }
        )
    return records


def write_json_lines(path: Path, records: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def build(
    files: Sequence[Path], tokenizer: Tokenizer, prefix: Path, quiet: bool = True, **options: Any
) -> dict[str, Any]:
    """`build_dataset`, without progress bars and with options as keywords."""
    return build_dataset(files, tokenizer, prefix, DataOptions(quiet=quiet, **options))


def open_path(path: Path, tokenizer: Tokenizer, **options: Any) -> Dataset:
    """`open_data` for one path, without progress bars and with options as keywords."""
    return open_data((str(path),), tokenizer, DataOptions(quiet=True, **options))


def write_dataset(
    prefix: Path, documents: list[tuple[list[int], list[int] | None]], vocab_size: int
) -> dict[str, Any]:
    """Write (ids, mask) pairs as a data set; mask None means that all tokens are targets."""
    chunk = Chunk(records=len(documents))
    for ids, mask in documents:
        chunk.append(ids, mask)
    with DatasetWriter(prefix, vocab_size, {}) as writer:
        writer.add(chunk)
        return writer.finish()


def document(dataset: Dataset, number: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Ids and mask of a document."""
    span = slice(dataset.offsets[number], dataset.offsets[number + 1])
    return dataset.tokens[span], None if dataset.mask is None else dataset.mask[span]


def all_ids(dataset: Dataset) -> list[list[int]]:
    """The ids of each document."""
    return [document(dataset, number)[0].tolist() for number in range(len(dataset))]


def contents(prefix: Path) -> dict[str, bytes]:
    return {part: Path(f"{prefix}.{part}").read_bytes() for part in ("bin", "mask", "idx", "json")}


def damage(prefix: Path, part: str, change) -> None:
    """Replace the content of PREFIX.part by change(content)."""
    path = Path(f"{prefix}.{part}")
    path.write_bytes(change(path.read_bytes()))
