"""Likelihoods of given continuations: the engine under every score.

A model that is asked to *write* an answer is scored on its manners too; one that is asked how *likely* each answer is, only on what it
knows. So a question becomes a `Query`: a context, and continuations whose log-probabilities are read off.

    context       The following are … Answer: B ⏎⏎ Find all … Answer:        computed up to its last token
    continuations  ▁A   ▁B   ▁C   ▁D                                         four numbers of one row of logits

Three things make it fast, and none changes a score by more than rounding:
- contexts that begin with the same tokens share their keys and values: `plan` finds where by sorting them, on ids, so that text is
  never encoded otherwise than whole. With prefix P and tails of t tokens, n queries cost P + n t instead of n (P + t);
- the continuations of a query share its context, and one row gives them all where each is a single token;
- rows of like length are batched, padded on the right (where causal attention does not see it), and the head is applied only to the
  positions that are read, a chunk at a time.

Shapes: B rows, T tail tokens, S all tokens, K key/value heads, D head size, C width, V vocabulary, N positions read.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from minillama.model import Llama

LOGIT_CHUNK = 1 << 22  # logits that exist at a time: 16 MB
WORTH = 0.2  # a prefix is shared where that saves this part of the tokens: less would not pay for splitting batches


@dataclass(frozen=True)
class Query:
    """What to read: log p(continuation | context) for each continuation. Nothing in it is empty."""

    context: list[int]
    continuations: list[list[int]]

    @property
    def rows(self) -> list[list[int]]:
        """What the model must see of each continuation behind the context; one row where every one is a single token."""
        tails = [continuation[:-1] for continuation in self.continuations]
        return tails if any(tails) else [[]]

    @property
    def length(self) -> int:
        return len(self.context) + max(map(len, self.rows))


@dataclass(frozen=True)
class Reading:
    """What the model says to a query."""

    logprobs: list[float]  # of each continuation, summed over its tokens
    logits: list[float]    # of each continuation's first token, as the head gives them
    greedy: int            # the token the model itself would write next


@dataclass(frozen=True)
class Batch:
    """Queries that go through the model together, behind a common prefix of `depth` tokens."""

    depth: int
    members: tuple[int, ...]
    cost: int  # tokens computed, padding included


def plan(queries: list[Query], batch_size: int) -> list[Batch]:
    """Every query in one batch of at most `batch_size` rows, or alone if it has more. Depends on nothing but its arguments."""
    order = sorted(range(len(queries)), key=lambda i: queries[i].context)
    shared = [_common(queries[a].context, queries[b].context) for a, b in pairwise(order)]
    groups: dict[tuple[int, int], list[int]] = {}
    for depth, lo, hi in _best_split(queries, order, shared, 0, len(order))[1]:
        groups.setdefault((depth, lo if depth else -1), []).extend(order[lo:hi])
    batches = []
    for (depth, _), members in groups.items():
        batch: list[int] = []
        for i in [*sorted(members, key=lambda i: (queries[i].length, i)), None]:
            rows = sum(len(queries[j].rows) for j in batch)
            if batch and (i is None or rows + len(queries[i].rows) > batch_size):
                batches.append(Batch(depth, tuple(batch), rows * (queries[batch[-1]].length - depth)))
                batch = []
            batch += [] if i is None else [i]
    return batches


def _best_split(queries: list[Query], order: list[int], shared: list[int], lo: int, hi: int) -> tuple[int, list[tuple[int, int, int]]]:
    """(tokens saved, [(depth, lo, hi), …]) for the sorted contexts lo..hi: all behind what they have in common, or split where they
    have no more in common than that, whichever saves more."""
    if lo == hi:
        return 0, []
    members = [queries[i] for i in order[lo:hi]]
    depth = min(shared[lo:hi - 1], default=len(members[0].context) - 1)
    rows = [query.length for query in members for _ in query.rows]
    saved = depth * (len(rows) - 1)
    if saved < WORTH * sum(rows):
        saved = 0
    here = saved, [(depth if saved else 0, lo, hi)]
    if hi - lo == 1:
        return here
    cuts = [lo, *(i + 1 for i in range(lo, hi - 1) if shared[i] == depth), hi]
    if len(cuts) == hi - lo + 1 and all(len(query.rows) == 1 for query in members):
        return here  # single rows have nothing left to share
    parts = [_best_split(queries, order, shared, a, b) for a, b in pairwise(cuts)]
    below = sum(part[0] for part in parts)
    return (below, [group for part in parts for group in part[1]]) if below > saved else here


def _common(a: list[int], b: list[int]) -> int:
    """How many tokens two contexts begin with in common; at least one of each is left to be read."""
    most = min(len(a), len(b)) - 1
    return next((i for i in range(most) if a[i] != b[i]), most)


class SharedPrefix:
    """A cache (`model.KeyValueCache`) that holds the keys and values of some tokens once, and lends them to any number of rows."""

    def __init__(self, model: Llama, tokens: list[int], device: torch.device) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []  # (1, P, K, D) each
        self.capacity, self.positions = model.config.max_seq_len, torch.arange(len(tokens), device=device)
        model(torch.tensor([tokens], device=device), cache=self)

    def before(self, count: int) -> "SharedPrefix":
        """Ready for rows of `count` tokens behind the prefix."""
        end = self.layers[0][0].shape[1]
        self.positions = torch.arange(end, end + count, device=self.positions.device)
        return self

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The prefix's own keys and values (B, S, K, D) the first time; then those followed by the rows' own, which are not kept."""
        if layer == len(self.layers):
            self.layers.append((k, v))
            return k, v
        return tuple(torch.cat((kept.expand(len(own), -1, -1, -1), own), 1) for kept, own in zip(self.layers[layer], (k, v), strict=True))


