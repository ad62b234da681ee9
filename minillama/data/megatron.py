"""AscendSpeed's and Megatron's tokenized `.bin/.idx`, read as they are.

    .bin   arrays of tokens end to end, little-endian
    .idx   "MMIDIDX\\0\\0" | uint64 version 1 | uint8 dtype | uint64 sequences | uint64 doc_idx entries
           | int32 sizes[sequences] | int64 byte pointers[sequences] | int64 doc_idx[entries]

`NAME_text_document` is pre-training text: doc_idx gives the sequences each document starts at. Instruction data is a triple,
`NAME_packed_{input_ids,attention_mask,labels}_document`, whose labels stand unshifted, -100 where nothing is trained. The format
records no tokenizer, so ids are only checked against the vocabulary's size.
"""

import struct
from pathlib import Path

import numpy as np

from minillama.data.memmap import Dataset
from minillama.errors import UserError

MAGIC, OLD_MAGIC = b"MMIDIDX\x00\x00", b"TNTIDX"
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats: no token ids
IDS, LABELS = "_packed_input_ids_document", "_packed_labels_document"
ENDINGS = ("", "_text_document", IDS)
IGNORE = -100
BLOCK = 1 << 24  # tokens looked at together


def is_megatron(prefix: Path | str) -> bool:
    return _part_of(prefix) is not None


def _part_of(prefix: Path | str) -> Path | None:
    """The part with the tokens, of a prefix given in full, without its ending, or as one of its files."""
    base = str(prefix).removesuffix(".idx").removesuffix(".bin")
    parts = (Path(f"{base}{ending}") for ending in ENDINGS)
    return next((part for part in parts if _is_index(Path(f"{part}.idx"))), None)


def _is_index(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(MAGIC)).startswith((MAGIC, OLD_MAGIC))


class MegatronDataset(Dataset):
    """A tokenized set of AscendSpeed's, with the face of ours: tokens, offsets, mask, meta."""

    def __init__(self, prefix: Path | str, vocab_size: int) -> None:
        """Raises UserError for a damaged set, and for ids beyond `vocab_size`."""
        part = _part_of(prefix)
        if part is None:
            raise UserError(f"{prefix}: no .idx file of Megatron's format")
        self.prefix, self.mask = part, None
        self.tokens, sizes, doc_idx = read_indexed(part)
        ends = np.append(0, sizes.cumsum(dtype=np.int64))
        self.offsets = ends[doc_idx]
        if part.name.endswith(IDS):
            labels_part = part.with_name(part.name.removesuffix(IDS) + LABELS)
            labels, label_sizes, _ = read_indexed(labels_part)
            if not np.array_equal(sizes, label_sizes):
                raise UserError(f"{labels_part}.idx: its sequences are not as long as those of {part}.idx; the triple does not fit")
            self.mask, self.offsets = self._mask_of(labels, labels_part), ends
        largest = max(int(self.tokens[i:i + BLOCK].max()) for i in range(0, len(self.tokens), BLOCK))
        if largest >= vocab_size:
            raise UserError(f"{part}.bin: token id {largest} is beyond the vocabulary of {vocab_size}; it needs its own tokenizer")
        trained = len(self.tokens) if self.mask is None else int(self.mask.sum())
        self.meta = {"documents": len(self), "tokens": len(self.tokens), "targets": trained, "template": ""}

    def _mask_of(self, labels: np.ndarray, labels_part: Path) -> np.ndarray:
        mask = np.empty(len(labels), np.uint8)
        for i in range(0, len(labels), BLOCK):
            part = slice(i, i + BLOCK)
            mask[part] = labels[part] != IGNORE
            if (labels[part] != self.tokens[part])[mask[part] == 1].any():
                raise UserError(f"{labels_part}.bin: labels differ from the input ids beside them; the files do not fit")
        return mask


def read_indexed(part: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens end to end, sizes of the sequences, doc_idx) of PART.bin and PART.idx. Raises UserError for what does not fit."""
    try:
        raw = Path(f"{part}.idx").read_bytes()
        tokens_bytes = Path(f"{part}.bin").stat().st_size
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file; the data set is not complete") from None
    if raw.startswith(OLD_MAGIC):
        raise UserError(f"{part}.idx: Megatron's older lazy/cached format; make the set again with `--dataset-impl mmap`")
    if not raw.startswith(MAGIC) or len(raw) < 34:
        raise UserError(f"{part}.idx: not an index of Megatron's format")
    version, code, sequences, documents = struct.unpack_from("<QBQQ", raw, len(MAGIC))
    if version != 1 or code not in DTYPES:
        raise UserError(f"{part}.idx: version {version} with dtype code {code}; expected version 1 and an integer dtype")
    needed = 34 + 12 * sequences + 8 * documents
    if len(raw) != needed:
        raise UserError(f"{part}.idx: has {len(raw)} bytes, its {sequences} sequences need {needed}; the file is damaged")
    sizes = np.frombuffer(raw, "<i4", sequences, 34)
    pointers = np.frombuffer(raw, "<i8", sequences, 34 + 4 * sequences)
    doc_idx = np.frombuffer(raw, "<i8", documents, 34 + 12 * sequences)
    dtype = np.dtype(DTYPES[code])
    ends = sizes.cumsum(dtype=np.int64) * dtype.itemsize
    in_order = sequences > 0 and (sizes >= 0).all() and np.array_equal(pointers, ends - sizes * dtype.itemsize)
    if not in_order or doc_idx[0] != 0 or doc_idx[-1] != sequences or (np.diff(doc_idx) < 0).any():
        raise UserError(f"{part}.idx: its pointers do not follow from its sizes; the file is damaged")
    if tokens_bytes != ends[-1]:
        raise UserError(f"{part}.bin: has {tokens_bytes} bytes, {part}.idx says {ends[-1]}; the file is damaged")
    return np.memmap(f"{part}.bin", dtype, mode="r"), sizes, doc_idx
