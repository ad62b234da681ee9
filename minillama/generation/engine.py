"""Text in, text out: a model with its tokenizer and its prompt template.

    prompt ── template, tokenizer ──▶ ids ── decode or beam_search ──▶ ids ── TextEmitter ──▶ text

`Engine` completes prompts, alone or in batches. `ChatSession` keeps a conversation on top of it.
"""

import secrets
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from minillama import chat, comm, ops
from minillama.checkpoint.stop_tokens import end_ids
from minillama.comm import Mesh
from minillama.data.encode import encode_document
from minillama.errors import UserError
from minillama.generation.beam import beam_search
from minillama.generation.config import GenerationConfig
from minillama.generation.decode import Completion, decode, rope_alpha_for
from minillama.generation.lookup import decode_with_lookup
from minillama.model import Llama
from minillama.tokenizer import Stream, Tokenizer

DEFAULT_NEW_TOKENS = 256
CHAT_RESERVE = 32  # tokens that a chat prompt leaves free if max_new_tokens is not set


class TextEmitter:
    """The text of a completion, emitted while its tokens come.

    Text is safe to emit when it is whole characters that cannot begin a stop string. The rest is
    held back until the next tokens decide.
    """

    def __init__(
        self, completion: Completion, tokenizer: Tokenizer, stop_strings: tuple[str, ...]
    ) -> None:
        self.completion = completion
        self.stop_strings = stop_strings
        self.decoder = Stream(tokenizer)
        self.num_decoded = 0  # tokens given to the decoder
        self.held_back = ""  # text that may begin a stop string

    def emit(self) -> str:
        """Text that became safe since the last call. Finishes the completion at a stop string."""
        completion = self.completion
        text = self.held_back + self._decode_new_tokens()
        stop_at = first_stop(text, self.stop_strings)
        if stop_at is not None:
            completion.finish("stop")
            num_safe = stop_at
        elif completion.is_finished:
            num_safe = len(text)
        else:
            num_safe = len(text) - longest_stop_prefix(text, self.stop_strings)
        self.held_back = text[num_safe:]
        completion.text += text[:num_safe]
        return text[:num_safe]

    def _decode_new_tokens(self) -> str:
        ids = self.completion.ids
        pieces = [self.decoder.push(token) for token in ids[self.num_decoded :]]
        self.num_decoded = len(ids)
        if self.completion.is_finished:
            pieces.append(self.decoder.flush())
        return "".join(pieces)


def first_stop(text: str, stop_strings: tuple[str, ...]) -> int | None:
    """Where the first stop string of `text` begins; None: there is none."""
    positions = [text.find(stop) for stop in stop_strings if stop in text]
    return min(positions, default=None)


def longest_stop_prefix(text: str, stop_strings: tuple[str, ...]) -> int:
    """How many characters at the end of `text` may begin a stop string."""
    longest = 0
    for stop in stop_strings:
        for length in range(longest + 1, len(stop)):
            if text.endswith(stop[:length]):
                longest = length
    return longest


class TextPiece(NamedTuple):
    """Text that was added to a completion; it may be empty."""

    completion: Completion
    text: str


