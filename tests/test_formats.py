"""Raw files: every format by example, every mistake by its message, and nothing read whole that can be read in parts."""

import hashlib
import json
import random
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillama.chat import Conversation, Turn
from minillama.data import records
from minillama.data.formats import BadRecord, detect, parse
from minillama.data.records import read_records
from minillama.data.sources import Source, find_sources
from minillama.data.tokenize import DataOptions, build_dataset
from minillama.errors import UserError

ALPACA = {"instruction": "Q", "input": "I", "output": "A"}


def write(path, content):
    path.write_text(
        content if isinstance(content, str) else json.dumps(content, ensure_ascii=False),
        encoding="utf-8",
    )
    return path


def documents(sources):
    return [
        document
        for source in sources
        for record in read_records(source)
        for document in parse(source, record)
    ]


def read(path, data_format="auto"):
    return documents([Source(path, detect(path) if data_format == "auto" else data_format)])


def test_alpaca_records_with_history_and_system(tmp_path):
    path = write(
        tmp_path / "a.json",
        [ALPACA, {"instruction": "R", "output": "B", "system": "S", "history": [["Q", "A"]]}],
    )
    assert detect(path) == "alpaca"
    assert read(path) == [
        Conversation((Turn("Q", "A", "I"),)),
        Conversation((Turn("Q", "A"), Turn("R", "B")), "S"),
    ]


def test_sharegpt_drops_what_stands_before_the_first_question(tmp_path):
    def said(*pairs):
        return {"id": "x", "conversations": [{"from": who, "value": text} for who, text in pairs]}

    path = write(
        tmp_path / "a.json",
        [said(("gpt", "Welcome"), ("human", "Q"), ("gpt", "A"), ("human", "unanswered"))],
    )
    assert detect(path) == "sharegpt"
    assert read(path) == [Conversation((Turn("Q", "A", None),))]
    bad = write(
        tmp_path / "b.json",
        [said(("human", "Q"), ("gpt", "A")), said(("human", "Q"), ("human", "R"))],
    )
    with pytest.raises(
        BadRecord, match=r"b\.json: record 2: turn 2 is from 'human', expected 'gpt'"
    ):
        read(bad)
    with pytest.raises(BadRecord, match="no question with an answer"):
        read(write(tmp_path / "c.json", [said(("human", "Q"))]))


def test_moss_gives_a_sample_for_each_turn_that_trains_its_answer_alone(tmp_path):
    def turn(question, answer):
        return {
            "Human": f"<|Human|>: {question}<eoh>\n",
            "Inner Thoughts": "None",
            "MOSS": f"<|MOSS|>: {answer}<eom>\n",
        }

    path = write(
        tmp_path / "a.jsonl",
        json.dumps({"chat": {"turn_1": turn("Q", "A"), "turn_2": turn("R", "B")}}) + "\n",
    )
    assert detect(path) == "moss"
    assert read(path) == [
        Conversation((Turn("Q", "A", None),)),
        Conversation((Turn("Q", "A", None, is_target=False), Turn("R", "B", None))),
    ]


def test_plain_text_is_a_document_a_file_or_a_line(tmp_path):
    path = write(tmp_path / "a.txt", "[one]\n\ntwo\u2028still two\n")
    assert detect(path) == "text"  # whatever it begins with
    assert read(path) == ["[one]\n\ntwo\u2028still two\n"]
    assert read(path, "lines") == ["[one]", "two\u2028still two"]


def test_pre_training_rows_are_their_text(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "one"}\n{"text": "two"}\n')
    assert detect(path) == "text" and read(path) == ["one", "two"]
    both = write(tmp_path / "b.json", [ALPACA | {"text": "all of it"}])
    assert read(both) == [
        Conversation((Turn("Q", "A", "I"),))
    ]  # instruction data, unless the text is asked for
    assert read(both, "text") == ["all of it"]
    assert read(both, "ascend") == read(both) and read(path, "ascend") == ["one", "two"]


def test_a_belle_dialogue_in_one_instruction_is_its_rounds(tmp_path):
    row = {
        "instruction": "Human:Q\nwhich?\nAssistant: A\nHuman:R\nAssistant:",
        "input": "",
        "output": "B",
    }
    said = "Human: Q\nAssistant: A"  # ends in an answer: nothing is left to answer, so it is an instruction like any other
    path = write(tmp_path / "a.json", [row, row | {"instruction": said}])
    assert read(path, "ascend") == [
        Conversation((Turn("Q\nwhich?", "A"), Turn("R", "B"))),
        Conversation((Turn(said, "B"),)),
    ]
    assert read(path)[0] == Conversation(
        (Turn(row["instruction"], "B"),)
    )  # only where AscendSpeed's rows are asked for


def test_parquet_rows_are_records(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([ALPACA | {"text": "T"}] * 3), tmp_path / "a.bin")
    assert detect(tmp_path / "a.bin") == "alpaca"  # by content, not by name
    assert read(tmp_path / "a.bin") == [Conversation((Turn("Q", "A", "I"),))] * 3
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "a.bin").read_bytes()[:100])
    with pytest.raises(UserError, match=r"cut\.parquet: not a readable Parquet file"):
        read(tmp_path / "cut.parquet")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
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
    usual, records.BLOCK = records.BLOCK, block
    try:
        assert [record for _, record in read_records(Source(path))] == values
    finally:
        records.BLOCK = usual


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
    monkeypatch.setattr(records, "BLOCK", 100)
    rows = [json.dumps(ALPACA)] * 300
    rows[200] = '{"instruction": "Q" "output"}'
    path = write(tmp_path / "a.json", "[\n" + between.join(rows) + "]")
    with pytest.raises(UserError, match=f"not valid JSON: .* at {place}$"):
        list(read_records(Source(path)))


