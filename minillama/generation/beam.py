"""Beam search: keep the W best hypotheses instead of one, and return the best finished ones.

    score of a hypothesis    s = sum of log p(token)
    score when finished      s / length ** length_penalty

A step extends each of the W hypotheses by every token and keeps the best 2 W candidates (more
if there are several stop tokens). At most W of those can end, so W remain to go on. A candidate
that ends among the first W joins the finished ones, of which the W best are kept. The search ends
when no hypothesis can overtake the worst of them; `early_stopping` says how that is judged. With
sampling, the 2 W candidates are sampled without replacement instead of taken from the top.

Results equal transformers' `generate(num_beams=W)`. The first child of a hypothesis keeps its
parent's cache row. Only further children are copied, and only what lies behind the prompt.

Shapes: W hypotheses, V vocabulary, N candidates.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minillama.errors import UserError
from minillama.generation.cache import Cache, refuse_too_large
from minillama.generation.decode import Completion, prefill, scale_rope
from minillama.generation.sampling import (
    Sampling,
    filter_logits,
    generator_for,
    penalise,
    refuse_non_finite,
    tokens_seen,
)
from minillama.model import Llama

EARLY_STOPPING = ("true", "false", "never")
SCORE_COPIES = 4  # fp32 tables (W, V) at once: logits, log p, its sum with the scores, sorting
MOST_CATEGORIES = 2**24  # of torch.multinomial
NEVER = -1e9  # the score of what must not be chosen


@dataclass(frozen=True)
class BeamOptions:
    """How many hypotheses to keep, and when to stop.

    early_stopping "true": when W hypotheses are finished.
    "false": when the best hypothesis, if it ended now, would not enter the W finished ones.
    "never": when it would not enter them at the full length either (for length_penalty <= 0 this
    is the same as "false").
    """

    width: int
    length_penalty: float = 1.0
    early_stopping: str = "false"
    sample: bool = False


@dataclass
class Hypothesis:
    """A sequence that still grows."""

    ids: list[int]  # its tokens after the prompt
    row: int  # its row in the cache


class Finished(NamedTuple):
    """A sequence that ended: by a stop token, which is the last of its ids, or by its length."""

    score: float
    ids: list[int]


class Candidates(NamedTuple):
    """Continuations of the hypotheses by one token."""

    scores: Tensor  # (N,)
    parents: list[int]  # index of the hypothesis that each continues
    tokens: list[int]


@torch.inference_mode()
def beam_search(
    model: Llama,
    completions: list[Completion],
    options: BeamOptions,
    sampling: Sampling,
    stop_ids: tuple[int, ...] = (),
    seed: int | None = None,
    rope_alpha: float | None = None,
) -> Iterator[Completion]:
    """Fill the completions, all of one prompt and at most W, with the best results, best first.

    Each is yielded once, finished. temperature, top-k and top-p of `sampling` count only if
    options.sample is set.
    """
    prompt = completions[0].prompt_ids
    max_new_tokens = completions[0].max_new_tokens
    W = options.width
    if len(completions) > W:
        raise UserError(
            f"num_samples = {len(completions)}: beam search returns at most as many texts as it "
            f"has beams, {W}"
        )
    refuse_too_many_beams(model, options)
    generator = generator_for(seed, prompt, completions[0].sample_index)
    config = scale_rope(model.config, completions, rope_alpha)
    cache = Cache.for_model(model, config, W, len(prompt) + max_new_tokens)
    logits = prefill(model, cache, [prompt] * W)  # (W, V)
    hypotheses = [Hypothesis(ids=[], row=row) for row in range(W)]  # the best first
    scores = torch.full((W,), NEVER, device=logits.device)
    scores[0] = 0.0  # all W are equal at first, so only one counts
    finished: list[Finished] = []  # at most W, the best first

    while True:
        rows = [hypothesis.row for hypothesis in hypotheses]
        log_p = next_log_p(logits[rows], prompt, hypotheses, sampling)  # (W, V)
        candidates = choose_candidates(
            log_p, scores, options, sampling, 1 + len(stop_ids), generator
        )
        sequences = extend_hypotheses(hypotheses, candidates)
        length = len(sequences[0])
        ends = [length == max_new_tokens or token in stop_ids for token in candidates.tokens]
        best_ended = [i for i in range(W) if ends[i]]
        finished = add_finished(finished, candidates.scores, best_ended, sequences, options)

        open_scores = candidates.scores + NEVER * torch.tensor(ends, device=logits.device)
        chosen = open_scores.topk(W).indices
        scores = open_scores[chosen]
        if all(ends) or is_decided(finished, scores, length, max_new_tokens, options):
            break
        parent_rows = [rows[candidates.parents[i]] for i in chosen.tolist()]
        child_rows = move_rows(cache, parent_rows, len(prompt))
        hypotheses = [
            Hypothesis(sequences[i], row)
            for i, row in zip(chosen.tolist(), child_rows, strict=True)
        ]
        logits = take_step(model, cache, hypotheses)  # (W, V)

    for completion, result in zip(completions, finished, strict=False):
        fill_completion(completion, result, stop_ids)
        yield completion


def refuse_too_many_beams(model: Llama, options: BeamOptions) -> None:
    """Raise UserError if the scores of all continuations are too many for memory, or for torch."""
    num_scores = options.width * model.config.vocab_size
    what = f"--num_beams {options.width}: the table of scores"
    refuse_too_large(SCORE_COPIES * 4 * num_scores, what, model.lm_head.weight.device)
    if options.sample and num_scores > MOST_CATEGORIES:
        most = MOST_CATEGORIES // model.config.vocab_size
        raise UserError(
            f"--num_beams {options.width}: sampling among so many continuations is not possible "
            f"in torch; use at most {most}, or leave temperature, top_k and top_p out"
        )


def next_log_p(
    logits: Tensor, prompt: list[int], hypotheses: list[Hypothesis], sampling: Sampling
) -> Tensor:
    """log p of each next token, (W, V), with the repetition penalty."""
    refuse_non_finite(logits.amax(-1))
    log_p = logits.float().log_softmax(-1)
    if sampling.repetition_penalty == 1:
        return log_p
    seen = tokens_seen([prompt + hypothesis.ids for hypothesis in hypotheses], log_p)
    return penalise(log_p, seen, sampling.repetition_penalty)


def choose_candidates(
    log_p: Tensor,
    scores: Tensor,
    options: BeamOptions,
    sampling: Sampling,
    per_hypothesis: int,
    generator: torch.Generator,
) -> Candidates:
    """The best, or sampled, continuations. log_p (W, V), scores of the hypotheses (W,).

    per_hypothesis: how many continuations to keep for each, but at least 2. With one more than
    there are stop tokens, W candidates that do not end remain.
    """
    per_hypothesis = max(2, per_hypothesis)
    if options.sample:
        log_p = filter_logits(log_p, sampling, at_least=per_hypothesis)
    total = (log_p + scores.unsqueeze(1)).flatten()  # (W·V,)
    count = per_hypothesis * options.width
    if options.sample:
        index = total.softmax(0).cpu().multinomial(count, generator=generator).to(total.device)
    else:
        index = total.topk(count).indices
    V = log_p.shape[-1]
    return Candidates(total[index], (index // V).tolist(), (index % V).tolist())


def extend_hypotheses(hypotheses: list[Hypothesis], candidates: Candidates) -> list[list[int]]:
    """The ids of each candidate: its parent's, and its own token."""
    return [
        [*hypotheses[parent].ids, token]
        for parent, token in zip(candidates.parents, candidates.tokens, strict=True)
    ]


