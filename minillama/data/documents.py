"""What a record gives: documents, and the texts under its keys."""

import json
import math
from typing import Any, NamedTuple

from minillama.chat import Conversation
from minillama.errors import UserError

Document = Conversation | str


class ParsedRecord(NamedTuple):
    """What a record gives. A conversation without turns has nothing to learn from."""

    documents: list[Document]
    dropped_messages: int = 0  # messages of the record that are in no document


def text_at(record: dict[str, Any], key: str, default: str | None = None) -> str:
    """record[key], which must be text, or the default if it is missing, null or NaN."""
    value = value_at(record, key)
    if isinstance(value, str):
        return value
    if value is not None:
        raise UserError(f"{key!r} is {type(value).__name__}, expected text")
    if default is None:
        raise missing(record, key)
    return default


def missing(record: dict[str, Any], key: str) -> UserError:
    """The error for a value that is missing, null or NaN."""
    if key not in record:
        return UserError(f"{key!r} is missing")
    return UserError(f"{key!r} is empty ({json.dumps(record[key])})")


def value_at(record: dict[str, Any], key: str) -> Any:
    """record[key]; None if it is missing, null or NaN, which pandas writes for a missing text."""
    value = record.get(key)
    if isinstance(value, float) and math.isnan(value):
        return None
    return value
