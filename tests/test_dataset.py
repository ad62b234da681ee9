"""Tokenized data sets: written whole or not at all, the same by any number of processes, refused when they do not fit."""

import json
import os
import signal
import subprocess
import sys
import time
from array import array
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from minillama.data import megatron, records, tokenize
from minillama.data.batches import BatchPlan
from minillama.data.encode import encode_document
from minillama.data.formats import parse
from minillama.data.memmap import Chunk, Dataset, DatasetWriter
from minillama.data.records import read_records
from minillama.data.show import show_batch
from minillama.data.sources import Source
from minillama.data.token_cache import open_data
from minillama.data.tokenize import DataOptions, build_dataset
from minillama.data.windows import TrainingWindows
from minillama.errors import UserError
from minillama.tokenizer import open_tokenizer, train_tokenizer

ROOT = Path(__file__).parents[1]


def build(files, tokenizer, prefix, **options):
    return build_dataset(files, tokenizer, prefix, DataOptions(**options))


def open_paths(paths, tokenizer, cache_dir, **options):
    return open_data(paths, tokenizer, DataOptions(cache_dir=cache_dir, **options))


def alpaca(count):
    return [
        {
            "instruction": f"Say {i}",
            "input": "twice" if i % 3 == 0 else "",
            "output": f"{i} the world " * (i % 7 + 1),
        }
        for i in range(count)
    ]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read(source):
    return [document for record in read_records(source) for document in parse(source, record)]


def write_dataset(prefix, documents, vocab_size, about):
    """Write (ids, mask or None for all) pairs as a data set."""
    chunk = Chunk(records=len(documents))
    for ids, mask in documents:
        chunk.append(ids, mask)
    with DatasetWriter(prefix, vocab_size, about) as writer:
        writer.add(chunk)
        return writer.finish()


def document(dataset, number):
    """(ids, mask or None) of a document."""
    span = slice(dataset.offsets[number], dataset.offsets[number + 1])
    return dataset.tokens[span], None if dataset.mask is None else dataset.mask[span]


def contents(prefix):
    return {part: Path(f"{prefix}.{part}").read_bytes() for part in ("bin", "mask", "idx", "json")}


@pytest.fixture
def built(tmp_path, small_tokenizer):
    """A data set of 40 alpaca records, and the file it was made from."""
    source = write(tmp_path / "a.jsonl", alpaca(40))
    build([source], small_tokenizer, tmp_path / "set", quiet=True)
    return source, tmp_path / "set"


def test_a_data_set_holds_every_documents_ids_and_mask(built, small_tokenizer):
    source, prefix = built
    dataset = Dataset(prefix, verify=True)
    documents = [
        encode_document(small_tokenizer, document, "alpaca", True)
        for document in read(Source(source, "alpaca"))
    ]
    assert len(dataset) == len(documents) == dataset.meta["documents"] == 40
    for number, (ids, mask) in enumerate(documents):
        found_ids, found_mask = document(dataset, number)
        assert found_ids.tolist() == ids and found_mask.tolist() == mask
    assert dataset.meta["tokens"] == sum(len(ids) for ids, _ in documents)
    assert dataset.meta["targets"] == sum(sum(mask) for _, mask in documents)
    assert dataset.tokens.dtype == np.uint16 and dataset.meta["documents_without_target"] == 0


def test_the_index_is_offsets_from_zero_and_the_mask_is_absent_where_all_is_trained(tmp_path):
    meta = write_dataset(tmp_path / "set", [([5, 6, 7], None), ([8, 9], None)], 70_000, {})
    assert np.frombuffer((tmp_path / "set.idx").read_bytes(), "<u8").tolist() == [0, 3, 5]
    assert not (tmp_path / "set.mask").exists()
    assert meta["dtype"] == "uint32" and np.frombuffer(
        (tmp_path / "set.bin").read_bytes(), "<u4"
    ).tolist() == [5, 6, 7, 8, 9]


