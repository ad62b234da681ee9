"""AscendSpeed's and Megatron's tokenized `.bin/.idx`, read as they are.

    .bin   arrays of tokens end to end, little-endian
    .idx   "MMIDIDX\\0\\0" | uint64 version 1 | uint8 dtype | uint64 sequences | uint64 doc_idx entries
           | int32 sizes[sequences] | int64 byte pointers[sequences] | int64 doc_idx[entries]

`NAME_text_document` is pre-training text: doc_idx gives the sequences each document starts at. Instruction data is a triple,
`NAME_packed_{input_ids,attention_mask,labels}_document`, whose labels stand unshifted, -100 where nothing is trained. The format
records no tokenizer, so ids are only checked against the vocabulary's size.
"""

import struct
from contextlib import suppress
from pathlib import Path

import numpy as np

from minillama.data.memmap import Dataset
from minillama.errors import UserError

MAGIC, OLD_MAGIC = b"MMIDIDX\x00\x00", b"TNTIDX"
DTYPES = {
    1: "<u1",
    2: "<i1",
    3: "<i2",
    4: "<i4",
    5: "<i8",
    8: "<u2",
}  # 6 and 7 are floats: no token ids
IDS, LABELS = "_packed_input_ids_document", "_packed_labels_document"
IGNORE = -100
BLOCK = 1 << 24  # tokens looked at together


def find_part(prefix: Path | str) -> Path | None:
    """The part with the tokens, of a prefix given in full, without its ending, or as one of its files; None: another kind of data."""
    base = str(prefix).removesuffix(".idx").removesuffix(".bin")
    for part in (f"{base}{ending}" for ending in ("", "_text_document", IDS)):
        with suppress(OSError), open(f"{part}.idx", "rb") as file:
            if file.read(len(MAGIC)).startswith((MAGIC, OLD_MAGIC)):
                return Path(part)
    return None


class MegatronDataset(Dataset):
    """A tokenized set of AscendSpeed's, with the face of ours: tokens, offsets, mask, meta."""

    def __init__(self, prefix: Path | str, vocab_size: int) -> None:
        """Raises UserError for a damaged set, and for ids beyond `vocab_size`."""
        self.prefix, self.mask, self.meta = (
            find_part(prefix) or Path(prefix),
            None,
            {},
        )  # the format does not say how it was made
        self.tokens, ends, doc_idx = read_indexed(self.prefix)
        self.offsets = ends[doc_idx]
        blocks = [slice(i, i + BLOCK) for i in range(0, len(self.tokens), BLOCK)]
        if (largest := max(int(self.tokens[block].max()) for block in blocks)) >= vocab_size:
            raise UserError(
                f"{self.prefix}.bin: token id {largest} is beyond the vocabulary of {vocab_size}; it needs its own tokenizer"
            )
        if self.prefix.name.endswith(IDS):
            labels_part = self.prefix.with_name(self.prefix.name.removesuffix(IDS) + LABELS)
            labels, label_ends, _ = read_indexed(labels_part)
            if not np.array_equal(ends, label_ends):
                raise UserError(
                    f"{labels_part}.idx: its sequences are not as long as those of {self.prefix}.idx; the triple does not fit"
                )
            if any(
                ((labels[block] != IGNORE) & (labels[block] != self.tokens[block])).any()
                for block in blocks
            ):
                raise UserError(
                    f"{labels_part}.bin: labels differ from the input ids beside them; the files do not fit"
                )
            self.mask, self.offsets = (
                np.concatenate([labels[block] != IGNORE for block in blocks]).view(np.uint8),
                ends,
            )


def read_indexed(part: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens end to end, bounds of the sequences, doc_idx) of PART.bin and PART.idx. Raises UserError for what does not fit."""
    try:
        raw = Path(f"{part}.idx").read_bytes()
        tokens_bytes = Path(f"{part}.bin").stat().st_size
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file; the data set is not complete") from None
    if not raw.startswith(MAGIC):
        raise UserError(
            f"{part}.idx: not Megatron's mmap format; make a set of its older lazy/cached format again: `--dataset-impl mmap`"
        )
    version, code, sequences, documents = struct.unpack_from(
        "<QBQQ", raw.ljust(34, b"\0"), len(MAGIC)
    )
    if version != 1 or code not in DTYPES:
        raise UserError(
            f"{part}.idx: version {version} with dtype code {code}; expected version 1 and an integer dtype"
        )
    needed = 34 + 12 * sequences + 8 * documents
    if len(raw) != needed:
        raise UserError(
            f"{part}.idx: has {len(raw)} bytes, its {sequences} sequences need {needed}; the file is damaged"
        )
    sizes = np.frombuffer(raw, "<i4", sequences, 34)
    pointers = np.frombuffer(raw, "<i8", sequences, 34 + 4 * sequences)
    doc_idx = np.frombuffer(raw, "<i8", documents, 34 + 12 * sequences)
    dtype, ends = np.dtype(DTYPES[code]), np.append(0, sizes.cumsum(dtype=np.int64))
    in_order = (
        documents > 0
        and ends[-1] > 0
        and (sizes >= 0).all()
        and np.array_equal(pointers, ends[:-1] * dtype.itemsize)
    )
    if not in_order or doc_idx[0] != 0 or doc_idx[-1] != sequences or (np.diff(doc_idx) < 0).any():
        raise UserError(
            f"{part}.idx: its pointers do not follow from its sizes; the file is damaged"
        )
    if tokens_bytes != ends[-1] * dtype.itemsize:
        raise UserError(
            f"{part}.bin: has {tokens_bytes} bytes, {part}.idx says {ends[-1] * dtype.itemsize}; the file is damaged"
        )
    return np.memmap(f"{part}.bin", dtype, mode="r"), ends, doc_idx
