"""Prompt templates: a conversation becomes pieces, and every piece knows whether it is trained on.

A model tuned on one layout of a conversation answers worse in any other, and a label mask found by searching rendered text for
"ASSISTANT:" goes wrong in silence. So a template here is a function that returns pieces in order; ids and labels are made from
them side by side (`data.encode`), and generation uses the same function with the last answer left open.

A piece is *fresh* (encoded by itself, with its own leading ▁) or *glued* to the one before (the reference system encodes the
joint text, so we do too and cut where the first part's ids end). Control tokens are pieces of their own, added by id.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from minillama.errors import UserError, closest


class Piece(NamedTuple):
    """A stretch of a rendered conversation. `control` is "bos" or "eos", and then there is no text."""

    text: str
    is_target: bool = False
    glued: bool = False
    control: str = ""


BOS = Piece("", control="bos")
EOS = Piece("", is_target=True, control="eos")


@dataclass(frozen=True)
class Turn:
    """One question and its answer; the answer is None where the model is to write it."""

    user: str
    answer: str | None
    input: str = ""  # alpaca's second field: what the instruction is about


@dataclass(frozen=True)
class Conversation:
    turns: tuple[Turn, ...]
    system: str = ""


def prompt(template: str, text: str) -> list[Piece]:
    """The pieces of a single open question."""
    return render(template, Conversation((Turn(text, None),)))


def render(template: str, conversation: Conversation) -> list[Piece]:
    """The pieces of a conversation in the named template. Raises UserError for an unknown name."""
    if template not in TEMPLATES:
        raise UserError(f"no template {template!r}{closest(template, TEMPLATES)}; templates: {', '.join(TEMPLATES)}")
    return TEMPLATES[template](conversation)


def _answer(text: str | None, glued: bool) -> list[Piece]:
    return [] if text is None else [Piece(text, is_target=True, glued=glued), EOS]


def _raw(conversation: Conversation) -> list[Piece]:
    """The text itself, then the answer: what a base model continues."""
    pieces = [BOS]
    for turn in conversation.turns:
        pieces += [Piece(_joined(turn), glued=len(pieces) > 1), *_answer(turn.answer, glued=True)]
    return pieces


def _alpaca(conversation: Conversation) -> list[Piece]:
    """Stanford Alpaca: the two prompts, encoded together with the answer."""
    pieces: list[Piece] = []
    for turn in conversation.turns:
        with_input = "an instruction that describes a task, paired with an input that provides further context."
        head = f"Below is {with_input if turn.input else 'an instruction that describes a task.'} "
        head += "Write a response that appropriately completes the request.\n\n"
        middle = f"### Input:\n{turn.input}\n\n" if turn.input else ""
        text = f"{head}### Instruction:\n{turn.user}\n\n{middle}### Response:"
        pieces += [BOS, Piece(text), *_answer(turn.answer, glued=True)]
    return pieces


def _llama_factory_default(conversation: Conversation) -> list[Piece]:
    """LLaMA-Factory's `default` of early 2024: no system text, no begin token, every slot encoded by itself."""
    pieces: list[Piece] = []
    for number, turn in enumerate(conversation.turns):
        pieces += [Piece("\n")] if number else []
        pieces += [Piece(f"Human: {_joined(turn)}\nAssistant: "), *_answer(turn.answer, glued=False)]
    return pieces


def _joined(turn: Turn) -> str:
    return f"{turn.user}\n{turn.input}" if turn.input else turn.user


TEMPLATES: dict[str, Callable[[Conversation], list[Piece]]] = {
    "raw": _raw,
    "alpaca": _alpaca,
    "llama_factory_default": _llama_factory_default,
}
