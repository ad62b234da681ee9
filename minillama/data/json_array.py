"""The elements of a long JSON array, one at a time.

Python's parser takes all of an array or nothing. So a window slides over the file. The parser takes
one element and the comma behind it from its beginning. If the window ends before that comma, more
of the file is read.

    file      [{"instruction": …}, {"instruction": …}, {"instruction": …}]
    window                         {"instruction": …}, {"instr

The array may be the only value of an object: {"data": […]}.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

from minillama.errors import UserError
from minillama.json_values import check_json, json_limits

BLOCK = 1 << 18  # characters read at a time
HEAD = 1024  # characters of the first window
SPACE = re.compile(r"[ \t\r\n]*")
WRAPPED = re.compile(r'\s*\{\s*"(?P<key>(?:[^"\\]|\\.)*)"\s*:\s*\[(?=\s*\{)')
DECODER = json.JSONDecoder()


def read_array(file: TextIO) -> Iterator[Any]:
    """The elements of a JSON array, or a UserError for one that cannot be worked with.

    Raises UserError, with its place, where the file is not JSON.
    """
    window = ArrayWindow(file)
    number = 0
    while not window.is_array_done:
        try:
            value = window.take_element()
        except json.JSONDecodeError as error:
            is_empty_array = number == 0 and window.text[error.pos : error.pos + 1] == "]"
            if is_empty_array:
                return
            if not (window.is_cut_off(error) and window.grow()):
                raise window.error_at(f"not valid JSON: {error.msg}", error.pos) from None
        except UserError as error:
            value_start = _skip_space(window.text, window.start)
            raise window.error_at(str(error), value_start) from None
        else:
            number += 1
            yield value
    window.check_end()


class ArrayWindow:
    """The part of a file with a JSON array that is in memory. text[start:] is not parsed yet."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.text = file.read(HEAD)
        wrapped = WRAPPED.match(self.text)
        self.is_wrapped = wrapped is not None
        self.start = wrapped.end() if wrapped else self.text.index("[") + 1
        self.line = 1  # where text[0] stands in the file
        self.column = 1
        self.is_array_done = False

    def take_element(self) -> Any:
        """The next element, or a UserError for one that cannot be worked with.

        The comma or bracket behind it is taken too. Raises JSONDecodeError, and takes nothing, if
        the text is wrong or the window ends; UserError beyond the limits of Python's parser.
        """
        value_start = _skip_space(self.text, self.start)
        with json_limits():
            value, value_end = DECODER.raw_decode(self.text, value_start)
        end = _skip_space(self.text, value_end)
        delimiter = self.text[end : end + 1]
        if delimiter not in (",", "]"):
            found = delimiter or "the end of the file"
            raise json.JSONDecodeError(f"expected , or ], found {found}", self.text, end)
        self.start = end + 1
        self.is_array_done = delimiter == "]"
        try:
            check_json(value, self.text[value_start:value_end])
        except UserError as error:
            return error
        return value

    def is_cut_off(self, error: json.JSONDecodeError) -> bool:
        """Whether the error can come from the end of the window alone."""
        is_near_end = error.pos > len(self.text) - 16  # within a number, a literal or an escape
        return is_near_end or error.msg.startswith("Unterminated string")

    def grow(self) -> bool:
        """Drop what is parsed and read more of the file. Returns False at the end of the file.

        At least as much as the window holds is read, so a long record is not parsed very often.
        """
        num_unparsed = len(self.text) - self.start
        block = self.file.read(max(BLOCK, num_unparsed))
        if not block:
            return False
        self.line, self.column = self._position(self.start)
        self.text = self.text[self.start :] + block
        self.start = 0
        return True

    def check_end(self) -> None:
        """Raise UserError if there is more than space behind the array, or its object."""
        self.text += self.file.read(BLOCK)
        end = _skip_space(self.text, self.start)
        if self.is_wrapped and self.text[end : end + 1] == "}":
            end = _skip_space(self.text, end + 1)
        elif self.is_wrapped:
            raise self.error_at("the object holds more than one list; make each a file", end)
        if self.text[end:].strip():
            raise self.error_at("not valid JSON: more text after the array", end)

    def error_at(self, message: str, index: int) -> UserError:
        """The error with the place of text[index]."""
        line, column = self._position(index)
        return UserError(f"{self.file.name}: {message} at line {line} column {column}")

    def _position(self, index: int) -> tuple[int, int]:
        """Line and column of text[index] in the file."""
        num_breaks = self.text.count("\n", 0, index)
        if num_breaks == 0:
            return self.line, self.column + index
        last_break = self.text.rfind("\n", 0, index)
        return self.line + num_breaks, index - last_break


def _skip_space(text: str, index: int) -> int:
    space = SPACE.match(text, index)
    return space.end() if space else index
