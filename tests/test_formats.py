"""What the records of each format mean, by example."""

import json
import random

import pytest

from minillama.chat import Conversation, Turn, render
from minillama.data.encode import encode_pieces
from minillama.data.formats import BadRecord, default_template, detect
from minillama.data.memmap import Dataset
from minillama.data.sources import find_sources
from minillama.data.windows import TrainingWindows
from minillama.errors import UserError
from minillama.generation.prompts import read_prompt_file
from tests.datasets import build
from tests.raw_files import ALPACA, documents, read, write


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


def dialogue(*messages):
    """A ShareGPT record of (role, text) pairs."""
    records = [{"from": role, "value": text} for role, text in messages]
    return {"id": "x", "conversations": records}


def test_sharegpt_drops_what_stands_before_the_first_question(tmp_path):
    path = write(
        tmp_path / "a.json",
        [dialogue(("gpt", "Welcome"), ("human", "Q"), ("gpt", "A"), ("human", "unanswered"))],
    )
    assert detect(path) == "sharegpt"
    assert read(path) == [Conversation((Turn("Q", "A", None),))]
    bad = write(
        tmp_path / "b.json",
        [dialogue(("human", "Q"), ("gpt", "A")), dialogue(("human", "Q"), ("human", "R"))],
    )
    with pytest.raises(
        BadRecord, match=r"b\.json: record 2: turn 2 is from 'human', expected 'gpt'"
    ):
        read(bad)


def test_a_system_message_of_sharegpt_is_the_system_text(tmp_path):
    messages = ("human", "Q"), ("gpt", "A")
    path = write(
        tmp_path / "a.json",
        [
            dialogue(("system", "S"), *messages),
            dialogue(("system", "S"), ("gpt", "Welcome"), *messages),
            dialogue(("system", "S"), *messages) | {"system": "of the record"},
        ],
    )
    assert read(path) == [Conversation((Turn("Q", "A", None),), "S")] * 3
    later = write(tmp_path / "b.json", [dialogue(*messages, ("system", "S"), ("human", "R"))])
    with pytest.raises(BadRecord, match="turn 3 is from 'system', expected 'human'"):
        read(later)


def test_what_sharegpt_records_lose_is_counted(tmp_path, small_tokenizer, capsys):
    records = [
        dialogue(("system", "S"), ("gpt", "Welcome"), ("human", "Q"), ("gpt", "A")),
        dialogue(("human", "Q"), ("gpt", "A"), ("human", "unanswered")),
        dialogue(("human", "Q"), ("gpt", "A")),
        dialogue(("human", "never answered")),
        dialogue(),
    ]
    path = write(tmp_path / "a.json", records)
    meta = build([path], small_tokenizer, tmp_path / "set", quiet=False, max_dropped=0.4)
    assert meta["dropped_messages"] == 3
    assert (meta["documents"], meta["documents_without_target"]) == (5, 2)
    printed = capsys.readouterr().err
    assert "3 messages left out" in printed
    assert "2 of 5 documents left out" in printed
    windows = TrainingWindows(Dataset(tmp_path / "set"), 512, max_dropped=0.4)
    assert (len(windows.start), windows.left_out) == (3, 2)
    with pytest.raises(UserError, match=r"2 of 5 documents .* raise max_dropped, now 0\.1"):
        build([path], small_tokenizer, tmp_path / "other")


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ({"version": 1, "rows": [ALPACA]}, "if the list under 'rows' holds the records"),
        ([{"question": "Q", "answer": "A"}], "say what its columns are, in .*dataset_info.json"),
        ([5], "its first record .int. is of no known format"),
    ],
)
def test_records_of_other_kinds_are_refused_with_the_remedy(tmp_path, records, message):
    with pytest.raises(UserError, match=message):
        read(write(tmp_path / "a.json", records))


def test_the_remedy_for_other_columns_makes_them_readable(tmp_path):
    path = write(tmp_path / "a.json", [{"question": "Q", "answer": "A", "id": 5}])
    with pytest.raises(UserError) as refused:
        detect(path)
    write(tmp_path / "dataset_info.json", str(refused.value).partition("example: ")[2])
    assert documents(find_sources([path])) == [Conversation((Turn("Q", "A"),))]


@pytest.mark.parametrize("key", ["data", "rows", "instances", "a [b"])
def test_records_may_be_the_only_list_of_an_object(tmp_path, key):
    path = write(tmp_path / "a.json", json.dumps({key: [ALPACA, ALPACA]}, indent=2))
    assert detect(path) == "alpaca"
    assert read(path) == [Conversation((Turn("Q", "A", "I"),))] * 2
    path = write(tmp_path / "c.json", {key: [ALPACA], "test": [ALPACA]})
    with pytest.raises(UserError, match=r"c\.json: the object holds more than one list; make each"):
        read(path)
    path = write(tmp_path / "b.json", {key: [ALPACA], "version": 1})
    with pytest.raises(UserError, match="no known format"):
        read(path)


