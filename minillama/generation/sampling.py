"""From logits to the next token, as three lines of algebra.

    l = logits / temperature          then    l_i = -inf outside the k best    and    outside the smallest set of mass p
    p = softmax(l)                            draw one

Greedy decoding is the limit temperature -> 0. A repetition penalty first makes tokens already in the text less likely (Keskar et
al. 2019): positive logits are divided by it, negative ones multiplied.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minillama.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 is greedy, top_k 0 and top_p 1 keep everything."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or self.repetition_penalty <= 0:
            raise UserError(f"{self}: expected temperature >= 0, top_k >= 0, 0 < top_p <= 1, repetition_penalty > 0")


def next_token(logits: Tensor, seen: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> int:
    """Choose from logits (V,); seen (n,) holds the ids of the text so far."""
    logits = logits.float()
    if sampling.repetition_penalty != 1.0:
        logits = penalise(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = keep_top_p(keep_top_k(logits / sampling.temperature, sampling.top_k), sampling.top_p)
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (V,) with those of the ids in `seen` made less likely, once each."""
    chosen = logits[seen]
    return logits.scatter(0, seen, torch.where(chosen > 0, chosen / penalty, chosen * penalty))


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Logits (V,) with all but the k largest at -inf; 0 keeps all."""
    return logits.masked_fill(logits < logits.topk(k).values[-1], -torch.inf) if 0 < k < len(logits) else logits


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Logits (V,) with all but the most likely ones that together reach mass p at -inf; the one that crosses p is kept."""
    if p == 1.0:
        return logits
    ordered, index = logits.sort(descending=True)
    mass = ordered.softmax(-1)
    outside = mass.cumsum(-1) - mass >= p  # what came before it was enough already
    return logits.scatter(0, index, ordered.masked_fill(outside, -torch.inf))
