"""Records that are lists of messages: ShareGPT's and OpenAI's.

    {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}

Both become Conversation((Turn("Q", "A"),)). A first message from `system` is the system text. One
that stands before the first question is dropped, and so is a last question without an answer:
there is nothing to learn from it. Messages of tools are refused: a model that does not see them
learns something else.
"""

from typing import Any, NamedTuple

from minillama.chat import Conversation, Turn
from minillama.data.documents import ParsedRecord, missing, text_at, value_at
from minillama.data.sources import COLUMNS, Source
from minillama.errors import UserError

OPENAI_COLUMNS = {
    "messages": "messages",
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
}
TOOL_KEYS = ("tools", "functions", "tool_calls", "function_call")
TOOL_ROLES = ("tool", "function", "ipython")


class Said(NamedTuple):
    """A message: who said what, and whether it is trained on if it is an answer."""

    role: str
    text: str
    is_target: bool = True


def parse_sharegpt(record: dict[str, Any], source: Source) -> ParsedRecord:
    """FastChat: {conversations: [{from: system|human|gpt, value}, …]}."""
    columns = COLUMNS | source.columns
    said = []
    for message in _messages_at(record, columns["messages"]):
        role = text_at(message, columns["role_tag"])
        said.append(Said(role, text_at(message, columns["content_tag"])))
    system = text_at(record, columns["system"], default="")
    return _conversation(said, system, columns)


def parse_openai(record: dict[str, Any], source: Source) -> ParsedRecord:
    """OpenAI: {messages: [{role: system|user|assistant, content, weight?}, …]}.

    content: a text, or a list of parts {type: text, text}. weight: 0 for an answer that is not
    trained on.
    """
    _refuse_tools(record, "the record")
    said = []
    for number, message in enumerate(_messages_at(record, "messages"), start=1):
        said.append(_said_in_openai(message, f"message {number}"))
    return _conversation(said, "", OPENAI_COLUMNS)


def _said_in_openai(message: dict[str, Any], place: str) -> Said:
    role = text_at(message, "role")
    if role in TOOL_ROLES:
        raise UserError(f"{place} is from {role!r}; conversations with tools are not supported")
    if role not in ("system", "user", "assistant"):
        hint = "; write system" if role == "developer" else ""
        raise UserError(f"{place} is from {role!r}; known are system, user and assistant{hint}")
    _refuse_tools(message, place)
    weight = value_at(message, "weight")
    if weight not in (None, 0, 1):
        raise UserError(f"{place}: weight is {weight!r}, expected 0 or 1")
    return Said(role, _text_of(message, place), is_target=weight != 0)


def _text_of(message: dict[str, Any], place: str) -> str:
    content = message.get("content")
    if not isinstance(content, list):
        return text_at(message, "content")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise UserError(f"{place}: holds a part of the kind {kind!r}; only text is read")
        texts.append(text_at(part, "text"))
    return "".join(texts)


def _refuse_tools(values: dict[str, Any], place: str) -> None:
    for key in TOOL_KEYS:
        if value_at(values, key):
            raise UserError(f"{place} has {key!r}; conversations with tools are not supported")


def _messages_at(record: dict[str, Any], key: str) -> list[dict[str, Any]]:
    messages = value_at(record, key)
    if messages is None:
        raise missing(record, key)
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise UserError(f"{key!r} is not a list of messages")
    return messages


def _conversation(said: list[Said], system: str, columns: dict[str, str]) -> ParsedRecord:
    """The conversation of messages. system: the system text, unless it is the first message."""
    first = 0  # the first message of the conversation
    if said and said[0].role == columns["system_tag"]:
        system = said[0].text
        first = 1
    has_greeting = len(said) > first and said[first].role != columns["user_tag"]
    first += has_greeting
    _check_alternation(said, first, columns)
    questions = said[first::2]
    answers = said[first + 1 :: 2]
    turns = []
    for question, answer in zip(questions, answers, strict=False):
        turns.append(Turn(question.text, answer.text, None, answer.is_target))
    num_dropped = has_greeting + len(questions) - len(answers)
    return ParsedRecord([Conversation(tuple(turns), system)], num_dropped)


def _check_alternation(said: list[Said], first: int, columns: dict[str, str]) -> None:
    expected = columns["user_tag"]
    after = columns["assistant_tag"]
    for number in range(first, len(said)):
        if said[number].role != expected:
            raise UserError(
                f"turn {number + 1} is from {said[number].role!r}, expected {expected!r}: "
                "the two alternate"
            )
        expected, after = after, expected
