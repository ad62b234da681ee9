"""Raw files to a tokenized data set: what `convert.py data` does, and train.py for a raw file, once.

    find_sources ─▶ read_records ─▶ chunks ─┬▶ parse ─▶ render ─▶ encode ─┬▶ Writer ─▶ PREFIX.bin .mask .idx .json
                                            └────── N worker processes ───┘

Every step is a generator that the next one pulls from: a few chunks of records are in memory, whatever the size of the file. With
processes, one chunk more than there are of them is out: all work while the next chunk is read. This path imports no torch.
"""

import hashlib
import json
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minillama import chat
from minillama.data.encode import encode_document
from minillama.data.formats import BadRecord, Part, detect, parse, read_records
from minillama.data.megatron import MegatronDataset, find_part
from minillama.data.memmap import Chunk, Dataset, Writer, is_dataset
from minillama.data.sources import Source, find_sources, hash_of
from minillama.errors import UserError
from minillama.tokenizer import Tokenizer

Records = list[tuple[Source, str, Any]]  # where from, place in it, record
CHUNK_RECORDS, CHUNK_CHARACTERS = 512, 1 << 19


def build_dataset(
    files: Sequence[Path | str],
    tokenizer: Tokenizer,
    prefix: Path,
    *,
    data_format: str = "auto",
    template: str = "alpaca",
    append_eod: bool = True,
    skip_bad_records: bool = False,
    quiet: bool = False,
    workers: int = 1,
    dataset_dir: str = "",
) -> dict[str, Any]:
    """Tokenize files, folders and named data sets into the data set PREFIX; returns what PREFIX.json says, with what was left out.

    The same call takes up an interrupted one where it stopped. Raises UserError for a malformed record unless skip_bad_records.
    """
    sources = [
        replace(source, data_format=detect(source.path)) if source.data_format == "auto" else source
        for source in find_sources(files, data_format, dataset_dir)
    ]
    is_plain = all(source.data_format in ("text", "lines") for source in sources)
    made_from = {
        str(source.path.resolve()): {
            "format": source.data_format,
            "columns": source.columns,
            **_stamp(source.path),
            "sha256": hash_of(source.path),
        }
        for source in sources
    }
    about = {
        "tokenizer_sha256": tokenizer.sha256,
        "template": "" if is_plain else template,
        "append_eod": append_eod,
        "sources": made_from,
    }
    for source in sources if not quiet else ():
        print(f"{source.path}: read as {source.data_format}", file=sys.stderr)
    encode = partial(encode_records, tokenizer, template, append_eod)
    with (
        Writer(prefix, tokenizer.size, about) as writer,
        tqdm(desc=f"tokenizing {prefix.name}", unit=" documents", disable=quiet) as bar,
    ):
        bar.update(writer.meta["documents"])
        for chunk in in_order(
            encode, _chunks(sources, tokenizer.splits_at_lines, writer.meta["records"]), workers
        ):
            if chunk.bad and not skip_bad_records:
                raise UserError(f"{chunk.bad[0]}; --skip_bad_records leaves such records out")
            writer.add(chunk)
            bar.update(len(chunk.ends))
        meta = writer.finish()
    if (skipped := meta["skipped_records"]) and not quiet:
        print(
            f"{len(skipped)} bad records left out, listed in {prefix}.json; the first: {skipped[0]}",
            file=sys.stderr,
        )
    return meta


def _chunks(sources: list[Source], in_parts: bool, skip: int) -> Iterator[Records]:
    """The records of all sources but the first `skip`, in lists of about as much text, so processes take about as long."""
    chunk: Records = []
    characters = 0
    for item in islice(
        ((source, *placed) for source in sources for placed in read_records(source, in_parts)),
        skip,
        None,
    ):
        chunk.append(item)
        characters += len(str(item[2]))
        if len(chunk) == CHUNK_RECORDS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def encode_records(
    tokenizer: Tokenizer, template: str, append_eod: bool, records: Records
) -> Chunk:
    """Records to ids and masks: the work of one process."""
    chunk = Chunk(records=len(records))
    for source, place, record in records:
        try:
            for document in parse(source, place, record):
                ids, mask = encode_document(tokenizer, document, template, append_eod)
                chunk.append(ids, mask, not isinstance(document, Part) or document.is_last)
        except BadRecord as error:
            chunk.bad.append(str(error))
    return chunk


