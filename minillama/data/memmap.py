"""A tokenized data set on disk, which is opened without reading it.

    PREFIX.bin    the ids of all documents, one after another: uint16, or uint32 for a vocabulary
                  of more than 65,536 tokens
    PREFIX.mask   uint8 for each token: is it a target; absent if all are
    PREFIX.idx    uint64[documents + 1]: where each document starts, and the end
    PREFIX.json   format version, counts, dtype, tokenizer sha256, template, sha256 of each file

The .json comes last and says what the other files must hold. So a data set is complete or it is not
there; renames.py puts it in place.

While a data set is written, its files are called *.partial, and the .json.partial is locked. After
every chunk it says up to where the others are valid. So an interrupted run, started again on the
same input, continues from there.
"""

import json
from array import array
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from minillama.data.renames import ARRAYS, parts_of, put_in_place
from minillama.errors import UserError
from minillama.files import (
    OutputFile,
    append_file,
    flush_to_disk,
    parsing,
    read_json,
    refuse_link,
    sha256_of,
)
from minillama.output_directory import take_lock

VERSION = 1
# A larger share of conversations without a target stops a run, unless the user says otherwise.
MAX_DROPPED = 0.1


@dataclass
class Chunk:
    """Some tokenized documents, and counts of the input they were made from."""

    ids: array = field(default_factory=lambda: array("I"))  # uint32, of all documents
    mask: bytearray = field(default_factory=bytearray)  # a byte for each id
    ends: list[int] = field(default_factory=list)  # where each document ends in ids
    without_target: int = 0  # documents with nothing to train on
    dropped_messages: int = 0  # of conversations: in no document
    records: int = 0  # read from the input, bad ones included
    bad: list[str] = field(default_factory=list)  # what is wrong with each bad record

    def append(self, ids: list[int], mask: list[int] | None, ends_document: bool = True) -> None:
        """Add a document, or a part of one. mask None means that every token is a target."""
        self.ids.extend(ids)
        if mask is None:
            self.mask += b"\1" * len(ids)
        else:
            self.mask += bytes(mask)
            # The first token has no context to be predicted from, so it is never a target.
            self.without_target += not any(mask[1:])
        if ends_document:
            self.ends.append(len(self.ids))

    def counts(self) -> dict[str, Any]:
        """What PREFIX.json adds up over all chunks."""
        return {
            "records": self.records,
            "documents": len(self.ends),
            "tokens": len(self.ids),
            "targets": self.mask.count(1),
            "documents_without_target": self.without_target,
            "dropped_messages": self.dropped_messages,
            "skipped_records": self.bad,
        }


class DatasetWriter:
    """Writes a data set chunk by chunk. To be used in a `with` statement.

    A UserError in the block removes the partial files. After an interruption they stay, and the
    next writer with the same arguments continues from them.

    `meta` is what PREFIX.json will say. meta["records"] is how many records of the input are
    written already; it is not 0 when an interrupted run is continued.
    """

    def __init__(self, prefix: Path, vocab_size: int, origin: dict[str, Any]) -> None:
        """origin: how the data set is made. It is stored, and must be equal to continue a run."""
        self.prefix = prefix
        self.vocab_size = vocab_size
        self.dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        self.meta = {
            "version": VERSION,
            "dtype": self.dtype.name,
            "vocab_size": vocab_size,
            **json.loads(json.dumps(origin)),  # as it is read back: tuples become lists
            **Chunk().counts(),
        }
        self.files: dict[str, OutputFile] = {}

    def __enter__(self) -> Self:
        for part in (*ARRAYS, "json"):
            refuse_link(self._partial(part))
        self.files["json"] = append_file(self._partial("json"))
        lock_message = (
            f"{self.prefix}: another process is writing this data set; wait for it to end"
        )
        take_lock(self.files["json"].fileno(), self._partial("json"), lock_message)
        for part in ARRAYS:
            self.files[part] = append_file(self._partial(part))
        with suppress(UserError, KeyError):  # no .json.partial, or a damaged one
            self._continue_from(read_json(self._partial("json")))
        for part, size in self._sizes(self.meta).items():
            self.files[part].truncate(size)  # a new .idx grows to its first offset, 0
        return self

    def _continue_from(self, meta: dict[str, Any]) -> None:
        """Take over `meta` of an interrupted run, if its input and files are right."""
        has_same_keys = meta.keys() == self.meta.keys()
        is_same_input = has_same_keys and meta | Chunk().counts() == self.meta
        sizes = self._sizes(meta)
        if is_same_input and all(self.files[part].tell() >= sizes[part] for part in ARRAYS):
            self.meta = meta

    def _partial(self, part: str) -> Path:
        return Path(f"{self.prefix}.{part}.partial")

    def _sizes(self, meta: dict[str, Any]) -> dict[str, int]:
        """How many bytes of each file are valid."""
        return {
            "bin": self.dtype.itemsize * meta["tokens"],
            "mask": meta["tokens"],
            "idx": 8 * (meta["documents"] + 1),
        }

    def add(self, chunk: Chunk) -> None:
        ids = np.array(chunk.ids)
        largest = int(ids.max(initial=0))
        if largest >= self.vocab_size:
            raise UserError(
                f"{self.prefix}: token id {largest} is beyond the vocabulary of {self.vocab_size}"
            )
        ends = self.meta["tokens"] + np.array(chunk.ends, "<u8")
        self.files["bin"].write(ids.astype(self.dtype).data)
        self.files["mask"].write(chunk.mask)
        self.files["idx"].write(ends.data)
        for key, count in chunk.counts().items():
            self.meta[key] = self.meta[key] + count
        self._write_meta()

    def _write_meta(self) -> None:
        text = json.dumps(self.meta, indent=2, ensure_ascii=False) + "\n"
        self.files["json"].truncate(0)
        self.files["json"].write(text.encode("utf-8"))

    def finish(self, max_dropped: float = MAX_DROPPED) -> dict[str, Any]:
        """Check the data set, put it in place, and return what PREFIX.json says.

        Raises UserError if a larger share of documents than max_dropped is without a target.
        """
        self._check_counts(max_dropped)
        parts = parts_of(self.meta)
        self.meta["sha256"] = {part: sha256_of(self._partial(part)) for part in parts}
        self._write_meta()
        for part in (*parts, "json"):
            flush_to_disk(self._partial(part))
        put_in_place(self.prefix, parts)
        return self.meta

    def _check_counts(self, max_dropped: float) -> None:
        num_documents = self.meta["documents"]
        num_empty = self.meta["documents_without_target"]
        if num_documents == 0:
            raise UserError(f"{self.prefix}: the input holds no document")
        if num_empty == num_documents or num_empty > max_dropped * num_documents:
            raise UserError(
                f"{self.prefix}: {num_empty} of {num_documents} documents have nothing to train on "
                "(no answer, or an empty one); repair the data or its template, or leave them out: "
                f"raise max_dropped, now {max_dropped:g}"
            )

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        was_interrupted = kind is not None and not issubclass(kind, UserError)
        if not was_interrupted:
            for part in (*ARRAYS, "json"):
                self._partial(part).unlink(missing_ok=True)
        for file in self.files.values():
            file.close()


