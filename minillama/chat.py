"""Prompt templates: a conversation becomes pieces, and every piece knows whether it is trained on.

A model tuned on one layout of a conversation answers worse in any other, and a label mask found by searching rendered text for
"ASSISTANT:" goes wrong in silence. So a template is a function that yields pieces in order; ids and labels are made from them
side by side (`data.encode`), and generation uses the same function with the last answer left open.

    vicuna_v1.1    BOS | A chat … USER: Hi ASSISTANT: | Hello | EOS | USER: Bye ASSISTANT: | Goodbye | EOS
    trained on                                          ^^^^^   ^^^                          ^^^^^^^   ^^^

A piece is *fresh* (encoded by itself, with its own leading ▁) or *glued* to the one before (the reference system encodes the
joint text, so we do too and cut where the first part's ids end). A space between prompt and answer belongs to whichever side the
reference counts it on: that decides whether a prompt, left open, is the beginning of what was trained. Control tokens are pieces
of their own, added by id: no text can produce one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from minillama.errors import UserError, closest


class Piece(NamedTuple):
    """A stretch of a rendered conversation. `control` names a control token ("bos", "eos", …), and then there is no text."""

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
    input: str | None = (
        ""  # alpaca's second field: what the instruction is about; None in formats that have no such field
    )
    is_target: bool = True  # False: the answer is there to be read, not learnt


@dataclass(frozen=True)
class Conversation:
    turns: tuple[Turn, ...]
    system: str = ""  # empty: the template's own


def render(template: str, conversation: Conversation) -> list[Piece]:
    """The pieces of a conversation in the named template. Raises UserError for an unknown name."""
    return list(find_template(template)(conversation))


def find_template(name: str) -> Callable[[Conversation], Iterator[Piece]]:
    if name not in TEMPLATES:
        raise UserError(
            f"no template {name!r}{closest(name, TEMPLATES)}; templates: {', '.join(TEMPLATES)}"
        )
    return TEMPLATES[name]


def _round(turn: Turn, text: str, glued: bool, form: str = "{}") -> list[Piece]:
    """A question's text, the answer set into `form`, and the end token after it; no answer where the turn is open."""
    if turn.answer is None:
        return [Piece(text)]
    return [
        Piece(text),
        Piece(form.format(turn.answer), turn.is_target, glued),
        EOS._replace(is_target=turn.is_target),
    ]


def _with_system(conversation: Conversation, head: str, later: str = "") -> list[tuple[Turn, str]]:
    """Each turn and what stands before it: `head` before the first, `later` before the others."""
    return [(turn, later if number else head) for number, turn in enumerate(conversation.turns)]


def _joined(turn: Turn) -> str:
    return f"{turn.user}\n{turn.input}" if turn.input else turn.user


ALPACA_TASK = "Below is an instruction that describes a task"
ALPACA_REQUEST = "Write a response that appropriately completes the request."
ALPACA = f"{ALPACA_TASK}. {ALPACA_REQUEST}"
ALPACA_INPUT = (
    f"{ALPACA_TASK}, paired with an input that provides further context. {ALPACA_REQUEST}"
)
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CHINESE_ALPACA_2_SYSTEM = "You are a helpful assistant. 你是一个乐于助人的助手。"
ASCEND_SYSTEM = f"{ALPACA_INPUT} Please note that you need to think through your response logically and step by step."


def _raw(conversation: Conversation) -> Iterator[Piece]:
    """The text itself, then the answer: what a base model continues."""
    yield BOS
    for turn, head in _with_system(conversation, conversation.system):
        yield from _round(turn, head + _joined(turn), glued=True)


def _alpaca(conversation: Conversation) -> Iterator[Piece]:
    """Stanford Alpaca's two prompts, encoded together with the answer; every round is complete, as it knows only one."""
    for turn in conversation.turns:
        head = conversation.system or (ALPACA_INPUT if turn.input else ALPACA)
        middle = f"### Input:\n{turn.input}\n\n" if turn.input else ""
        yield from [
            BOS,
            *_round(
                turn,
                f"{head}\n\n### Instruction:\n{turn.user}\n\n{middle}### Response:",
                glued=True,
            ),
        ]