def in_order(
    work: Callable[[Records], Chunk], chunks: Iterable[Records], workers: int
) -> Iterator[Chunk]:
    """work(chunk) of every chunk, in order; by this process for fewer than two workers. What work raises is raised here."""
    if workers < 2:
        yield from map(work, chunks)
        return
    with ProcessPoolExecutor(workers, initializer=_begin, initargs=(work,)) as pool:
        queue: deque[Future[Chunk]] = deque()
        for chunk in chunks:
            queue.append(pool.submit(_work_on, chunk))
            if len(queue) > workers:
                yield queue.popleft().result()
        yield from (future.result() for future in queue)


def _begin(work: Callable[[Records], Chunk]) -> None:
    """A worker's first act: keep `work`, which is sent once, not with every chunk."""
    global _work
    _work = work
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C goes to every process; the first one decides
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _work_on(chunk: Records) -> Chunk:
    return _work(chunk)


def _end_with_parent() -> None:
    parent_process().join()  # one that is killed says nothing
    os._exit(1)


def open_data(
    paths: Sequence[str],
    tokenizer: Tokenizer,
    cache_dir: str,
    *,
    data_format: str = "auto",
    template: str = "",
    default_template: str = "alpaca",
    append_eod: bool = True,
    skip_bad_records: bool = False,
    quiet: bool = False,
    workers: int = 1,
    dataset_dir: str = "",
) -> Dataset:
    """Open a data set made by `convert.py data` or AscendSpeed, or tokenize raw files into the cache, once.

    template: the one asked for; empty: the data set's own, or `default_template` for raw files. Raises UserError for a set that is
    damaged, was made with another tokenizer or template, or from a file that has changed since.
    """
    if len(paths) == 1 and find_part(paths[0]):
        return MegatronDataset(paths[0], tokenizer.size)
    if len(paths) == 1 and is_dataset(paths[0]):
        dataset = Dataset(paths[0], verify=True)
        _check_origin(dataset, tokenizer, template)
        return dataset
    options = {
        "data_format": data_format,
        "template": template or default_template,
        "append_eod": append_eod,
        "skip_bad_records": skip_bad_records,
    }
    prefix = _cache_prefix(
        find_sources(paths, data_format, dataset_dir), tokenizer, cache_dir, options
    )
    if not is_dataset(prefix):
        build_dataset(
            paths,
            tokenizer,
            prefix,
            **options,
            quiet=quiet,
            workers=workers,
            dataset_dir=dataset_dir,
        )
    return Dataset(prefix)


def _check_origin(dataset: Dataset, tokenizer: Tokenizer, template: str) -> None:
    again = f"make it again with `convert.py data --input FILE --tokenizer {tokenizer.path} --output {dataset.prefix}`"
    if dataset.meta.get("tokenizer_sha256") != tokenizer.sha256:
        raise UserError(
            f"{dataset.prefix}: was made with another tokenizer than {tokenizer.path}; {again}"
        )
    made_with = dataset.meta.get("template")  # empty: plain text, which has none
    if template and made_with and chat.find_template(template) is not chat.find_template(made_with):
        raise UserError(
            f"{dataset.prefix}: was made with the template {made_with}, not {template}; leave --template out, or {again}"
        )
    for name, made_from in dataset.meta.get("sources", {}).items():
        path = Path(name)
        touched = path.is_file() and _stamp(path) != {
            key: made_from[key] for key in ("bytes", "mtime_ns")
        }
        if touched and hash_of(path) != made_from["sha256"]:
            raise UserError(f"{dataset.prefix}: {path} has changed since it was tokenized; {again}")


def _stamp(path: Path) -> dict[str, int]:
    status = path.stat()
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def _cache_prefix(
    sources: list[Source], tokenizer: Tokenizer, cache_dir: str, options: dict[str, Any]
) -> Path:
    """Where the cache of these sources stands: a changed file, tokenizer or option is another place."""
    folder = Path(
        cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minillama"
    )
    state = [
        (str(source.path.resolve()), source.columns, _stamp(source.path)) for source in sources
    ]
    key = json.dumps([state, tokenizer.sha256, options], sort_keys=True)
    return folder / f"{sources[0].path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
