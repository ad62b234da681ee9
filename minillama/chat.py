"""Prompt templates: a conversation becomes pieces, and every piece knows whether it is trained on.

A model that was tuned on one layout of a conversation answers worse in any other. And a label mask
that is found by searching the rendered text for "ASSISTANT:" can be wrong without an error. So a
template is a function that yields pieces in order. Ids and labels are made from the pieces together
(data/encode.py), and generation uses the same function with the last answer left open.

    BOS | A chat … USER: Hi ASSISTANT: | Hello | EOS | USER: Bye ASSISTANT: | Goodbye | EOS
    trained on:                          ^^^^^   ^^^                          ^^^^^^^   ^^^

A piece is *fresh* or *glued*. A fresh one is encoded by itself, and so has its own leading ▁. A
glued one is encoded together with the text before it, because the reference system does so, and
begins where the ids of that text would have ended. Behind a control token, a glued text is encoded
as transformers encodes it there. The space between prompt and answer belongs to
the side where the reference system counts it. Then an open prompt has the ids that a training
example begins with. Control tokens are pieces of their own, added by id: no text can produce one.

A template is known by a string: a name of TEMPLATES, or the text of a published model's own
chat template, which is a program in the language Jinja (chat_template.py).
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from minillama.errors import UserError, closest


class Piece(NamedTuple):
    """A part of a rendered conversation: a text, or the control token named by `control`."""

    text: str
    is_target: bool = False
    glued: bool = False
    control: str = ""  # "bos", "eos", or a token such as "<|eot_id|>"; the text is empty then


BOS = Piece("", control="bos")
EOS = Piece("", is_target=True, control="eos")


@dataclass(frozen=True)
class Turn:
    """One message of the user, and the model's answer.

    answer: None if the model is to write it.
    input: Alpaca's second field, what the instruction is about. None in formats without this field.
    is_target: False for an answer that is context for later ones and is not trained on.
    """

    user: str
    answer: str | None
    input: str | None = ""
    is_target: bool = True


@dataclass(frozen=True)
class Conversation:
    """Turns, and a system text. If that is empty, the template uses its own."""

    turns: tuple[Turn, ...]
    system: str = ""


class Message(NamedTuple):
    """What one side says. An answer that the model is to write has no text."""

    role: str  # system, user or assistant
    text: str | None
    is_target: bool = False


def messages_of(conversation: Conversation) -> list[Message]:
    """A conversation as a list of messages, as chat templates see it."""
    messages = []
    if conversation.system:
        messages.append(Message("system", conversation.system))
    for turn in conversation.turns:
        messages.append(Message("user", _user_text(turn)))
        messages.append(Message("assistant", turn.answer, turn.is_target))
    return messages


def is_jinja(template: str) -> bool:
    """Tell whether a template is the text of a chat template, and not a name."""
    return "{{" in template or "{%" in template


def name_of(template: str) -> str:
    """What a template is called when it is printed: its name, or what identifies its text."""
    if not is_jinja(template):
        return template or "none"
    digest = hashlib.sha256(template.encode()).hexdigest()
    return f"Jinja text (sha256 {digest[:12]})"


def render(template: str, conversation: Conversation) -> list[Piece]:
    """The pieces of a conversation in the named template. Raises UserError for an unknown name."""
    return list(find_template(template)(conversation))


def find_template(name: str) -> Callable[[Conversation], Iterator[Piece]]:
    """The function that renders a conversation. Raises UserError for an unknown name."""
    if name not in TEMPLATES:
        known = ", ".join(TEMPLATES)
        raise UserError(
            f"no template {name!r}{closest(name, TEMPLATES)}; templates: {known}, or a FILE.jinja"
        )
    return TEMPLATES[name]


def _round(prompt: str, turn: Turn, glued: bool, answer_format: str = "{}") -> list[Piece]:
    """Prompt, answer and EOS of a turn; the prompt alone if the turn has no answer yet."""
    if turn.answer is None:
        return [Piece(prompt)]
    answer = answer_format.format(turn.answer)
    return [
        Piece(prompt),
        Piece(answer, turn.is_target, glued),
        EOS._replace(is_target=turn.is_target),
    ]


def _user_text(turn: Turn) -> str:
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
ASCEND_SYSTEM = (
    f"{ALPACA_INPUT} Please note that you need to think through your response logically and step "
    "by step."
)


def _raw(conversation: Conversation) -> Iterator[Piece]:
    """The text itself, then the answer: what a base model continues."""
    system = conversation.system
    yield BOS
    for turn in conversation.turns:
        yield from _round(system + _user_text(turn), turn, glued=True)
        system = ""  # it stands before the first round only, here and in the templates below


def _alpaca(conversation: Conversation) -> Iterator[Piece]:
    """Stanford Alpaca's two prompts, with and without an input, encoded together with the answer.

    Alpaca knows only one round, so every round of a longer conversation is complete in itself.
    """
    for turn in conversation.turns:
        system = conversation.system or (ALPACA_INPUT if turn.input else ALPACA)
        input_part = f"### Input:\n{turn.input}\n\n" if turn.input else ""
        prompt = f"{system}\n\n### Instruction:\n{turn.user}\n\n{input_part}### Response:"
        yield BOS
        yield from _round(prompt, turn, glued=True)


def _vicuna(conversation: Conversation) -> Iterator[Piece]:
    """FastChat's vicuna_v1.1. The next USER follows EOS directly, and has its own ▁."""
    system = (conversation.system or VICUNA_SYSTEM) + " "
    yield BOS
    for turn in conversation.turns:
        prompt = f"{system}USER: {_user_text(turn)} ASSISTANT:"
        yield from _round(prompt, turn, glued=True, answer_format=" {}")
        system = ""


