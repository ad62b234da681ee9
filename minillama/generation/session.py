"""Text in, text out: a model with its tokenizer and template, answering prompts and holding a conversation."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from minillama import chat
from minillama.data.encode import encode_pieces
from minillama.errors import UserError
from minillama.generation.decode import generate
from minillama.generation.sampling import Sampling
from minillama.model import Llama
from minillama.tokenizer import Stream, Tokenizer


@dataclass
class Answer:
    """What came of a prompt; filled while it streams."""

    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = "length"  # length | eos | stop


@dataclass
class Session:
    """A model ready to answer. template "none" continues the text as it is, after the begin token."""

    model: Llama
    tokenizer: Tokenizer
    template: str
    sampling: Sampling
    max_new_tokens: int  # 0: 256, or as many as the context leaves
    stop_ids: tuple[int, ...]
    stop_texts: tuple[str, ...] = ()

    def encode_prompt(self, text: str) -> list[int]:
        if self.template != "none":
            return encode_pieces(self.tokenizer, chat.prompt(self.template, text))[0]
        begin = [] if self.tokenizer.bos_id is None else [chat.BOS]
        return encode_pieces(self.tokenizer, [*begin, chat.Piece(text)])[0]

    def new_tokens(self, prompt_tokens: int) -> int:
        """How many tokens may follow a prompt."""
        return self.max_new_tokens or max(1, min(256, self.model.config.max_seq_len - prompt_tokens))

    def stream(self, answer: Answer, seed: int | None) -> Iterator[str]:
        """Answer `answer.prompt_ids`, yielding text as it becomes certain (not the beginning of a stop text); `answer` holds it all."""
        decoder, held, most = Stream(self.tokenizer), "", self.new_tokens(len(answer.prompt_ids))
        for token in generate(self.model, answer.prompt_ids, most, self.sampling, self.stop_ids, seed):
            answer.ids.append(token)
            held += decoder.push(token)
            stop = min((held.find(text) for text in self.stop_texts if text in held), default=None)
            sure = held[:len(held) - _possible_beginning(held, self.stop_texts) if stop is None else stop]
            held = held[len(sure):]
            answer.text += sure
            yield sure
            if stop is not None:
                answer.finish_reason = "stop"
                return
        if len(answer.ids) < most:
            answer.finish_reason = "eos"
        rest = held + decoder.flush()
        answer.text += rest
        yield rest

    def answer(self, text: str, seed: int | None = None) -> Answer:
        """The whole answer to one prompt."""
        answer = Answer(self.encode_prompt(text))
        for _ in self.stream(answer, seed):
            pass
        return answer


def _possible_beginning(text: str, stops: tuple[str, ...]) -> int:
    """How many characters at the end of `text` could begin one of `stops`."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    return next((n for n in range(min(longest, len(text)), 0, -1) if any(stop.startswith(text[-n:]) for stop in stops)), 0)


class Dialogue:
    """A conversation in progress: history within the context, the oldest rounds dropped first, the system text kept."""

    ROOM = 32  # tokens kept free for an answer where max_new_tokens is not given

    def __init__(self, session: Session, system: str = "") -> None:
        self.session, self.system, self.turns = session, system, []

    def clear(self) -> None:
        self.turns = []

    def prompt_ids(self, text: str) -> tuple[list[int], int]:
        """Ids of the conversation so far plus an open question, and how many rounds had to be dropped."""
        s = self.session
        template = "raw" if s.template == "none" else s.template
        room, context = s.max_new_tokens or self.ROOM, s.model.config.max_seq_len
        for dropped in range(len(self.turns) + 1):
            turns = (*self.turns[dropped:], chat.Turn(text, None))
            ids, _ = encode_pieces(s.tokenizer, chat.render(template, chat.Conversation(turns, self.system)))
            if len(ids) + room <= context:
                self.turns = self.turns[dropped:]
                return ids, dropped
        raise UserError(f"this question alone has {len(ids)} tokens; with {room} new ones that exceeds the model's context of {context}")

    def ask(self, text: str, answer: Answer, seed: int | None = None) -> Iterator[str]:
        """Stream the answer to `text` (prepared by `prompt_ids`) and remember the round."""
        yield from self.session.stream(answer, seed)
        self.turns.append(chat.Turn(text, answer.text.strip()))
