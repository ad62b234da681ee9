"""From logits to the next token.

    l = logits / temperature
    l_i = -inf outside the k largest (top-k) and outside the smallest set of mass p (top-p)
    p = softmax(l), from which one token is sampled

Greedy decoding is the limit temperature -> 0. A repetition penalty first makes the tokens that are
already in the sequence less likely (Keskar et al. 2019): it divides positive logits and multiplies
negative ones.

Each completion has a random generator of its own, which gives one number per token. So a
completion does not depend on the rest of the batch.

Shapes: B rows, V vocabulary.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from minillama.errors import UserError

SMALLEST = 1e-6  # temperature and penalty divide logits: by less, fp32 could overflow
TOP_P_FIRST = 256  # top-p first looks among this many tokens, to avoid sorting the whole vocabulary


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy; top_k 0 and top_p 1 keep all."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        has_valid_temperature = self.temperature == 0 or SMALLEST <= self.temperature < 1e9
        has_valid_penalty = SMALLEST <= self.repetition_penalty < 1e9
        has_valid_filters = self.top_k >= 0 and 0 < self.top_p <= 1
        if not (has_valid_temperature and has_valid_filters and has_valid_penalty):
            raise UserError(
                f"{self}: expected temperature >= 0, top_k >= 0, 0 < top_p <= 1, "
                f"repetition_penalty > 0 (a temperature or penalty below {SMALLEST} overflows)"
            )


def generator_for(seed: int | None, prompt: list[int], sample_index: int) -> torch.Generator:
    """The random numbers of one sample of `prompt`. seed None: different ones every time."""
    if seed is None:
        name = str(torch.seed())
    else:
        name = f"{seed} {sample_index} {' '.join(map(str, prompt))}"
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


def next_tokens(
    logits: Tensor, seen: Tensor | None, sampling: Sampling, generators: list[torch.Generator]
) -> Tensor:
    """Choose a token for each row of logits (B, V): (B,) int64.

    seen (B, V): which tokens the sequence has so far; None: no repetition penalty.
    generators: one per row; greedy decoding needs none.
    """
    logits = logits.float()
    if seen is not None:
        logits = penalise(logits, seen, sampling.repetition_penalty)
    best = logits.max(-1)
    refuse_non_finite(best.values)
    if sampling.temperature == 0:
        return best.indices
    p = filter_logits(logits, sampling).softmax(-1).cpu()  # on the CPU: not every device has fp64
    cumulative = p.double().cumsum(-1)  # (B, V)
    uniform = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])
    target = uniform * cumulative[:, -1:]  # (B, 1)
    tokens = torch.searchsorted(cumulative, target, right=True)  # (B, 1)
    return tokens.squeeze(1).to(logits.device)


def refuse_non_finite(largest: Tensor) -> None:
    """Raises UserError if the largest logit of a row, (B,), is NaN or infinite."""
    if not bool(largest.isfinite().all()):
        raise UserError(
            "the model's logits are not finite numbers; its numbers overflow: try --dtype float32"
        )


def filter_logits(logits: Tensor, sampling: Sampling, at_least: int = 1) -> Tensor:
    """Apply temperature, top-k and top-p. at_least: how many tokens are kept in any case."""
    k = max(sampling.top_k, at_least) if sampling.top_k > 0 else 0
    logits = keep_top_k(logits / sampling.temperature, k)
    return keep_top_p(logits, sampling.top_p, at_least)


def tokens_seen(sequences: list[list[int]], logits: Tensor) -> Tensor:
    """Which tokens each sequence has, (B, V) bool, on the device of the logits (B, V)."""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for row, ids in enumerate(sequences):
        seen[row, ids] = True
    return seen


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (..., V) in which the tokens marked in `seen` are less likely."""
    penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalised, logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Logits (..., V) with all but the k largest at -inf; 0 keeps all."""
    if not 0 < k < logits.shape[-1]:
        return logits
    smallest_kept = logits.topk(k).values[..., -1:]  # (..., 1)
    return logits.masked_fill(logits < smallest_kept, -torch.inf)


def keep_top_p(logits: Tensor, p: float, at_least: int = 1) -> Tensor:
    """Logits (..., V) with all but the most likely tokens of total mass p at -inf.

    The token that crosses p is kept.
    """
    if p == 1.0:
        return logits
    log_total = logits.logsumexp(-1, keepdim=True)  # (..., 1)
    V = logits.shape[-1]
    for head in (min(TOP_P_FIRST, V), V):  # the head is enough unless p lies beyond its mass
        ordered, index = logits.topk(head)  # (..., head)
        mass = (ordered - log_total).exp()
        mass_before = mass.cumsum(-1) - mass
        is_removed = mass_before >= p
        if bool(is_removed[..., -1].all()):
            break
    is_removed[..., :at_least] = False
    kept = ordered.masked_fill(is_removed, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(-1, index, kept)