def test_a_prompt_and_its_completion_are_one_text(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"prompt": "Q:", "completion": " A"}\n')
    assert detect(path) == "completion"
    assert read(path) == [Conversation((Turn("Q:", " A", None),))]
    chat = {"prompt": [{"role": "user", "content": "Q"}], "completion": []}
    with pytest.raises(BadRecord, match="'prompt' is a list; write its messages into one list"):
        read(write(tmp_path / "b.json", [chat]))


@pytest.mark.parametrize(
    ("data_formats", "template"),
    [
        (["sharegpt"], "vicuna_v1.1"),
        (["alpaca"], "alpaca"),
        (["text", "lines"], ""),
        (["messages"], "vicuna_v1.1"),
        (["completion"], "raw"),
        (["alpaca", "sharegpt"], "vicuna_v1.1"),
        (["text", "alpaca"], "alpaca"),
    ],
)
def test_the_template_follows_from_the_format(data_formats, template):
    assert default_template(data_formats) == template


def test_a_missing_text_may_be_written_as_nan(tmp_path):
    """pandas writes NaN for a missing text, and json.dump keeps it."""
    path = write(tmp_path / "a.json", '[{"instruction": "Q", "input": NaN, "output": "A"}]')
    assert read(path) == [Conversation((Turn("Q", "A", ""),))]
    path = write(tmp_path / "b.json", '[{"instruction": "Q", "output": NaN}]')
    with pytest.raises(BadRecord, match=r"record 1: .output. is empty .NaN"):
        read(path)


def test_nan_in_a_parquet_column_is_a_missing_text(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"instruction": ["Q", "R"], "input": [float("nan")] * 2, "output": ["A", "B"]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [
        Conversation((Turn("Q", "A", ""),)),
        Conversation((Turn("R", "B", ""),)),
    ]


def test_moss_gives_a_sample_for_each_turn_that_trains_its_answer_alone(tmp_path, small_tokenizer):
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
    conversations = read(path)
    assert conversations == [
        Conversation((Turn("Q", "A", None),)),
        Conversation((Turn("Q", "A", None, is_target=False), Turn("R", "B", None))),
    ]
    # The EOS after an answer that is only read is no target either.
    for template in ("vicuna_v1.1", "alpaca", "llama2"):
        ids, mask = encode_pieces(small_tokenizer, render(template, conversations[1]))
        mask_of_eos = [m for i, m in zip(ids, mask, strict=True) if i == small_tokenizer.eos_id]
        assert mask_of_eos == [0, 1]


def test_plain_text_is_a_document_a_file_or_a_line(tmp_path):
    path = write(tmp_path / "a.txt", "[one]\n\ntwo\u2028still two\n")
    assert detect(path) == "text"  # whatever it begins with
    assert read(path) == ["[one]\n\ntwo\u2028still two\n"]
    assert read(path, "lines") == ["[one]", "two\u2028still two"]


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_any_line_end_ends_a_line_in_data_and_in_prompts(tmp_path, line_end):
    (tmp_path / "a.txt").write_bytes(line_end.join(["one", "", "two\x85still two", ""]).encode())
    assert read(tmp_path / "a.txt", "lines") == ["one", "two\x85still two"]
    assert read_prompt_file(tmp_path / "a.txt") == ["one", "two\x85still two"]
    assert read(tmp_path / "a.txt") == ["one\n\ntwo\x85still two\n"]
    rows = [json.dumps({"text": text, "prompt": text}) for text in ("one\r\n", "two")]
    (tmp_path / "a.jsonl").write_bytes(line_end.join(rows).encode())
    assert read(tmp_path / "a.jsonl") == ["one\r\n", "two"]  # what JSON says is kept
    assert read_prompt_file(tmp_path / "a.jsonl") == ["one\r\n", "two"]


def test_pre_training_rows_are_their_text(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "one"}\n{"text": "two"}\n')
    assert detect(path) == "text"
    assert read(path) == ["one", "two"]
    both = write(tmp_path / "b.json", [ALPACA | {"text": "all of it"}])
    conversation = Conversation((Turn("Q", "A", "I"),))
    assert read(both) == [conversation]  # instruction data, unless the text is asked for
    assert read(both, "text") == ["all of it"]
    assert read(both, "ascend") == [conversation]
    assert read(path, "ascend") == ["one", "two"]


def test_a_belle_dialogue_in_one_instruction_is_its_rounds(tmp_path):
    row = {
        "instruction": "Human:Q\nwhich?\nAssistant: A\nHuman:R\nAssistant:",
        "input": "",
        "output": "B",
    }
    # It ends in an answer, so nothing is left to answer: an instruction like any other.
    complete = "Human: Q\nAssistant: A"
    path = write(tmp_path / "a.json", [row, row | {"instruction": complete}])
    assert read(path, "ascend") == [
        Conversation((Turn("Q\nwhich?", "A"), Turn("R", "B"))),
        Conversation((Turn(complete, "B"),)),
    ]
    # In the detected format, alpaca, such an instruction is not taken apart.
    assert read(path)[0] == Conversation((Turn(row["instruction"], "B"),))


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
