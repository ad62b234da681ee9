"""AscendSpeed's and Megatron's .bin/.idx: read as they are, or refused if damaged."""

from pathlib import Path

import numpy as np
import pytest

from minillama.data import megatron
from minillama.data.windows import TrainingWindows
from minillama.errors import UserError
from tests.datasets import all_ids, damage, document, open_path

GOLDEN = bytes.fromhex(
    "4d4d494449445800000100000000000000040300000000000000030000000000000003000000020000000400000000"
    "000000000000000c000000000000001400000000000000000000000000000001000000000000000300000000000000"
)


def indexed(path, sequences, doc_idx=None):
    """Write sequences in Megatron's format, int32."""
    if doc_idx is None:
        doc_idx = range(len(sequences) + 1)
    sizes = np.array([len(sequence) for sequence in sequences], "<i4")
    pointers = (np.cumsum(sizes) - sizes).astype("<i8") * 4
    head = (
        megatron.MAGIC
        + np.array([1], "<u8").tobytes()
        + b"\x04"
        + np.array([len(sizes), len(doc_idx)], "<u8").tobytes()
    )
    Path(f"{path}.idx").write_bytes(
        head + sizes.tobytes() + pointers.tobytes() + np.array(doc_idx, "<i8").tobytes()
    )
    Path(f"{path}.bin").write_bytes(np.concatenate(sequences).astype("<i4").tobytes())


def test_the_golden_index_is_read_and_equals_ours(tmp_path, small_tokenizer):
    part = tmp_path / "x_text_document"
    indexed(part, [[1, 5, 6], [7, 8], [1, 9, 9, 2]], [0, 1, 3])
    assert Path(f"{part}.idx").read_bytes() == GOLDEN
    for name in (part, tmp_path / "x", f"{part}.idx"):
        dataset = megatron.MegatronDataset(name, vocab_size=10)
        assert all_ids(dataset) == [[1, 5, 6], [7, 8, 1, 9, 9, 2]]
    assert isinstance(open_path(part, small_tokenizer), megatron.MegatronDataset)
    with pytest.raises(UserError, match="append_eod = False holds for raw files"):
        open_path(part, small_tokenizer, append_eod=False)
    assert TrainingWindows(dataset, 4).targets.sum() == 2 + 5


def test_an_instruction_triple_is_trained_where_its_labels_are(tmp_path):
    ids = [[1, 5, 6, 2], [1, 7, 2]]
    labels = [[-100, -100, 6, 2], [-100, 7, 2]]
    parts = {"input_ids": ids, "attention_mask": [[1] * 4, [1] * 3], "labels": labels}
    for name, sequences in parts.items():
        indexed(tmp_path / f"x_packed_{name}_document", sequences)
    dataset = megatron.MegatronDataset(tmp_path / "x", 10)
    assert [document(dataset, i)[1].tolist() for i in range(2)] == [[0, 0, 1, 1], [0, 1, 1]]
    batch = TrainingWindows(dataset, 8).batch(np.arange(2))
    # not shifted on disk, shifted here
    assert batch.labels.tolist() == [-100, 6, 2, -100, 7, 2, -100]
    with pytest.raises(UserError, match="token id 7 is beyond the vocabulary of 7"):
        megatron.MegatronDataset(tmp_path / "x", 7)
    indexed(tmp_path / "x_packed_labels_document", [[-100, 5, 6, 2], [-100, 8, 2]])
    with pytest.raises(UserError, match="labels differ from the input ids"):
        megatron.MegatronDataset(tmp_path / "x", 10)
    indexed(tmp_path / "x_packed_labels_document", [[-100, 5, 6], [2, -100, 8, 2]])
    with pytest.raises(UserError, match="the triple does not fit"):
        megatron.MegatronDataset(tmp_path / "x", 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: b"TNTIDX\x00\x00" + raw[8:], "older lazy/cached format"),
        (lambda raw: raw[:-8], "the file is damaged"),
        (lambda raw: raw[:17] + b"\x06" + raw[18:], "dtype code 6"),
        (lambda raw: raw[:34] + b"\x04" + raw[35:], "do not follow from its sizes"),
    ],
)
def test_a_damaged_megatron_index_is_refused(tmp_path, change, message):
    part = tmp_path / "x_text_document"
    indexed(part, [[1, 5, 6], [7, 8], [1, 9, 9, 2]], [0, 1, 3])
    damage(part, "idx", change)
    with pytest.raises(UserError, match=message):
        megatron.MegatronDataset(part, 10)
