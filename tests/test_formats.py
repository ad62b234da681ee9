"""What the records of each format mean, by example."""

import json
import random

import pytest

from minillama.chat import Conversation, Turn
from minillama.data.formats import BadRecord, detect
from tests.raw_files import ALPACA, read, write


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
    def dialogue(*messages):
        records = [{"from": role, "value": text} for role, text in messages]
        return {"id": "x", "conversations": records}

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
    with pytest.raises(BadRecord, match="no question with an answer"):
        read(write(tmp_path / "c.json", [dialogue(("human", "Q"))]))


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
