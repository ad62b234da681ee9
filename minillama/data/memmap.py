"""A tokenized data set on disk, opened without reading it.

    PREFIX.bin    the ids of all documents end to end, uint16 or uint32 as the vocabulary needs
    PREFIX.mask   uint8 a token: is it trained on; absent where all are
    PREFIX.idx    uint64[documents + 1]: where each document starts, and the end
    PREFIX.json   format version, counts, dtype, tokenizer sha256, template, sha256 of each file

The .json is put in place last and names what the others must hold, so a data set is complete or it is not there. While it grows,
its parts are called *.partial, and after every chunk the .json says how far the others are valid: an interrupted run, started
again on the same input, goes on from there.
"""

import fcntl
import json
import os
from array import array
from contextlib import suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, Self

import numpy as np

from minillama.data.sources import hash_of
from minillama.errors import UserError, parsing

VERSION = 1
MOST_WITHOUT_TARGET = (
    0.01  # a larger share of documents with nothing to train on is a mistake, not noise
)
PARTS = ("bin", "mask", "idx")


@dataclass
class Chunk:
    """Some documents, tokenized: ids (uint32) and mask (uint8) end to end, where documents end, and what they were made from."""

    ids: array = field(default_factory=lambda: array("I"))
    mask: bytearray = field(default_factory=bytearray)
    ends: list[int] = field(default_factory=list)
    without_target: int = 0  # documents with nothing to train on
    records: int = 0  # of the input, malformed ones included
    bad: list[str] = field(default_factory=list)

    def append(self, ids: list[int], mask: list[int] | None, is_last: bool = True) -> None:
        """Add a document, or a stretch of one where not is_last. mask None: all is trained on."""
        self.ids.extend(ids)
        self.mask += b"\1" * len(ids) if mask is None else bytes(mask)
        self.without_target += mask is not None and not any(
            mask[1:]
        )  # a first token never is one: nothing is before it
        if is_last:
            self.ends.append(len(self.ids))

    def counts(self) -> dict[str, Any]:
        """What PREFIX.json says of all chunks together."""
        return {
            "records": self.records,
            "documents": len(self.ends),
            "tokens": len(self.ids),
            "targets": self.mask.count(1),
            "documents_without_target": self.without_target,
            "skipped_records": self.bad,
        }