def test_processes_do_not_change_a_byte(tmp_path, small_tokenizer, monkeypatch):
    monkeypatch.setattr(tokenize, "CHUNK_RECORDS", 7)
    source = write(tmp_path / "a.jsonl", alpaca(100))
    for workers in (1, 2, 3):
        build([source], small_tokenizer, tmp_path / f"set{workers}", quiet=True, workers=workers)
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
def test_a_long_text_read_in_parts_is_the_same_document(
    tmp_path, small_tokenizer, monkeypatch, block
):
    monkeypatch.setattr(records, "BLOCK", block)
    monkeypatch.setattr(tokenize, "CHUNK_CHARACTERS", 2 * block)
    text = "the cat  sat\n\n on the mat 12\n▁\n" * 20 + "without an end"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("another\n")
    build(
        [tmp_path / "a.txt", tmp_path / "b.txt"],
        small_tokenizer,
        tmp_path / "set",
        quiet=True,
        workers=2,
    )
    dataset = Dataset(tmp_path / "set", verify=True)
    expected = [
        encode_document(small_tokenizer, document, "", True)[0] for document in (text, "another\n")
    ]
    assert [document(dataset, i)[0].tolist() for i in range(len(dataset))] == expected


def test_this_path_imports_no_torch(tmp_path, built, small_tokenizer):
    code = BUILD + "assert 'torch' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", code, built[0], small_tokenizer.path, tmp_path / "again"],
        check=True,
        cwd=ROOT,
    )
    assert contents(tmp_path / "again")["bin"] == contents(built[1])["bin"]


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, small_tokenizer, monkeypatch):
    monkeypatch.setattr(tokenize, "CHUNK_RECORDS", 7)
    records = alpaca(100)
    records[10] = {"instruction": "no output"}
    source = write(tmp_path / "a.jsonl", records)
    options = {"quiet": True, "skip_bad_records": True}
    expected = build([source], small_tokenizer, tmp_path / "whole", **options)

    add, added = DatasetWriter.add, []

    def interrupted(writer, chunk):
        if len(added) == 5:
            writer.files["bin"].write(b"half a chunk")
            raise KeyboardInterrupt
        added.append(chunk.records)
        add(writer, chunk)

    monkeypatch.setattr(DatasetWriter, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build([source], small_tokenizer, tmp_path / "set", **options)
    assert not (tmp_path / "set.json").exists()
    monkeypatch.setattr(
        DatasetWriter,
        "add",
        lambda writer, chunk: (added.append(chunk.records), add(writer, chunk)),
    )
    assert build([source], small_tokenizer, tmp_path / "set", **options) == expected
    assert sum(added) == 100  # nothing was tokenized twice
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")
    assert not list(tmp_path.glob("*.partial"))
    assert expected["skipped_records"] == [f"{source}: record 11 (line 11): 'output' is missing"]


def test_work_on_another_input_is_not_taken_up(tmp_path, small_tokenizer):
    source = write(tmp_path / "a.jsonl", alpaca(20))
    with (
        pytest.raises(KeyboardInterrupt),
        DatasetWriter(tmp_path / "set", small_tokenizer.size, {"template": "raw"}) as writer,
    ):
        writer.add(Chunk(array("I", [1, 2]), bytearray([0, 1]), [2], records=1))
        raise KeyboardInterrupt
    for name in ("set", "fresh"):
        build([source], small_tokenizer, tmp_path / name, quiet=True)
    assert contents(tmp_path / "set") == contents(tmp_path / "fresh")


def test_a_killed_run_leaves_no_data_set_and_no_process(tmp_path, small_tokenizer):
    source = write(tmp_path / "a.jsonl", alpaca(20_000))
    command = [sys.executable, "-c", BUILD, source, small_tokenizer.path, tmp_path / "set"]
    run = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    while not (tmp_path / "set.json.partial").exists() and run.poll() is None:
        time.sleep(0.005)
    run.kill()
    assert run.wait() == -signal.SIGKILL and not (tmp_path / "set.json").exists()
    for _ in range(400):  # its workers notice, and end by themselves
        try:
            os.killpg(run.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.01)
    else:
        pytest.fail("a worker outlived the run")
    meta = build([source], small_tokenizer, tmp_path / "set", quiet=True)
    assert meta["documents"] == 20_000 and len(Dataset(tmp_path / "set", verify=True)) == 20_000


def test_two_runs_do_not_write_the_same_data_set(tmp_path, small_tokenizer):
    source = write(tmp_path / "a.jsonl", alpaca(5))
    with (
        DatasetWriter(tmp_path / "set", small_tokenizer.size, {}),
        pytest.raises(UserError, match="another process is writing"),
    ):
        build([source], small_tokenizer, tmp_path / "set", quiet=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_record_stops_the_run_and_leaves_what_was_there(
    tmp_path, built, small_tokenizer, workers
):
    before = contents(built[1])
    source = write(tmp_path / "bad.jsonl", [*alpaca(700), {"instruction": "Q"}])
    with pytest.raises(
        UserError,
        match=r"bad\.jsonl: record 701 \(line 701\): 'output' is missing; --skip_bad_records leaves",
    ):
        build([source], small_tokenizer, built[1], quiet=True, workers=workers)
    assert contents(built[1]) == before and not list(tmp_path.glob("*.partial"))


def test_documents_without_a_target_are_counted_and_too_many_stop_the_run(
    tmp_path, small_tokenizer
):
    records = alpaca(200)
    for record in records[:2]:
        record["output"] = ""
    options = {
        "quiet": True,
        "append_eod": False,
    }  # an empty answer and no end token: nothing to learn
    meta = build(
        [write(tmp_path / "a.jsonl", records)], small_tokenizer, tmp_path / "set", **options
    )
    assert meta["documents_without_target"] == 2
    records[2]["output"] = ""
    with pytest.raises(UserError, match="3 of 200 documents have nothing to train on"):
        build(
            [write(tmp_path / "b.jsonl", records)], small_tokenizer, tmp_path / "other", **options
        )
    assert not list(tmp_path.glob("other*"))


def test_the_end_token_is_the_last_alone_where_it_is_an_option(small_tokenizer):
    from minillama.chat import Conversation, Turn

    for document, counts in (
        (Conversation((Turn("Q", "A"), Turn("R", "B"))), [2, 1]),
        ("text", [1, 0]),
    ):
        ids = [
            encode_document(small_tokenizer, document, "vicuna_v1.1", append_eod)[0]
            for append_eod in (True, False)
        ]
        assert [found.count(small_tokenizer.eos_id) for found in ids] == counts and ids[0][
            :-1
        ] == ids[1]


# --- refusals


def damage(prefix, part, change):
    path = Path(f"{prefix}.{part}")
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("bin", lambda raw: raw[:-2], r"set\.bin: has \d+ bytes"),
        ("bin", lambda raw: bytes([raw[0] ^ 1]) + raw[1:], r"set\.bin: its sha256 is not the one"),
        (
            "mask",
            lambda raw: bytes([raw[0] ^ 1]) + raw[1:],
            r"set\.mask: its sha256 is not the one",
        ),
        ("idx", lambda raw: raw[:8] + raw[16:] + raw[:8], r"set\.idx: offsets do not rise"),
        ("json", lambda raw: b"{}", "not a minillama data set"),
        (
            "json",
            lambda raw: raw.replace(b'"version": 1', b'"version": 9'),
            "version 9, this program reads 1",
        ),
    ],
)
def test_a_damaged_data_set_is_refused_with_the_reason(
    built, small_tokenizer, part, change, message
):
    damage(built[1], part, change)
    with pytest.raises(UserError, match=message):
        open_paths((str(built[1]),), small_tokenizer, "")


