"""Decoding: read the prompts once, then write one token of every completion at a time.

    prefill   prompts of any lengths are read end to end as packed documents, without padding;
              a prompt longer than CHUNK is read alone, chunk by chunk
    steps     all completions take a step together, each at its own position in the cache;
              a completion that ends leaves the batch

The completion of a prompt does not depend on the rest of the batch.

Shapes: B live completions, T tokens, C model width, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from minillama.errors import UserError
from minillama.generation.cache import Cache
from minillama.generation.sampling import Sampling, generator_for, next_tokens, tokens_seen
from minillama.llama_config import LlamaConfig
from minillama.model import Llama
from minillama.ops import Documents

CHUNK = 512  # tokens of a long prompt that are read at a time


@dataclass
class Completion:
    """What follows a prompt. `decode` fills it while it runs."""

    prompt_ids: list[int]
    max_new_tokens: int = 256
    sample_index: int = 0  # which sample of this prompt; it seeds the sample's random numbers
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""  # "length", "eos" or "stop"; empty while tokens are added
    seconds: float = 0.0  # from the start of the batch to this completion's last token
    score: float | None = None  # of a beam: log-probability / length ** length_penalty

    @property
    def is_finished(self) -> bool:
        return bool(self.finish_reason)

    def finish(self, reason: str) -> None:
        """Add no more tokens. The consumer of `decode` may call this between two steps."""
        self.finish_reason = reason

    def add(self, token: int, stop_ids: tuple[int, ...]) -> None:
        """Append a token, or finish; a token of `stop_ids` is not appended."""
        if token in stop_ids:
            self.finish("eos")
            return
        self.ids.append(token)
        if len(self.ids) == self.max_new_tokens:
            self.finish("length")


@torch.inference_mode()
def decode(
    model: Llama,
    completions: list[Completion],
    sampling: Sampling,
    stop_ids: tuple[int, ...] = (),
    seed: int | None = None,
    rope_alpha: float | None = None,
) -> Iterator[Completion]:
    """Write all completions together, and yield one whenever a token was added to it or it ended.

    The consumer may call `completion.finish(reason)`; the completion then leaves the batch.
    seed: the same seed gives the same samples; None: different ones every time.
    rope_alpha: see `scale_rope`; None: the context must hold the prompt and the completion.
    """
    config = scale_rope(model.config, completions, rope_alpha)
    prompts = [completion.prompt_ids for completion in completions]
    cache = Cache.for_model(model, config, len(completions), longest_sequence(completions))
    logits = prefill(model, cache, prompts)  # (B, V)
    generators: list[torch.Generator] = []
    if sampling.temperature > 0:
        generators = [generator_for(seed, c.prompt_ids, c.sample_index) for c in completions]
    seen = None
    if sampling.repetition_penalty != 1:
        seen = tokens_seen(prompts, logits)  # (B, V)

    live = list(completions)  # live[row] is written in row `row` of the cache
    while True:
        tokens = next_tokens(logits, seen, sampling, generators)  # (B,)
        for completion, token in zip(live, tokens.tolist(), strict=True):
            completion.add(token, stop_ids)
            yield completion
        if seen is not None:
            seen.scatter_(1, tokens.unsqueeze(1), True)
        if any(completion.is_finished for completion in live):
            rows = drop_finished(cache, live)
            if not rows:
                return
            live = [live[row] for row in rows]
            tokens = tokens[rows]
            if generators:
                generators = [generators[row] for row in rows]
            if seen is not None:
                seen = seen[rows]
        hidden = model(tokens.unsqueeze(1), cache=cache.extend(1))  # (B, 1, C)
        logits = model.logits(hidden[:, 0])  # (B, V)


def longest_sequence(completions: list[Completion]) -> int:
    """Tokens of the longest prompt with its completion."""
    return max(len(c.prompt_ids) + c.max_new_tokens for c in completions)


def drop_finished(cache: Cache, live: list[Completion]) -> list[int]:
    """Drop the rows of finished completions.

    The last row moves into a row that is dropped. Returns `result[new row] = old row`.
    """
    old_rows = list(range(len(live)))
    for row in reversed(range(len(live))):
        if live[row].is_finished:
            cache.drop(row)
            old_rows[row] = old_rows[-1]
            old_rows.pop()
    return old_rows


@dataclass
class PromptGroup:
    """Prompts that one forward pass reads together."""

    rows: list[int]  # cache rows, one per prompt
    num_tokens: int = 0


def group_prompts(prompts: dict[int, list[int]]) -> list[PromptGroup]:
    """Group prompts, given by cache row, so that a pass reads at most 2 * CHUNK tokens.

    A prompt longer than CHUNK gets a group of its own and is read chunk by chunk.
    """
    groups: list[PromptGroup] = []
    for row, prompt in prompts.items():
        is_long = len(prompt) > CHUNK
        num_tokens = 2 * CHUNK if is_long else len(prompt)  # nothing joins a long prompt
        has_room = bool(groups) and groups[-1].num_tokens + num_tokens <= 2 * CHUNK
        if not has_room:
            groups.append(PromptGroup(rows=[]))
        groups[-1].rows.append(row)
        groups[-1].num_tokens += num_tokens
    return groups


def prefill(model: Llama, cache: Cache, prompts: list[list[int]]) -> Tensor:
    """Read prompts[i] into row i of the cache. Returns the logits after each prompt, (B, V)."""
    first_row: dict[tuple[int, ...], int] = {}  # equal prompts are read once
    for row, prompt in enumerate(prompts):
        first_row.setdefault(tuple(prompt), row)
    unique = {row: prompts[row] for row in first_row.values()}

    last_hidden: dict[int, Tensor] = {}  # row -> hidden state of the prompt's last token, (C,)
    for group in group_prompts(unique):
        if len(group.rows) == 1:
            row = group.rows[0]
            last_hidden[row] = prefill_in_chunks(model, cache, row, prompts[row])
        else:
            last_hidden |= prefill_packed(model, cache, group.rows, prompts)

    sources = [first_row[tuple(prompt)] for prompt in prompts]
    copies = [row for row, source in enumerate(sources) if source != row]
    cache.copy([sources[row] for row in copies], copies)
    hidden = torch.stack([last_hidden[source] for source in sources])  # (B, C)
    return model.logits(hidden)


def prefill_in_chunks(model: Llama, cache: Cache, row: int, prompt: list[int]) -> Tensor:
    """Read a prompt into a row; returns the hidden state of its last token, (C,)."""
    tokens = torch.tensor([prompt], device=model.lm_head.weight.device)  # (1, T)
    for chunk in tokens.split(CHUNK, dim=1):
        hidden = model(chunk, cache=cache.extend(chunk.shape[1], slice(row, row + 1)))  # (1, T, C)
    return hidden[0, -1]


def prefill_packed(
    model: Llama, cache: Cache, rows: list[int], prompts: list[list[int]]
) -> dict[int, Tensor]:
    """Read several prompts end to end; returns the hidden state of each one's last token, (C,)."""
    device = model.lm_head.weight.device
    documents = Documents([len(prompts[row]) for row in rows], device)
    tokens = torch.tensor([token for row in rows for token in prompts[row]], device=device)  # (T,)
    ends = torch.tensor(documents.lengths).cumsum(0) - 1
    hidden = model(tokens.unsqueeze(0), documents, cache.pack(documents, rows))[0]  # (T, C)
    return dict(zip(rows, hidden[ends.to(device)], strict=True))


