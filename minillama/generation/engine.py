"""Text in, text out: a model with its tokenizer and template, answering prompts and holding a conversation."""

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from minillama import chat, ops
from minillama.data.encode import encode_document
from minillama.errors import UserError
from minillama.generation.beam import Beams, beam_search
from minillama.generation.decode import Completion, decode, rope_alpha_for
from minillama.generation.sampling import Sampling
from minillama.model import Llama
from minillama.tokenizer import Stream, Tokenizer


class Writer:
    """Writes an answer's text as its ids come: whole characters only, and never the beginning of a stop text."""

    def __init__(self, answer: Completion, tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
        self.answer, self.decoder, self.stops, self.held, self.read = (
            answer,
            Stream(tokenizer),
            stops,
            "",
            0,
        )

    def catch_up(self) -> str:
        """The text that the ids since the last call make certain. Ends the answer where it comes to a stop text."""
        answer, is_over = self.answer, bool(self.answer.finish_reason)
        text = (
            self.held
            + "".join(map(self.decoder.push, answer.ids[self.read :]))
            + (self.decoder.flush() if is_over else "")
        )
        self.read = len(answer.ids)
        if found := [text.find(stop) for stop in self.stops if stop in text]:
            sure, answer.finish_reason = min(found), "stop"
        else:
            begun = (
                n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])
            )  # characters of a stop text
            sure = len(text) - (0 if is_over else max(begun, default=0))
        answer.text, self.held = answer.text + text[:sure], text[sure:]
        return text[:sure]


@dataclass
class Engine:
    """A model ready to answer. template "none" continues the text as it is, after the begin token."""

    model: Llama
    tokenizer: Tokenizer
    template: str
    sampling: Sampling
    max_new_tokens: int  # 0: 256, or as many as the context leaves
    stop_ids: tuple[int, ...]
    stop_texts: tuple[str, ...] = ()
    beams: Beams | None = None  # beam search in place of one text at a time
    rope_alpha: float | None = None  # beyond the context: see `decode.scale_rope`

    def encode_prompt(self, text: str, system: str = "") -> list[int]:
        asked = (
            text if self.template == "none" else chat.Conversation((chat.Turn(text, None),), system)
        )
        return encode_document(self.tokenizer, asked, self.template, append_eod=False)[0]

    def ask(self, prompt_ids: list[int], number: int = 0) -> Completion:
        """An answer to be written."""
        left = (
            256
            if self.rope_alpha is not None
            else min(256, self.model.config.max_seq_len - len(prompt_ids))
        )
        return Completion(prompt_ids, self.max_new_tokens or max(1, left), number)

    def write(
        self, answers: list[Completion], seed: int | None
    ) -> Iterator[tuple[Completion, str]]:
        """Write `answers` together, yielding each with its new text as it becomes certain. With beams they are those of one prompt."""
        ops.pack(self.model, self.beams.width if self.beams else len(answers))
        if self.beams:
            steps = beam_search(
                self.model, answers, self.beams, self.sampling, self.stop_ids, seed, self.rope_alpha
            )
        else:
            steps = decode(self.model, answers, self.sampling, self.stop_ids, seed, self.rope_alpha)
        began, writers = (
            time.perf_counter(),
            {id(answer): Writer(answer, self.tokenizer, self.stop_texts) for answer in answers},
        )
        for answer in steps:
            text = writers[id(answer)].catch_up()
            answer.seconds = time.perf_counter() - began
            yield answer, text

    def ask_all(self, prompts: list[list[int]], samples: int) -> dict[int, list[Completion]]:
        """`samples` answers to be written to each prompt, by its number. One that comes again goes on counting, so its answers differ."""
        asked = defaultdict(count)
        return {
            i: [self.ask(prompt, next(asked[tuple(prompt)])) for _ in range(samples)]
            for i, prompt in enumerate(prompts)
        }

    def write_all(
        self, questions: dict[int, list[Completion]], batch_size: int, seed: int | None
    ) -> Iterator[tuple[int, str]]:
        """Write the answers to many prompts, yielding a prompt's number and new text as it comes. One by one they come in their order;
        batches of up to `batch_size` texts hold prompts of like length, the longest first: memory for the first suffices for all."""
        alpha = {
            i: rope_alpha_for(self.model.config, several[0]) if self.rope_alpha == 0 else None
            for i, several in questions.items()
        }
        left = sorted(
            questions, key=lambda i: -len(questions[i][0].prompt_ids) if batch_size > 1 else i
        )
        while left:
            most = 1 if self.beams else max(1, batch_size // len(questions[left[0]]))
            batch = [
                i for i in left[:most] if alpha[i] == alpha[left[0]]
            ]  # the first ones: alpha follows from the length
            left = left[len(batch) :]
            number = {id(answer): i for i in batch for answer in questions[i]}
            for answer, text in self.write(
                [answer for i in batch for answer in questions[i]], seed
            ):
                yield number[id(answer)], text


class ChatSession:
    """A conversation in progress: history within the context, the oldest rounds dropped first, the system text kept."""

    def __init__(self, session: Engine, system: str = "") -> None:
        self.session, self.system, self.turns, self.note = session, system, [], ""

    def prompt_ids(self, text: str) -> tuple[list[int], int]:
        """Ids of the conversation so far plus an open question, and how many rounds had to be dropped."""
        s = self.session
        template = "raw" if s.template == "none" else s.template
        room, context = (
            s.max_new_tokens or 32,
            s.model.config.max_seq_len,
        )  # room: tokens kept free for the answer
        for dropped in range(len(self.turns) + 1):
            asked = chat.Conversation((*self.turns[dropped:], chat.Turn(text, None)), self.system)
            ids, _ = encode_document(s.tokenizer, asked, template, append_eod=False)
            if len(ids) + room <= context or s.rope_alpha is not None:
                self.turns = self.turns[dropped:]
                return ids, dropped
        raise UserError(
            f"this question alone has {len(ids)} tokens; with {room} new ones that exceeds the model's context of {context}"
        )

    def reply(self, text: str, seed: int | None) -> Iterator[str]:
        """Answer a question, yielding new text. The last of `turns` grows with it, so that what came is kept; `note` says how it went."""
        try:
            ids, dropped = self.prompt_ids(text)
        except UserError as error:
            self.note = str(error)
            yield ""
            return
        answer, earlier, self.note = self.session.ask(ids), self.turns, "nothing written"
        for _, piece in self.session.write([answer], seed):
            self.turns = [*earlier, chat.Turn(text, answer.text.strip())]
            speed = f"{len(answer.ids) / answer.seconds:.1f} tokens/s"
            self.note = (
                f"{speed}, {dropped} oldest rounds dropped: the context is full"
                if dropped
                else speed
            )
            yield piece
