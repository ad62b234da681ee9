"""Raw files to documents: what each format's records mean.

A document is a `Conversation` (instruction data, rendered by a template later) or a plain string. Reading has two steps, so that
worker processes can share the second: a *container* gives records with their places, one at a time and never a whole file; a
*format* turns a record into documents, or says what is wrong with it.

    alpaca.json ── array ──▶ ("record 1", {"instruction": …}) ── alpaca ──▶ Conversation
    book.txt    ── text  ──▶ ("", "It was the …")             ── text ───▶ "It was the …"

Left out on purpose: guessing. A file whose first record fits no format is an error that names the keys it has.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from minillama.chat import Conversation, Turn
from minillama.data import containers
from minillama.data.sources import Source
from minillama.errors import UserError

Document = Conversation | str | containers.Part

# What tells the formats apart: the keys of a record.
KEYS = {"alpaca": {"instruction", "output"}, "sharegpt": {"conversations"}, "moss": {"chat"}, "text": {"text"}}
# LLaMA-Factory's words for columns and tags, and what they are called where dataset_info.json says nothing.
ALPACA_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system"}
SHAREGPT_TAGS = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt", "system_tag": ""}


class BadRecord(UserError):
    """A record that does not follow its format; `--skip_bad_records` counts these instead of stopping."""


def detect(path: Path) -> str:
    """The format of a file, from its content: alpaca, sharegpt, moss or text."""
    if containers.kind_of(path) == "text":
        return "text"
    _, record = next(containers.records(path))
    if isinstance(record, UserError):
        raise record
    keys = set(record) if isinstance(record, dict) else set()
    for name, needed in KEYS.items():
        if needed <= keys:
            return name
    shown = ", ".join(sorted(map(str, keys))) or type(record).__name__
    raise UserError(f"{path}: its first record ({shown}) is of no known format; expected instruction and output (alpaca), "
                    f"conversations (sharegpt), chat (moss) or text")


def read_records(source: Source, in_parts: bool = False) -> Iterator[tuple[str, Any]]:
    """(place, record) of a file; a record that could not even be read is a UserError in the record's stead.

    in_parts: a text file comes as `containers.Part`s, not whole.
    """
    return containers.records(source.path, "lines" if source.data_format == "lines" else "parts" if in_parts else "text")


def parse(source: Source, place: str, record: Any) -> list[Document]:
    """The documents of a record. Raises BadRecord, with file and place, for one that does not follow the format."""
    try:
        if isinstance(record, UserError):
            raise record
        return FORMATS[source.data_format](record, source)
    except UserError as error:
        raise BadRecord(": ".join(filter(None, (str(source.path), place, str(error))))) from None


def _object(record: Any, hint: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise BadRecord(f"expected an object with {hint}, found {type(record).__name__}")
    return record


def _text_of(record: dict[str, Any], name: str, default: str | None = None) -> str:
    """record[name], which must be text; where it is absent or null, the default."""
    value = record.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise BadRecord(f"{name!r} is missing" if value is None else f"{name!r} is {type(value).__name__}, expected text")
    return value


def _alpaca(record: Any, source: Source) -> list[Document]:
    """{instruction, input?, output, system?, history?: [[question, answer], …]}: Stanford Alpaca, LLaMA-Factory, AscendSpeed."""
    record, name = _object(record, "instruction and output"), ALPACA_COLUMNS | source.columns
    turns = _rounds(record.get(name["history"]) or [], name["history"])
    turns.append(Turn(_text_of(record, name["prompt"]), _text_of(record, name["response"]), _text_of(record, name["query"], "")))
    return [Conversation(tuple(turns), _text_of(record, name["system"], ""))]


def _rounds(history: Any, name: str) -> list[Turn]:
    pairs = isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)
    if not pairs or not all(isinstance(text, str) for pair in history for text in pair):
        raise BadRecord(f"{name!r} is not a list of [question, answer] pairs")
    return [Turn(question, answer) for question, answer in history]


def _sharegpt(record: Any, source: Source) -> list[Document]:
    """{conversations: [{from: human|gpt, value}, …]}: FastChat. What stands before the first human turn is dropped."""
    name, tag = {"messages": "conversations", "system": "system"} | source.columns, SHAREGPT_TAGS | source.tags
    messages = _object(record, name["messages"]).get(name["messages"])
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadRecord(f"{name['messages']!r} is {'missing' if messages is None else 'not a list of messages'}")
    said = [(_text_of(message, tag["role_tag"]), _text_of(message, tag["content_tag"])) for message in messages]
    system = _text_of(record, name["system"], "")
    if said and said[0][0] != tag["user_tag"]:
        role, text = said.pop(0)
        system = text if role == tag["system_tag"] else system
    for number, (role, _) in enumerate(said):
        expected = tag["assistant_tag"] if number % 2 else tag["user_tag"]
        if role != expected:
            turn = len(messages) - len(said) + number + 1
            raise BadRecord(f"turn {turn} is from {role!r}, expected {expected!r}: the two alternate")
    if len(said) < 2:
        raise BadRecord(f"{name['messages']!r} holds no question with an answer")
    texts = [text for _, text in said]  # a last question without an answer teaches nothing
    return [Conversation(tuple(Turn(user, answer, None) for user, answer in zip(texts[::2], texts[1::2], strict=False)), system)]


MOSS_MARKS = {"Human": r"<eoh>|<\|Human\|>: ?", "MOSS": r"<eom>|<\|MOSS\|>:"}


def _moss(record: Any, source: Source) -> list[Document]:
    """{chat: {turn_1: {Human, MOSS, …}, …}}: a sample for each turn, which holds the turns up to it and trains its answer alone."""
    chat = _object(_object(record, "chat").get("chat"), "turn_1, turn_2, …")
    earlier: list[Turn] = []
    samples: list[Document] = []
    for name, messages in chat.items():
        if messages:
            said = _object(messages, f"Human and MOSS in {name!r}")
            turn = Turn(*(re.sub(marks, "", _text_of(said, who)).strip() for who, marks in MOSS_MARKS.items()), None)
            samples.append(Conversation((*earlier, turn)))
            earlier.append(replace(turn, is_target=False))
    if not samples:
        raise BadRecord("'chat' holds no turn")
    return samples


def _ascend(record: Any, source: Source) -> list[Document]:
    """AscendSpeed's rows: instruction data where there is an instruction, else pre-training text."""
    return (_alpaca if isinstance(record, dict) and "instruction" in record else _text)(record, source)


def _text(record: Any, source: Source) -> list[Document]:
    """Plain text, or a row with the column `text`."""
    if isinstance(record, (str, containers.Part)):
        return [record]
    return [_text_of(_object(record, "text"), source.columns.get("prompt", "text"))]


FORMATS = {"alpaca": _alpaca, "sharegpt": _sharegpt, "moss": _moss, "ascend": _ascend, "text": _text, "lines": _text}