def _vicuna(conversation: Conversation) -> Iterator[Piece]:
    """FastChat's vicuna_v1.1: nothing between the end token and the next USER, which has its own ▁."""
    yield BOS
    for turn, head in _with_system(conversation, (conversation.system or VICUNA_SYSTEM) + " "):
        yield from _round(turn, f"{head}USER: {_joined(turn)} ASSISTANT:", glued=True, form=" {}")


def _llama2(conversation: Conversation) -> Iterator[Piece]:
    """Meta's Llama-2 chat: begin and end tokens around every round, questions and answers stripped, a space after the answer."""
    for turn, head in _with_system(
        conversation, f"<<SYS>>\n{conversation.system}\n<</SYS>>\n\n" if conversation.system else ""
    ):
        answered = replace(turn, answer=turn.answer and turn.answer.strip())
        yield from [
            BOS,
            *_round(
                answered,
                f"[INST] {(head + _joined(turn)).strip()} [/INST]",
                glued=True,
                form=" {} ",
            ),
        ]


def _chinese_alpaca(conversation: Conversation) -> Iterator[Piece]:
    """Chinese-LLaMA-Alpaca's training prompt, a space at its end, and the answer encoded by itself."""
    for turn in conversation.turns:
        text = f"{conversation.system or ALPACA}\n\n### Instruction:\n{_joined(turn)}\n\n### Response: "
        yield from [BOS, *_round(turn, text, glued=False)]


def _chinese_alpaca_2(conversation: Conversation) -> Iterator[Piece]:
    """Chinese-LLaMA-Alpaca-2: Llama-2's brackets around every round, the answer encoded by itself."""
    for turn, head in _with_system(
        conversation, f"<<SYS>>\n{conversation.system or CHINESE_ALPACA_2_SYSTEM}\n<</SYS>>\n\n"
    ):
        yield from [BOS, *_round(turn, f"[INST] {head}{_joined(turn)} [/INST]", glued=False)]


def _ascend_instruction(conversation: Conversation) -> Iterator[Piece]:
    """AscendSpeed's instruction prompt: encoded whole, an empty input leaves its line, only the last answer is trained on."""
    text, (*earlier, last) = f"\n{conversation.system or ASCEND_SYSTEM}\n", conversation.turns
    for turn in earlier:
        text += f"### Instruction:\n{_joined(turn)}\n### Response:\n{turn.answer}\n"
    question = _joined(last) if earlier or last.input is None else f"{last.user}\n{last.input}"
    yield from [
        BOS,
        *_round(
            last, f"{text}### Instruction:\n{question}\n### Response:\n", glued=True, form="{}\n"
        ),
    ]


def _llama_factory_default(conversation: Conversation) -> Iterator[Piece]:
    """LLaMA-Factory's `default` of early 2024: no begin token, every slot encoded by itself."""
    for turn, head in _with_system(
        conversation, conversation.system and conversation.system + "\n", later="\n"
    ):
        yield from [Piece(head)] if head else []
        yield from _round(turn, f"Human: {_joined(turn)}\nAssistant: ", glued=False)


def _llama3(conversation: Conversation) -> Iterator[Piece]:
    """Meta's Llama-3 chat: a header before every message, <|eot_id|> after it, both by id; messages stripped."""

    def message(role: str, text: str | None, is_target: bool = False) -> list[Piece]:
        header = [
            Piece("", control="<|start_header_id|>"),
            Piece(role),
            Piece("", control="<|end_header_id|>"),
            Piece("\n\n"),
        ]
        return header + (
            []
            if text is None
            else [Piece(text.strip(), is_target), Piece("", is_target, control="<|eot_id|>")]
        )

    yield BOS
    yield from message("system", conversation.system) if conversation.system else []
    for turn in conversation.turns:
        yield from message("user", _joined(turn)) + message(
            "assistant", turn.answer, turn.is_target
        )


TEMPLATES: dict[str, Callable[[Conversation], Iterator[Piece]]] = {
    "raw": _raw,
    "alpaca": _alpaca,
    "vicuna_v1.1": _vicuna,
    "llama2": _llama2,
    "llama3": _llama3,
    "chinese_alpaca": _chinese_alpaca,
    "chinese_alpaca_2": _chinese_alpaca_2,
    "ascend_instruction": _ascend_instruction,
    "llama_factory_default": _llama_factory_default,
    "default": _llama_factory_default,  # as LLaMA-Factory's own command lines call it
}
