"""Raw files to documents: what each format's records mean.

A document is a `Conversation` (instruction data, rendered by a template later) or a plain string. Reading has two steps, so that
worker processes can share the second: a *container* (a JSON array, JSON lines, Parquet, text) gives records with their places,
one at a time and never a whole file; a *format* turns a record into documents, or says what is wrong with it.

    alpaca.json ── json ──▶ ("record 1", {"instruction": …}) ── alpaca ──▶ Conversation
    book.txt    ── text ──▶ ("", "It was the …")             ── text ───▶ "It was the …"

Left out on purpose: guessing. A file whose first record fits no format is an error that names the keys it has.
"""

from collections.abc import Callable, Iterator
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
    if containers.kind_of(source.path) == "text":
        if source.data_format == "lines":
            return containers.lines(source.path)
        if in_parts:
            return containers.text_parts(source.path)
    return containers.records(source.path)


def parse(source: Source, place: str, record: Any) -> list[Document]:
    """The documents of a record. Raises BadRecord, with file and place, for one that does not follow the format."""
    try:
        if isinstance(record, UserError):
            raise record
        return FORMATS[source.data_format](record, source)
    except UserError as error:
        raise BadRecord(": ".join(part for part in (str(source.path), place, str(error)) if part)) from None


def read_documents(path: Path, data_format: str, on_bad: Callable[[BadRecord], None] | None = None) -> Iterator[Document]:
    """The documents of a file. A malformed record goes to `on_bad`, or is raised where there is none."""
    source = Source(path, data_format)
    for place, record in read_records(source):
        try:
            yield from parse(source, place, record)
        except BadRecord as error:
            if on_bad is None:
                raise
            on_bad(error)


def _text_of(record: Any, name: str, default: str | None = None) -> str:
    """record[name], which must be text; where it is absent or null, the default."""
    value = record.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise BadRecord(f"{name!r} is missing" if value is None else f"{name!r} is {type(value).__name__}, expected text")
    return value


def _object(record: Any, hint: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise BadRecord(f"expected an object with {hint}, found {type(record).__name__}")
    return record


def _alpaca(record: Any, source: Source) -> list[Document]:
    """{instruction, input?, output, system?, history?: [[question, answer], …]}: Stanford Alpaca, LLaMA-Factory, AscendSpeed."""
    record = _object(record, "instruction and output")
    name = ALPACA_COLUMNS | source.columns
    history = record.get(name["history"]) or []
    pairs = isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)
    if not pairs or not all(isinstance(text, str) for pair in history for text in pair):
        raise BadRecord(f"{name['history']!r} is not a list of [question, answer] pairs")
    turns = [Turn(question, answer) for question, answer in history]
    turns.append(Turn(_text_of(record, name["prompt"]), _text_of(record, name["response"]), _text_of(record, name["query"], "")))
    return [Conversation(tuple(turns), _text_of(record, name["system"], ""))]


def _sharegpt(record: Any, source: Source) -> list[Document]:
    """{conversations: [{from: human|gpt, value}, …]}: FastChat. What stands before the first human turn is dropped."""
    name = {"messages": "conversations", "system": "system"} | source.columns
    tag = SHAREGPT_TAGS | source.tags
    record = _object(record, name["messages"])
    messages = record.get(name["messages"])
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadRecord(f"{name['messages']!r} is {'missing' if messages is None else 'not a list of messages'}")
    said = [(_text_of(message, tag["role_tag"]), _text_of(message, tag["content_tag"])) for message in messages]
    system = _text_of(record, name["system"], "")
    if said and said[0][0] != tag["user_tag"]:
        system = said[0][1] if said[0][0] == tag["system_tag"] else system
        said = said[1:]
    for number, (role, _) in enumerate(said):
        expected = tag["assistant_tag"] if number % 2 else tag["user_tag"]
        if role != expected:
            turn = len(messages) - len(said) + number + 1
            raise BadRecord(f"turn {turn} is from {role!r}, expected {expected!r}: the two alternate")
    if len(said) < 2:
        raise BadRecord(f"{name['messages']!r} holds no question with an answer")
    texts = [text for _, text in said]  # a last question without an answer teaches nothing
    return [Conversation(tuple(Turn(user, answer, None) for user, answer in zip(texts[::2], texts[1::2], strict=False)), system)]


def _moss(record: Any, source: Source) -> list[Document]:
    """{chat: {turn_1: {Human, MOSS, …}, …}}: a sample for each turn, which holds the turns up to it and trains its answer alone."""
    chat = _object(_object(record, "chat").get("chat"), "turn_1, turn_2, …")
    turns: list[Turn] = []
    samples: list[Document] = []
    for name, messages in chat.items():
        if not messages:
            continue
        human, moss = (_text_of(_object(messages, f"Human and MOSS in {name!r}"), who) for who in ("Human", "MOSS"))
        for mark in ("<eoh>", "<|Human|>: ", "<|Human|>:"):
            human = human.replace(mark, "")
        for mark in ("<eom>", "<|MOSS|>:"):
            moss = moss.replace(mark, "")
        samples.append(Conversation((*turns, Turn(human.strip(), moss.strip(), None))))
        turns.append(Turn(human.strip(), moss.strip(), None, is_target=False))
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


FORMATS: dict[str, Callable[[Any, Source], list[Document]]] = {
    "alpaca": _alpaca, "sharegpt": _sharegpt, "moss": _moss, "ascend": _ascend, "text": _text, "lines": _text,
}
