"""Option dataclasses, filled from command-line flags or from Python keywords of the same names."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from minillama.errors import UserError, closest

Options = TypeVar("Options")


def from_flags(kind: type[Options], flags: Mapping[str, Any]) -> Options:
    """The dataclass `kind` from those flags that have the names of its fields."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return from_keywords(kind, {name: flags[name] for name in flags if name in names})


def from_keywords(kind: type[Options], keywords: Mapping[str, Any]) -> Options:
    """The dataclass `kind` from keywords; lists become tuples.

    Raises UserError for a keyword that is not a field, with the closest one.
    """
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    values = {}
    for name, value in keywords.items():
        if name not in names:
            raise UserError(
                f"no option {name!r}{closest(name, names)}; options: {', '.join(names)}"
            )
        values[name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)
