"""JSON that others wrote: what Python's parser cannot read, and what nobody can work with later.

Python parses JSON that breaks a program in another place: an array in an array, ten thousand times,
ends in a RecursionError, an integer of 5,000 digits in a ValueError, and "\\ud83d", which is half a
character, parses and cannot be encoded again. Each is a mistake in a file, so each is a UserError.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minillama.errors import UserError

MAX_DEPTH = 100  # of arrays and objects inside each other
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")


def parse_json(text: str, where: Path | str) -> Any:
    """Return the value of a JSON text. `where` begins the message of an error.

    Raises UserError if the text is not JSON, or for what `json_limits` and `check_json` refuse.
    """
    try:
        with json_limits():
            content = json.loads(text)
        check_json(content, text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error})") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return content


@contextmanager
def json_limits() -> Iterator[None]:
    """Turn the limits of Python's JSON parser into a UserError. A JSONDecodeError stays as it is.

    They are the digits of an integer, and the depth of arrays and objects.
    """
    try:
        yield
    except json.JSONDecodeError:
        raise
    except ValueError:
        raise UserError("an integer has too many digits") from None
    except RecursionError:
        raise UserError(f"nested more than {MAX_DEPTH} levels deep") from None


def check_json(content: Any, text: str) -> None:
    """Raise UserError for a value that can be parsed, but not worked with. `text` is its JSON.

    That is one nested deeper than MAX_DEPTH, or with a lone surrogate, which UTF-8 cannot encode.
    """
    if _is_too_deep(content):
        raise UserError(f"nested more than {MAX_DEPTH} levels deep")
    if SURROGATE.search(text):  # a pair of surrogates is one character, and encodes
        check_encodable(json.dumps(content, ensure_ascii=False))


def check_encodable(text: str) -> None:
    """Raise UserError for a text with a lone surrogate, which UTF-8 cannot encode.

    They come from broken JSON escapes, and from bytes of a command line that are not UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"\\u{ord(text[error.start]):04x}"
        raise UserError(f"a string has the lone surrogate {found}; write it as UTF-8") from None


def _is_too_deep(content: Any) -> bool:
    """Tell whether containers lie in each other more than MAX_DEPTH levels deep, level by level."""
    level = [content]
    for _ in range(MAX_DEPTH + 1):
        containers = [value for value in level if isinstance(value, dict | list)]
        if not containers:
            return False
        level = []
        for container in containers:
            children = container.values() if isinstance(container, dict) else container
            level.extend(children)
    return True
