"""Likelihoods of given continuations, computed batch by batch: the base of every score.

    log p(continuation | context) = sum over its tokens of log p(token | context, tokens before it)

Batches, shared prefixes and the chunks of the head change a likelihood by rounding only. Rows are
padded on the right, where causal attention hides the padding from every real token.

Shapes: B rows, T tokens of a row behind the prefix, P prefix tokens, S = P + T, K key/value heads,
D head size, C model width, V vocabulary, N positions to score.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from minillama.evaluation.batching import Query, QueryBatch
from minillama.llama_config import LlamaConfig
from minillama.model import Llama

LOGIT_CHUNK = 1 << 22  # logits that exist at a time: 16 MB


class QueryResult(NamedTuple):
    """What the model predicts for a query."""

    logprobs: list[float]  # of each continuation, summed over its tokens
    logits: list[float]  # of each continuation's first token, as the head gives them
    greedy: int  # the token that the model itself would write next


class Target(NamedTuple):
    """A token whose probability is wanted."""

    position: int  # among the B·T positions; the hidden state there predicts the token
    token: int


class TokenScore(NamedTuple):
    """What the model predicts at the position of a target."""

    logit: float
    logprob: float
    greedy: int  # the most likely token


class SharedPrefix:
    """A `model.KeyValueCache`: a prefix's keys and values, computed once for any number of rows."""

    def __init__(self, config: LlamaConfig, tokens: list[int], device: torch.device) -> None:
        self.config = config
        self.capacity = config.max_seq_len
        self.lengths = None
        self.tokens = tokens
        self.layers: list[tuple[Tensor, Tensor]] = []  # keys and values, (1, P, K, D) each
        self.positions = torch.arange(len(tokens), device=device)  # of the tokens of the next call

    @classmethod
    def compute(cls, model: Llama, tokens: list[int]) -> "SharedPrefix":
        """Run the model on the prefix, and keep its keys and values."""
        device = model.lm_head.weight.device
        prefix = cls(model.config, tokens, device)
        model(torch.tensor([tokens], device=device), cache=prefix)
        return prefix

    def extend(self, T: int) -> None:
        """Before a call of the model: its rows are T tokens, which follow the prefix."""
        P = len(self.tokens)
        self.positions = torch.arange(P, P + T, device=self.positions.device)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values so far, (B, S, K, D) each.

        The first call of a layer stores those of the prefix. Those of later calls are not kept.
        """
        if layer == len(self.layers):
            self.layers.append((k, v))
            return k, v
        B = len(k)
        prefix_k, prefix_v = self.layers[layer]
        k = torch.cat((prefix_k.expand(B, -1, -1, -1), k), dim=1)  # (B, S, K, D)
        v = torch.cat((prefix_v.expand(B, -1, -1, -1), v), dim=1)  # (B, S, K, D)
        return k, v


@torch.inference_mode()
def score_queries(
    model: Llama, queries: list[Query], batches: Iterable[QueryBatch]
) -> Iterator[dict[int, QueryResult]]:
    """Yield the results of one batch after another, by the index of the query.

    Successive batches with the same prefix share its keys and values.
    """
    prefix: SharedPrefix | None = None
    for batch in batches:
        members = [queries[i] for i in batch.members]
        tokens = members[0].context[: batch.prefix]
        if not tokens:
            prefix = None
        elif prefix is None or prefix.tokens != tokens:
            prefix = SharedPrefix.compute(model, tokens)
        results = _score_batch(model, members, prefix)
        yield dict(zip(batch.members, results, strict=True))


def _score_batch(
    model: Llama, queries: list[Query], prefix: SharedPrefix | None
) -> list[QueryResult]:
    """The result of each query; their contexts begin with the prefix."""
    P = len(prefix.tokens) if prefix else 0
    rows = [query.context[P:] + tail for query in queries for tail in query.tails]
    T = max(map(len, rows))
    device = model.lm_head.weight.device
    if prefix:
        prefix.extend(T)
    padded = [row + [0] * (T - len(row)) for row in rows]
    hidden = model(torch.tensor(padded, device=device), cache=prefix)  # (B, T, C)
    targets = _find_targets(queries, P, T)
    # In the order of _find_targets: by query, then continuation, then token.
    scores = iter(_score_targets(model, hidden.flatten(0, 1), targets))
    results = []
    for query in queries:
        logprobs = []
        first_tokens = []
        for continuation in query.continuations:
            token_scores = list(islice(scores, len(continuation)))
            logprobs.append(sum(token_score.logprob for token_score in token_scores))
            first_tokens.append(token_scores[0])
        logits = [token_score.logit for token_score in first_tokens]
        results.append(QueryResult(logprobs, logits, first_tokens[0].greedy))
    return results


def _find_targets(queries: list[Query], P: int, T: int) -> list[Target]:
    """Every token of every continuation, with the position that predicts it: by query, then
    continuation, then token."""
    targets = []
    row = 0
    for query in queries:
        last = len(query.context) - P - 1  # column of the context's last token
        has_own_rows = len(query.tails) > 1
        for number, continuation in enumerate(query.continuations):
            first_position = row * T + last
            if has_own_rows:
                first_position += number * T
            for offset, token in enumerate(continuation):
                targets.append(Target(first_position + offset, token))
        row += len(query.tails)
    return targets


def _score_targets(model: Llama, hidden: Tensor, targets: list[Target]) -> list[TokenScore]:
    """Apply the head at the targets' positions, to some at a time. hidden: (B·T, C)."""
    positions, tokens = torch.tensor(targets).T  # (N,) each
    unique, index = positions.unique_consecutive(return_inverse=True)  # the head runs once at each
    chunk_size = max(1, LOGIT_CHUNK // model.config.vocab_size)
    chunks = []
    for number, chunk in enumerate(unique.split(chunk_size)):
        logits = model.logits(hidden[chunk.to(hidden.device)]).float()  # (chunk, V)
        in_chunk = index // chunk_size == number  # (N,)
        row = (index[in_chunk] % chunk_size).to(hidden.device)
        token = tokens[in_chunk].to(hidden.device)
        logit = logits[row, token]
        logprob = logit - logits.logsumexp(-1)[row]
        greedy = logits.argmax(-1)[row].float()  # exact below 2^24
        chunks.append(torch.stack((logit, logprob, greedy), dim=1))  # (n, 3)
    scores = []
    for logit, logprob, greedy in torch.cat(chunks).tolist():
        scores.append(TokenScore(logit, logprob, int(greedy)))
    return scores
