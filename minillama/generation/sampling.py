"""From logits to the next token, as three lines of algebra.

    l = logits / temperature          then    l_i = -inf outside the k best    and    outside the smallest set of mass p
    p = softmax(l)                            draw one

Greedy decoding is the limit temperature -> 0. A repetition penalty first makes tokens already in the text less likely (Keskar et
al. 2019): positive logits are divided by it, negative ones multiplied.

Every text draws from a generator of its own, one number a token, so what it becomes does not depend on its neighbours in a batch.

Shapes: B rows, V vocabulary.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from minillama.errors import UserError

HEAD = 256  # the likeliest tokens, among which the smallest set of mass p nearly always lies: no need to sort the vocabulary


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 is greedy, top_k 0 and top_p 1 keep everything."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not (
            0 <= self.temperature < 1e9
            and self.top_k >= 0
            and 0 < self.top_p <= 1
            and 0 < self.repetition_penalty < 1e9
        ):
            raise UserError(
                f"{self}: expected temperature >= 0, top_k >= 0, 0 < top_p <= 1, repetition_penalty > 0"
            )


def generator_for(seed: int | None, prompt: list[int], number: int) -> torch.Generator:
    """The draws of the `number`-th text that continues `prompt`; seed None: different every time."""
    name = (
        f"{seed} {number} {' '.join(map(str, prompt))}" if seed is not None else str(torch.seed())
    )
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7]))


def next_tokens(
    logits: Tensor, seen: Tensor | None, sampling: Sampling, generators: list[torch.Generator]
) -> Tensor:
    """Choose a token for each row of logits (B, V): (B,) int64. seen (B, V): is the token in the text so far? None: no penalty."""
    logits = (
        logits.float()
        if seen is None
        else penalise(logits.float(), seen, sampling.repetition_penalty)
    )
    best = logits.max(-1)
    if not bool(best.values.isfinite().all()):
        raise UserError(
            "the model's logits are not finite numbers; its weights are damaged, or overflow: try --dtype float32"
        )
    if sampling.temperature == 0:
        return best.indices
    mass = (
        warp(logits, sampling).softmax(-1).cpu().double().cumsum(-1)
    )  # (B, V), on the host: not every device has fp64
    uniform = torch.stack(
        [torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators]
    )  # (B, 1)
    return torch.searchsorted(mass, uniform * mass[:, -1:], right=True).squeeze(1).to(logits.device)


def warp(logits: Tensor, sampling: Sampling, at_least: int = 1) -> Tensor:
    """Temperature, top-k, top-p. at_least: tokens that are kept in any case."""
    logits = keep_top_k(
        logits / sampling.temperature, sampling.top_k and max(sampling.top_k, at_least)
    )
    return keep_top_p(logits, sampling.top_p, at_least)


def tokens_seen(texts: list[list[int]], logits: Tensor) -> Tensor:
    """Which tokens each text holds, (B, V) bool like `logits`."""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for row, ids in enumerate(texts):
        seen[row, ids] = True
    return seen


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (..., V) with those of the tokens marked in `seen` made less likely."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Logits (..., V) with all but the k largest at -inf; 0 keeps all."""
    return (
        logits.masked_fill(logits < logits.topk(k).values[..., -1:], -torch.inf)
        if 0 < k < logits.shape[-1]
        else logits
    )


def keep_top_p(logits: Tensor, p: float, at_least: int = 1) -> Tensor:
    """Logits (..., V) with all but the most likely ones that together reach mass p at -inf; the one that crosses p is kept."""
    if p == 1.0:
        return logits
    total, V = logits.logsumexp(-1, keepdim=True), logits.shape[-1]
    for head in (min(HEAD, V), V):
        ordered, index = logits.topk(head)
        mass = (ordered - total).exp()
        outside = mass.cumsum(-1) - mass >= p  # what came before it was enough already
        if bool(outside[..., -1].all()):
            break
    outside[..., :at_least] = False
    return torch.full_like(logits, -torch.inf).scatter(
        -1, index, ordered.masked_fill(outside, -torch.inf)
    )
