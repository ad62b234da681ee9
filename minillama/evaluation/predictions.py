"""The predictions of a run that may be interrupted: DIR/predictions.jsonl and DIR/settings.json.

Each rank appends its records to a file of its own as batches are finished. At the end rank 0 writes
all of them, in the order of the questions.

    running      predictions.jsonl (rank 0), predictions.rank-1.jsonl, …        as they come
    finished     predictions.jsonl                                              sorted

A run with the same settings continues from these files. Other settings are refused, and so are
records that were changed: each carries a digest of itself.
"""

from collections.abc import Iterable
from pathlib import Path

from minillama.evaluation.report import Record
from minillama.files import (
    append_file,
    json_line,
    parsing,
    read_json,
    read_json_lines,
    write_json,
    write_json_lines,
)
from minillama.generation.output_file import refuse_other_settings, with_digest, without_digest

REMEDY = "name another --out, or delete it"


def resume(directory: Path, settings: Record) -> dict[str, Record]:
    """The records that an interrupted run left, by id, gathered into predictions.jsonl.

    Raises UserError if that run had other settings.
    """
    files = sorted(directory.glob("predictions*.jsonl"))
    path = directory / "settings.json"
    old_settings = settings
    if path.is_file():
        old_settings = read_json(path)
    elif files:
        old_settings = {}  # predictions of an unknown run
    with parsing(directory):
        refuse_other_settings(old_settings, settings, REMEDY)
    write_json(path, settings)
    records = {}
    for file in files:
        with parsing(file):
            for line in read_json_lines(file):
                record = without_digest(line)
                records[record["id"]] = record
    publish(directory, records.values())
    return records


def append(directory: Path, rank: int, records: Iterable[Record]) -> None:
    """Append finished records to this rank's file."""
    name = f"predictions.rank-{rank}.jsonl" if rank else "predictions.jsonl"
    lines = "".join(json_line(with_digest(record)) for record in records)
    with append_file(directory / name) as file:
        file.write(lines.encode("utf-8"))


def publish(directory: Path, records: Iterable[Record]) -> None:
    """Replace predictions.jsonl, and the files of the other ranks with it."""
    write_json_lines(directory / "predictions.jsonl", map(with_digest, records))
    for file in directory.glob("predictions.rank-*.jsonl"):
        file.unlink()
