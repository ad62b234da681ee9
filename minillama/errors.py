"""What the user got wrong: one exception, one line, exit code 2.

A mistake that a user can mend is a `UserError`; its text names the thing, where it is, and what to do. Everything else
is a defect of ours and keeps its traceback. `cli.run` is the only place that turns the first kind into `error: …`.
"""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class UserError(Exception):
    """A mistake the user can mend. The message says what, where, and the remedy."""


def closest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'learning_rate'?)` for the known name nearest to `name`, or an empty string."""
    match = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f" (did you mean {match[0]!r}?)" if match else ""


def listed(problems: Sequence[str], most: int = 4) -> str:
    """Return the first `most` problems in one line, and how many more there are."""
    line = "; ".join(problems[:most])
    if len(problems) > most:
        line += f"; and {len(problems) - most} more"
    return line


def read_json(
    path: Path, remedy: str = "", keys: Mapping[str, type] | None = None, what: str = ""
) -> dict[str, Any]:
    """The JSON object that a file of the user's holds. Raises UserError where it is missing (with `remedy`) or damaged, or is not
    `what` it should be: with values of these types under these `keys`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file" + (f"; {remedy}" if remedy else "")) from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object")
    if wrong := [
        key for key, kind in (keys or {}).items() if not isinstance(content.get(key), kind)
    ]:
        raise UserError(f"{path}: not {what} ({wrong[0]} is {content.get(wrong[0], 'missing')})")
    return content


@contextmanager
def parsing(where: Path | str = "") -> Iterator[None]:
    """What the body cannot read of a file becomes one line, which begins with the file."""
    place = f"{where}: " if where else ""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}{error}") from None
    except KeyError as error:
        raise UserError(f"{place}key {error.args[0]!r} is missing") from None
    except (ArithmeticError, TypeError, ValueError) as error:
        raise UserError(f"{place}a value is wrong or of the wrong type ({error})") from None
