"""Marks by which the texts of messages are found again in what a chat template writes.

    text      " Hi </s> "          a control token's letters, and white space around
    marked    " ⟨Hi <·/s>⟩₀ "      ⟨ start, · split, ⟩₀ the end of message 0

The marks are characters of Unicode's private use that are in none of the texts. They stand inside
the white space around a text, so that a template which trims its texts trims marked ones too. The
letters of a token are parted, in upper or lower case, so that no letters of a text are one.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from minillama.errors import UserError

PLANES = (0xF0000, 0x100000)  # where characters of private use begin
PLANE_SIZE = 0xFFFE
NOTHING = "(?!)"  # a regular expression that fits nowhere


class AddedToken(Protocol):
    """A token that a vocabulary was given beside the learnt ones.

    lstrip, rstrip: whether it takes the white space before it, or behind it.
    """

    @property
    def content(self) -> str: ...
    @property
    def special(self) -> bool: ...
    @property
    def lstrip(self) -> bool: ...
    @property
    def rstrip(self) -> bool: ...


class Marks(NamedTuple):
    """Characters that are in no text of a conversation.

    start: before a text. split: inside the letters of a control token. cut: inside those of an
    added word. first_end: the code point of the mark behind message 0; the next one is that of
    message 1.
    """

    start: str
    split: str
    cut: str
    first_end: int

    def end(self, number: int) -> str:
        """The mark behind a message."""
        return chr(self.first_end + number)

    def remove(self, text: str) -> str:
        """A text without its marks."""
        return re.sub(_plane(ord(self.start)), "", text)


def choose_marks(texts: Sequence[str]) -> Marks:
    """Marks that are in none of the texts. Raises UserError if there are none left."""
    everything = "".join(texts)
    for first in PLANES:
        if not re.search(_plane(first), everything):
            return Marks(chr(first), chr(first + 1), chr(first + 2), first + 3)
    raise UserError("a text holds characters of both private planes of Unicode; take them out")


def _plane(first: int) -> str:
    """A regular expression for the characters of a plane."""
    return f"[{chr(first)}-{chr(first + PLANE_SIZE - 1)}]"


class Letters:
    """The letters of some tokens, to be parted in texts."""

    def __init__(self, control: Sequence[AddedToken], words: Sequence[AddedToken]) -> None:
        self.one_letter = [token.content for token in control if len(token.content) == 1]
        self.control = _any_case(control)
        self.words = _any_case(words)

    def mark(self, text: str, number: int, marks: Marks) -> str:
        """The text of a message with its marks.

        Raises UserError for a control token of one letter, which cannot be parted.
        """
        core = text.strip()
        for name in self.one_letter:
            if name in core:
                raise UserError(f"a message holds {name!r}, which is a control token; take it out")
        letters = list(core)
        for position in _find_starts(self.control, core):
            letters[position] += marks.split
        for position in _find_starts(self.words, core):
            letters[position] += marks.cut
        before = text[: len(text) - len(text.lstrip())]
        behind = text[len(before) + len(core) :]
        return f"{before}{marks.start}{''.join(letters)}{marks.end(number)}{behind}"


def token_pattern(tokens: Iterable[AddedToken]) -> re.Pattern[str]:
    """A pattern for the longest token at a place, with the white space that it takes."""
    alternatives = []
    for token in _longest_first(tokens):
        before = r"\s*" if token.lstrip else ""
        behind = r"\s*" if token.rstrip else ""
        alternatives.append(before + re.escape(token.content) + behind)
    return re.compile("|".join(alternatives) or NOTHING)


def _any_case(tokens: Iterable[AddedToken]) -> re.Pattern[str]:
    """A pattern for the letters of a token, in upper or lower case."""
    alternatives = [re.escape(token.content) for token in _longest_first(tokens)]
    return re.compile("|".join(alternatives) or NOTHING, re.IGNORECASE)


def _longest_first(tokens: Iterable[AddedToken]) -> list[AddedToken]:
    return sorted(tokens, key=lambda token: len(token.content), reverse=True)


def _find_starts(pattern: re.Pattern[str], text: str) -> list[int]:
    """Where the pattern begins in a text; one place can lie inside another's match."""
    starts = []
    match = pattern.search(text)
    while match:
        starts.append(match.start())
        match = pattern.search(text, match.start() + 1)
    return starts
