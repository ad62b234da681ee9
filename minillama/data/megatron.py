"""AscendSpeed's and Megatron's tokenized `.bin/.idx`, read as they are.

    .bin   arrays of tokens, one after another, little-endian
    .idx   "MMIDIDX\\0\\0" | uint64 version 1 | uint8 dtype | uint64 sequences | uint64 entries
           | int32 sizes[sequences] | int64 byte pointers[sequences] | int64 doc_idx[entries]

`NAME_text_document` is pre-training text: document i is the sequences doc_idx[i] to doc_idx[i + 1].
Instruction data is three such pairs, `NAME_packed_{input_ids,attention_mask,labels}_document`. Its
labels are not shifted, and are -100 where nothing is trained. The format does not record the
tokenizer, so ids are only compared with the size of the vocabulary.
"""

import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minillama.data.memmap import Dataset
from minillama.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
OLD_MAGIC = b"TNTIDX"
HEADER = struct.Struct("<QBQQ")  # after MAGIC: version, dtype code, sequences, entries of doc_idx
HEADER_BYTES = len(MAGIC) + HEADER.size
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats: no ids
IDS = "_packed_input_ids_document"
LABELS = "_packed_labels_document"
IGNORE = -100
BLOCK = 1 << 24  # tokens that are compared at a time


class IndexedFile(NamedTuple):
    """PART.bin and PART.idx. Sequence i is the tokens bounds[i] to bounds[i + 1]."""

    tokens: np.ndarray  # (tokens,)
    bounds: np.ndarray  # (sequences + 1,)
    doc_idx: np.ndarray  # (documents + 1,) in sequences


def find_part(prefix: Path | str) -> Path | None:
    """The PART with the tokens of a Megatron data set, or None for another kind of data.

    prefix: the part, its name without the ending, or one of its two files.
    """
    base = str(prefix).removesuffix(".idx").removesuffix(".bin")
    for ending in ("", "_text_document", IDS):
        part = base + ending
        with suppress(OSError), open(f"{part}.idx", "rb") as file:
            if file.read(len(MAGIC)).startswith((MAGIC, OLD_MAGIC)):
                return Path(part)
    return None


class MegatronDataset(Dataset):
    """A data set of AscendSpeed or Megatron, with the attributes of our own."""

    def __init__(self, prefix: Path | str, vocab_size: int) -> None:
        """Raises UserError for a damaged data set, and for ids beyond `vocab_size`."""
        self.prefix = find_part(prefix) or Path(prefix)
        self.meta = {}  # the format does not say how it was made
        indexed = read_indexed(self.prefix)
        self.tokens = indexed.tokens
        self.offsets = indexed.bounds[indexed.doc_idx]
        self.mask = None
        largest = max(int(self.tokens[block].max()) for block in self._blocks())
        if largest >= vocab_size:
            raise UserError(
                f"{self.prefix}.bin: token id {largest} is beyond the vocabulary of {vocab_size}; "
                "it needs its own tokenizer"
            )
        if self.prefix.name.endswith(IDS):
            self.offsets = indexed.bounds  # each sequence is a document
            self.mask = self._read_mask(indexed)

    @property
    def files(self) -> list[Path]:
        """The files that hold the arrays, those of the labels too."""
        prefixes = [self.prefix]
        if self.mask is not None:
            name = self.prefix.name.removesuffix(IDS) + LABELS
            prefixes.append(self.prefix.with_name(name))
        return [Path(f"{prefix}.{part}") for prefix in prefixes for part in ("bin", "idx")]

    def _blocks(self) -> Iterator[slice]:
        for start in range(0, len(self.tokens), BLOCK):
            yield slice(start, start + BLOCK)

    def _read_mask(self, indexed: IndexedFile) -> np.ndarray:
        """Which tokens are targets, from the labels beside the input ids."""
        name = self.prefix.name.removesuffix(IDS) + LABELS
        part = self.prefix.with_name(name)
        labels_file = read_indexed(part)
        if not np.array_equal(indexed.bounds, labels_file.bounds):
            raise UserError(
                f"{part}.idx: its sequences are not as long as those of {self.prefix}.idx; "
                "the triple does not fit"
            )
        masks = []
        for block in self._blocks():
            labels = labels_file.tokens[block]
            is_target = labels != IGNORE
            if (is_target & (labels != self.tokens[block])).any():
                raise UserError(
                    f"{part}.bin: labels differ from the input ids beside them; "
                    "the files do not fit"
                )
            masks.append(is_target)
        return np.concatenate(masks).view(np.uint8)


def read_indexed(part: Path) -> IndexedFile:
    """Open PART.bin and PART.idx. Raises UserError if they are damaged or of another format."""
    idx_path = Path(f"{part}.idx")
    bin_path = Path(f"{part}.bin")
    try:
        raw = idx_path.read_bytes()
        bin_bytes = bin_path.stat().st_size
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file; the data set is not complete") from None
    if not raw.startswith(MAGIC):
        raise UserError(
            f"{idx_path}: not Megatron's mmap format; make a set of its older lazy/cached format "
            "again: `--dataset-impl mmap`"
        )
    header = raw.ljust(HEADER_BYTES, b"\0")  # a file may be cut off
    version, code, num_sequences, num_entries = HEADER.unpack_from(header, len(MAGIC))
    if version != 1 or code not in DTYPES:
        raise UserError(
            f"{idx_path}: version {version} with dtype code {code}; expected version 1 and an "
            "integer dtype"
        )
    sizes_start = HEADER_BYTES
    pointers_start = sizes_start + 4 * num_sequences
    doc_idx_start = pointers_start + 8 * num_sequences
    needed = doc_idx_start + 8 * num_entries
    if len(raw) != needed:
        raise UserError(
            f"{idx_path}: has {len(raw)} bytes, its {num_sequences} sequences need {needed}; "
            "the file is damaged"
        )
    sizes = np.frombuffer(raw, "<i4", num_sequences, sizes_start)
    pointers = np.frombuffer(raw, "<i8", num_sequences, pointers_start)
    doc_idx = np.frombuffer(raw, "<i8", num_entries, doc_idx_start)
    dtype = np.dtype(DTYPES[code])
    bounds = np.append(0, sizes.cumsum(dtype=np.int64))
    if not _is_consistent(sizes, pointers, doc_idx, dtype.itemsize):
        raise UserError(
            f"{idx_path}: its pointers do not follow from its sizes; the file is damaged"
        )
    expected_bytes = bounds[-1] * dtype.itemsize
    if bin_bytes != expected_bytes:
        raise UserError(
            f"{bin_path}: has {bin_bytes} bytes, {idx_path} says {expected_bytes}; "
            "the file is damaged"
        )
    return IndexedFile(np.memmap(bin_path, dtype, mode="r"), bounds, doc_idx)


def _is_consistent(
    sizes: np.ndarray, pointers: np.ndarray, doc_idx: np.ndarray, itemsize: int
) -> bool:
    """Whether sequences follow each other without a gap, and so do documents."""
    if len(doc_idx) == 0 or (sizes < 0).any() or sizes.sum(dtype=np.int64) == 0:
        return False
    starts = sizes.cumsum(dtype=np.int64) - sizes
    if not np.array_equal(pointers, starts * itemsize):
        return False
    covers_all = doc_idx[0] == 0 and doc_idx[-1] == len(sizes)
    return bool(covers_all and (np.diff(doc_idx) >= 0).all())
