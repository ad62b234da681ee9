"""Decoding: read the prompts once, then one token of every text at a time over the cache.

Prompts of any lengths are read end to end as one run of documents, so no padding is computed; one longer than a chunk is read by
itself, chunk by chunk. Then all texts take steps together, each at its own position, and a text that ends leaves the batch.
What a text becomes does not depend on the others.
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

CHUNK = 512  # tokens of a long prompt read at a time


@dataclass
class Completion:
    """What comes of a prompt; filled while it is written."""

    prompt_ids: list[int]
    room: int = 256  # most tokens to write
    number: int = 0  # which of the texts that continue this prompt: each has its own draws
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""  # length | eos | stop; empty while it is being written
    seconds: float = 0.0  # from the batch's beginning to this text's end
    score: float | None = None  # of a beam: its log-probability over length ** length_penalty


@torch.inference_mode()
def decode(
    model: Llama,
    answers: list[Completion],
    sampling: Sampling,
    stop: tuple[int, ...] = (),
    seed: int | None = None,
    rope_alpha: float | None = None,
) -> Iterator[Completion]:
    """Write all `answers` together, yielding each whenever a token was added to it or one of `stop` ended it (that one is not added).
    The caller may end an answer by giving it a finish_reason.
    seed: of the draws; the same seed gives the same text. rope_alpha: see `scale_rope`; None: the context must hold prompt and answer."""
    config, weight = scale_rope(model.config, answers, rope_alpha), model.lm_head.weight
    cache = Cache(
        config,
        len(answers),
        max(len(a.prompt_ids) + a.room for a in answers),
        weight.dtype,
        weight.device,
    )
    logits, live = read_prompts(model, cache, [a.prompt_ids for a in answers]), list(answers)
    generators = (
        []
        if sampling.temperature == 0
        else [generator_for(seed, a.prompt_ids, a.number) for a in answers]
    )
    seen = (
        None
        if sampling.repetition_penalty == 1
        else tokens_seen([a.prompt_ids for a in answers], logits)
    )
    while True:
        tokens = next_tokens(logits, seen, sampling, generators)  # (B,)
        for answer, token in zip(live, tokens.tolist(), strict=True):
            if token in stop:
                answer.finish_reason = "eos"
            else:
                answer.ids.append(token)
                answer.finish_reason = "length" if len(answer.ids) == answer.room else ""
            yield answer
        if seen is not None:
            seen.scatter_(1, tokens.unsqueeze(1), True)
        rows = list(range(len(live)))  # which rows go on, in their order in the cache
        for row in reversed([row for row, answer in enumerate(live) if answer.finish_reason]):
            cache.drop(row)
            rows[row] = rows[-1]
            rows.pop()
        if not rows:
            return
        if len(rows) < len(live):
            live, generators = (
                [live[row] for row in rows],
                [generators[row] for row in rows] if generators else [],
            )
            tokens, seen = tokens[rows], None if seen is None else seen[rows]
        logits = model.logits(model(tokens.unsqueeze(1), cache=cache.extend(1))[:, 0])  # (B, V)


def read_prompts(model: Llama, cache: Cache, prompts: list[list[int]]) -> Tensor:
    """Fill row r of the cache with prompts[r] and return the logits that follow each, (B, V). Equal prompts are read once."""
    device, read, last = (
        model.lm_head.weight.device,
        {},
        {},
    )  # last: by row, the hidden state (C,) of its prompt's last token
    source = [
        read.setdefault(tuple(prompt), row) for row, prompt in enumerate(prompts)
    ]  # the row that is read for each
    runs, size = (
        [],
        2 * CHUNK,
    )  # rows read together, and their tokens; a long prompt counts as many, and so stands alone
    for row in read.values():
        more = len(prompts[row]) if len(prompts[row]) <= CHUNK else 2 * CHUNK
        if size + more > 2 * CHUNK:
            runs, size = [*runs, []], 0
        runs[-1].append(row)
        size += more
    for rows in runs:
        tokens = torch.tensor([[token for row in rows for token in prompts[row]]], device=device)
        if len(rows) == 1:
            for part in tokens.split(CHUNK, dim=1):
                hidden = model(
                    part, cache=cache.extend(part.shape[1], slice(rows[0], rows[0] + 1))
                )[:, -1]
        else:
            documents = Documents([len(prompts[row]) for row in rows], device)
            ends = torch.tensor(documents.lengths).cumsum(0) - 1
            hidden = model(tokens, documents, cache.pack(documents, rows))[0, ends.to(device)]
        last |= zip(rows, hidden, strict=True)
    again = [row for row, read_in in enumerate(source) if read_in != row]
    cache.copy([source[row] for row in again], again)
    return model.logits(torch.stack([last[row] for row in source]))


def scale_rope(config: LlamaConfig, answers: list[Completion], alpha: float | None) -> LlamaConfig:
    """`config` with its rotary base raised to theta * alpha^(D/(D-2)): positions beyond the context become slow turns within it
    ("NTK-aware" scaling). alpha 0: what the longest answer needs, L / (context / 2) - 1 as Chinese-LLaMA-Alpaca-2 has it, where L is
    prompt and room, and 1 within the context. Fixed before the first token: keys in the cache are never turned again.
    Raises UserError for an empty prompt, and without alpha (None) for one that leaves no room for the answer."""
    for answer in answers:
        if not answer.prompt_ids:
            raise UserError(
                "the prompt is empty; give at least one token (a tokenizer without <s> needs some text)"
            )
        left = config.max_seq_len - len(answer.prompt_ids)
        if alpha is None and answer.room > left:
            remedy = f"use --max_new_tokens {left} or fewer" if left > 0 else "shorten the prompt"
            raise UserError(
                f"a prompt of {len(answer.prompt_ids)} tokens and {answer.room} new ones exceed the context of "
                f"{config.max_seq_len}; {remedy}, or stretch the rotary positions with --rope_alpha auto"
            )
    if alpha is None:
        return config
    if config.rope_scaling and config.rope_scaling.kind == "dynamic":
        raise UserError(
            "--rope_alpha: this checkpoint's own rope_scaling, dynamic, stretches the rotary base already"
        )
    alpha, D = alpha or max(rope_alpha_for(config, answer) for answer in answers), config.head_dim
    return (
        config
        if alpha == 1
        else replace(config, rope_theta=config.rope_theta * alpha ** (D / (D - 2)))
    )


def rope_alpha_for(config: LlamaConfig, answer: Completion) -> float:
    """The alpha that `scale_rope` finds for one answer."""
    length = len(answer.prompt_ids) + answer.room
    return 2 * length / config.max_seq_len - 1 if length > config.max_seq_len else 1.0