def scale_rope(
    config: LlamaConfig, completions: list[Completion], alpha: float | None
) -> LlamaConfig:
    """`config` with its rotary base raised to theta * alpha^(D/(D-2)) ("NTK-aware" scaling).

    Positions beyond the context then become slow rotations within it. alpha 0: what the longest
    completion needs (`rope_alpha_for`). The base is fixed before the first token, because keys in
    the cache are never rotated again. Raises UserError for an empty prompt, and without alpha
    (None) for a prompt and completion that exceed the context.
    """
    for completion in completions:
        if not completion.prompt_ids:
            raise UserError(
                "the prompt is empty; give at least one token "
                "(a tokenizer without <s> needs some text)"
            )
        if alpha is None:
            check_context(config, completion)
    if alpha is None:
        return config
    if config.rope_scaling and config.rope_scaling.kind == "dynamic":
        raise UserError(
            "--rope_alpha: this checkpoint's own rope_scaling, dynamic, scales the rotary "
            "base already"
        )
    if alpha == 0:
        alpha = max(rope_alpha_for(config, completion) for completion in completions)
    if alpha == 1:
        return config
    D = config.head_dim
    return replace(config, rope_theta=config.rope_theta * alpha ** (D / (D - 2)))


def check_context(config: LlamaConfig, completion: Completion) -> None:
    """Raises UserError if the prompt and the completion together exceed the context."""
    num_free = config.max_seq_len - len(completion.prompt_ids)
    if completion.max_new_tokens <= num_free:
        return
    remedy = f"use --max_new_tokens {num_free} or fewer" if num_free > 0 else "shorten the prompt"
    raise UserError(
        f"a prompt of {len(completion.prompt_ids)} tokens and {completion.max_new_tokens} new ones "
        f"exceed the context of {config.max_seq_len}; {remedy}, "
        "or scale the rotary base with --rope_alpha auto"
    )


def rope_alpha_for(config: LlamaConfig, completion: Completion) -> float:
    """The alpha that a completion of L tokens with its prompt needs: 2 L / context - 1.

    Within the context it is 1. The rule is Chinese-LLaMA-Alpaca-2's.
    """
    length = len(completion.prompt_ids) + completion.max_new_tokens
    if length <= config.max_seq_len:
        return 1.0
    return 2 * length / config.max_seq_len - 1