def test_an_array_is_never_in_memory_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "BLOCK", 1000)
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
    lines[1], lines[4] = "{broken", json.dumps({"instruction": "Q"})
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    meta = build_dataset(
        [path], small_tokenizer, tmp_path / "set", DataOptions(skip_bad_records=True, quiet=True)
    )
    assert meta["documents"] == 4
    assert [error.split(": ")[1] for error in meta["skipped_records"]] == [
        "record 2 (line 2)",
        "record 5 (line 5)",
    ]


# --- dataset_info.json


@pytest.fixture
def dataset_dir(tmp_path):
    rows = [{"q": "Q", "more": "I", "a": "A", "past": [["P", "O"]], "system": "S"}]
    path = write(tmp_path / "rows.json", rows)
    write(
        tmp_path / "talk.json",
        [{"chat": [{"role": "user", "text": "Q"}, {"role": "bot", "text": "A"}]}],
    )
    columns = {"prompt": "q", "query": "more", "response": "a", "history": "past"}
    write(
        tmp_path / "dataset_info.json",
        {
            "rows_zh": {
                "file_name": "rows.json",
                "file_sha1": hashlib.sha1(path.read_bytes()).hexdigest(),
                "columns": columns,
            },
            "talk_en": {
                "file_name": "talk.json",
                "formatting": "sharegpt",
                "columns": {"messages": "chat"},
                "tags": {
                    "role_tag": "role",
                    "content_tag": "text",
                    "user_tag": "user",
                    "assistant_tag": "bot",
                },
            },
            "damaged": {"file_name": "rows.json", "file_sha1": "0" * 40},
            "hub_only": {"hf_hub_url": "a/b"},
            "rewards": {"file_name": "rows.json", "ranking": True},
            "gone": {"file_name": "gone.json"},
        },
    )
    return tmp_path


def test_dataset_info_gives_names_columns_and_tags(dataset_dir):
    rows, talk = (
        Conversation((Turn("P", "O"), Turn("Q", "A", "I"))),
        Conversation((Turn("Q", "A", None),)),
    )
    named = find_sources(["rows_zh", "talk_en"], dataset_dir=dataset_dir)
    assert documents(named) == [rows, talk]  # the system text is there, but no column names it
    assert documents(find_sources([dataset_dir / "rows.json"])) == [
        rows
    ]  # the entry beside a file holds for the file
    assert documents(find_sources([dataset_dir])) == [rows, talk]  # and for a folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rows_z", "has no data set 'rows_z' .did you mean 'rows_zh'"),
        ("damaged", "its sha1 is .* for damaged; get the file again"),
        ("hub_only", "hub_only has no file_name"),
        ("rewards", "ranking data"),
        ("gone", r"gone\.json: no such file"),
    ],
)
def test_a_data_set_that_cannot_be_had_is_refused_with_the_reason(dataset_dir, name, message):
    with pytest.raises(UserError, match=message):
        find_sources([name], dataset_dir=dataset_dir)


def test_several_files_and_folders_are_read_in_order(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("folder/b.jsonl", "folder/a.txt", "folder/ignored.png", "c.json"):
        write(tmp_path / name, "x")
    found = find_sources([tmp_path / "c.json", tmp_path / "folder"], "text")
    assert [source.path.name for source in found] == ["c.json", "a.txt", "b.jsonl"]
    assert found[0] == Source(tmp_path / "c.json", "text")
    for missing in (tmp_path / "none", "not_a_name"):
        with pytest.raises(UserError, match="no such file or folder"):
            find_sources([missing])
    with pytest.raises(UserError, match="the folder holds no"):
        (tmp_path / "empty").mkdir()
        find_sources([tmp_path / "empty"])


def test_the_published_files_are_recognised(shared):
    expected = {
        "alpaca_en_demo.json": ("alpaca", 999),
        "alpaca_zh_demo.json": ("alpaca", 1000),
        "dummy_conversation.json": ("sharegpt", 500),
        "moss_sample.jsonl": ("moss", 46),
    }
    for name, (kind, count) in expected.items():
        assert detect(shared / "sft" / name) == kind
        assert len(read(shared / "sft" / name)) == count
    assert random.choice(read(shared / "sft/alpaca_zh_demo.json")).turns[0].answer


@pytest.mark.parametrize(
    "info",
    [
        {"a": ["b"]},
        {"a": {"file_name": "f", "columns": ["q"]}},
        {"a": {"file_name": "f", "tags": 1}},
    ],
)
def test_a_dataset_info_of_other_kinds_is_one_error(tmp_path, info):
    write(tmp_path / "dataset_info.json", info)
    with pytest.raises(
        UserError,
        match=r"dataset_info\.json: expected an object that maps data set names to objects",
    ):
        find_sources(["a"], dataset_dir=tmp_path)