@torch.inference_mode()
def read(model: Llama, queries: list[Query], batches: Iterable[Batch]) -> Iterator[list[tuple[int, Reading]]]:
    """(index of a query, its reading) for the queries of one batch after another."""
    device = model.lm_head.weight.device
    tokens, prefix = None, None
    for batch in batches:
        wanted = queries[batch.members[0]].context[:batch.depth]
        if wanted != tokens:
            tokens, prefix = wanted, SharedPrefix(model, wanted, device) if wanted else None
        yield list(zip(batch.members, _read_batch(model, [queries[i] for i in batch.members], batch.depth, prefix), strict=True))


def _read_batch(model: Llama, queries: list[Query], depth: int, prefix: SharedPrefix | None) -> list[Reading]:
    rows, at, pairs = [], [], []  # at: (row, position) to apply the head to; pairs: (index into at, token) to read there
    for query in queries:
        single = len(query.rows) < len(query.continuations)
        for number, continuation in enumerate(query.continuations):
            if number == 0 or not single:
                rows.append(query.context[depth:] + continuation[:-1])
                at += [(len(rows) - 1, len(query.context) - depth - 1 + j) for j in range(len(continuation))]
            pairs += [(len(at) - len(continuation) + j, token) for j, token in enumerate(continuation)]
    T, device = max(map(len, rows)), model.lm_head.weight.device
    tokens = torch.tensor([row + [0] * (T - len(row)) for row in rows], device=device)            # (B, T)
    hidden = model(tokens, cache=prefix.before(T) if prefix else None)                            # (B, T, C)
    hidden = hidden[tuple(torch.tensor(at, device=device).T)]                                     # (N, C)
    values, greedy = _apply_head(model, hidden, torch.tensor(pairs, device=device))
    readings = []
    values, pairs = iter(values), iter(pairs)
    for query in queries:
        found = [[(next(pairs)[0], *next(values)) for _ in continuation] for continuation in query.continuations]
        readings.append(Reading([sum(logprob for *_, logprob in tokens) for tokens in found], [tokens[0][1] for tokens in found],
                                greedy[found[0][0][0]]))
    return readings


def _apply_head(model: Llama, hidden: Tensor, pairs: Tensor) -> tuple[list[list[float]], list[int]]:
    """([logit, log-probability] of each pair (position, token), the most likely token of each position) for hidden (N, C)."""
    values, greedy = torch.empty(len(pairs), 2), []
    step = max(1, LOGIT_CHUNK // model.config.vocab_size)
    for start in range(0, len(hidden), step):
        logits = model.logits(hidden[start:start + step]).float()  # (step, V)
        inside = ((pairs[:, 0] >= start) & (pairs[:, 0] < start + step)).nonzero().squeeze(1)
        position, token = pairs[inside, 0] - start, pairs[inside, 1]
        logit = logits[position, token]
        values[inside.cpu()] = torch.stack((logit, logit - logits.logsumexp(-1)[position]), 1).cpu()
        greedy += logits.argmax(-1).tolist()
    return values.tolist(), greedy
