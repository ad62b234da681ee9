"""The chat template that a model brings with it, as pieces: no text becomes a control token.

A published model's template is a program in the language Jinja. It writes one string, in which its
control tokens and the texts of the messages look alike: a user who types "</s>" would end the
conversation. And nothing in that string says what to train on. So the texts are marked:

    messages      user: "Hi </s>"                 assistant: "Hello"
    marked        ⟨Hi <·/s>⟩₀                     ⟨Hello⟩₁           · parts the letters of a token
    rendered      <s>[INST] ⟨Hi <·/s>⟩₀ [/INST] ⟨Hello⟩₁</s>
    pieces        <s> | "[INST] Hi </s> [/INST]" | " Hello" | </s>
    trained on                                      ^^^^^^    ^^^^

The marks are characters of private use that occur in none of the texts. They stand inside the
white space around a text, so a template that trims its texts trims the marked ones too. Letters of
a control token are one in the rendering only if the template wrote them. The texts without marks
are rendered as well, and the two renderings must be equal but for the marks. Otherwise the template
decides by the letters of a text, and the conversation is refused.

An answer is trained on from where its prompt ends: the rendering of the messages before it, with
`add_generation_prompt`, which is what generation reads. If the prompt is not how the conversation
begins, it is trained on from its text on, with a warning. Spaces before an answer belong to it,
because most vocabularies have tokens of a space and a word. It ends behind the first control token
that follows its text. A template that writes the messages before an answer in another way when the
answer is there cannot be trained on as one document, and is refused.

Left out: tools, documents, and messages that are not text.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from minillama.chat import Conversation, Message, Piece, Turn, messages_of
from minillama.chat_marks import AddedToken, Letters, Marks, choose_marks, token_pattern
from minillama.errors import UserError
from minillama.jinja_renderer import REMEDY, JinjaRenderer

SHOWN = 40  # characters of a text in an error
WORD = re.compile(r"\W.*\W")  # an added word that can be a control token: <|im_start|>, [INST]
MESSAGES = [Message("user", "a"), Message("assistant", "b")]
TEXTS = ["a", "b"]
TURN = Turn("a", "b", is_target=False)
SAMPLES = (Conversation((TURN, TURN)), Conversation((TURN, TURN), system="c"))


class Target(NamedTuple):
    """Where an answer stands in a rendering, with the token that ends it.

    start: where its prompt ends. token: where the token begins. end: behind the token.
    """

    start: int
    token: int
    end: int


class ChatTemplate:
    """A chat template, for a vocabulary.

    source: its text. variables: bos_token and the like. tokens: the added tokens, which no text is
    split across. Those that are special are control tokens: no text of a message produces one. The
    others are words, and a word that the template writes, such as <|im_start|>, is cut in two where
    it stands in a message.
    """

    def __init__(
        self, source: str, variables: dict[str, str], tokens: Sequence[AddedToken]
    ) -> None:
        self.eos = variables.get("eos_token")
        self.renderer = JinjaRenderer(source, variables)
        control = [token for token in tokens if token.special]
        words = [token for token in tokens if not token.special and WORD.fullmatch(token.content)]
        self.control_pattern = token_pattern(control)
        self.letters = Letters(control, [])
        if words:
            written = self._write_sample()
            words = [word for word in words if word.content in written]
            self.letters = Letters(control, words)
        self.end_pattern = token_pattern([*control, *words])

    def pieces(self, conversation: Conversation) -> list[Piece]:
        """The pieces of a conversation. Raises UserError for one that the template refuses."""
        messages = messages_of(conversation)
        is_open = messages[-1].text is None
        if is_open:
            del messages[-1]
        texts = [message.text or "" for message in messages]
        marks = choose_marks(texts)
        marked = [self.letters.mark(text, number, marks) for number, text in enumerate(texts)]
        calls = [_call(messages, texts, is_open), _call(messages, marked, is_open)]
        answers = []
        if not is_open:  # a prompt is not trained on
            answers = [number for number, message in enumerate(messages) if message.is_target]
        for number in answers:
            calls.append(_call(messages, marked[:number], is_open=True))
        plain, rendered, *prompts = self.renderer.render(calls)
        _refuse_changes(plain, rendered, messages, marks)
        targets = []
        for number, prompt in zip(answers, prompts, strict=True):
            start = len(prompt)
            if not rendered.startswith(prompt):
                before = _call(messages, marked[:number], is_open=False)
                start = self._start_of_text(rendered, before, number, marks)
            start = len(rendered[:start].rstrip(" "))  # a space belongs to the word behind it
            targets.append(self._find_target(rendered, start, number, marks))
        return self._split(rendered, targets, marks)

    def prompt_warning(self) -> str:
        """A warning if the prompt of an answer is no beginning of a whole conversation, or ""."""
        calls = [_call(MESSAGES, TEXTS[:1], is_open=True), _call(MESSAGES, TEXTS, is_open=False)]
        prompt, whole = self.renderer.render(calls)
        shared = _shared_length(prompt, whole)
        if shared == len(prompt) and not prompt.endswith(" "):
            return ""
        if shared == len(prompt):
            return (
                f"the chat template's prompt ends in a space ({prompt[-SHOWN:]!r}), which a "
                "vocabulary makes a token of the answer's first word, so the model is asked with "
                "other tokens than it is trained on"
            )
        return (
            f"the chat template writes {prompt[shared:][:SHOWN]!r} before an answer that the model "
            f"is to write, but {whole[shared:][:SHOWN]!r} in a whole conversation, which is what "
            "it is trained on"
        )

    def _write_sample(self) -> str:
        """What the template writes for some conversations, as far as it does not refuse them."""
        written = ""
        for conversation in SAMPLES:
            try:
                pieces = self.pieces(conversation)
            except UserError:
                continue
            written += "".join(piece.text for piece in pieces)
        return written

    def _start_of_text(
        self, rendered: str, before: dict[str, Any], number: int, marks: Marks
    ) -> int:
        """Where an answer begins whose prompt is not the beginning of the whole conversation.

        before: the call for the messages before it.
        """
        beginning = self.renderer.render([before])[0]
        if not rendered.startswith(beginning):
            shared = _shared_length(rendered, beginning)
            raise UserError(
                "the chat template writes messages in another way once others follow "
                f"({marks.remove(beginning[shared:])[:SHOWN]!r}, then "
                f"{marks.remove(rendered[shared:])[:SHOWN]!r}), so a whole conversation cannot be "
                f"trained on; use conversations of one turn, or {REMEDY}"
            )
        end = rendered.find(marks.end(number), len(beginning))
        start = rendered.rfind(marks.start, len(beginning), end)
        if start < 0:
            raise UserError(f"the chat template leaves out the beginning of an answer; {REMEDY}")
        return start

    def _find_target(self, rendered: str, start: int, number: int, marks: Marks) -> Target:
        """The target that is the answer in message `number`, from `start` on."""
        text_end = rendered.find(marks.end(number), start)
        next_text = rendered.find(marks.start, text_end)
        token = self.end_pattern.search(rendered, text_end)
        if text_end < 0 or token is None or 0 <= next_text < token.start():
            raise UserError(
                "the chat template writes no control token of this vocabulary behind an answer, so "
                f"a model would not learn to end one; {REMEDY}"
            )
        return Target(start, token.start(), token.end())

    def _split(self, rendered: str, targets: list[Target], marks: Marks) -> list[Piece]:
        """A marked rendering as pieces, cut at control tokens and where targets begin and end."""
        bounds = {0, len(rendered)}
        names = {}  # of control tokens, by where they begin
        for match in self.control_pattern.finditer(rendered):
            names[match.start()] = match[0].strip()
            bounds |= {match.start(), match.end()}
        for target in targets:
            bounds |= set(target)
        bounds |= {match.start() for match in re.finditer(marks.cut, rendered)}
        pieces = []
        for start, end in pairwise(sorted(bounds)):
            is_target = any(target.start <= start < target.end for target in targets)
            part = rendered[start:end]
            name = names.get(start)
            if name is not None:
                pieces.append(Piece("", is_target, control="eos" if name == self.eos else name))
                continue
            text = marks.remove(part)
            if text:
                pieces.append(Piece(text, is_target, glued=not part.startswith(marks.cut)))
        return pieces


def _call(messages: list[Message], texts: list[str], is_open: bool) -> dict[str, Any]:
    """What a rendering of the first messages, with these texts, is asked for with."""
    contents = []
    for message, text in zip(messages, texts, strict=False):
        contents.append({"role": message.role, "content": text})
    return {"messages": contents, "add_generation_prompt": is_open}


def _refuse_changes(plain: str, rendered: str, messages: list[Message], marks: Marks) -> None:
    """Raise UserError if marks change a rendering, or a message is not in it."""
    unmarked = marks.remove(rendered)
    if unmarked != plain:
        shared = _shared_length(unmarked, plain)
        raise UserError(
            "the chat template decides by the letters of a message, so its own text and the "
            f"message cannot be told apart, at {plain[max(0, shared - SHOWN) :][: 2 * SHOWN]!r}; "
            f"change the message, or {REMEDY}"
        )
    for number, message in enumerate(messages):
        if marks.end(number) not in rendered:
            what = "a system text" if message.role == "system" else f"message {number + 1}"
            raise UserError(
                f"the chat template leaves out {what} ({(message.text or '')[:SHOWN]!r}); {REMEDY}"
            )


def _shared_length(text: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    length = 0
    for a, b in zip(text, other, strict=False):
        if a != b:
            break
        length += 1
    return length
