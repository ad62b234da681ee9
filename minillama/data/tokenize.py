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

from minillama.chat import is_jinja, name_of
from minillama.data.encode import encode_block, encode_document, open_chat_template
from minillama.data.formats import PLAIN_TEXT, BadRecord, default_template, detect, parse
from minillama.data.memmap import MAX_DROPPED, Chunk, DatasetWriter
from minillama.data.records import InputRecord, TextBlock, read_records
from minillama.data.sources import Source, find_sources, find_unread
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
    template: str = ""  # empty: base_template, else the data's; for a tokenized data set its own
    base_template: str = ""  # the one that the base model was tuned with
    append_eod: bool = True  # end each document with EOS
    skip_bad_records: bool = False
    max_samples: int = 0  # records read of each file, from its beginning; 0: all
    max_dropped: float = MAX_DROPPED  # the largest share of documents without a target
    dataset_dir: str = ""  # the folder of the dataset_info.json that names data sets
    cache_dir: str = ""  # empty: $XDG_CACHE_HOME/minillama
    workers: int = 1  # processes
    quiet: bool = False


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
    sources = detect_sources(files, options)
    template = choose_template(sources, options)
    origin = _describe_origin(sources, tokenizer, template, options)
    origin["unread_files"] = find_unread(files)
    if not options.quiet:
        for source in sources:
            print(f"{source.path}: read as {source.data_format}", file=sys.stderr)
        print(f"{prefix}: template {name_of(template)}", file=sys.stderr)
        if is_jinja(template):
            _print_warning(tokenizer, template)
    encode = partial(encode_records, tokenizer, template, options.append_eod)
    with (
        DatasetWriter(prefix, tokenizer.size, origin) as writer,
        tqdm(desc=f"tokenizing {prefix.name}", unit=" documents", disable=options.quiet) as bar,
    ):
        bar.update(writer.meta["documents"])
        records = _read_sources(sources, tokenizer.splits_at_lines, options.max_samples)
        new_records = islice(records, writer.meta["records"], None)  # the others are written
        for chunk in map_in_order(encode, _chunks(new_records), options.workers):
            if chunk.bad and not options.skip_bad_records:
                raise UserError(f"{chunk.bad[0]}; --skip_bad_records leaves such records out")
            writer.add(chunk)
            bar.update(len(chunk.ends))
        meta = writer.finish(options.max_dropped)
    if not options.quiet:
        print_omissions(prefix, meta)
    return meta


def _print_warning(tokenizer: Tokenizer, template: str) -> None:
    warning = open_chat_template(tokenizer, template).prompt_warning()
    if warning:
        print(f"warning: {warning}", file=sys.stderr)


def print_omissions(prefix: Path, meta: dict[str, Any]) -> None:
    """Print what of the input is not trained on. meta: what PREFIX.json says."""
    lines = []
    unread = meta.get("unread_files")
    if unread:
        lines.append(f"not read: {', '.join(unread)}")
    skipped = meta["skipped_records"]
    if skipped:
        lines.append(
            f"{len(skipped)} bad records left out, listed in {prefix}.json; the first: {skipped[0]}"
        )
    dropped = meta.get("dropped_messages")
    if dropped:
        lines.append(
            f"{dropped} messages left out: before the first question, or a last one without answer"
        )
    num_empty = meta["documents_without_target"]
    if num_empty:
        lines.append(f"{num_empty} of {meta['documents']} documents left out: no answer in them")
    for line in lines:
        print(f"{prefix}: {line}", file=sys.stderr)


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
            parsed = parse(source, record)
        except BadRecord as error:
            chunk.bad.append(str(error))
            continue
        for document in parsed.documents:
            chunk.append(*encode_document(tokenizer, document, template, append_eod))
        chunk.dropped_messages += parsed.dropped_messages
    return chunk


def file_stamp(path: Path) -> dict[str, int]:
    """Size and time of a file: as long as they are the same, its content is taken as unchanged."""
    status = path.stat()
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def detect_sources(files: Sequence[Path | str], options: DataOptions) -> list[Source]:
    """The sources of files, folders and named data sets, each with its format."""
    detected = []
    for source in find_sources(files, options.data_format, options.dataset_dir):
        if source.data_format == "auto":
            source = replace(source, data_format=detect(source.path))
        detected.append(source)
    return detected


def choose_template(sources: Sequence[Source], options: DataOptions) -> str:
    """The template of conversations in raw files; "" for plain text alone, which has none."""
    data_template = default_template({source.data_format for source in sources})
    if not data_template:
        return ""
    return options.template or options.base_template or data_template


def _describe_origin(
    sources: list[Source], tokenizer: Tokenizer, template: str, options: DataOptions
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
    origin = {
        "tokenizer_sha256": tokenizer.sha256,
        "template": template,
        "append_eod": options.append_eod,
        "sources": described,
    }
    if options.max_samples:
        origin["max_samples"] = options.max_samples
    return origin


def _read_sources(
    sources: list[Source], split_text: bool, max_samples: int
) -> Iterator[tuple[Source, InputRecord]]:
    """The records of all sources, of each the first max_samples (0: all)."""
    for source in sources:
        takes_text = source.data_format in PLAIN_TEXT
        num_read = 0
        for record in read_records(source, split_text and takes_text):
            if max_samples and num_read == max_samples:
                break
            yield source, record
            is_block = isinstance(record.value, TextBlock)  # of a text that is cut into several
            if not is_block or record.value.is_last:
                num_read += 1


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
