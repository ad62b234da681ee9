"""Raw files to a tokenized data set: what `convert.py data` does, and train.py for a raw file, once.

    file ─ containers ─▶ records ─┬▶ formats.parse ─▶ chat.render ─▶ encode ─┬▶ memmap ─▶ PREFIX.bin .mask .idx .json
                                  └──────────── N worker processes ──────────┘

This path imports no torch, and holds a few chunks of records at a time, whatever the size of the file.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minillama import chat
from minillama.data import formats
from minillama.data.containers import Part
from minillama.data.encode import encode_pieces
from minillama.data.megatron import MegatronDataset, find_part
from minillama.data.memmap import Chunk, Dataset, Writer, is_dataset
from minillama.data.sources import Source, find_sources, hash_of
from minillama.data.workers import in_order
from minillama.errors import UserError
from minillama.tokenizer import Tokenizer

Placed = tuple[int, str, Any]  # number of the source, place in it, record
CHUNK_RECORDS, CHUNK_CHARACTERS = 512, 1 << 19


def build_dataset(files: Sequence[Path | str], tokenizer: Tokenizer, prefix: Path, *, data_format: str = "auto",
                  template: str = "alpaca", append_eod: bool = True, skip_bad_records: bool = False, quiet: bool = False,
                  workers: int = 1, dataset_dir: str = "") -> dict[str, Any]:
    """Tokenize files, folders and named data sets into the data set PREFIX; returns what PREFIX.json says.

    That includes `documents_without_target` and `skipped_records`, what was left out and why. The same call takes up an
    interrupted one where it stopped. Raises UserError for a malformed record unless skip_bad_records.
    """
    work = Encoder(tokenizer, [_detected(s) for s in find_sources(files, data_format, dataset_dir)], template, append_eod)
    is_plain_text = all(source.data_format in ("text", "lines") for source in work.sources)
    about = {
        "tokenizer_sha256": tokenizer.sha256, "template": "" if is_plain_text else template, "append_eod": append_eod,
        "sources": {str(s.path.resolve()): {"format": s.data_format, "columns": s.columns, "tags": s.tags, **_stamp(s.path),
                                            "sha256": hash_of(s.path)} for s in work.sources},
    }
    for source in work.sources if not quiet else ():
        print(f"{source.path}: read as {source.data_format}", file=sys.stderr)
    bar = tqdm(desc=f"tokenizing {prefix.name}", unit=" documents", disable=quiet)
    with Writer(prefix, tokenizer.size, about) as writer, bar:
        bar.update(writer.meta["documents"])
        for chunk in in_order(work, _chunks(work, writer.meta["records"]), workers):
            if chunk.bad and not skip_bad_records:
                raise UserError(f"{chunk.bad[0]}; --skip_bad_records leaves such records out")
            writer.add(chunk)
            bar.update(len(chunk.ends))
        bar.close()
        meta = writer.finish()
    if (skipped := meta["skipped_records"]) and not quiet:
        print(f"{len(skipped)} bad records left out, listed in {prefix}.json; the first: {skipped[0]}", file=sys.stderr)
    return meta


def _detected(source: Source) -> Source:
    """The source with its format found out."""
    if source.data_format not in ("auto", *formats.FORMATS):
        raise UserError(f"no data format {source.data_format!r}; formats: auto, {', '.join(formats.FORMATS)}")
    return replace(source, data_format=formats.detect(source.path)) if source.data_format == "auto" else source


@dataclass(frozen=True)
class Encoder:
    """Records to ids and masks: the work of one process."""

    tokenizer: Tokenizer
    sources: list[Source]
    template: str
    append_eod: bool

    def __call__(self, records: list[Placed]) -> Chunk:
        chunk = Chunk(records=len(records))
        for number, place, record in records:
            try:
                for document in formats.parse(self.sources[number], place, record):
                    ids, mask = encode_document(self.tokenizer, document, self.template, self.append_eod)
                    chunk.append(ids, mask, not isinstance(document, Part) or document.is_last)
            except formats.BadRecord as error:
                chunk.bad.append(str(error))
        return chunk


def encode_document(tokenizer: Tokenizer, document: formats.Document, template: str,
                    append_eod: bool) -> tuple[list[int], list[int] | None]:
    """(ids, mask) of a conversation by its template; (ids, None) of plain text, between begin and end tokens.

    append_eod: is the last answer, or the text, followed by the end token? Those between rounds belong to the template.
    """
    if isinstance(document, chat.Conversation):
        pieces = chat.render(template, document)
        return encode_pieces(tokenizer, pieces[:-1] if pieces[-1].control == "eos" and not append_eod else pieces)
    part = Part(document) if isinstance(document, str) else document
    ids = tokenizer.encode(part.text) if part.is_first else tokenizer.encode_next(part.text)
    begin = [tokenizer.bos_id] if part.is_first and tokenizer.bos_id is not None else []
    end = [tokenizer.eos_id] if part.is_last and append_eod and tokenizer.eos_id is not None else []
    return begin + ids + end, None


def _chunks(work: Encoder, skip: int) -> Iterator[list[Placed]]:
    """The records of all sources but the first `skip`, in lists of about as much text, so processes take about as long."""
    placed = ((number, *record) for number, source in enumerate(work.sources)
              for record in formats.read_records(source, work.tokenizer.splits_at_lines))
    chunk: list[Placed] = []
    characters = 0
    for item in islice(placed, skip, None):
        chunk.append(item)
        characters += len(str(item[2]))
        if len(chunk) == CHUNK_RECORDS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def open_data(paths: Sequence[str], tokenizer: Tokenizer, cache_dir: str, *, data_format: str = "auto", template: str = "",
              default_template: str = "alpaca", append_eod: bool = True, skip_bad_records: bool = False, quiet: bool = False,
              workers: int = 1, dataset_dir: str = "") -> Dataset:
    """Open a data set made by `convert.py data` or AscendSpeed, or tokenize raw files into the cache, once.

    template: the one asked for; empty: the data set's own, or `default_template` for raw files. The cache is keyed by the files,
    the tokenizer and the options. Raises UserError for a set that is damaged, was made with another tokenizer or template, or
    from a file that has changed since.
    """
    if len(paths) == 1 and find_part(paths[0]):
        return MegatronDataset(paths[0], tokenizer.size)
    if len(paths) == 1 and is_dataset(paths[0]):
        dataset = Dataset(paths[0], verify=True)
        _check_origin(dataset, tokenizer, template)
        return dataset
    sources = find_sources(paths, data_format, dataset_dir)
    options = {"data_format": data_format, "template": template or default_template, "append_eod": append_eod,
               "skip_bad_records": skip_bad_records}
    described = options | {"columns": [[source.columns, source.tags] for source in sources]}
    prefix = cache_prefix([source.path for source in sources], tokenizer, cache_dir, described)
    if not is_dataset(prefix):
        build_dataset(paths, tokenizer, prefix, **options, quiet=quiet, workers=workers, dataset_dir=dataset_dir)
    return Dataset(prefix)


def _check_origin(dataset: Dataset, tokenizer: Tokenizer, template: str) -> None:
    again = f"make it again with `convert.py data --input FILE --tokenizer {tokenizer.path} --output {dataset.prefix}`"
    if dataset.meta.get("tokenizer_sha256") != tokenizer.sha256:
        raise UserError(f"{dataset.prefix}: was made with another tokenizer than {tokenizer.path}; {again}")
    made_with = dataset.meta.get("template")  # empty: plain text, which has none
    if template and made_with and chat.find_template(template) is not chat.find_template(made_with):
        raise UserError(f"{dataset.prefix}: was made with the template {made_with}, not {template}; leave --template out, or {again}")
    for name, made_from in dataset.meta.get("sources", {}).items():
        path = Path(name)
        touched = path.is_file() and _stamp(path) != {key: made_from[key] for key in ("bytes", "mtime_ns")}
        if touched and hash_of(path) != made_from["sha256"]:
            raise UserError(f"{dataset.prefix}: {path} has changed since it was tokenized; {again}")


def _stamp(path: Path) -> dict[str, int]:
    status = path.stat()
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def cache_prefix(files: list[Path], tokenizer: Tokenizer, cache_dir: str, options: dict[str, Any]) -> Path:
    """Where the cache of these files stands: a changed file, tokenizer or option is another place."""
    folder = Path(cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minillama")
    state = [(str(path.resolve()), *_stamp(path).values()) for path in files]
    key = json.dumps([state, tokenizer.sha256, options], sort_keys=True)
    return folder / f"{files[0].stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
