"""Mistakes of the user: one exception, one line, exit code 2.

A mistake that the user can correct is a `UserError`. Its message names the thing, where it is, and
what to do. Any other exception is a fault of this program and keeps its traceback. Only `cli.run`
turns a UserError into `error: …`.
"""

import difflib
from collections.abc import Iterable, Sequence


class UserError(Exception):
    """A mistake that the user can correct. The message says what, where, and the remedy."""


def closest(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'learning_rate'?)` for the known name nearest to `name`, or ""."""
    matches = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def listed(problems: Sequence[str], most: int = 4) -> str:
    """Return the first `most` problems in one line, and how many more there are."""
    line = "; ".join(problems[:most])
    if len(problems) > most:
        line += f"; and {len(problems) - most} more"
    return line