class Writer:
    """Grows PREFIX chunk by chunk. A context: left by a UserError nothing stays behind, left by an interruption, what is valid.

    `meta` is what PREFIX.json will say; its `records`, how many of the input are in, is not 0 where an interrupted run is taken up.
    """

    def __init__(self, prefix: Path, vocab_size: int, about: dict[str, Any]) -> None:
        """about: tokenizer_sha256, template, … stored as they are; work is taken up only where all of it is the same."""
        self.prefix, self.vocab_size, self.dtype = (
            prefix,
            vocab_size,
            np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32),
        )
        fixed = {
            "version": VERSION,
            "dtype": self.dtype.name,
            "vocab_size": vocab_size,
            **json.loads(json.dumps(about)),
        }
        self.meta = fixed | Chunk().counts()

    def __enter__(self) -> Self:
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self.files = {"lock": FileIO(self._partial("lock"), "ab")}
        try:
            fcntl.flock(self.files["lock"], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.prefix}: another process is writing this data set; wait for it to end"
            ) from None
        self.files |= {part: FileIO(self._partial(part), "ab") for part in PARTS}
        with suppress(OSError, ValueError, KeyError):  # nothing to take up, or half written
            meta = json.loads(self._partial("json").read_text(encoding="utf-8"))
            is_same = meta | Chunk().counts() == self.meta
            if is_same and all(
                self.files[part].tell() >= size for part, size in self._sizes(meta).items()
            ):
                self.meta = meta
        for part, size in self._sizes(self.meta).items():
            self.files[part].truncate(size)  # a new index grows to its first offset, 0
        return self

    def _partial(self, part: str) -> Path:
        return Path(f"{self.prefix}.{part}.partial")

    def _sizes(self, meta: dict[str, Any]) -> dict[str, int]:
        """Bytes of each part that `meta` vouches for."""
        return {
            "bin": self.dtype.itemsize * meta["tokens"],
            "mask": meta["tokens"],
            "idx": 8 * (meta["documents"] + 1),
        }

    def add(self, chunk: Chunk) -> None:
        ids = np.array(chunk.ids)
        if (largest := int(ids.max(initial=0))) >= self.vocab_size:
            raise UserError(
                f"{self.prefix}: token id {largest} is beyond the vocabulary of {self.vocab_size}"
            )
        self.files["bin"].write(ids.astype(self.dtype).data)
        self.files["mask"].write(chunk.mask)
        self.files["idx"].write((self.meta["tokens"] + np.array(chunk.ends, "<u8")).data)
        self.meta |= {key: self.meta[key] + value for key, value in chunk.counts().items()}
        self._write_meta()

    def _write_meta(self) -> None:
        self._partial("json").write_text(
            json.dumps(self.meta, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )

    def finish(self) -> dict[str, Any]:
        """Check the whole, put it in place, and return what PREFIX.json says."""
        documents, empty = self.meta["documents"], self.meta["documents_without_target"]
        if not documents:
            raise UserError(f"{self.prefix}: the input holds no document")
        if empty > MOST_WITHOUT_TARGET * documents:
            raise UserError(
                f"{self.prefix}: {empty} of {documents} documents have nothing to train on (no answer, or an "
                f"empty one); more than {MOST_WITHOUT_TARGET:.0%} is a mistake in the data or its template"
            )
        parts = [
            part for part in PARTS if part != "mask" or self.meta["targets"] < self.meta["tokens"]
        ]
        self.meta["sha256"] = {part: hash_of(self._partial(part)) for part in parts}
        self._write_meta()
        for part in (*PARTS, "json"):
            Path(f"{self.prefix}.{part}").unlink(missing_ok=True)
        for part in (*parts, "json"):
            os.replace(self._partial(part), f"{self.prefix}.{part}")
        return self.meta

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        ended = kind is None or issubclass(kind, UserError)
        for part in (*PARTS, "json", "lock") if ended else ("lock",):
            self._partial(part).unlink(missing_ok=True)
        for file in self.files.values():
            file.close()


def is_dataset(prefix: Path | str) -> bool:
    return Path(f"{prefix}.json").is_file() and Path(f"{prefix}.bin").is_file()


class Dataset:
    """An open data set: `offsets` (documents + 1,), `tokens` and `mask` (all tokens,) as memory maps, `meta` from the .json."""

    def __init__(self, prefix: Path | str, verify: bool = False) -> None:
        """Open PREFIX; sizes are always checked, the files' sha256 where `verify`. Raises UserError for a damaged set."""
        self.prefix = Path(prefix)
        with parsing(f"{prefix}.json: not a minillama data set"):
            self.meta: dict[str, Any] = json.loads(
                Path(f"{prefix}.json").read_text(encoding="utf-8")
            )
            version, dtype, documents, tokens, hashes = (
                self.meta[key] for key in ("version", "dtype", "documents", "tokens", "sha256")
            )
        if version != VERSION:
            raise UserError(
                f"{prefix}.json: version {version}, this program reads {VERSION}; make it again with `convert.py data`"
            )
        self.tokens = self._map("bin", np.dtype(dtype), tokens)
        self.offsets = self._map("idx", np.dtype("<u8"), documents + 1).astype(np.int64)
        self.mask = self._map("mask", np.dtype(np.uint8), tokens) if "mask" in hashes else None
        if self.offsets[0] != 0 or self.offsets[-1] != tokens or (np.diff(self.offsets) < 0).any():
            raise UserError(
                f"{prefix}.idx: offsets do not rise from 0 to {tokens}; the file is damaged"
            )
        for part, expected in hashes.items() if verify else ():
            if hash_of(Path(f"{prefix}.{part}")) != expected:
                raise UserError(
                    f"{prefix}.{part}: its sha256 is not the one in {prefix}.json; the file is damaged"
                )

    def _map(self, part: str, dtype: np.dtype, count: int) -> np.ndarray:
        path, expected = Path(f"{self.prefix}.{part}"), f"has {count * dtype.itemsize} bytes"
        found = f"has {path.stat().st_size} bytes" if path.is_file() else "is missing"
        if found != expected:
            raise UserError(
                f"{path}: {found}, {self.prefix}.json says that it {expected}; make the data set again"
            )
        return np.memmap(path, dtype, mode="r")

    def __len__(self) -> int:
        return len(self.offsets) - 1
