"""Records to documents: what the keys of each published format mean.

A document is a `Conversation`, which a template renders later, or a plain string.

    {"instruction": "Q", "output": "A"}       alpaca      Conversation((Turn("Q", "A"),))
    {"text": "It was the best of times"}      text        "It was the best of times"

Nothing is guessed: if the first record of a file fits no format, the error names the
keys it has.
"""

import json
import math
import re
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from minillama.chat import Conversation, Turn
from minillama.data.records import InputRecord, TextBlock, read_records
from minillama.data.sources import COLUMNS, INFO_NAME, Source
from minillama.errors import UserError

Document = Conversation | str

# The keys by which a record's format is recognised. The first format that fits is taken.
FORMAT_KEYS = {
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "moss": ("chat",),
    "text": ("text",),
}
PLAIN_TEXT = ("text", "lines", "ascend")  # formats that take a plain text file

# The template of conversations, if neither the user nor the base model has one. The first format
# that is among the data decides.
DEFAULT_TEMPLATES = {
    "sharegpt": "vicuna_v1.1",
    "alpaca": "alpaca",
    "moss": "alpaca",
    "ascend": "alpaca",
}

# MOSS puts these marks around what each side says.
MOSS_MARKS = {
    "Human": re.compile(r"<eoh>|<\|Human\|>: ?"),
    "MOSS": re.compile(r"<eom>|<\|MOSS\|>:"),
}
# An entry of dataset_info.json with the names of OpenAI's chat format.
OPENAI_ENTRY = {
    "formatting": "sharegpt",
    "columns": {"messages": "messages"},
    "tags": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
    },
}
BELLE_ROUND = re.compile(r"Human:(.*?)Assistant:(.*?)(?=Human:|\Z)", re.DOTALL)


class ParsedRecord(NamedTuple):
    """What a record gives. A conversation without turns has nothing to learn from."""

    documents: list[Document]
    dropped_messages: int = 0  # messages of the record that are in no document


class BadRecord(UserError):
    """A record that does not follow its format. With --skip_bad_records it is only counted."""


def detect(path: Path) -> str:
    """The format of a file, from its first record: alpaca, sharegpt, moss or text."""
    record = next(read_records(Source(path), split_text=True))
    value = record.value
    if isinstance(value, UserError):
        raise UserError(f"{path}: {record.place}: {value}")
    if isinstance(value, str | TextBlock):
        return "text"
    keys = set(value) if isinstance(value, dict) else set()
    for name, needed in FORMAT_KEYS.items():
        if keys.issuperset(needed):
            return name
    shown = ", ".join(sorted(map(str, keys))) or type(value).__name__
    message = (
        f"{path}: its first record ({shown}) is of no known format; expected instruction and "
        "output (alpaca), conversations (sharegpt), chat (moss) or text"
    )
    raise UserError(message + _remedy(path, value))


def _remedy(path: Path, value: Any) -> str:
    """How the data of a file of two well-known other kinds can be read: the end of an error."""
    if not isinstance(value, dict):
        return ""
    if "messages" in value:
        entry = {"file_name": path.name, **OPENAI_ENTRY}
        info = json.dumps({path.stem: entry})
        return f"; for OpenAI's messages, write this into {path.parent / INFO_NAME}: {info}"
    for key, content in value.items():
        if isinstance(content, list) and content and isinstance(content[0], dict):
            return f"; if the list under {key!r} holds the records, make it the whole file"
    return ""


def default_template(data_formats: Collection[str]) -> str:
    """The template of data in these formats; "" for plain text, which has none."""
    for name, template in DEFAULT_TEMPLATES.items():
        if name in data_formats:
            return template
    return ""


def parse(source: Source, record: InputRecord) -> ParsedRecord:
    """The documents of a record.

    Raises BadRecord, with file and place, if the record does not follow the format of `source`.
    """
    try:
        return _parse_value(source, record.value)
    except UserError as error:
        place = f"{source.path}: {record.place}" if record.place else str(source.path)
        raise BadRecord(f"{place}: {error}") from None


def _parse_value(source: Source, value: Any) -> ParsedRecord:
    if isinstance(value, UserError):
        raise value
    if isinstance(value, str) and source.data_format in PLAIN_TEXT:
        return ParsedRecord([value])
    if not isinstance(value, dict):
        keys = " and ".join(FORMAT_KEYS.get(source.data_format, ("text",)))
        raise UserError(f"expected an object with {keys}, found {type(value).__name__}")
    return FORMATS[source.data_format](value, source)


def _text_at(record: dict[str, Any], key: str, default: str | None = None) -> str:
    """record[key], which must be text, or the default if it is missing, null or NaN.

    NaN is what pandas writes for a missing text.
    """
    value = record.get(key)
    if isinstance(value, float) and math.isnan(value):
        value = None
    if isinstance(value, str):
        return value
    if value is not None:
        raise UserError(f"{key!r} is {type(value).__name__}, expected text")
    if default is None:
        raise UserError(f"{key!r} is missing")
    return default