def test_a_data_set_of_another_tokenizer_or_a_changed_file_is_refused(
    tmp_path, built, small_tokenizer
):
    source, prefix = built
    assert len(open_paths((str(prefix),), small_tokenizer, "")) == 40
    other = tmp_path / "other.model"
    other.write_bytes(train_tokenizer(["quite another text"] * 3, 280))
    with pytest.raises(UserError, match="was made with another tokenizer"):
        open_paths((str(prefix),), open_tokenizer(other), "")
    os.utime(source, (1, 1))
    assert len(open_paths((str(prefix),), small_tokenizer, "")) == 40  # touched is not changed
    write(source, alpaca(41))
    with pytest.raises(UserError, match=r"a\.jsonl has changed since it was tokenized"):
        open_paths((str(prefix),), small_tokenizer, "")
    source.unlink()
    assert len(open_paths((str(prefix),), small_tokenizer, "")) == 40  # moved away is not changed


def test_another_template_than_a_data_sets_own_is_refused(tmp_path, built, small_tokenizer):
    for asked in ("", "alpaca"):
        assert len(open_paths((str(built[1]),), small_tokenizer, "", template=asked)) == 40
    with pytest.raises(
        UserError, match="made with the template alpaca, not raw; leave --template out"
    ):
        open_paths((str(built[1]),), small_tokenizer, "", template="raw")
    build(
        [built[0]],
        small_tokenizer,
        tmp_path / "other",
        template="llama_factory_default",
        quiet=True,
    )
    assert (
        len(open_paths((str(tmp_path / "other"),), small_tokenizer, "", template="default")) == 40
    )  # two names for one


