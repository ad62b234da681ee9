"""The conversation behind the web page: what is shown, and how Stop and Clear end an answer.

The page sends events that overlap: an answer is being written when Clear comes. So there is one
place that says what is true, a `Conversation` for each visitor, and every event ends by showing it:

    ask      begin -> a token, grow -> … -> finish           or until `grow` says no
    Stop     end                                             what was written stays
    Clear    end, and forget all turns

`begin` gives an answer a number, and `end` makes that number invalid. An answer whose number is no
longer valid cannot change the conversation, whatever it still writes.

A message that was sent before Clear can still wait for its turn when Clear comes, behind the answer
of another visitor. So Clear is followed by `end_clear`, which takes its turn behind that message;
what begins between the two was sent before Clear.

Turns that no longer fit into the model's context stay here, and are marked where they are shown.
Messages are shown as typed; answers as Markdown, without HTML and images in it.
"""

import re
import threading
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from minillama.chat import Turn

Messages = list[dict[str, str]]  # as gradio's Chatbot takes them

LEFT_CONTEXT = "*↑ no longer in the model's context: it does not see these messages*"
STOPPED = "*(stopped)*"
CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)  # of Markdown
TAG = re.compile(r"<(?=[a-zA-Z/!?])")
ENTITY = re.compile(r"&(?=#?\w+;)")
IMAGE = re.compile(r"!(?=\[)")
MARKUP = re.compile(r"([\\`*_\[\]|~$])")  # characters that mean something anywhere in a line
MARKUP_AT_START = re.compile(r"^(\s*)([#>+=-]|\d+(?=[.)]))", re.MULTILINE)
INDENTATION = re.compile(r"^[ \t]+", re.MULTILINE)

_lock = threading.Lock()  # gradio runs events in threads of their own


@dataclass
class Conversation:
    """The conversation of one visitor. `begin`, `grow`, `end` and `clear` may come from threads."""

    turns: list[Turn] = field(default_factory=list)
    num_dropped: int = 0  # the oldest turns: the model does not see them any more
    message: str = ""  # what has no answer yet; "" if all messages have
    answer_number: int = 0
    is_answering: bool = False
    is_clearing: bool = False  # between `clear` and `end_clear`

    def begin(self, message: str) -> int:
        """Begin an answer, and return its number; 0 if the message was sent before Clear."""
        with _lock:
            if self.is_clearing:
                return 0
            self.message = message
            self.answer_number += 1
            self.is_answering = True
            return self.answer_number

    def grow(self, number: int, turns: list[Turn], num_dropped: int) -> bool:
        """Take the turns with what an answer has become; False if that answer has ended."""
        with _lock:
            if number != self.answer_number:
                return False
            self.turns = turns
            self.num_dropped = num_dropped
            self.message = ""
            return True

    def withdraw(self, number: int) -> None:
        """The message is refused before anything is shown of it."""
        with _lock:
            if number == self.answer_number:
                self.is_answering = False
                self.message = ""

    def finish(self, number: int) -> None:
        """An answer is complete; nothing changes if it has ended before."""
        with _lock:
            if number == self.answer_number:
                self.is_answering = False

    def end(self) -> None:
        """End the answer that is being written."""
        with _lock:
            self.answer_number += 1
            self.is_answering = False

    def clear(self) -> None:
        """End the answer that is being written, and forget all turns."""
        with _lock:
            self.is_clearing = True
            self.answer_number += 1
            self.is_answering = False
            self.turns = []
            self.num_dropped = 0
            self.message = ""

    def end_clear(self) -> None:
        """All messages that were sent before `clear` have had their turn."""
        with _lock:
            self.is_clearing = False

    def take_unanswered(self) -> str:
        """The message that got no answer, which then goes back to where it was typed; or ""."""
        with _lock:
            if self.is_answering:
                return ""
            message = self.message
            self.message = ""
            return message

    def shown(self) -> Messages:
        """The messages that the page shows."""
        with _lock:
            turns = list(self.turns)
            num_dropped = self.num_dropped
            message = self.message
        messages = []
        for number, turn in enumerate(turns):
            if number == num_dropped and number > 0:
                messages.append({"role": "assistant", "content": LEFT_CONTEXT})
            messages.append({"role": "user", "content": as_typed(turn.user)})
            answer = as_safe_markdown(turn.answer or "")
            messages.append({"role": "assistant", "content": answer or STOPPED})
        if message:
            messages.append({"role": "user", "content": as_typed(message)})
        return messages

    def saved(self) -> dict[str, Any]:
        """The conversation as JSON, which the visitor's browser keeps."""
        with _lock:
            turns = [[turn.user, turn.answer or ""] for turn in self.turns]
            return {"turns": turns, "num_dropped": self.num_dropped}

    def restore(self, saved: Any) -> None:
        """Become the conversation that `saved` returned; an empty one if it is something else.

        A conversation that has begun stays as it is.
        """
        kept = read_saved(saved)
        with _lock:
            if self.answer_number > 0:
                return
            self.turns = kept.turns
            self.num_dropped = kept.num_dropped


class SavedConversation(NamedTuple):
    turns: list[Turn]
    num_dropped: int


def read_saved(saved: Any) -> SavedConversation:
    """What a browser kept; an empty conversation if it is not what `Conversation.saved` made."""
    turns = []
    pairs = saved.get("turns") if isinstance(saved, dict) else None
    for pair in pairs if isinstance(pairs, list) else []:
        is_turn = isinstance(pair, list) and len(pair) == 2
        if not (is_turn and all(isinstance(text, str) for text in pair)):
            return SavedConversation([], 0)
        turns.append(Turn(pair[0], pair[1]))
    num_dropped = saved.get("num_dropped") if isinstance(saved, dict) else 0
    if not isinstance(num_dropped, int) or not 0 <= num_dropped <= len(turns):
        return SavedConversation([], 0)
    return SavedConversation(turns, num_dropped)


def as_safe_markdown(text: str) -> str:
    """Markdown that shows tags and images of the text as text; code is left as it is.

    A browser would load an image from wherever it is, and drop a tag that it does not know.
    """
    parts = CODE.split(text)
    for number in range(0, len(parts), 2):  # every second part is code
        part = TAG.sub("&lt;", parts[number])
        parts[number] = IMAGE.sub(r"!\\", part)
    return "".join(parts)


def as_typed(text: str) -> str:
    """Markdown that shows a text as it is."""
    text = ENTITY.sub("&amp;", text)
    text = TAG.sub("&lt;", text)
    text = MARKUP.sub(r"\\\1", text)
    text = MARKUP_AT_START.sub(_escape_start, text)
    return INDENTATION.sub(_keep_indentation, text)


def _escape_start(match: re.Match[str]) -> str:
    """The beginning of a line that is not to become a heading, a quotation or a list."""
    indentation, mark = match.groups()
    if mark.isdigit():
        return f"{indentation}{mark}\\"  # before the dot or bracket
    return f"{indentation}\\{mark}"


def _keep_indentation(match: re.Match[str]) -> str:
    return match[0].replace("\t", "    ").replace(" ", "&nbsp;")