@dataclass
class Engine:
    """A model that completes prompts. Its template is resolved: a name, a text, or "none"."""

    model: Llama
    tokenizer: Tokenizer
    config: GenerationConfig
    eos_ids: tuple[int, ...] = ()
    path: Path | None = None  # the checkpoint directory in use
    mesh: Mesh = field(default_factory=Mesh)  # the tensor ranks that have the model's parts

    @property
    def template(self) -> str:
        return self.config.template

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end a completion: those of the model, and that of the template."""
        if self.config.ignore_eos:
            return ()
        return tuple(dict.fromkeys([*self.eos_ids, *end_ids(self.tokenizer, self.template)]))

    def encode_prompt(self, text: str, system: str = "") -> list[int]:
        """Token ids of a prompt: the text after BOS, or a user's message in the template."""
        if self.template == "none":
            if system:
                raise UserError(
                    "--system has no place in a prompt without a template; name one with "
                    "--template, or put the text into the prompt"
                )
            document: str | chat.Conversation = text
        else:
            document = chat.Conversation((chat.Turn(text, None),), system)
        ids, _ = encode_document(self.tokenizer, document, self.template, append_eod=False)
        return ids

    def new_completion(self, prompt_ids: list[int], sample_index: int = 0) -> Completion:
        """A completion that is still to be written."""
        max_new_tokens = self.config.max_new_tokens or DEFAULT_NEW_TOKENS
        has_fixed_context = self.config.rope_alpha is None
        if not self.config.max_new_tokens and has_fixed_context:
            num_free = self.model.config.max_seq_len - len(prompt_ids)
            max_new_tokens = max(1, min(max_new_tokens, num_free))
        return Completion(prompt_ids, max_new_tokens, sample_index)

    def new_completions(
        self, prompts: list[list[int]], num_samples: int
    ) -> dict[int, list[Completion]]:
        """`num_samples` completions of each prompt, by the prompt's index.

        If a prompt occurs twice, its samples get different numbers, so that they differ.
        """
        num_made: Counter[tuple[int, ...]] = Counter()
        completions: dict[int, list[Completion]] = {}
        for index, prompt in enumerate(prompts):
            first = num_made[tuple(prompt)]
            num_made[tuple(prompt)] += num_samples
            sample_indices = range(first, first + num_samples)
            completions[index] = [self.new_completion(prompt, i) for i in sample_indices]
        return completions

    def stream(self, completions: list[Completion], seed: int | None) -> Iterator[TextPiece]:
        """Write `completions` together, and yield each with its new text while it grows.

        With beam search they must belong to one prompt, with prompt lookup it must be one. Tensor
        ranks call this together.
        """
        config = self.config
        if seed is None and self.mesh.size > 1:
            seed = comm.gather_objects(self.mesh, secrets.randbits(32))[0]
        num_rows = len(completions) * config.num_beams * (1 + config.prompt_lookup)
        ops.pack_weights(self.model, num_rows)
        if config.prompt_lookup:
            (completion,) = completions
            steps = decode_with_lookup(
                self.model, completion, config.prompt_lookup, self.stop_ids, config.rope_alpha
            )
        elif config.beams is None:
            steps = decode(
                self.model, completions, config.sampling, self.stop_ids, seed, config.rope_alpha
            )
        else:
            steps = beam_search(
                self.model,
                completions,
                config.beams,
                config.sampling,
                self.stop_ids,
                seed,
                config.rope_alpha,
            )
        emitters = {
            id(completion): TextEmitter(completion, self.tokenizer, config.stop)
            for completion in completions
        }
        start = time.perf_counter()
        for completion in steps:
            text = emitters[id(completion)].emit()
            completion.seconds = time.perf_counter() - start
            yield TextPiece(completion, text)

    def stream_all(
        self, requests: dict[int, list[Completion]], batch_size: int, seed: int | None
    ) -> Iterator[tuple[int, str]]:
        """Write the completions of many prompts; yields (index of the prompt, new text)."""
        for batch in self.group_requests(requests, batch_size):
            index_of = {id(completion): i for i in batch for completion in requests[i]}
            completions = [completion for i in batch for completion in requests[i]]
            for completion, text in self.stream(completions, seed):
                yield index_of[id(completion)], text

    def group_requests(
        self, requests: dict[int, list[Completion]], batch_size: int
    ) -> list[list[int]]:
        """Which prompts, by index, are completed together: at most `batch_size` completions.

        A batch holds prompts of similar length. The longest come first: if memory suffices for
        the first batch, it suffices for all. Batches of one keep the order of the prompts.
        """
        remaining = sorted(requests)
        if batch_size > 1:
            remaining.sort(key=lambda i: len(requests[i][0].prompt_ids), reverse=True)
        batches = []
        while remaining:
            first = remaining[0]
            alpha = self._rope_alpha(requests[first][0])
            is_alone = self.config.beams or self.config.prompt_lookup
            limit = 1 if is_alone else max(1, batch_size // len(requests[first]))
            batch = [i for i in remaining[:limit] if self._rope_alpha(requests[i][0]) == alpha]
            batches.append(batch)
            remaining = remaining[
                len(batch) :
            ]  # sorted, longest first: prompts of one alpha are neighbours
        return batches

    def _rope_alpha(self, completion: Completion) -> float | None:
        """The rotary scaling that a completion needs; all of a batch must share it."""
        if self.config.rope_alpha != 0:
            return self.config.rope_alpha
        return rope_alpha_for(self.model.config, completion)


class ChatPrompt(NamedTuple):
    """A conversation that ends with an open turn, and what was left out of it."""

    ids: list[int]
    num_dropped: int  # oldest turns that did not fit into the context


class ChatSession:
    """A conversation in progress.

    The prompt holds as many turns as the context allows; the oldest are dropped first, and the
    system text is always kept. `note` says how the last reply went.
    """

    def __init__(self, engine: Engine, system: str = "") -> None:
        self.engine = engine
        self.system = system
        self.turns: list[chat.Turn] = []  # those that the next prompt holds
        self.dropped_turns: list[chat.Turn] = []  # those before them
        self.note = ""

    def fit_prompt(self, text: str) -> ChatPrompt:
        """The conversation so far and an open turn; drops the oldest turns until it fits."""
        engine = self.engine
        template = "raw" if engine.template == "none" else engine.template
        reserve = engine.config.max_new_tokens or CHAT_RESERVE
        context = engine.model.config.max_seq_len
        for num_dropped in range(len(self.turns) + 1):
            turns = (*self.turns[num_dropped:], chat.Turn(text, None))
            conversation = chat.Conversation(turns, self.system)
            ids, _ = encode_document(engine.tokenizer, conversation, template, append_eod=False)
            if len(ids) + reserve <= context or engine.config.rope_alpha is not None:
                self.dropped_turns = [*self.dropped_turns, *self.turns[:num_dropped]]
                self.turns = self.turns[num_dropped:]
                return ChatPrompt(ids, num_dropped)
        raise UserError(
            f"this message alone has {len(ids)} tokens; with {reserve} new ones that exceeds "
            f"the model's context of {context}"
        )

    def reply(self, text: str, seed: int | None = None) -> Iterator[str]:
        """Write the completion of a new turn, and yield its text. The last turn grows with it.

        Raises UserError for a message that does not fit into the context.
        """
        prompt = self.fit_prompt(text)
        yield from self._stream(text, prompt, seed)

    def ask(self, text: str, seed: int | None = None) -> str:
        """The whole completion of a new turn. Raises UserError for a message that does not fit."""
        return "".join(self.reply(text, seed)).strip()

    def _stream(self, text: str, prompt: ChatPrompt, seed: int | None) -> Iterator[str]:
        completion = self.engine.new_completion(prompt.ids)
        earlier = self.turns
        self.note = "nothing written"
        for _, new_text in self.engine.stream([completion], seed):
            self.turns = [*earlier, chat.Turn(text, completion.text.strip())]
            self.note = f"{len(completion.ids) / completion.seconds:.1f} tokens/s"
            if prompt.num_dropped:
                self.note += f", {prompt.num_dropped} oldest turns dropped: the context is full"
            yield new_text
