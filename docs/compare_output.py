"""Compare what a command prints with what a page says that it prints.

A page shows an output as it was on one machine. On another one some of it differs, and none of that
matters:

    times, speeds          0.41 s, 1,250 tokens/s: any number
    numbers with a point   the last digit may differ by one, because CPUs round sums differently
    spaces                 any number of them, because columns follow the width of numbers
    …                      in a line: any text; as a line of its own: any number of lines

Whole numbers and words have to be equal.
"""

import re

ELLIPSIS = "…"
NUMBER = re.compile(r"-?\d+\.\d+(?:e[+-]?\d+)?")
# A time or a speed: a number and a unit that no size or count has.
MEASURED = re.compile(
    r"\d[\d,]*(?:\.\d+)? ?(?=(?:ms|s|seconds?|minutes?|tokens/s|documents/s|samples/s|it/s)\b)"
)


def first_difference(expected: str, printed: str) -> str:
    """What of a page's output was not printed; "" if all of it was, in this order."""
    expected_lines = _clean(expected)
    printed_lines = _clean(printed)
    if not expected_lines:
        return ""
    next_line = 0  # of what was printed
    may_skip = False  # after a line that is only an ellipsis
    for line in expected_lines:
        if line == ELLIPSIS:
            may_skip = True
            continue
        found = _find(line, printed_lines, next_line, may_skip)
        if found is None:
            instead = "the end"
            if not may_skip and next_line < len(printed_lines):
                instead = repr(printed_lines[next_line])
            return f"the page has {line!r}, the command printed {instead}"
        next_line = found + 1
        may_skip = False
    if next_line < len(printed_lines) and not may_skip:
        return f"the command also printed {printed_lines[next_line]!r}"
    return ""


def _clean(text: str) -> list[str]:
    """The lines that are not blank, with single spaces, without times and speeds."""
    lines = []
    for line in text.splitlines():
        words = " ".join(line.split())
        if words:
            lines.append(MEASURED.sub("# ", words))
    return lines


def _find(line: str, printed: list[str], start: int, may_skip: bool) -> int | None:
    """The index of the first printed line from `start` on that matches; None if there is none."""
    end = len(printed) if may_skip else start + 1
    for index in range(start, min(end, len(printed))):
        if matches(line, printed[index]):
            return index
    return None


def matches(expected: str, printed: str) -> bool:
    """Whether a printed line is the expected one, up to ellipses and last digits."""
    pattern = NUMBER.sub("\0", expected)
    pattern = re.escape(pattern).replace(re.escape(ELLIPSIS), ".*?")
    pattern = pattern.replace("\0", f"({NUMBER.pattern})")
    match = re.fullmatch(pattern, printed)
    if match is None:
        return False
    numbers = zip(NUMBER.findall(expected), match.groups(), strict=True)
    return all(is_close(number, other) for number, other in numbers)


def is_close(expected: str, printed: str) -> bool:
    """Whether two numbers with as many digits differ by at most one in the last digit."""
    mantissa, _, exponent = expected.partition("e")
    decimals = len(mantissa.partition(".")[2])
    last_digit = 10.0 ** (int(exponent or "0") - decimals)
    return abs(float(expected) - float(printed)) <= 1.01 * last_digit