def test_ids_beyond_the_vocabulary_are_refused(tmp_path):
    with pytest.raises(UserError, match="token id 10 is beyond the vocabulary of 10"):
        write_dataset(tmp_path / "set", [([1, 10], None)], 10, {})
    assert not list(tmp_path.iterdir())


def test_a_cache_follows_its_file_its_tokenizer_and_its_options(tmp_path, small_tokenizer):
    source, cache = write(tmp_path / "a.jsonl", alpaca(10)), str(tmp_path / "cache")
    first = open_paths((str(source),), small_tokenizer, cache, quiet=True)
    assert open_paths((str(source),), small_tokenizer, cache, quiet=True).prefix == first.prefix
    assert (
        open_paths((str(source),), small_tokenizer, cache, quiet=True, template="raw").prefix
        != first.prefix
    )
    info = tmp_path / "dataset_info.json"
    info.write_text(json.dumps({"a": {"file_name": "a.jsonl", "columns": {"query": "output"}}}))
    assert open_paths((str(source),), small_tokenizer, cache, quiet=True).prefix != first.prefix
    info.unlink()
    write(source, alpaca(11))
    assert len(open_paths((str(source),), small_tokenizer, cache, quiet=True)) == 11


# --- AscendSpeed's .bin/.idx

GOLDEN = bytes.fromhex(
    "4d4d494449445800000100000000000000040300000000000000030000000000000003000000020000000400000000"
    "000000000000000c000000000000001400000000000000000000000000000001000000000000000300000000000000"
)


def indexed(path, sequences, doc_idx=None):
    """Write sequences in Megatron's format, int32."""
    doc_idx = range(len(sequences) + 1) if doc_idx is None else doc_idx
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


def test_the_golden_index_is_read_and_equals_ours(tmp_path):
    part = tmp_path / "x_text_document"
    indexed(part, [[1, 5, 6], [7, 8], [1, 9, 9, 2]], [0, 1, 3])
    assert Path(f"{part}.idx").read_bytes() == GOLDEN
    for name in (part, tmp_path / "x", f"{part}.idx"):
        dataset = open_paths((str(name),), type("Ten", (), {"size": 10}), "")
        assert [document(dataset, i)[0].tolist() for i in range(len(dataset))] == [
            [1, 5, 6],
            [7, 8, 1, 9, 9, 2],
        ]
    assert TrainingWindows(dataset, 4).targets.sum() == 2 + 5


def test_an_instruction_triple_is_trained_where_its_labels_are(tmp_path):
    ids, labels = [[1, 5, 6, 2], [1, 7, 2]], [[-100, -100, 6, 2], [-100, 7, 2]]
    parts = {"input_ids": ids, "attention_mask": [[1] * 4, [1] * 3], "labels": labels}
    for name, sequences in parts.items():
        indexed(tmp_path / f"x_packed_{name}_document", sequences)
    dataset = megatron.MegatronDataset(tmp_path / "x", 10)
    assert [document(dataset, i)[1].tolist() for i in range(2)] == [[0, 0, 1, 1], [0, 1, 1]]
    batch = TrainingWindows(dataset, 8).batch(np.arange(2))
    assert batch.labels.tolist() == [
        -100,
        6,
        2,
        -100,
        7,
        2,
        -100,
    ]  # unshifted on disk, shifted here
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


# --- batches


def specs_of(prefix, **changes):
    options = {
        "max_length": 256,
        "rows_per_step": 4,
        "rows_per_micro_batch": 2,
        "seed": 3,
        "epochs": 2.0,
    } | changes
    return BatchPlan(TrainingWindows(Dataset(prefix), options.pop("max_length")), **options)


def rows(batches):
    """The documents of batches, as tuples of ids."""
    return [
        tuple(part)
        for batch in batches
        for part in np.split(batch.tokens, np.cumsum(batch.lengths)[:-1])
    ]


def test_an_epoch_packs_every_document_once(built):
    dataset, plan = Dataset(built[1]), specs_of(built[1], epochs=1.0)
    packed = sorted(
        tuple(map(int, part))
        for step in range(plan.total_steps)
        for part in rows(plan.micro_batches(step))
    )
    assert packed == sorted(tuple(document(dataset, i)[0].tolist()) for i in range(len(dataset)))


