"""Files to documents: records as a stream, and what each format's records mean.

A *container* gives records with their places ("record 3 (line 5)"), one at a time and never a whole file. A *format* turns a record
into documents, or says what is wrong with it: a `Conversation` (rendered by a template later), a plain string, or a `Part` of a
long one. Left out on purpose: guessing. A file whose first record fits no format is an error that names the keys it has.

    alpaca.json ── array ──▶ ("record 1", {"instruction": …}) ── alpaca ──▶ Conversation
    book.txt    ── text  ──▶ ("", "It was the …")             ── text ───▶ "It was the …"

A JSON array is the awkward container: Python's parser wants all of it. Here a window slides over the file; the parser takes a
record and the mark behind it off its front, and when the window ends before that mark, it grows.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from minillama.chat import Conversation, Turn
from minillama.data.sources import Source
from minillama.errors import UserError

BLOCK = 1 << 18  # characters read at a time


class Part(NamedTuple):
    """A stretch of a long text, cut after a line break."""

    text: str
    is_first: bool = True
    is_last: bool = True


Document = Conversation | str | Part

# What tells the formats apart: the keys of a record.
KEYS = {
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "moss": ("chat",),
    "text": ("text",),
}
# LLaMA-Factory's words for columns and tags, and what they are called where dataset_info.json says nothing.
COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": "history",
    "system": "system",
    "messages": "conversations",
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "system_tag": "",
}


class BadRecord(UserError):
    """A record that does not follow its format; `--skip_bad_records` counts these instead of stopping."""


def read_records(source: Source, in_parts: bool = False) -> Iterator[tuple[str, Any]]:
    """(place, record) of every record of a file; a line that is not JSON costs that line alone, and comes as a UserError.

    A text file is one record, or one a line for the format `lines`; in_parts: if it is long, it comes as `Part`s.
    Raises UserError where there is no record, and where what follows cannot be read.
    """
    kind, is_empty = _container_of(source), True
    try:
        with open(source.path, encoding="utf-8-sig", newline="\n") as file:
            for placed in (
                _texts(file, BLOCK if in_parts else -1)
                if kind == "text"
                else CONTAINERS[kind](file)
            ):
                is_empty = False
                yield placed
    except UnicodeDecodeError as error:
        raise UserError(
            f"{source.path}: not UTF-8 text ({error.reason}); save it as UTF-8"
        ) from None
    if is_empty:
        raise UserError(f"{source.path}: holds no records")


def _container_of(source: Source) -> str:
    """array, jsonl, parquet, text or lines, from the content. A .txt or .md file is text whatever it begins with."""
    path = source.path
    with open(path, "rb") as file:
        head = file.read(1024)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path}: a git-lfs pointer, not the file; run `git lfs pull` or download it again"
        )
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if path.suffix in (".txt", ".md") or (
        path.suffix not in (".json", ".jsonl") and first not in (b"[", b"{")
    ):
        return "lines" if source.data_format == "lines" else "text"
    return "array" if first == b"[" else "jsonl"


def _texts(file: TextIO, block: int) -> Iterator[tuple[str, str | Part]]:
    text, is_first = file.read(block) + file.readline(), True
    while text.strip() or (text and not is_first):
        following = file.read(block) + file.readline()
        yield "", text if is_first and not following else Part(text, is_first, not following)
        text, is_first = following, False


def _lines(file: TextIO) -> Iterator[tuple[str, str]]:
    return (
        (f"line {number}", line.rstrip("\n")) for number, line in enumerate(file, 1) if line.strip()
    )


def _json_lines(file: TextIO) -> Iterator[tuple[str, Any]]:
    for number, (line_number, line) in enumerate(_lines(file), 1):
        place = f"record {number} ({line_number})"
        try:
            yield place, json.loads(line)
        except json.JSONDecodeError as error:
            yield place, UserError(f"not valid JSON: {error.msg} at column {error.colno}")


def _parquet(file: TextIO) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{file.name}: needs the package `pyarrow`; pip install 'minillama[parquet]'"
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(file.name) as table:
            rows = (
                row for batch in table.iter_batches(batch_size=256) for row in batch.to_pylist()
            )
            yield from ((f"record {number}", row) for number, row in enumerate(rows, 1))
    except pyarrow.ArrowException as error:
        raise UserError(
            f"{file.name}: not a readable Parquet file ({str(error).splitlines()[0]})"
        ) from None


SPACE, DECODER = re.compile(r"[ \t\r\n]*"), json.JSONDecoder()


def _array(file: TextIO) -> Iterator[tuple[str, Any]]:
    text, line, column = file.read(1024), 1, 1  # the window, and where it begins
    number, at, mark = 0, text.index("[") + 1, ","
    while mark == ",":
        try:
            value, end, mark = _element(text, at)
        except json.JSONDecodeError as error:
            if number == 0 and text[error.pos : error.pos + 1] == "]":
                return
            is_cut_off = error.msg.startswith("Unterminated string") or error.pos > len(text) - 16
            block = (
                file.read(max(BLOCK, len(text) - at)) if is_cut_off else ""
            )  # as much again: no record is parsed over and over
            if not block:
                line, column = _position(line, column, text, error.pos)
                raise UserError(
                    f"{file.name}: not valid JSON: {error.msg} at line {line} column {column}"
                ) from None
            line, column = _position(line, column, text, at)
            text, at = text[at:] + block, 0
        else:
            number += 1
            yield f"record {number}", value
            at = end
    rest = text[at:] + file.read(BLOCK)
    if rest.strip():
        line, column = _position(line, column, text, at + len(rest) - len(rest.lstrip()))
        raise UserError(
            f"{file.name}: not valid JSON: more text after the array at line {line} column {column}"
        )


def _element(text: str, at: int) -> tuple[Any, int, str]:
    """(value, where the mark behind it ends, the mark: comma or bracket). Raises JSONDecodeError, also where text is lacking."""
    value, end = DECODER.raw_decode(text, SPACE.match(text, at).end())
    end = SPACE.match(text, end).end()
    mark = text[end : end + 1]
    if mark not in (",", "]"):
        raise json.JSONDecodeError(
            f"expected , or ], found {mark or 'the end of the file'}", text, end
        )
    return value, end + 1, mark


def _position(line: int, column: int, text: str, at: int) -> tuple[int, int]:
    """Line and column of text[at], of a text that begins at `line` and `column`."""
    breaks = text.count("\n", 0, at)
    return line + breaks, at - text.rfind("\n", 0, at) if breaks else column + at


CONTAINERS = {"array": _array, "jsonl": _json_lines, "parquet": _parquet, "lines": _lines}


def detect(path: Path) -> str:
    """The format of a file, from its first record: alpaca, sharegpt, moss or text."""
    place, record = next(read_records(Source(path), in_parts=True))
    if isinstance(record, UserError):
        raise UserError(f"{path}: {place}: {record}")
    if isinstance(record, (str, Part)):
        return "text"
    keys = set(record) if isinstance(record, dict) else set()
    if known := [name for name, needed in KEYS.items() if keys.issuperset(needed)]:
        return known[0]
    shown = ", ".join(sorted(map(str, keys))) or type(record).__name__
    raise UserError(
        f"{path}: its first record ({shown}) is of no known format; expected instruction and output (alpaca), "
        f"conversations (sharegpt), chat (moss) or text"
    )


def parse(source: Source, place: str, record: Any) -> list[Document]:
    """The documents of a record. Raises BadRecord, with file and place, for one that does not follow the format."""
    try:
        if isinstance(record, UserError):
            raise record
        if isinstance(record, (str, Part)) and source.data_format in ("text", "lines", "ascend"):
            return [record]
        if not isinstance(record, dict):
            keys = " and ".join(KEYS.get(source.data_format, ("text",)))
            raise UserError(f"expected an object with {keys}, found {type(record).__name__}")
        return FORMATS[source.data_format](record, source)
    except UserError as error:
        raise BadRecord(": ".join(filter(None, (str(source.path), place, str(error))))) from None


def _text_of(record: dict[str, Any], name: str, default: str | None = None) -> str:
    """record[name], which must be text; where it is absent or null, the default."""
    value = record.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise UserError(
            f"{name!r} is missing"
            if value is None
            else f"{name!r} is {type(value).__name__}, expected text"
        )
    return value


def _alpaca(record: dict[str, Any], source: Source) -> list[Document]:
    """{instruction, input?, output, system?, history?: [[question, answer], …]}: Stanford Alpaca, LLaMA-Factory, AscendSpeed."""
    name = COLUMNS | source.columns
    history = record.get(name["history"]) or []
    pairs = isinstance(history, list) and all(
        isinstance(pair, list) and len(pair) == 2 for pair in history
    )
    if not pairs or not all(isinstance(text, str) for pair in history for text in pair):
        raise UserError(f"{name['history']!r} is not a list of [question, answer] pairs")
    last = Turn(
        _text_of(record, name["prompt"]),
        _text_of(record, name["response"]),
        _text_of(record, name["query"], ""),
    )
    return [
        Conversation(
            (*(Turn(*pair) for pair in history), last), _text_of(record, name["system"], "")
        )
    ]


def _sharegpt(record: dict[str, Any], source: Source) -> list[Document]:
    """{conversations: [{from: human|gpt, value}, …]}: FastChat. What stands before the first human turn is dropped."""
    name = COLUMNS | source.columns
    messages = record.get(name["messages"])
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(
            f"{name['messages']!r} is {'missing' if messages is None else 'not a list of messages'}"
        )
    said = [
        (_text_of(message, name["role_tag"]), _text_of(message, name["content_tag"]))
        for message in messages
    ]
    system = _text_of(record, name["system"], "")
    if said and said[0][0] != name["user_tag"]:
        role, text = said.pop(0)
        system = text if role == name["system_tag"] else system
    for number, (role, _) in enumerate(said):
        expected = name["assistant_tag"] if number % 2 else name["user_tag"]
        if role != expected:
            raise UserError(
                f"turn {len(messages) - len(said) + number + 1} is from {role!r}, expected {expected!r}: the two alternate"
            )
    if len(said) < 2:
        raise UserError(f"{name['messages']!r} holds no question with an answer")
    texts = [text for _, text in said]  # a last question without an answer teaches nothing
    return [
        Conversation(
            tuple(
                Turn(user, answer, None)
                for user, answer in zip(texts[::2], texts[1::2], strict=False)
            ),
            system,
        )
    ]


MOSS_MARKS = {"Human": r"<eoh>|<\|Human\|>: ?", "MOSS": r"<eom>|<\|MOSS\|>:"}


def _moss(record: dict[str, Any], source: Source) -> list[Document]:
    """{chat: {turn_1: {Human, MOSS, …}, …}}: a sample for each turn, which holds the turns up to it and trains its answer alone."""
    chat = record.get("chat")
    if not isinstance(chat, dict) or not all(
        isinstance(said, dict) for said in chat.values() if said
    ):
        raise UserError("'chat' is not an object of turns with Human and MOSS")
    turns = [
        Turn(
            *(re.sub(marks, "", _text_of(said, who)).strip() for who, marks in MOSS_MARKS.items()),
            None,
        )
        for said in chat.values()
        if said
    ]
    if not turns:
        raise UserError("'chat' holds no turn")
    return [
        Conversation((*(replace(turn, is_target=False) for turn in turns[:i]), turns[i]))
        for i in range(len(turns))
    ]


BELLE_ROUND = re.compile(r"Human:(.*?)Assistant:(.*?)(?=Human:|\Z)", re.DOTALL)


def _ascend(record: dict[str, Any], source: Source) -> list[Document]:
    """AscendSpeed's rows: instruction data where there is an instruction, else pre-training text.

    BelleMultiTurn's instruction holds the dialogue (Human:Q Assistant:A Human:R Assistant:) and its output the last answer.
    """
    if "instruction" not in record:
        return _text(record, source)
    said = _text_of(record, "instruction")
    rounds = (
        [[text.strip() for text in pair] for pair in BELLE_ROUND.findall(said)]
        if said.startswith("Human:")
        else []
    )
    if rounds and not rounds[-1][1]:
        record = record | {"history": rounds[:-1], "instruction": rounds[-1][0]}
    return _alpaca(record, source)


def _text(record: dict[str, Any], source: Source) -> list[Document]:
    return [_text_of(record, source.columns.get("prompt", "text"))]


FORMATS = {
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "moss": _moss,
    "ascend": _ascend,
    "text": _text,
    "lines": _text,
}
