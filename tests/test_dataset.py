"""Tokenized data sets: written whole or not at all, and the same by any number of processes."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from array import array
from pathlib import Path

import numpy as np
import pytest

from minillama.chat import Conversation, Turn
from minillama.data import records, tokenize
from minillama.data.encode import encode_document
from minillama.data.memmap import Chunk, Dataset, DatasetWriter
from minillama.errors import UserError
from tests.datasets import (
    all_ids,
    alpaca,
    build,
    contents,
    document,
    write_dataset,
    write_json_lines,
)
from tests.raw_files import read

ROOT = Path(__file__).parents[1]


def test_a_data_set_holds_every_documents_ids_and_mask(alpaca_dataset, small_tokenizer):
    source, prefix = alpaca_dataset
    dataset = Dataset(prefix, verify=True)
    documents = [
        encode_document(small_tokenizer, conversation, "alpaca", True)
        for conversation in read(source, "alpaca")
    ]
    assert len(dataset) == len(documents) == dataset.meta["documents"] == 40
    for number, (ids, mask) in enumerate(documents):
        found_ids, found_mask = document(dataset, number)
        assert found_ids.tolist() == ids
        assert found_mask.tolist() == mask
    assert dataset.meta["tokens"] == sum(len(ids) for ids, _ in documents)
    assert dataset.meta["targets"] == sum(sum(mask) for _, mask in documents)
    assert dataset.tokens.dtype == np.uint16
    assert dataset.meta["documents_without_target"] == 0


def test_a_data_set_knows_size_time_and_content_of_its_sources(alpaca_dataset):
    source, prefix = alpaca_dataset
    status = source.stat()
    assert Dataset(prefix).meta["sources"] == {
        str(source): {
            "format": "alpaca",
            "columns": {},
            "bytes": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        }
    }


def test_the_index_is_offsets_from_zero_and_the_mask_is_absent_where_all_is_trained(tmp_path):
    meta = write_dataset(tmp_path / "set", [([5, 6, 7], None), ([8, 9], None)], 70_000)
    assert np.frombuffer((tmp_path / "set.idx").read_bytes(), "<u8").tolist() == [0, 3, 5]
    assert not (tmp_path / "set.mask").exists()
    assert meta["dtype"] == "uint32"
    ids = np.frombuffer((tmp_path / "set.bin").read_bytes(), "<u4")
    assert ids.tolist() == [5, 6, 7, 8, 9]


def test_processes_do_not_change_a_byte(tmp_path, small_tokenizer, monkeypatch):
    monkeypatch.setattr(tokenize, "CHUNK_RECORDS", 7)
    source = write_json_lines(tmp_path / "a.jsonl", alpaca(100))
    for workers in (1, 2, 3):
        build([source], small_tokenizer, tmp_path / f"set{workers}", workers=workers)
    assert contents(tmp_path / "set1") == contents(tmp_path / "set2") == contents(tmp_path / "set3")


BUILD = """
import sys
from pathlib import Path
from minillama.data.tokenize import DataOptions, build_dataset
from minillama.tokenizer import open_tokenizer
source, model, prefix = map(Path, sys.argv[1:])
build_dataset([source], open_tokenizer(model), prefix, DataOptions(quiet=True, workers=2))
"""


@pytest.mark.parametrize("block", [1, 50, 300, 10_000])
def test_a_long_text_read_in_blocks_is_the_same_document(
    tmp_path, small_tokenizer, monkeypatch, block
):
    monkeypatch.setattr(records, "BLOCK", block)
    monkeypatch.setattr(tokenize, "CHUNK_CHARACTERS", 2 * block)
    text = "the cat  sat\n\n on the mat 12\n▁\n" * 20 + "without an end"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("another\n")
    build([tmp_path / "a.txt", tmp_path / "b.txt"], small_tokenizer, tmp_path / "set", workers=2)
    dataset = Dataset(tmp_path / "set", verify=True)
    ids, _ = encode_document(small_tokenizer, text, "", True)
    other_ids, _ = encode_document(small_tokenizer, "another\n", "", True)
    assert all_ids(dataset) == [ids, other_ids]


def test_this_path_imports_no_torch(tmp_path, alpaca_dataset, small_tokenizer):
    code = BUILD + "assert 'torch' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", code, alpaca_dataset[0], small_tokenizer.path, tmp_path / "again"],
        check=True,
        cwd=ROOT,
    )
    assert contents(tmp_path / "again")["bin"] == contents(alpaca_dataset[1])["bin"]


def test_an_interrupted_run_continues_where_it_stopped(tmp_path, small_tokenizer, monkeypatch):
    monkeypatch.setattr(tokenize, "CHUNK_RECORDS", 7)
    rows = alpaca(100)
    rows[10] = {"instruction": "no output"}
    source = write_json_lines(tmp_path / "a.jsonl", rows)
    whole = build([source], small_tokenizer, tmp_path / "whole", skip_bad_records=True)
    add = DatasetWriter.add
    num_records: list[int] = []  # of each chunk that was written
    fails_at = 5

    def count_and_add(writer, chunk):
        if len(num_records) == fails_at:
            writer.files["bin"].write(b"half a chunk")
            raise KeyboardInterrupt
        num_records.append(chunk.records)
        add(writer, chunk)

    monkeypatch.setattr(DatasetWriter, "add", count_and_add)
    with pytest.raises(KeyboardInterrupt):
        build([source], small_tokenizer, tmp_path / "set", skip_bad_records=True)
    assert not (tmp_path / "set.json").exists()
    fails_at = -1
    assert build([source], small_tokenizer, tmp_path / "set", skip_bad_records=True) == whole
    assert sum(num_records) == 100  # nothing was tokenized twice
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")
    assert not list(tmp_path.glob("*.partial"))
    assert whole["skipped_records"] == [f"{source}: record 11 (line 11): 'output' is missing"]


def test_a_run_does_not_continue_one_on_another_input(tmp_path, small_tokenizer):
    source = write_json_lines(tmp_path / "a.jsonl", alpaca(20))
    with (
        pytest.raises(KeyboardInterrupt),
        DatasetWriter(tmp_path / "set", small_tokenizer.size, {"template": "raw"}) as writer,
    ):
        writer.add(Chunk(array("I", [1, 2]), bytearray([0, 1]), [2], records=1))
        raise KeyboardInterrupt
    for name in ("set", "fresh"):
        build([source], small_tokenizer, tmp_path / name)
    assert contents(tmp_path / "set") == contents(tmp_path / "fresh")


def test_an_interrupted_run_whose_files_were_cut_off_starts_again(tmp_path):
    """PREFIX.json.partial may have reached the disk while the other files did not."""
    for num_lost_bytes, num_records in ((0, 1), (1, 0)):
        prefix = tmp_path / f"set{num_lost_bytes}"
        with pytest.raises(KeyboardInterrupt), DatasetWriter(prefix, 10, {}) as writer:
            writer.add(Chunk(array("I", [1, 2]), bytearray([0, 1]), [2], records=1))
            raise KeyboardInterrupt
        partial = Path(f"{prefix}.bin.partial")
        os.truncate(partial, partial.stat().st_size - num_lost_bytes)
        with DatasetWriter(prefix, 10, {}) as writer:
            assert writer.meta["records"] == num_records


def test_a_document_whose_first_token_alone_is_marked_has_no_target(tmp_path):
    documents = [([5, 6], [1, 0])] + [([5, 6], [0, 1])] * 9
    meta = write_dataset(tmp_path / "set", documents, 10)
    assert meta["documents_without_target"] == 1


def test_a_killed_run_leaves_no_data_set_and_no_process(tmp_path, small_tokenizer):
    source = write_json_lines(tmp_path / "a.jsonl", alpaca(20_000))
    command = [sys.executable, "-c", BUILD, source, small_tokenizer.path, tmp_path / "set"]
    run = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    while not (tmp_path / "set.json.partial").exists() and run.poll() is None:
        time.sleep(0.005)
    run.kill()
    assert run.wait() == -signal.SIGKILL
    assert not (tmp_path / "set.json").exists()
    for _ in range(400):  # its workers notice, and end by themselves
        try:
            os.killpg(run.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.01)
    else:
        pytest.fail("a worker outlived the run")
    meta = build([source], small_tokenizer, tmp_path / "set")
    assert meta["documents"] == 20_000
    assert len(Dataset(tmp_path / "set", verify=True)) == 20_000


def test_two_runs_do_not_write_the_same_data_set(tmp_path, small_tokenizer):
    source = write_json_lines(tmp_path / "a.jsonl", alpaca(5))
    with (
        DatasetWriter(tmp_path / "set", small_tokenizer.size, {}),
        pytest.raises(UserError, match="another process is writing"),
    ):
        build([source], small_tokenizer, tmp_path / "set")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_record_stops_the_run_and_leaves_what_was_there(
    tmp_path, alpaca_dataset, small_tokenizer, workers
):
    before = contents(alpaca_dataset[1])
    source = write_json_lines(tmp_path / "bad.jsonl", [*alpaca(700), {"instruction": "Q"}])
    message = r"bad\.jsonl: record 701 \(line 701\): 'output' is missing; --skip_bad_records leaves"
    with pytest.raises(UserError, match=message):
        build([source], small_tokenizer, alpaca_dataset[1], workers=workers)
    assert contents(alpaca_dataset[1]) == before
    assert not list(tmp_path.glob("*.partial"))


def test_documents_without_a_target_are_counted_and_too_many_stop_the_run(
    tmp_path, small_tokenizer
):
    rows = alpaca(200)
    for row in rows[:2]:
        row["output"] = ""  # and no EOS: there is nothing to learn
    source = write_json_lines(tmp_path / "a.jsonl", rows)
    meta = build([source], small_tokenizer, tmp_path / "set", append_eod=False)
    assert meta["documents_without_target"] == 2
    for row in rows[:21]:
        row["output"] = ""
    write_json_lines(source, rows)
    message = "21 of 200 documents have nothing to train on .* raise max_dropped, now 0.1"
    with pytest.raises(UserError, match=message):
        build([source], small_tokenizer, tmp_path / "other", append_eod=False)
    assert not list(tmp_path.glob("other*"))
    meta = build([source], small_tokenizer, tmp_path / "other", append_eod=False, max_dropped=0.105)
    assert meta["documents_without_target"] == 21


@pytest.mark.parametrize(
    ("document_to_end", "num_eos"),
    [(Conversation((Turn("Q", "A"), Turn("R", "B"))), 2), ("text", 1)],
)
def test_append_eod_is_about_the_last_eos_of_a_document(small_tokenizer, document_to_end, num_eos):
    """The template decides about EOS between two rounds."""
    ids, _ = encode_document(small_tokenizer, document_to_end, "vicuna_v1.1", True)
    ids_without, _ = encode_document(small_tokenizer, document_to_end, "vicuna_v1.1", False)
    assert ids == [*ids_without, small_tokenizer.eos_id]
    assert ids.count(small_tokenizer.eos_id) == num_eos


def test_ids_beyond_the_vocabulary_are_refused(tmp_path):
    with pytest.raises(UserError, match="token id 10 is beyond the vocabulary of 10"):
        write_dataset(tmp_path / "set", [([1, 10], None)], 10)
    assert not list(tmp_path.iterdir())