def is_dataset(prefix: Path | str) -> bool:
    return Path(f"{prefix}.json").is_file() and Path(f"{prefix}.bin").is_file()


class Dataset:
    """An open data set. Its arrays are memory maps: a page is read when it is used.

    offsets  (documents + 1,)  document i is the tokens offsets[i] to offsets[i + 1]
    tokens   (tokens,)         of all documents
    mask     (tokens,)         1 for a target; None if all tokens are targets
    meta                       what PREFIX.json says
    """

    def __init__(self, prefix: Path | str, verify: bool = False) -> None:
        """Open PREFIX. Sizes are always checked, the sha256 of the files only if `verify`.

        Raises UserError for a damaged data set.
        """
        self.prefix = Path(prefix)
        json_path = Path(f"{prefix}.json")
        self.meta = read_json(json_path)
        with parsing(f"{json_path}: not a minillama data set"):
            version = self.meta["version"]
            dtype = np.dtype(self.meta["dtype"])
            num_documents = self.meta["documents"]
            num_tokens = self.meta["tokens"]
            hashes = {part: self.meta["sha256"][part] for part in parts_of(self.meta)}
        if version != VERSION:
            raise UserError(
                f"{json_path}: version {version}, this program reads {VERSION}; make it again with "
                "`convert.py data`"
            )
        self.tokens = self._map("bin", dtype, num_tokens)
        offsets = self._map("idx", np.dtype("<u8"), num_documents + 1)
        self.offsets = offsets.astype(np.int64)
        self.mask = None
        if "mask" in hashes:
            self.mask = self._map("mask", np.dtype(np.uint8), num_tokens)
        is_sorted = (np.diff(self.offsets) >= 0).all()
        if self.offsets[0] != 0 or self.offsets[-1] != num_tokens or not is_sorted:
            raise UserError(
                f"{prefix}.idx: offsets do not rise from 0 to {num_tokens}; the file is damaged"
            )
        if verify:
            self._verify(hashes)

    def _verify(self, hashes: dict[str, str]) -> None:
        for part, expected in hashes.items():
            if sha256_of(Path(f"{self.prefix}.{part}")) != expected:
                raise UserError(
                    f"{self.prefix}.{part}: its sha256 is not the one in {self.prefix}.json; the "
                    "file is damaged"
                )

    def _map(self, part: str, dtype: np.dtype, count: int) -> np.ndarray:
        path = Path(f"{self.prefix}.{part}")
        expected_bytes = count * dtype.itemsize
        found = "is missing"
        if path.is_file():
            num_bytes = path.stat().st_size
            if num_bytes == expected_bytes:
                return np.memmap(path, dtype, mode="r")
            found = f"has {num_bytes} bytes"
        raise UserError(
            f"{path}: {found}, {self.prefix}.json says that it has {expected_bytes} bytes; make "
            "the data set again"
        )

    @property
    def files(self) -> list[Path]:
        """The files that hold the arrays."""
        return [Path(f"{self.prefix}.{part}") for part in parts_of(self.meta)]

    @property
    def template(self) -> str:
        """The template that its conversations are rendered in; "" for plain text, or if unknown."""
        return self.meta.get("template", "") if self.mask is not None else ""

    def __len__(self) -> int:
        return len(self.offsets) - 1
