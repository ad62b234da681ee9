"""Raw files as streams of records: never whole in memory, every mistake named with its place."""

import json
import sys
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillama.chat import Conversation, Turn
from minillama.data import json_array, records
from minillama.data.encode import encode_document
from minillama.data.formats import detect
from minillama.data.records import read_records
from minillama.data.sources import Source
from minillama.errors import UserError
from minillama.generation.prompts import read_prompt_file
from tests.datasets import build
from tests.raw_files import ALPACA, read, write


def test_parquet_rows_are_records(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.bin"
    parquet.write_table(pyarrow.Table.from_pylist([ALPACA | {"text": "T"}] * 3), path)
    assert detect(path) == "alpaca"  # by content, not by name
    assert read(path) == [Conversation((Turn("Q", "A", "I"),))] * 3
    (tmp_path / "cut.parquet").write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"cut\.parquet: not a readable Parquet file"):
        read(tmp_path / "cut.parquet")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"pip install 'minillama\[parquet\]'"):
        read(tmp_path / "a.parquet")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
)


@given(
    values=st.lists(json_values, min_size=1, max_size=8),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    block=st.integers(1, 40),
)
@settings(max_examples=200, deadline=None)
def test_an_array_read_through_a_window_is_the_array(
    tmp_path_factory, values, indent, ascii_only, block
):
    path = tmp_path_factory.mktemp("array") / "a.json"
    path.write_text(
        json.dumps(values, indent=indent, ensure_ascii=ascii_only), encoding="utf-8-sig"
    )
    with pytest.MonkeyPatch.context() as patch:  # a fixture would not be undone between examples
        patch.setattr(json_array, "BLOCK", block)
        assert [record.value for record in read_records(Source(path))] == values


@given(
    values=st.lists(st.dictionaries(st.text(max_size=5), json_values), min_size=1, max_size=8),
    indent=st.sampled_from([None, 1]),
    key=st.text(max_size=5),
    block=st.integers(1, 40),
)
@settings(max_examples=100, deadline=None)
def test_an_array_that_is_all_of_an_object_is_read_as_the_array(
    tmp_path_factory, values, indent, key, block
):
    path = write(tmp_path_factory.mktemp("a") / "a.json", json.dumps({key: values}, indent=indent))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "BLOCK", block)
        assert [record.value for record in read_records(Source(path))] == values


@pytest.mark.parametrize(
    ("between", "place"),
    [
        (",\n", "line 202 column 21"),
        (", ", f"line 2 column {200 * (len(json.dumps(ALPACA)) + 2) + 21}"),
    ],
)
def test_a_fault_behind_many_windows_is_placed_as_in_the_file(
    tmp_path, monkeypatch, between, place
):
    monkeypatch.setattr(json_array, "BLOCK", 100)
    rows = [json.dumps(ALPACA)] * 300
    rows[200] = '{"instruction": "Q" "output"}'
    path = write(tmp_path / "a.json", "[\n" + between.join(rows) + "]")
    with pytest.raises(UserError, match=f"not valid JSON: .* at {place}$"):
        list(read_records(Source(path)))


