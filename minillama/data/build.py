"""Raw files to a tokenized data set: what `convert.py data` does, and train.py for a raw file, once.

    file ─ formats ─▶ conversation ─ chat.render ─▶ pieces ─ encode ─▶ ids, mask ─ memmap ─▶ PREFIX.bin .mask .idx .json
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minillama import chat
from minillama.data import formats
from minillama.data.encode import encode_pieces
from minillama.data.memmap import Dataset, is_dataset, write_dataset
from minillama.errors import UserError
from minillama.tokenizer import Tokenizer

Encoded = tuple[list[int], list[int] | None]


def build_dataset(files: list[Path], tokenizer: Tokenizer, prefix: Path, *, data_format: str = "auto", template: str = "alpaca",
                  append_eod: bool = True, skip_bad_records: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Tokenize files into the data set PREFIX; returns what PREFIX.json says, which includes what was skipped and why."""
    read = {path: formats.detect(path) if data_format == "auto" else data_format for path in files}
    bad: list[str] = []
    about = {
        "tokenizer_sha256": tokenizer.sha256, "template": "" if set(read.values()) == {"text"} else template,
        "sources": {str(path): kind for path, kind in read.items()}, "skipped_records": bad,
    }

    def on_bad(error: formats.BadRecord) -> None:
        if not skip_bad_records:
            raise UserError(f"{error}; --skip_bad_records leaves such records out")
        bad.append(str(error))

    def encoded() -> Iterator[Encoded]:
        with tqdm(desc=f"tokenizing {prefix.name}", unit=" documents", disable=quiet) as bar:
            for path, kind in read.items():
                for document in formats.read_documents(path, kind, on_bad):
                    bar.update()
                    yield encode_document(tokenizer, document, template, append_eod)

    return write_dataset(prefix, encoded(), tokenizer.size, about)


def encode_document(tokenizer: Tokenizer, document: formats.Document, template: str, append_eod: bool) -> Encoded:
    """(ids, mask) of a conversation by its template; (ids, None) of plain text, between begin and end tokens."""
    if isinstance(document, str):
        begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        end = [tokenizer.eos_id] if append_eod and tokenizer.eos_id is not None else []
        return begin + tokenizer.encode(document) + end, None
    pieces = chat.render(template, document)
    if not append_eod:
        pieces = [piece for piece in pieces if piece != chat.EOS]
    return encode_pieces(tokenizer, pieces)


def open_data(paths: tuple[str, ...], tokenizer: Tokenizer, cache_dir: str, **options: Any) -> Dataset:
    """Open a prefix made by `convert.py data`, or tokenize raw files into the cache, keyed by files, tokenizer and options."""
    if len(paths) == 1 and is_dataset(paths[0]):
        dataset = Dataset(paths[0])
        if dataset.meta.get("tokenizer_sha256") != tokenizer.sha256:
            raise UserError(f"{paths[0]}: was made with another tokenizer than {tokenizer.path}; make it again with "
                            f"`convert.py data --input FILE --tokenizer {tokenizer.path} --output {paths[0]}`")
        return dataset
    files = formats.expand(paths)
    prefix = cache_prefix(files, tokenizer, cache_dir, options)
    if not is_dataset(prefix):
        build_dataset(files, tokenizer, prefix, **options)
    return Dataset(prefix)


def cache_prefix(files: list[Path], tokenizer: Tokenizer, cache_dir: str, options: dict[str, Any]) -> Path:
    """Where the cache of these files stands: a changed file, tokenizer or option is another place."""
    folder = Path(cache_dir or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / ("" if cache_dir else "minillama")
    state = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = json.dumps([state, tokenizer.sha256, {k: v for k, v in options.items() if k != "quiet"}], sort_keys=True)
    return folder / f"{files[0].stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
