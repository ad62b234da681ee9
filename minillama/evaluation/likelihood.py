"""Likelihoods of given continuations: the engine under every score.

    context  The following are … Answer: B ⏎⏎ Find all … Answer:      continuations  ▁A  ▁B  ▁C  ▁D

Three things make it fast, and none changes a score by more than rounding. Contexts that begin with the same ids share their keys and
values: n tails of t tokens behind a prefix of P cost P + n t, not n (P + t). One row gives all continuations that are single tokens.
Rows of like length are batched, padded on the right, and the head is applied only where it is read.

Shapes: B rows, T tail tokens, P prefix tokens, S all tokens, K key/value heads, D head size, C width, V vocabulary, N positions read.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from minillama.model import Llama

LOGIT_CHUNK = 1 << 22  # logits that exist at a time: 16 MB
SPREAD = 1.1  # longest row of a batch to shortest, and some tokens more: padding is computed like anything else
WORTH = 0.2  # share a prefix that is this part of a context; less would not pay for smaller batches


@dataclass(frozen=True)
class Query:
    """What to read: log p(continuation | context) for each continuation. Nothing in it is empty."""

    context: list[int]
    continuations: list[list[int]]

    @cached_property
    def tails(self) -> list[list[int]]:
        """What the model must see behind the context, a row each; a single empty one where continuations are single tokens."""
        tails = [continuation[:-1] for continuation in self.continuations]
        return tails if any(tails) else [[]]

    @property
    def length(self) -> int:
        return len(self.context) + max(map(len, self.tails))


class QueryResult(NamedTuple):
    """What the model says to a query."""

    logprobs: list[float]  # of each continuation, summed over its tokens
    logits: list[float]  # of each continuation's first token, as the head gives them
    greedy: int  # the token the model itself would write next


class Batch(NamedTuple):
    """Queries (by index) that go through the model together, behind a common prefix of so many tokens; cost: tokens computed."""

    prefix: int
    members: list[int]
    cost: int


def plan(queries: list[Query], batch_size: int) -> list[Batch]:
    """Each query in one batch, of at most `batch_size` rows or by itself. Depends on nothing but its arguments.
    In the order of their contexts neighbours share most: each query joins the group before it, unless apart they save more."""
    groups: list[
        tuple[int, int, list[int]]
    ] = []  # (P tokens in common, n rows, members); to compute P once saves P (n - 1) tokens
    for i in sorted(range(len(queries)), key=lambda i: queries[i].context):
        own, rows = (
            len(queries[i].context) - 1,
            len(queries[i].tails),
        )  # own: all but the last token, which is left to be read
        if groups:
            prefix, n, members = groups[-1]
            common = min(prefix, own, _in_common(queries[members[-1]].context, queries[i].context))
            together, apart = (
                common * (n + rows - 1),
                prefix * (n - 1) + own * (rows - 1),
            )  # tokens saved
            if common >= WORTH * own and together >= apart:
                groups[-1] = common, n + rows, [*members, i]
                continue
        groups.append((own, rows, [i]))
    alone = [members[0] for _, n, members in groups if n == 1]
    sharing = [(prefix, members) for prefix, n, members in groups if n > 1]
    return [
        batch
        for prefix, members in [(0, alone), *sharing]
        for batch in _batches(queries, prefix, members, batch_size)
    ]


def _in_common(a: list[int], b: list[int]) -> int:
    """How many ids are the same at the beginning of both."""
    return next(
        (at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _batches(queries: list[Query], prefix: int, members: list[int], batch_size: int) -> list[Batch]:
    """The shortest first; a batch ends where it is full, or where its shortest row would be padded too much."""
    batches, rows, longest = [], batch_size, 0
    for i in sorted(members, key=lambda i: (queries[i].length, i)):
        length, more = queries[i].length - prefix, len(queries[i].tails)
        if rows + more > batch_size or length > longest:
            batches, rows, longest = [*batches, []], 0, SPREAD * length + 8
        batches[-1].append(i)
        rows += more
    return [
        Batch(
            prefix,
            some,
            sum(len(queries[i].tails) for i in some) * (queries[some[-1]].length - prefix),
        )
        for some in batches
    ]


class SharedPrefix:
    """A cache (`model.KeyValueCache`) that computes the keys and values of some tokens once, and lends them to any number of rows."""

    def __init__(self, model: Llama, tokens: list[int]) -> None:
        self.config, self.capacity, self.lengths = model.config, model.config.max_seq_len, None
        self.layers: list[tuple[Tensor, Tensor]] = []  # (1, P, K, D) each
        self.positions = torch.arange(len(tokens), device=model.lm_head.weight.device)
        model(torch.tensor([tokens], device=self.positions.device), cache=self)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The prefix's keys and values (B, S, K, D) the first time; later those, and behind them the rows' own, which are not kept."""
        if layer == len(self.layers):
            self.layers.append((k, v))
            return k, v
        return tuple(
            torch.cat((kept.expand(len(own), -1, -1, -1), own), 1)
            for kept, own in zip(self.layers[layer], (k, v), strict=True)
        )


