"""Records to documents: what the keys of each published format mean.

A document is a `Conversation`, which a template renders later, or a plain string.

    {"instruction": "Q", "output": "A"}       alpaca      Conversation((Turn("Q", "A"),))
    {"text": "It was the best of times"}      text        "It was the best of times"

Nothing is guessed: if the first record of a file fits no format, the error names the
keys it has.
"""

import json
import re
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from minillama.chat import Conversation, Turn
from minillama.data.documents import Document, ParsedRecord, text_at
from minillama.data.messages import parse_openai, parse_sharegpt
from minillama.data.records import InputRecord, TextBlock, read_records
from minillama.data.sources import COLUMNS, INFO_NAME, Source
from minillama.errors import UserError

# The keys by which a record's format is recognised. The first format that fits is taken.
FORMAT_KEYS = {
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "messages": ("messages",),
    "moss": ("chat",),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
PLAIN_TEXT = ("text", "lines", "ascend")  # formats that take a plain text file

# The template of conversations, if neither the user nor the base model has one. The first format
# that is among the data decides.
DEFAULT_TEMPLATES = {
    "sharegpt": "vicuna_v1.1",
    "messages": "vicuna_v1.1",
    "alpaca": "alpaca",
    "moss": "alpaca",
    "ascend": "alpaca",
    "completion": "raw",
}

# MOSS puts these marks around what each side says.
MOSS_MARKS = {
    "Human": re.compile(r"<eoh>|<\|Human\|>: ?"),
    "MOSS": re.compile(r"<eom>|<\|MOSS\|>:"),
}
BELLE_ROUND = re.compile(r"Human:(.*?)Assistant:(.*?)(?=Human:|\Z)", re.DOTALL)


class BadRecord(UserError):
    """A record that does not follow its format. With --skip_bad_records it is only counted."""


def detect(path: Path) -> str:
    """The format of a file, from its first record: alpaca, sharegpt, …, or text."""
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
        "output (alpaca), conversations (sharegpt), messages (OpenAI), chat (moss), prompt and "
        "completion, or text"
    )
    raise UserError(message + _remedy(path, value))


def _remedy(path: Path, value: Any) -> str:
    """What makes the data of another format readable: the end of an error."""
    if not isinstance(value, dict):
        return ""
    texts = [key for key, content in value.items() if isinstance(content, str)]
    if len(texts) >= 2:
        columns = {"prompt": texts[0], "response": texts[1]}
        info = json.dumps({path.stem: {"file_name": path.name, "columns": columns}})
        return f"; say what its columns are, in {path.parent / INFO_NAME}, for example: {info}"
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


def _alpaca(record: dict[str, Any], source: Source) -> ParsedRecord:
    """Stanford Alpaca, LLaMA-Factory, AscendSpeed.

    {instruction, input?, output, system?, history?: [[question, answer], …]}
    """
    columns = COLUMNS | source.columns
    history = record.get(columns["history"]) or []
    if not isinstance(history, list) or not all(map(_is_pair, history)):
        raise UserError(f"{columns['history']!r} is not a list of [question, answer] pairs")
    turns = [Turn(question, answer) for question, answer in history]
    prompt = text_at(record, columns["prompt"])
    response = text_at(record, columns["response"])
    query = text_at(record, columns["query"], default="")
    turns.append(Turn(prompt, response, query))
    system = text_at(record, columns["system"], default="")
    return ParsedRecord([Conversation(tuple(turns), system)])


def _is_pair(value: Any) -> bool:
    is_pair = isinstance(value, list) and len(value) == 2
    return is_pair and all(isinstance(text, str) for text in value)


def _moss(record: dict[str, Any], source: Source) -> ParsedRecord:
    """MOSS: {chat: {turn_1: {Human, MOSS, …}, …}}.

    Each turn gives a conversation of the turns up to it, in which only its own answer is a target.
    `meta_instruction`, and what a turn has beside Human and MOSS, are not read.
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
    return MOSS_MARKS[speaker].sub("", text_at(message, speaker)).strip()


def _ascend(record: dict[str, Any], source: Source) -> ParsedRecord:
    """AscendSpeed: instruction data if there is an instruction, else pre-training text.

    The instruction of BelleMultiTurn is a whole dialogue, "Human:Q Assistant:A Human:R Assistant:",
    and its output is the last answer.
    """
    if "instruction" not in record:
        return _text(record, source)
    instruction = text_at(record, "instruction")
    if instruction.startswith("Human:"):
        rounds = [
            [question.strip(), answer.strip()]
            for question, answer in BELLE_ROUND.findall(instruction)
        ]
        if rounds and rounds[-1][1] == "":  # a dialogue that waits for an answer
            *history, last = rounds
            record = record | {"history": history, "instruction": last[0]}
    return _alpaca(record, source)


def _completion(record: dict[str, Any], source: Source) -> ParsedRecord:
    """OpenAI's older format: {prompt, completion}, two texts."""
    for key in ("prompt", "completion"):
        if isinstance(record.get(key), list):
            raise UserError(f"{key!r} is a list; write its messages into one list, 'messages'")
    turn = Turn(text_at(record, "prompt"), text_at(record, "completion"), None)
    return ParsedRecord([Conversation((turn,))])


def _text(record: dict[str, Any], source: Source) -> ParsedRecord:
    key = source.columns.get("prompt", "text")
    return ParsedRecord([text_at(record, key)])


FORMATS: dict[str, Callable[[dict[str, Any], Source], ParsedRecord]] = {
    "alpaca": _alpaca,
    "sharegpt": parse_sharegpt,
    "messages": parse_openai,
    "moss": _moss,
    "ascend": _ascend,
    "completion": _completion,
    "text": _text,
    "lines": _text,
}