def _alpaca(record: dict[str, Any], source: Source) -> ParsedRecord:
    """Stanford Alpaca, LLaMA-Factory, AscendSpeed.

    {instruction, input?, output, system?, history?: [[question, answer], …]}
    """
    columns = COLUMNS | source.columns
    history = record.get(columns["history"]) or []
    if not isinstance(history, list) or not all(map(_is_pair, history)):
        raise UserError(f"{columns['history']!r} is not a list of [question, answer] pairs")
    turns = [Turn(question, answer) for question, answer in history]
    prompt = _text_at(record, columns["prompt"])
    response = _text_at(record, columns["response"])
    query = _text_at(record, columns["query"], default="")
    turns.append(Turn(prompt, response, query))
    system = _text_at(record, columns["system"], default="")
    return ParsedRecord([Conversation(tuple(turns), system)])


def _is_pair(value: Any) -> bool:
    is_pair = isinstance(value, list) and len(value) == 2
    return is_pair and all(isinstance(text, str) for text in value)


def _sharegpt(record: dict[str, Any], source: Source) -> ParsedRecord:
    """FastChat: {conversations: [{from: system|human|gpt, value}, …]}.

    A first message from `system` is the system text. One that stands before the first question is
    dropped, and so is a last question without an answer: there is nothing to learn from it.
    """
    columns = COLUMNS | source.columns
    key = columns["messages"]
    messages = record.get(key)
    if messages is None:
        raise UserError(f"{key!r} is missing")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise UserError(f"{key!r} is not a list of messages")
    roles = []
    texts = []
    for message in messages:
        roles.append(_text_at(message, columns["role_tag"]))
        texts.append(_text_at(message, columns["content_tag"]))
    system = _text_at(record, columns["system"], default="")
    first = 0  # the first message of the conversation
    if roles and roles[0] == columns["system_tag"]:
        system = texts[0]
        first = 1
    has_greeting = len(roles) > first and roles[first] != columns["user_tag"]
    first += has_greeting
    _check_alternation(roles, first, columns)
    questions = texts[first::2]
    answers = texts[first + 1 :: 2]
    turns = [Turn(q, a, None) for q, a in zip(questions, answers, strict=False)]
    num_dropped = has_greeting + len(questions) - len(answers)
    return ParsedRecord([Conversation(tuple(turns), system)], num_dropped)


def _check_alternation(roles: list[str], first: int, columns: dict[str, str]) -> None:
    expected = columns["user_tag"]
    after = columns["assistant_tag"]
    for number in range(first, len(roles)):
        if roles[number] != expected:
            raise UserError(
                f"turn {number + 1} is from {roles[number]!r}, expected {expected!r}: "
                "the two alternate"
            )
        expected, after = after, expected


def _moss(record: dict[str, Any], source: Source) -> ParsedRecord:
    """MOSS: {chat: {turn_1: {Human, MOSS, …}, …}}.

    Each turn gives a conversation of the turns up to it, in which only its own answer is a target.
    """
    chat = record.get("chat")
    if not isinstance(chat, dict) or not all(isinstance(m, dict) for m in chat.values() if m):
        raise UserError("'chat' is not an object of turns with Human and MOSS")
    turns = []
    for message in filter(None, chat.values()):
        question = _moss_text(message, "Human")
        answer = _moss_text(message, "MOSS")
        turns.append(Turn(question, answer, None))
    if not turns:
        raise UserError("'chat' holds no turn")
    conversations: list[Document] = []
    context: list[Turn] = []
    for turn in turns:
        conversations.append(Conversation((*context, turn)))
        context.append(replace(turn, is_target=False))
    return ParsedRecord(conversations)


def _moss_text(message: dict[str, Any], speaker: str) -> str:
    return MOSS_MARKS[speaker].sub("", _text_at(message, speaker)).strip()


def _ascend(record: dict[str, Any], source: Source) -> ParsedRecord:
    """AscendSpeed: instruction data if there is an instruction, else pre-training text.

    The instruction of BelleMultiTurn is a whole dialogue, "Human:Q Assistant:A Human:R Assistant:",
    and its output is the last answer.
    """
    if "instruction" not in record:
        return _text(record, source)
    instruction = _text_at(record, "instruction")
    if instruction.startswith("Human:"):
        rounds = [
            [question.strip(), answer.strip()]
            for question, answer in BELLE_ROUND.findall(instruction)
        ]
        if rounds and rounds[-1][1] == "":  # a dialogue that waits for an answer
            *history, last = rounds
            record = record | {"history": history, "instruction": last[0]}
    return _alpaca(record, source)


def _text(record: dict[str, Any], source: Source) -> ParsedRecord:
    key = source.columns.get("prompt", "text")
    return ParsedRecord([_text_at(record, key)])


FORMATS: dict[str, Callable[[dict[str, Any], Source], ParsedRecord]] = {
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "moss": _moss,
    "ascend": _ascend,
    "text": _text,
    "lines": _text,
}
