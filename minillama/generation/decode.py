"""Decoding: read the prompt once, then one token at a time over the cache."""

from collections.abc import Iterator

import torch

from minillama.errors import UserError
from minillama.generation.cache import Cache
from minillama.generation.sampling import Sampling, next_token
from minillama.model import Llama


@torch.inference_mode()
def generate(model: Llama, prompt: list[int], max_new_tokens: int, sampling: Sampling, stop: tuple[int, ...] = (),
             seed: int | None = None) -> Iterator[int]:
    """Yield the ids that follow `prompt`, until one of `stop` (not yielded) or max_new_tokens.
    seed: of the draws; the same seed gives the same text. Raises UserError where prompt and new tokens exceed the context."""
    check_fits(model, len(prompt), max_new_tokens)
    device = model.lm_head.weight.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    text = torch.empty(len(prompt) + max_new_tokens, dtype=torch.int64, device=device)
    text[:len(prompt)] = torch.tensor(prompt)
    cache = Cache(model.config, 1, len(text), model.lm_head.weight.dtype, device)
    start = 0
    for end in range(len(prompt), len(text)):
        hidden = model(text[None, start:end], cache=cache.extend(end - start))  # (1, T, C)
        token = next_token(model.logits(hidden[0, -1]), text[:end], sampling, generator)
        if token in stop:
            return
        text[end], start = token, end
        yield token


def check_fits(model: Llama, prompt_tokens: int, max_new_tokens: int) -> None:
    """Raise UserError for an empty prompt, or one that leaves no room for the new tokens."""
    if prompt_tokens == 0:
        raise UserError("the prompt is empty; give at least one token (a tokenizer without <s> needs some text)")
    context = model.config.max_seq_len
    if prompt_tokens + max_new_tokens > context:
        room = context - prompt_tokens
        remedy = f"use --max_new_tokens {room} or fewer" if room > 0 else "shorten the prompt"
        raise UserError(f"a prompt of {prompt_tokens} tokens and {max_new_tokens} new ones exceed the context of {context}; {remedy}")
