"""Regular expressions over module names, matched in bounded time.

PEFT's configurations name modules by regular expressions: `target_modules` as a string, and the
keys of `rank_pattern` and `alpha_pattern`. They come in files that others made. Python's `re` tries
one way after another, so `(a+)+b` takes 2^n steps for a name of n letters. Here every part of a
pattern is a function from a start to all ends, and each of its values is computed once:

    ends(start)    the positions where a match can end if it begins at `start`
    a|b            ends of a, and ends of b
    ab             ends of b from each end of a
    a*             start, its ends, their ends, … until nothing is new

A pattern of p parts and a name of n letters take about p n² steps.

Left out: groups by number, lookbehind, flags, and whatever else PEFT's files do not use; such a
pattern is refused. Greedy or not makes no difference, because all ends are known.
"""

import re
from collections.abc import Callable, Iterable
from functools import cache, lru_cache

from minillama.errors import UserError

Ends = Callable[[int], frozenset[int]]

MAX_LENGTH = 2000  # characters of a pattern
MAX_DEPTH = 20  # of groups inside each other
TOKEN = re.compile(
    r"""(?P<character> \\[dDwWsS] | \\[^a-zA-Z0-9] | \[\^?\]?(?:\\.|[^\]\\])*\] | [^\\\[(){*+?|^$] )
      | (?P<open>      \( (?: \?(?:[:=!]|P<\w+>) )? (?!\?) )
      | (?P<repeat>    (?: [*+?] | \{\d+\} | \{\d+,\d*\} | \{,\d+\} ) \?? )
      | (?P<other>     [)|^$] | \\[bB] )""",
    re.VERBOSE,
)
SUPPORTED = r". [] () | * + ? {m,n} ^ $ \d \w \s \b (?:) (?=) (?!)"


@lru_cache(maxsize=10_000)
def matches(pattern: str, name: str) -> bool:
    """Tell whether a pattern matches a whole name, as `re.fullmatch` does.

    Raises UserError for a pattern that is wrong or not supported.
    """
    return len(name) in _compile(pattern, name)(0)


@lru_cache(maxsize=10_000)
def matches_tail(pattern: str, name: str) -> bool:
    """Tell whether a pattern matches a whole name, or what follows one of its dots."""
    ends = _compile(pattern, name)
    starts = [0]
    starts += [index + 1 for index, character in enumerate(name) if character == "."]
    return any(len(name) in ends(start) for start in starts)


def _compile(pattern: str, name: str) -> Ends:
    if len(pattern) > MAX_LENGTH:
        raise UserError(f"a pattern of {len(pattern)} characters; at most {MAX_LENGTH} are read")
    try:
        return _Parser(pattern, name).parse()
    except (re.error, OverflowError, ValueError) as error:
        raise UserError(f"pattern {pattern!r}: {error}; supported: {SUPPORTED}") from None


class _Parser:
    """Reads a pattern from left to right and makes the function of each part, for one name."""

    def __init__(self, pattern: str, name: str) -> None:
        self.pattern = pattern
        self.name = name
        self.position = 0  # in the pattern
        self.kind = ""  # of the token under way: a group of TOKEN, or "end"
        self.token = ""
        self._advance()

    def parse(self) -> Ends:
        ends = self._alternatives(depth=0)
        if self.kind != "end":
            raise ValueError("a ) without its (")
        return ends

    def _advance(self) -> None:
        """Read the next token."""
        if self.position == len(self.pattern):
            self.kind = "end"
            self.token = ""
            return
        match = TOKEN.match(self.pattern, self.position)
        if match is None or match.lastgroup is None:
            rest = self.pattern[self.position : self.position + 8]
            raise ValueError(f"{rest!r} is not supported")
        self.kind = match.lastgroup
        self.token = match.group()
        self.position = match.end()

    def _alternatives(self, depth: int) -> Ends:
        if depth > MAX_DEPTH:
            raise ValueError(f"groups lie in each other more than {MAX_DEPTH} levels deep")
        options = [self._sequence(depth)]
        while self.token == "|":
            self._advance()
            options.append(self._sequence(depth))

        @cache
        def ends(start: int) -> frozenset[int]:
            return frozenset().union(*(option(start) for option in options))

        return ends

    def _sequence(self, depth: int) -> Ends:
        parts = []
        while self.kind != "end" and self.token not in ("|", ")"):
            part = self._part(depth)
            if self.kind == "repeat":
                part = self._repeated(part, *_limits(self.token))
                self._advance()
            parts.append(part)

        @cache
        def ends(start: int) -> frozenset[int]:
            positions = frozenset([start])
            for part in parts:
                positions = _union(part, positions)
            return positions

        return ends

    def _part(self, depth: int) -> Ends:
        """A character, an anchor or a group."""
        kind = self.kind
        token = self.token
        self._advance()
        if kind == "character":
            return self._character(token)
        if kind == "other":
            return self._anchor(token)
        if kind == "repeat":
            raise ValueError(f"{token} has nothing to repeat")
        group = self._alternatives(depth + 1)
        if self.token != ")":
            raise ValueError("a ( without its )")
        self._advance()
        if token not in ("(?=", "(?!"):
            return group
        must_match = token == "(?="
        return lambda start: _only(start, bool(group(start)) == must_match)

    def _character(self, token: str) -> Ends:
        one = re.compile(token)

        @cache
        def ends(start: int) -> frozenset[int]:
            return _only(start + 1, one.fullmatch(self.name[start : start + 1]) is not None)

        return ends

    def _anchor(self, token: str) -> Ends:
        """^, $, \\b or \\B: `re` tells at a position, in constant time."""
        anchor = re.compile(token)
        return lambda start: _only(start, anchor.match(self.name, start) is not None)

    def _repeated(self, part: Ends, low: int, high: int | None) -> Ends:
        # A name of n letters has n + 1 positions: after twice as many steps nothing changes.
        enough = 2 * len(self.name) + 2

        @cache
        def ends(start: int) -> frozenset[int]:
            positions = frozenset([start])
            for _ in range(min(low, enough)):
                positions = _union(part, positions)
            new = positions
            rounds = enough if high is None else min(high - low, enough)
            for _ in range(rounds):
                new = _union(part, new) - positions
                positions |= new
            return positions

        return ends


def _limits(quantifier: str) -> tuple[int, int | None]:
    """The least and largest number of repetitions; None: any number."""
    quantifier = quantifier if quantifier == "?" else quantifier.removesuffix("?")
    if not quantifier.startswith("{"):
        return {"*": (0, None), "+": (1, None), "?": (0, 1)}[quantifier]
    first, comma, last = quantifier[1:-1].partition(",")
    low = int(first or 0)
    if not comma:
        return low, low
    high = int(last) if last else None
    if high is not None and high < low:
        raise ValueError(f"{quantifier} has a smaller limit after a larger one")
    return low, high


def _union(part: Ends, starts: Iterable[int]) -> frozenset[int]:
    return frozenset().union(*(part(start) for start in starts))


def _only(position: int, is_match: bool) -> frozenset[int]:
    return frozenset([position] if is_match else [])
