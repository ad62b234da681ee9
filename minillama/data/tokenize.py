"""Raw files to a tokenized data set: what `convert.py data` does, and train.py once for a raw file.

    find_sources ─▶ read_records ─▶ chunks ─┬▶ parse ─▶ render ─▶ encode ─┬▶ DatasetWriter
                                            └────── N worker processes ───┘

Every step is a generator from which the next one pulls. So only a few chunks of records are in
memory, whatever the size of the file. This path imports no torch.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minillama.data.encode import encode_block, encode_document
from minillama.data.formats import PLAIN_TEXT, BadRecord, detect, parse
from minillama.data.memmap import Chunk, DatasetWriter
from minillama.data.records import InputRecord, TextBlock, read_records
from minillama.data.sources import Source, find_sources
from minillama.data.workers import map_in_order
from minillama.errors import UserError
from minillama.files import sha256_of
from minillama.tokenizer import Tokenizer

CHUNK_RECORDS = 512
CHUNK_CHARACTERS = 1 << 19

Records = list[tuple[Source, InputRecord]]


@dataclass(frozen=True)
class DataOptions:
    """How raw files become a tokenized data set."""

    data_format: str = "auto"  # auto: from the first record of each file
    template: str = ""  # empty: default_template, or for a tokenized data set its own
    default_template: str = "alpaca"
    append_eod: bool = True  # end each document with EOS
    skip_bad_records: bool = False
    dataset_dir: str = ""  # the folder of the dataset_info.json that names data sets
    cache_dir: str = ""  # empty: $XDG_CACHE_HOME/minillama
    workers: int = 1  # processes
    quiet: bool = False

    @property
    def raw_template(self) -> str:
        """The template for raw files."""
        return self.template or self.default_template


def build_dataset(
    files: Sequence[Path | str],
    tokenizer: Tokenizer,
    prefix: Path,
    options: DataOptions = DataOptions(),
) -> dict[str, Any]:
    """Tokenize files, folders and named data sets into the data set PREFIX.

    Returns what PREFIX.json says. After an interruption, the same call continues where it stopped.
    Raises UserError for a malformed record, unless options.skip_bad_records.
    """
    sources = _detect_formats(find_sources(files, options.data_format, options.dataset_dir))
    origin = _describe_origin(sources, tokenizer, options)
    if not options.quiet:
        for source in sources:
            print(f"{source.path}: read as {source.data_format}", file=sys.stderr)
    encode = partial(encode_records, tokenizer, options.raw_template, options.append_eod)
    with (
        DatasetWriter(prefix, tokenizer.size, origin) as writer,
        tqdm(desc=f"tokenizing {prefix.name}", unit=" documents", disable=options.quiet) as bar,
    ):
        bar.update(writer.meta["documents"])
        records = _read_sources(sources, split_text=tokenizer.splits_at_lines)
        new_records = islice(records, writer.meta["records"], None)  # the others are written
        for chunk in map_in_order(encode, _chunks(new_records), options.workers):
            if chunk.bad and not options.skip_bad_records:
                raise UserError(f"{chunk.bad[0]}; --skip_bad_records leaves such records out")
            writer.add(chunk)
            bar.update(len(chunk.ends))
        meta = writer.finish()
    skipped = meta["skipped_records"]
    if skipped and not options.quiet:
        print(
            f"{len(skipped)} bad records left out, listed in {prefix}.json; "
            f"the first: {skipped[0]}",
            file=sys.stderr,
        )
    return meta


def encode_records(
    tokenizer: Tokenizer, template: str, append_eod: bool, records: Records
) -> Chunk:
    """Records to ids and masks: the work of one process."""
    chunk = Chunk(records=len(records))
    for source, record in records:
        if isinstance(record.value, TextBlock):
            ids = encode_block(tokenizer, record.value, append_eod)
            chunk.append(ids, None, ends_document=record.value.is_last)
            continue
        try:
            for document in parse(source, record):
                chunk.append(*encode_document(tokenizer, document, template, append_eod))
        except BadRecord as error:
            chunk.bad.append(str(error))
    return chunk


def file_stamp(path: Path) -> dict[str, int]:
    """Size and time of a file: as long as they are the same, its content is taken as unchanged."""
    status = path.stat()
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def _detect_formats(sources: list[Source]) -> list[Source]:
    detected = []
    for source in sources:
        if source.data_format == "auto":
            source = replace(source, data_format=detect(source.path))
        detected.append(source)
    return detected


def _describe_origin(
    sources: list[Source], tokenizer: Tokenizer, options: DataOptions
) -> dict[str, Any]:
    """What PREFIX.json says of how a data set was made."""
    described = {}
    for source in sources:
        described[str(source.path.resolve())] = {
            "format": source.data_format,
            "columns": source.columns,
            **file_stamp(source.path),
            "sha256": sha256_of(source.path),
        }
    has_template = any(source.data_format not in ("text", "lines") for source in sources)
    return {
        "tokenizer_sha256": tokenizer.sha256,
        "template": options.raw_template if has_template else "",
        "append_eod": options.append_eod,
        "sources": described,
    }


def _read_sources(sources: list[Source], split_text: bool) -> Iterator[tuple[Source, InputRecord]]:
    for source in sources:
        takes_text = source.data_format in PLAIN_TEXT
        for record in read_records(source, split_text and takes_text):
            yield source, record


def _chunks(records: Iterable[tuple[Source, InputRecord]]) -> Iterator[Records]:
    """Lists of records with about as much text each, so that processes take about as long."""
    chunk: Records = []
    num_characters = 0
    for source, record in records:
        chunk.append((source, record))
        num_characters += len(str(record.value))
        if len(chunk) == CHUNK_RECORDS or num_characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk = []
            num_characters = 0
    if chunk:
        yield chunk
