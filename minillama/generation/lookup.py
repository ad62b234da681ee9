"""Prompt lookup: several tokens in one step, where a text repeats what it has said before.

A step reads all weights for one token, and could check several for nearly the same price. So the
next tokens are guessed from the text itself: find the last two tokens where they stood before, and
take what followed them.

    text so far     the cat sat on the mat and the cat
    guesses                                            sat on the mat
    most likely     (after `cat` and each guess)       sat on a   …
    added                                              sat on a

The model reads the last token and the guesses in one pass, which gives the most likely token after
each. Guesses are right up to the first that differs, and there the model's own token is added. The
cache forgets what was read beyond. So the text is that of greedy decoding, up to rounding: products
of several rows may be rounded otherwise than those of one. Saxena 2023.
"""

from collections.abc import Iterator

import torch

from minillama.generation.cache import Cache
from minillama.generation.decode import Completion, prefill, scale_rope
from minillama.generation.sampling import Sampling, next_tokens
from minillama.model import Llama

GREEDY = Sampling(temperature=0.0)


@torch.inference_mode()
def decode_with_lookup(
    model: Llama,
    completion: Completion,
    num_guesses: int,
    stop_ids: tuple[int, ...] = (),
    rope_alpha: float | None = None,
) -> Iterator[Completion]:
    """Write the greedy completion, and yield it whenever a token was added or it ended.

    num_guesses: the most tokens that a step guesses. The other arguments are those of `decode`.
    """
    config = scale_rope(model.config, [completion], rope_alpha)
    text = list(completion.prompt_ids)  # the prompt and what was added
    cache = Cache.for_model(model, config, 1, len(text) + completion.max_new_tokens)
    logits = prefill(model, cache, [text])  # (1, V)
    tokens = next_tokens(logits, None, GREEDY, []).tolist()
    while True:
        for token in tokens:
            completion.add(token, stop_ids)
            yield completion
            if completion.is_finished:
                return
        text += tokens
        num_left = completion.max_new_tokens - len(completion.ids)
        guesses = guess(text, min(num_guesses, num_left - 1))
        new = torch.tensor([[text[-1], *guesses]], device=model.lm_head.weight.device)  # (1, T)
        hidden = model(new, cache=cache.extend(new.shape[1]))[0]  # (T, C)
        tokens = next_tokens(model.logits(hidden), None, GREEDY, []).tolist()
        num_right = count_right(guesses, tokens)
        tokens = tokens[: num_right + 1]
        cache.filled[0] = len(text) + num_right


def guess(text: list[int], count: int) -> list[int]:
    """Up to `count` tokens that followed the last two tokens of `text` where they last stood."""
    for start in reversed(range(len(text) - 2)):
        if text[start : start + 2] == text[-2:]:
            return text[start + 2 : start + 2 + count]
    return []


def count_right(guesses: list[int], tokens: list[int]) -> int:
    """How many guesses from the first on are the model's tokens."""
    for count, (guessed, token) in enumerate(zip(guesses, tokens, strict=False)):
        if guessed != token:
            return count
    return len(guesses)
