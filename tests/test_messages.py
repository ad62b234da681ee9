"""OpenAI's messages: what they become, and what is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from minillama.chat import Conversation, Turn
from minillama.data.formats import BadRecord, detect
from minillama.errors import UserError
from tests.raw_files import read, write

SYSTEM = {"role": "system", "content": "S"}
USER = {"role": "user", "content": "Q"}
ASSISTANT = {"role": "assistant", "content": "A"}
EXPECTED = Conversation((Turn("Q", "A", None),), "S")


@pytest.mark.parametrize("container", ["array", "wrapped", "lines", "parquet"])
def test_messages_are_conversations_in_every_container(tmp_path: Path, container: str) -> None:
    records = [{"messages": [SYSTEM, USER, ASSISTANT]}] * 2
    path = tmp_path / {"lines": "a.jsonl", "parquet": "a.parquet"}.get(container, "a.json")
    if container == "array":
        write(path, records)
    elif container == "wrapped":
        write(path, {"data": records})
    elif container == "lines":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    assert detect(path) == "messages"
    assert read(path) == [EXPECTED] * 2


def test_a_file_of_one_record_is_no_wrapping(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.json", {"messages": [USER, ASSISTANT]})) == [
        Conversation((Turn("Q", "A", None),))
    ]


def test_an_answer_of_weight_0_is_not_trained_on(tmp_path: Path) -> None:
    messages = [USER, ASSISTANT | {"weight": 0}, USER, ASSISTANT | {"weight": 1}]
    path = write(tmp_path / "a.json", [{"messages": messages}])
    turns = (Turn("Q", "A", None, is_target=False), Turn("Q", "A", None))
    assert read(path) == [Conversation(turns)]


def test_parts_of_text_are_one_text_and_empty_tools_are_none(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Q"}, {"type": "text", "text": "!"}]
    answer = ASSISTANT | {"tool_calls": None, "function_call": None, "name": "x"}
    record = {"messages": [USER | {"content": parts}, answer], "tools": []}
    path = write(tmp_path / "a.json", [record])
    assert read(path) == [Conversation((Turn("Q!", "A", None),))]


CALL = [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([USER, {"role": "assistant", "content": None, "tool_calls": CALL}], "message 2 has 'tool"),
        ([USER, ASSISTANT, {"role": "tool", "content": "x"}], "message 3 is from 'tool'; conv"),
        ([{"role": "developer", "content": "x"}], "from 'developer'.*; write system"),
        ([{"role": "narrator", "content": "x"}], "from 'narrator'; known are system, user and"),
        ([USER | {"content": [{"type": "image_url"}]}], "holds a part of the kind 'image_url'"),
        ([USER | {"content": 5}], "'content' is int, expected text"),
        ([USER, ASSISTANT | {"content": None}], r"'content' is empty .null"),
        ([USER, USER], "turn 2 is from 'user', expected 'assistant'"),
        ([USER, ASSISTANT | {"weight": 0.5}], "message 2: weight is 0.5, expected 0 or 1"),
        (float("nan"), "'messages' is empty .NaN"),
        ("hello", "'messages' is not a list of messages"),
    ],
)
def test_what_is_no_conversation_of_texts_is_refused(
    tmp_path: Path, messages: Any, message: str
) -> None:
    records = [{"messages": [USER, ASSISTANT]}, {"messages": messages}]
    with pytest.raises(BadRecord, match=f"record 2: .*{message}"):
        read(write(tmp_path / "a.json", records))


def test_definitions_of_tools_are_refused(tmp_path: Path) -> None:
    record = {"messages": [USER, ASSISTANT], "tools": [{"type": "function"}]}
    with pytest.raises(UserError, match="the record has 'tools'; conversations with tools"):
        read(write(tmp_path / "a.json", [record]))