def add_finished(
    finished: list[Finished],
    scores: Tensor,
    ended: list[int],
    sequences: list[list[int]],
    options: BeamOptions,
) -> list[Finished]:
    """The W best of `finished` and of the candidates that ended, the best first."""
    ended_now = []
    for i in ended:
        length = len(sequences[i])
        score = float(scores[i]) / length**options.length_penalty
        ended_now.append(Finished(score, sequences[i]))
    by_score = sorted([*finished, *ended_now], key=lambda sequence: sequence.score, reverse=True)
    return by_score[: options.width]


def is_decided(
    finished: list[Finished],
    scores: Tensor,
    length: int,
    max_new_tokens: int,
    options: BeamOptions,
) -> bool:
    """Can no hypothesis enter the finished ones any more, as `early_stopping` judges it?"""
    if len(finished) < options.width:
        return False
    if options.early_stopping == "true":
        return True
    if options.early_stopping == "never" and options.length_penalty > 0:
        length = max_new_tokens
    best_possible = float(scores[0]) / length**options.length_penalty
    return best_possible <= finished[-1].score


def move_rows(cache: Cache, parents: list[int], start: int) -> list[int]:
    """Give the i-th child a row that holds what row parents[i] holds; returns the rows.

    start: the tokens before it are the prompt, which all rows hold already.
    """
    used = set(parents)
    free = [row for row in range(len(parents)) if row not in used]
    sources = []
    targets = []
    rows = []
    without_child = used
    for parent in parents:
        if parent in without_child:
            without_child.remove(parent)
            rows.append(parent)
            continue
        row = free.pop()
        rows.append(row)
        sources.append(parent)
        targets.append(row)
    cache.copy(sources, targets, start)
    return rows


def take_step(model: Llama, cache: Cache, hypotheses: list[Hypothesis]) -> Tensor:
    """Read the last token of each hypothesis into its row; returns the logits by row, (W, V)."""
    by_row = sorted(hypotheses, key=lambda hypothesis: hypothesis.row)
    last_tokens = [[hypothesis.ids[-1]] for hypothesis in by_row]
    tokens = torch.tensor(last_tokens, device=model.lm_head.weight.device)  # (W, 1)
    hidden = model(tokens, cache=cache.extend(1))  # (W, 1, C)
    return model.logits(hidden[:, 0])


def fill_completion(completion: Completion, result: Finished, stop_ids: tuple[int, ...]) -> None:
    """Put a finished sequence into a completion, without its stop token."""
    ends_with_stop = result.ids[-1] in stop_ids
    completion.ids = result.ids[:-1] if ends_with_stop else result.ids
    completion.score = result.score
    completion.finish("eos" if ends_with_stop else "length")
