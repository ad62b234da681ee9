"""A tokenized data set on disk, opened without reading it.

    PREFIX.bin    the ids of all documents end to end, uint16 or uint32 as the vocabulary needs
    PREFIX.mask   uint8 a token: is it trained on; absent where all are
    PREFIX.idx    uint64[documents + 1]: where each document starts, and the end
    PREFIX.json   format version, counts, dtype, tokenizer sha256, template, sha256 of each file

The .json is written last and names what the others must hold, so a data set is complete or it is not there. While it grows, its
parts are called *.partial, and after every chunk PREFIX.state.partial says how far they are valid: an interrupted run, started
again on the same input, goes on from there.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from minillama.errors import UserError

VERSION = 1
MOST_WITHOUT_TARGET = 0.01  # a larger share of documents with nothing to train on is a mistake, not noise
PARTS = ("bin", "mask", "idx")


@dataclass(frozen=True)
class Chunk:
    """Some documents, tokenized: ids and mask end to end, the length of each, and what they were made from."""

    ids: np.ndarray      # (tokens,) integer
    mask: np.ndarray     # (tokens,) uint8
    lengths: np.ndarray  # (documents,) int64
    without_target: int = 0  # documents with nothing to train on
    records: int = 0         # of the input, malformed ones included
    bad: tuple[str, ...] = ()
    is_open: bool = False    # the last document goes on in the next chunk

    @classmethod
    def of(cls, documents: Sequence[tuple[list[int], list[int] | None]], records: int = 0, bad: Sequence[str] = (),
           is_open: bool = False) -> "Chunk":
        """From (ids, mask) pairs; mask None: all of the document is trained on. A first token never is: nothing is before it."""
        lengths = np.fromiter((len(ids) for ids, _ in documents), np.int64, len(documents))
        ids, mask = np.empty(lengths.sum(), np.uint32), np.ones(lengths.sum(), np.uint8)
        at = 0
        for tokens, trained in documents:
            ids[at:at + len(tokens)] = tokens
            if trained is not None:
                mask[at:at + len(tokens)] = trained
            at += len(tokens)
        without_target = sum(trained is not None and not any(trained[1:]) for _, trained in documents)
        return cls(ids, mask, lengths, without_target, records, tuple(bad), is_open)


class Writer:
    """Grows PREFIX chunk by chunk. A context: left by a UserError nothing stays behind, left by an interruption, what is valid.

    `state["records"]` says how many records of the input are already in: non-zero where an interrupted run is taken up.
    """

    def __init__(self, prefix: Path, vocab_size: int, about: dict[str, Any]) -> None:
        """about: tokenizer_sha256, template, … stored as they are; work is taken up only where all of it is the same."""
        self.prefix, self.vocab_size, self.about = prefix, vocab_size, about
        self.dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        self.state: dict[str, Any] = {"about": about, "vocab_size": vocab_size, "records": 0, "documents": 0, "tokens": 0,
                                      "targets": 0, "documents_without_target": 0, "skipped_records": []}

    def _partial(self, part: str) -> Path:
        return Path(f"{self.prefix}.{part}.partial")

    def __enter__(self) -> Self:
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self.opened = ExitStack()
        try:
            fcntl.flock(self.opened.enter_context(open(self._partial("lock"), "w")), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.opened.close()
            raise UserError(f"{self.prefix}: another process is writing this data set; wait for it to end") from None
        self._take_up()
        self.files: dict[str, FileIO] = {}
        for part, size in self._sizes(self.state).items():
            self.files[part] = self.opened.enter_context(open(self._partial(part), "ab", buffering=0))
            self.files[part].truncate(size)
        if not self.state["records"]:
            self.files["idx"].write(bytes(8))
        return self

    def _sizes(self, state: dict[str, Any]) -> dict[str, int]:
        """Bytes of each part that `state` vouches for."""
        idx = 8 * (state["documents"] + 1) if state["records"] else 0
        return {"bin": self.dtype.itemsize * state["tokens"], "mask": state["tokens"], "idx": idx}

    def _take_up(self) -> None:
        """The state of an interrupted run with the same input, if its parts still hold that much."""
        try:
            state = json.loads(self._partial("state").read_text(encoding="utf-8"))
            found = {part: self._partial(part).stat().st_size for part in PARTS}
        except (OSError, ValueError):
            return
        fresh = json.loads(json.dumps(self.state))
        same = state["about"] == fresh["about"] and state["vocab_size"] == fresh["vocab_size"]
        if same and all(found[part] >= size for part, size in self._sizes(state).items()):
            self.state = state

    def add(self, chunk: Chunk) -> None:
        if len(chunk.ids) and int(chunk.ids.max()) >= self.vocab_size:
            raise UserError(f"{self.prefix}: token id {int(chunk.ids.max())} is beyond the vocabulary of {self.vocab_size}")
        state = self.state
        self.files["bin"].write(chunk.ids.astype(self.dtype).data)
        self.files["mask"].write(chunk.mask.data)
        ended = len(chunk.lengths) - chunk.is_open
        self.files["idx"].write((state["tokens"] + chunk.lengths.cumsum()[:ended]).astype("<u8").data)
        for key, more in {"records": chunk.records, "documents": ended, "tokens": len(chunk.ids),
                          "targets": int(chunk.mask.sum()), "documents_without_target": chunk.without_target}.items():
            state[key] += more
        state["skipped_records"] += chunk.bad
        self._write_json(self._partial("state"), state)

    def finish(self) -> dict[str, Any]:
        """Check the whole, put it in place, and return what PREFIX.json says."""
        state, empty = self.state, self.state["documents_without_target"]
        if not state["documents"]:
            raise UserError(f"{self.prefix}: the input holds no document")
        if empty > MOST_WITHOUT_TARGET * state["documents"]:
            raise UserError(f"{self.prefix}: {empty} of {state['documents']} documents have nothing to train on (no answer, or an "
                            f"empty one); more than {MOST_WITHOUT_TARGET:.0%} is a mistake in the data or its template")
        parts = [part for part in PARTS if part != "mask" or state["targets"] < state["tokens"]]
        meta = {"version": VERSION, "dtype": self.dtype.name} | {key: value for key, value in state.items() if key != "about"}
        meta |= self.about | {"sha256": {part: sha256_of(self._partial(part)) for part in parts}}
        for part in (*PARTS, "json"):
            Path(f"{self.prefix}.{part}").unlink(missing_ok=True)
        for part in parts:
            os.replace(self._partial(part), f"{self.prefix}.{part}")
        self._write_json(Path(f"{self.prefix}.json"), meta)
        return meta

    def _write_json(self, path: Path, content: dict[str, Any]) -> None:
        self._partial("new").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(self._partial("new"), path)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None or issubclass(kind, UserError):
            for part in (*PARTS, "state", "new"):
                self._partial(part).unlink(missing_ok=True)
        self._partial("lock").unlink(missing_ok=True)
        self.opened.close()


def write_dataset(prefix: Path, documents: Iterable[tuple[list[int], list[int] | None]], vocab_size: int,
                  about: dict[str, Any]) -> dict[str, Any]:
    """Write documents, (ids, mask or None for all) each, as a data set; returns what PREFIX.json says. Streams.

    about: tokenizer_sha256, template, … stored as they are. Raises UserError where no document comes.
    """
    with Writer(prefix, vocab_size, about) as writer:
        left = islice(documents, writer.state["records"], None)
        while batch := list(islice(left, 256)):
            writer.add(Chunk.of(batch, records=len(batch)))
        return writer.finish()


def is_dataset(prefix: Path | str) -> bool:
    return Path(f"{prefix}.json").is_file() and Path(f"{prefix}.bin").is_file()


class Dataset:
    """An open data set: `offsets` (documents + 1,), `tokens` and `mask` (all tokens,) as memory maps, `meta` from the .json."""

    def __init__(self, prefix: Path | str, verify: bool = False) -> None:
        """Open PREFIX; sizes are always checked, the files' sha256 where `verify`. Raises UserError for a damaged set."""
        self.prefix = Path(prefix)
        try:
            self.meta: dict[str, Any] = json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))
            version, dtype = self.meta["version"], np.dtype(self.meta["dtype"])
            documents, tokens, hashes = self.meta["documents"], self.meta["tokens"], self.meta["sha256"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{prefix}.json: not a minillama data set ({error})") from None
        if version != VERSION:
            raise UserError(f"{prefix}.json: version {version}, this program reads {VERSION}; make it again with `convert.py data`")
        self.tokens = self._map("bin", dtype, tokens)
        self.offsets = self._map("idx", np.dtype("<u8"), documents + 1).astype(np.int64)
        self.mask = self._map("mask", np.dtype(np.uint8), tokens) if "mask" in hashes else None
        if self.offsets[0] != 0 or self.offsets[-1] != tokens or (np.diff(self.offsets) < 0).any():
            raise UserError(f"{prefix}.idx: offsets do not rise from 0 to {tokens}; the file is damaged")
        for part, expected in hashes.items() if verify else ():
            if sha256_of(Path(f"{prefix}.{part}")) != expected:
                raise UserError(f"{prefix}.{part}: its sha256 is not the one in {prefix}.json; the file is damaged")

    def _map(self, part: str, dtype: np.dtype, count: int) -> np.ndarray:
        path = Path(f"{self.prefix}.{part}")
        found = path.stat().st_size if path.is_file() else -1
        if found != count * dtype.itemsize:
            shown = "is missing" if found < 0 else f"has {found} bytes"
            raise UserError(f"{path}: {shown}, {self.prefix}.json says {count * dtype.itemsize}; make the data set again")
        return np.memmap(path, dtype, mode="r")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def document(self, number: int) -> tuple[np.ndarray, np.ndarray | None]:
        """(ids, mask or None) of a document."""
        span = slice(self.offsets[number], self.offsets[number + 1])
        return self.tokens[span], None if self.mask is None else self.mask[span]


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