def test_an_array_is_never_in_memory_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(json_array, "BLOCK", 1000)
    path = write(tmp_path / "a.json", [ALPACA | {"output": "x" * 100}] * 5000)
    tracemalloc.start()
    assert sum(1 for _ in read_records(Source(path))) == 5000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 70_000  # of 700,000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "", "holds no records"),
        ("a.json", "[]", "holds no records"),
        ("a.txt", " \n", "holds no records"),
        (
            "a.json",
            '[{"instruction": "Q", "output": "A"},\n {"instruction": "Q" "output"}]',
            "not valid JSON: .* at line 2 column 22",
        ),
        (
            "a.json",
            '[{"instruction": "Q", "output": "A"}',
            "expected , or ], found the end of the file at line 1 column 37",
        ),
        (
            "a.json",
            '[{"instruction": "Q", "output": "A"}] []',
            "more text after the array at line 1 column 39",
        ),
        (
            "a.json",
            '[{"instruction": "Q", "output": "A"}, {"instruction": "Q"}]',
            "record 2: 'output' is missing",
        ),
        (
            "a.json",
            '[{"instruction": "Q", "output": 3}]',
            "record 1: 'output' is int, expected text",
        ),
        (
            "a.json",
            '[{"instruction": "Q", "output": "A"}, 7]',
            "record 2: expected an object with instruction and output, found int",
        ),
        (
            "a.json",
            '[{"instruction": "Q", "output": "A", "history": ["x"]}]',
            "record 1: 'history' is not a list",
        ),
        (
            "a.jsonl",
            '{"instruction": "Q", "output": "A"}\n\n{"instr',
            r"record 2 \(line 3\): not valid JSON: .* at column 2",
        ),
        ("a.jsonl", "{broken", r"record 1 \(line 1\): not valid JSON: .* at column 2"),
        (
            "a.json",
            '[{"question": "Q", "answer": "A"}]',
            r"first record \(answer, question\) is of no known format",
        ),
        ("a.json", "[1, 2]", r"first record \(int\) is of no known format"),
        ("a.json", '[{"chat": {}}]', "record 1: 'chat' holds no turn"),
        ("a.json", '[{"chat": {"turn_1": {"Human": "Q"}}}]', "record 1: 'MOSS' is missing"),
        (
            "a.json",
            '[{"conversations": "Q"}]',
            "record 1: 'conversations' is not a list of messages",
        ),
        ("a.json", "version https://git-lfs.github.com/spec/v1", "git-lfs pointer"),
    ],
)
def test_a_malformed_file_names_itself_the_place_and_the_fault(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as refused:
        read(path)
    assert str(path) in str(refused.value)


def test_text_that_is_not_utf8_is_refused(tmp_path):
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_bytes('{"text": "玄德"}'.encode("gbk"))
        with pytest.raises(UserError, match=f"{name}: not UTF-8 text"):
            read(tmp_path / name)


def test_bad_records_can_be_left_out_and_are_told_about(tmp_path, small_tokenizer):
    lines = [json.dumps(ALPACA)] * 6
    lines[1] = "{broken"
    lines[4] = json.dumps({"instruction": "Q"})
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    meta = build([path], small_tokenizer, tmp_path / "set", skip_bad_records=True)
    assert meta["documents"] == 4
    assert [error.split(": ")[1] for error in meta["skipped_records"]] == [
        "record 2 (line 2)",
        "record 5 (line 5)",
    ]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("[" * 100_000, "nested more than 100 levels deep"),
        ("[" * 101 + "]" * 101, "nested more than 100 levels deep"),
        ("1" * 5000, "an integer has too many digits"),
        (r'"\ud83d"', r"a string has the lone surrogate .ud83d"),
        ("{", "an object must end on its line"),
    ],
)
def test_a_line_that_cannot_be_worked_with_costs_only_itself(
    tmp_path, small_tokenizer, fault, message
):
    row = json.dumps(ALPACA)
    path = write(tmp_path / "a.jsonl", f'{row}\n{{"instruction": {fault}\n{row}\n')
    if "{" not in fault and "[" * 1000 not in fault:
        path = write(tmp_path / "a.jsonl", f'{row}\n{{"instruction": {fault}}}\n{row}\n')
    with pytest.raises(UserError, match=rf"a\.jsonl: record 2 \(line 2\): .*{message}"):
        read(path)
    meta = build([path], small_tokenizer, tmp_path / "set", skip_bad_records=True)
    assert (meta["documents"], len(meta["skipped_records"])) == (2, 1)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("[" * 100_000, "nested more than 100 levels deep at line 2"),
        ('{"a":' * 101 + "1" + "}" * 101, "record 2: nested more than 100 levels deep"),
        ("1" * 5000, "an integer has too many digits at line 2"),
        (r'{"instruction": "\udc00"}', "record 2: a string has the lone surrogate .udc00"),
    ],
)
def test_an_element_that_cannot_be_worked_with_is_one_error(tmp_path, fault, message):
    path = write(tmp_path / "a.json", f"[{json.dumps(ALPACA)},\n{fault}, 1]")
    with pytest.raises(UserError, match=rf"a\.json: {message}"):
        read(path, "alpaca")


def test_texts_that_cannot_be_encoded_are_refused(small_tokenizer):
    """Bytes of a command line that are not UTF-8 become lone surrogates."""
    text = "玄".encode("gbk").decode("utf-8", "surrogateescape")
    answer = Turn("Q", None)
    for document in (text, Conversation((Turn(text, None),)), Conversation((answer,), text)):
        with pytest.raises(UserError, match=r"lone surrogate .udcd0; write it as UTF-8"):
            encode_document(small_tokenizer, document, "vicuna_v1.1", append_eod=False)


def test_prompts_of_a_file_are_checked_as_data_is(tmp_path):
    path = tmp_path / "a.jsonl"
    faults = ["[" * 100_000, "1" * 5000, r'{"prompt": "\ud83d"}', "{broken", "[1]", '{"prompt": 3}']
    for fault in faults:
        path.write_text('{"prompt": "one"}\n' + fault, encoding="utf-8")
        with pytest.raises(UserError, match=r"a\.jsonl: line 2"):
            read_prompt_file(path)
    path.write_bytes('{"prompt": "玄"}'.encode("gbk"))
    with pytest.raises(UserError, match=r"a\.jsonl: not UTF-8 text"):
        read_prompt_file(path)


def test_a_long_run_of_blank_lines_does_not_end_a_text(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "BLOCK", 4)
    text = "one\n" + " \n" * 20 + "two\n"
    (tmp_path / "a.txt").write_text(text)
    blocks = [record.value for record in read_records(Source(tmp_path / "a.txt"), split_text=True)]
    assert "".join(block.text for block in blocks) == text