def test_every_label_is_the_next_token_of_its_own_document(built):
    dataset = Dataset(built[1])
    trained = {
        tuple(ids.tolist()): mask
        for ids, mask in (document(dataset, i) for i in range(len(dataset)))
    }
    for batch in specs_of(built[1]).micro_batches(0):
        bounds = np.cumsum([0, *batch.lengths])
        for start, end in pairwise(bounds):
            ids, labels = batch.tokens[start:end], batch.labels[start:end]
            mask = trained[tuple(ids.tolist())]
            assert labels[-1] == -100 and (labels[:-1] == np.where(mask[1:], ids[1:], -100)).all()


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_any_split_into_micro_batches_and_ranks_trains_on_the_same_tokens(built, micro):
    whole, split = (
        specs_of(built[1], rows_per_micro_batch=4),
        specs_of(built[1], rows_per_micro_batch=micro),
    )
    assert whole.total_steps == split.total_steps
    for step in range(whole.total_steps):
        batches = split.micro_batches(step)
        ranks = [batches[rank::2] for rank in range(2)]
        assert (
            sorted(rows(batches))
            == sorted(rows(whole.micro_batches(step)))
            == sorted(rows(ranks[0]) + rows(ranks[1]))
        )
        assert sum(batch.targets for batch in batches) == sum(
            batch.targets for batch in whole.micro_batches(step)
        )


def test_a_step_needs_no_memory_of_the_steps_before_it(built):
    run = specs_of(built[1])
    seen = [rows(run.micro_batches(step)) for step in range(run.total_steps)]
    for step in reversed(range(run.total_steps)):
        assert rows(specs_of(built[1]).micro_batches(step)) == seen[step]
    assert seen != [
        rows(specs_of(built[1], seed=4).micro_batches(step)) for step in range(run.total_steps)
    ]


def test_the_cut_rule_shortens_instruction_data_and_continues_text(tmp_path, built):
    cut = TrainingWindows(Dataset(built[1]), 150)
    lengths = np.diff(Dataset(built[1]).offsets)
    assert cut.shortened == (lengths > 150).sum() > 0
    assert cut.length.sum() == np.minimum(lengths, 150).sum()
    write_dataset(tmp_path / "text", [(list(range(10)), None)], 10, {})
    pieces = TrainingWindows(Dataset(tmp_path / "text"), 4)
    assert [pieces.batch(np.array([i])).labels.tolist() for i in range(3)] == [
        [1, 2, 3, 4],
        [5, 6, 7, 8],
        [9, -100],
    ]
    assert pieces.targets.sum() == 9  # every token but the first is predicted once


def test_prompts_that_fill_max_length_stop_the_run(built):
    with pytest.raises(
        UserError,
        match="of 40 documents have nothing to train on within max_length = 20 tokens; raise max_length",
    ):
        TrainingWindows(Dataset(built[1]), 20)


def test_show_batch_marks_what_is_trained_on(built, small_tokenizer):
    batch = specs_of(built[1], rows_per_step=1, rows_per_micro_batch=1).micro_batches(0)[0]
    text = show_batch(small_tokenizer, batch)
    assert text.count("### Response:⟦") == text.count("</s>⟧") == len(batch.lengths)
    assert "<s>Below is an instruction" in text and f"{batch.targets} trained on" in text
    assert show_batch(small_tokenizer, batch, color=True).count("\033[32m") == len(batch.lengths)
    one = replace(batch, tokens=batch.tokens[:3], labels=np.array([-100, 5, -100]), lengths=[3])
    assert "3 tokens, 1 trained on" in show_batch(small_tokenizer, one)


# --- the published data


def test_chinese_all_the_way(tmp_path, shared):
    tokenizer = open_tokenizer(shared / "tokenizers/chinese_llama2")
    chat = open_paths(
        (str(shared / "sft/alpaca_zh_demo.json"),),
        tokenizer,
        str(tmp_path),
        template="chinese_alpaca_2",
        quiet=True,
    )
    assert (len(chat), chat.meta["documents_without_target"]) == (1000, 0)
    ids, mask = document(chat, 0)
    records = json.loads((shared / "sft/alpaca_zh_demo.json").read_text(encoding="utf-8"))
    assert tokenizer.decode(ids[mask == 1].tolist()) == records[0]["output"]
    text = shared / "text/sanguo_ch1-20_zh.txt"
    whole, lines = (
        open_paths((str(text),), tokenizer, str(tmp_path), data_format=kind, quiet=True)
        for kind in ("text", "lines")
    )
    assert tokenizer.decode(whole.tokens.tolist()) == text.read_text(encoding="utf-8")
    assert len(whole) == 1 and len(lines) == sum(
        bool(line.strip()) for line in text.read_text(encoding="utf-8").split("\n")
    )