@torch.inference_mode()
def read(
    model: Llama, queries: list[Query], batches: Iterable[Batch]
) -> Iterator[dict[int, QueryResult]]:
    """{index of a query: its reading} for one batch after another."""
    for tokens, some in groupby(
        batches, key=lambda batch: queries[batch.members[0]].context[: batch.prefix]
    ):
        prefix = SharedPrefix(model, tokens) if tokens else None
        for batch in some:
            readings = _read_batch(model, [queries[i] for i in batch.members], len(tokens), prefix)
            yield dict(zip(batch.members, readings, strict=True))


def _read_batch(
    model: Llama, queries: list[Query], P: int, prefix: SharedPrefix | None
) -> Iterator[QueryResult]:
    """A reading for each query; their contexts begin with the same P tokens."""
    rows = [query.context[P:] + tail for query in queries for tail in query.tails]
    T, device = max(map(len, rows)), model.lm_head.weight.device
    if prefix:
        prefix.positions = torch.arange(P, P + T, device=device)
    hidden = model(
        torch.tensor([row + [0] * (T - len(row)) for row in rows], device=device), cache=prefix
    )  # (B, T, C)
    wanted, first = (
        [],
        0,
    )  # (position among B·T, token to read behind it); first: of the query's rows
    for query in queries:
        for number, continuation in enumerate(query.continuations):
            row = first + min(number, len(query.tails) - 1)  # each its own, or all the only one
            wanted += enumerate(continuation, row * T + len(query.context) - P - 1)
        first += len(query.tails)
    values = iter(_apply_head(model, hidden.flatten(0, 1), wanted))
    for query in queries:
        found = [[next(values) for _ in continuation] for continuation in query.continuations]
        yield QueryResult(
            [sum(log_p for _, log_p, _ in some) for some in found],
            [some[0][0] for some in found],
            int(found[0][0][2]),
        )


def _apply_head(model: Llama, hidden: Tensor, wanted: list[tuple[int, int]]) -> list[list[float]]:
    """[logit, log-probability, the position's likeliest token] of each (position, token), by position, for hidden (B·T, C)."""
    position, token = torch.tensor(wanted).T
    places, which = position.unique_consecutive(
        return_inverse=True
    )  # so that the head is applied to each once
    found, step = [], max(1, LOGIT_CHUNK // model.config.vocab_size)
    for number, some in enumerate(places.split(step)):
        logits = model.logits(hidden[some.to(hidden.device)]).float()  # (step, V)
        mine = which // step == number
        row, column = (which[mine] % step).to(hidden.device), token[mine].to(hidden.device)
        logit = logits[row, column]
        found.append(
            torch.stack(
                (logit, logit - logits.logsumexp(-1)[row], logits.argmax(-1)[row].float()), 1
            )
        )
    return torch.cat(found).tolist()