def _llama2(conversation: Conversation) -> Iterator[Piece]:
    """Meta's Llama-2 chat: BOS and EOS around a round, stripped texts, a space after the answer."""
    system = ""
    if conversation.system:
        system = f"<<SYS>>\n{conversation.system}\n<</SYS>>\n\n"
    for turn in conversation.turns:
        prompt = f"[INST] {(system + _user_text(turn)).strip()} [/INST]"
        if turn.answer is not None:
            turn = replace(turn, answer=turn.answer.strip())
        yield BOS
        yield from _round(prompt, turn, glued=True, answer_format=" {} ")
        system = ""


def _chinese_alpaca(conversation: Conversation) -> Iterator[Piece]:
    """Chinese-LLaMA-Alpaca's prompt, with a space at its end. The answer is encoded by itself."""
    system = conversation.system or ALPACA
    for turn in conversation.turns:
        prompt = f"{system}\n\n### Instruction:\n{_user_text(turn)}\n\n### Response: "
        yield BOS
        yield from _round(prompt, turn, glued=False)


def _chinese_alpaca_2(conversation: Conversation) -> Iterator[Piece]:
    """Chinese-LLaMA-Alpaca-2: Llama-2's brackets, with the answer encoded by itself."""
    system = f"<<SYS>>\n{conversation.system or CHINESE_ALPACA_2_SYSTEM}\n<</SYS>>\n\n"
    for turn in conversation.turns:
        yield BOS
        yield from _round(f"[INST] {system}{_user_text(turn)} [/INST]", turn, glued=False)
        system = ""


def _ascend_instruction(conversation: Conversation) -> Iterator[Piece]:
    """AscendSpeed's instruction prompt. It is encoded as a whole; only the last answer is a target.

    In a single round, an empty input still has its line.
    """
    *earlier, last = conversation.turns
    prompt = f"\n{conversation.system or ASCEND_SYSTEM}\n"
    for turn in earlier:
        prompt += f"### Instruction:\n{_user_text(turn)}\n### Response:\n{turn.answer}\n"
    user_text = _user_text(last)
    if not earlier and last.input is not None:
        user_text = f"{last.user}\n{last.input}"
    prompt += f"### Instruction:\n{user_text}\n### Response:\n"
    yield BOS
    yield from _round(prompt, last, glued=True, answer_format="{}\n")


def _llama_factory_default(conversation: Conversation) -> Iterator[Piece]:
    """LLaMA-Factory's `default` of early 2024: no BOS, and every slot is encoded by itself."""
    before = conversation.system and conversation.system + "\n"
    for turn in conversation.turns:
        if before:
            yield Piece(before)
        yield from _round(f"Human: {_user_text(turn)}\nAssistant: ", turn, glued=False)
        before = "\n"


def _llama3(conversation: Conversation) -> Iterator[Piece]:
    """Meta's Llama-3 chat: a header before each message, <|eot_id|> after it; texts stripped."""
    yield BOS
    for message in messages_of(conversation):
        yield Piece("", control="<|start_header_id|>")
        yield Piece(message.role)
        yield Piece("", control="<|end_header_id|>")
        yield Piece("\n\n")
        if message.text is not None:
            yield Piece(message.text.strip(), message.is_target)
            yield Piece("", message.is_target, control="<|eot_id|>")


def _chatml(conversation: Conversation) -> Iterator[Piece]:
    """ChatML: <|im_start|>, role, text and <|im_end|>; a line break between two messages."""
    yield BOS
    separator = ""
    for message in messages_of(conversation):
        yield Piece(separator, glued=True)
        yield Piece("", control="<|im_start|>")
        yield Piece(f"{message.role}\n", glued=True)
        if message.text is not None:
            yield Piece(message.text, message.is_target, glued=True)
            yield Piece("", message.is_target, control="<|im_end|>")
        separator = "\n"


def _zephyr(conversation: Conversation) -> Iterator[Piece]:
    """Zephyr and TinyLlama-Chat: no BOS, the role in a line, EOS behind every message."""
    separator = ""
    for message in messages_of(conversation):
        yield Piece(f"{separator}<|{message.role}|>\n", glued=True)
        if message.text is not None:
            yield Piece(message.text, message.is_target, glued=True)
            yield EOS._replace(is_target=message.is_target)
        separator = "\n"


TEMPLATES: dict[str, Callable[[Conversation], Iterator[Piece]]] = {
    "raw": _raw,
    "alpaca": _alpaca,
    "vicuna_v1.1": _vicuna,
    "llama2": _llama2,
    "llama3": _llama3,
    "chatml": _chatml,
    "zephyr": _zephyr,
    "chinese_alpaca": _chinese_alpaca,
    "chinese_alpaca_2": _chinese_alpaca_2,
    "ascend_instruction": _ascend_instruction,
    "llama_factory_default": _llama_factory_default,
    "default": _llama_factory_default,  # its name in LLaMA-Factory's own command lines
}
