"""A tokenized data set on disk, opened without reading it.

    PREFIX.bin    the ids of all documents end to end, uint16 or uint32 as the vocabulary needs
    PREFIX.mask   uint8 a token: is it trained on; absent where all are
    PREFIX.idx    uint64[documents + 1]: where each document starts, and the end
    PREFIX.json   format version, counts, dtype, tokenizer sha256, template, sha256 of each file

The .json is written last and names what the others must hold, so a data set is complete or it is not there.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from minillama.errors import UserError

VERSION = 1


def write_dataset(prefix: Path, documents: Iterable[tuple[list[int], list[int] | None]], vocab_size: int,
                  about: dict[str, Any]) -> dict[str, Any]:
    """Write documents, (ids, mask or None for all) each, as a data set; returns what PREFIX.json says. Streams.

    about: tokenizer_sha256, template, … stored as they are. Raises UserError where no document comes.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    partial = {part: Path(f"{prefix}.{part}.partial") for part in ("bin", "mask", "idx")}
    offsets, targets = [0], 0
    try:
        with open(partial["bin"], "wb") as bin_file, open(partial["mask"], "wb") as mask_file:
            for ids, mask in documents:
                np.asarray(ids, dtype).tofile(bin_file)
                trained = np.ones(len(ids), np.uint8) if mask is None else np.asarray(mask, np.uint8)
                trained.tofile(mask_file)
                targets += int(trained.sum())
                offsets.append(offsets[-1] + len(ids))
        if len(offsets) == 1:
            raise UserError(f"{prefix}: the input holds no document")
        np.asarray(offsets, "<u8").tofile(partial["idx"])
        if targets == offsets[-1]:
            partial.pop("mask").unlink()
        files = {part: _sha256(path) for part, path in partial.items()}
        meta = {"version": VERSION, "documents": len(offsets) - 1, "tokens": offsets[-1], "targets": targets,
                "dtype": np.dtype(dtype).name, "vocab_size": vocab_size, **about, "sha256": files}
        for part in ("bin", "mask", "idx", "json"):
            Path(f"{prefix}.{part}").unlink(missing_ok=True)
        for part, path in partial.items():
            os.replace(path, f"{prefix}.{part}")
        Path(f"{prefix}.json.partial").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        os.replace(f"{prefix}.json.partial", f"{prefix}.json")
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    return meta


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
            if _sha256(Path(f"{prefix}.{part}")) != expected:
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


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
