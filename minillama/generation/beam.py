"""Beam search: keep the W likeliest beginnings instead of one, and return the best ends.

    score of a beginning   s = sum of log p(token)            score of a finished text   s / length ** length_penalty

A step extends each of the W beginnings by every token and keeps the best 2 W (more where several tokens end a text): at most W of
those can end, so W remain to go on. A text that ends within the first W joins the finished ones, of which the W best are kept. The
search is over when no beginning can overtake the worst of them any more; how hopeful that judgement is, `early_stopping` says. With
sampling, the 2 W candidates are drawn without replacement instead of taken from the top.

Results equal transformers' `generate(num_beams=W)`. A beginning's keys and values stay in their cache row as long as one of its
children lives; only further children are copied, and only what lies behind the prompt.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from minillama.errors import UserError
from minillama.generation.cache import Cache
from minillama.generation.decode import Completion, read_prompts, scale_rope
from minillama.generation.sampling import Sampling, generator_for, penalise, tokens_seen, warp
from minillama.model import Llama

NEVER = -1e9  # the score of what must not be chosen


@dataclass(frozen=True)
class Beams:
    """How wide to search, and when to stop.

    early_stopping "true": with W finished texts. "false": when the best beginning, ended now, would not enter the finished ones.
    "never": when it could not even if it went on to the full length (the same as "false" for length_penalty <= 0)."""

    width: int
    length_penalty: float = 1.0
    early_stopping: str = "false"
    sample: bool = False


@torch.inference_mode()
def beam_search(
    model: Llama,
    answers: list[Completion],
    beams: Beams,
    sampling: Sampling,
    stop: tuple[int, ...] = (),
    seed: int | None = None,
    rope_alpha: float | None = None,
) -> Iterator[Completion]:
    """Fill `answers`, all of one prompt and at most W, with the best texts, the best first, and yield each once.
    Of `sampling`, temperature, top-k and top-p count only where beams.sample is set."""
    prompt, room, W = answers[0].prompt_ids, answers[0].room, beams.width
    if len(answers) > W:
        raise UserError(
            f"num_samples = {len(answers)}: beam search returns at most as many texts as it has beams, {W}"
        )
    generator = generator_for(seed, prompt, answers[0].number)
    config, weight = scale_rope(model.config, answers, rope_alpha), model.lm_head.weight
    cache = Cache(config, W, len(prompt) + room, weight.dtype, weight.device)
    logits = read_prompts(model, cache, [prompt] * W)
    texts, rows = (
        [[] for _ in range(W)],
        list(range(W)),
    )  # the beginnings, the best first, and their rows in the cache
    scores = torch.tensor(
        [0.0] + [NEVER] * (W - 1), device=weight.device
    )  # all are alike at first, so only one counts
    finished: list[
        tuple[float, list[int]]
    ] = []  # the W best ended texts so far and their scores, the best first
    while True:
        tried, parents, tokens = candidates(
            logits[rows], scores, texts, prompt, beams, sampling, len(stop), generator
        )
        grown = [[*texts[parent], token] for parent, token in zip(parents, tokens, strict=True)]
        ends = [
            token in stop or len(text) == room for text, token in zip(grown, tokens, strict=True)
        ]
        ended = [
            (score / len(grown[i]) ** beams.length_penalty, grown[i])
            for i, score in enumerate(tried[:W].tolist())
            if ends[i]
        ]
        finished = sorted([*finished, *ended], key=lambda one: -one[0])[:W]
        going = tried + NEVER * torch.tensor(ends, device=tried.device)
        best = going.topk(W).indices
        scores, chosen = going[best], best.tolist()
        length = (
            room if beams.early_stopping == "never" and beams.length_penalty > 0 else len(grown[0])
        )  # at which the best is judged
        is_best = (
            len(finished) == W
            and float(scores[0]) / length**beams.length_penalty <= finished[-1][0]
        )  # nothing overtakes
        if all(ends) or is_best or (len(finished) == W and beams.early_stopping == "true"):
            break
        texts, rows = (
            [grown[i] for i in chosen],
            move_rows(cache, [rows[parents[i]] for i in chosen], len(prompt)),
        )
        step = torch.tensor(
            [[text[-1]] for _, text in sorted(zip(rows, texts, strict=True))], device=weight.device
        )  # (W, 1), by row
        logits = model.logits(model(step, cache=cache.extend(1))[:, 0])  # (W, V)
    for answer, (score, text) in zip(answers, finished, strict=False):
        has_end = text[-1] in stop
        answer.ids, answer.score, answer.finish_reason = (
            text[:-1] if has_end else text,
            score,
            "eos" if has_end else "length",
        )
        yield answer


def candidates(
    logits: Tensor,
    scores: Tensor,
    texts: list[list[int]],
    prompt: list[int],
    beams: Beams,
    sampling: Sampling,
    stops: int,
    generator: torch.Generator,
) -> tuple[Tensor, list[int], list[int]]:
    """From logits (W, V) and the beginnings' scores (W,): scores of the continuations tried, each one's parent and token."""
    log_p = logits.float().log_softmax(-1)
    if sampling.repetition_penalty != 1:
        log_p = penalise(
            log_p,
            tokens_seen([prompt + text for text in texts], log_p),
            sampling.repetition_penalty,
        )
    if beams.sample:
        log_p = warp(log_p, sampling, at_least=max(2, 1 + stops))
    total, count = (
        (log_p + scores.unsqueeze(1)).flatten(),
        max(2, 1 + stops) * beams.width,
    )  # (W·V,)
    drawn = (
        total.softmax(0).cpu().multinomial(count, generator=generator).to(total.device)
        if beams.sample
        else None
    )
    index, V = total.topk(count).indices if drawn is None else drawn, logits.shape[-1]
    return total[index], (index // V).tolist(), (index % V).tolist()


def move_rows(cache: Cache, parents: list[int], start: int) -> list[int]:
    """Give each child of row parents[i] a row of its own that holds what its parent's holds; returns the rows."""
    free = [row for row in range(len(parents)) if row not in parents]
    rows = [row if parents.index(row) == i else free.pop() for i, row in enumerate(parents)]
    copied = [(parent, row) for parent, row in zip(parents, rows, strict=True) if parent != row]
    cache.copy([parent for parent, _ in copied], [row for _, row in copied], start)
    return rows
