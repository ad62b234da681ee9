"""Which queries go through the model together, so that as few tokens as possible are computed.

    context  The following are … Answer: B ⏎⏎ Find all … Answer:      continuations  ▁A  ▁B  ▁C  ▁D

1. Contexts that begin with the same tokens share the keys and values of that prefix. Behind a
   prefix of P tokens, n rows of t tokens cost P + n t instead of n (P + t).
2. One row gives the likelihoods of all continuations that are single tokens.
3. A batch holds rows of similar length, because padding is computed like any other token.
"""

from dataclasses import dataclass
from functools import cached_property

MAX_SPREAD = 1.1  # length of a batch's longest row to its shortest, plus MAX_PADDING tokens
MAX_PADDING = 8
MIN_SHARE = 0.2  # share a prefix that is this part of a context; a shorter one only splits batches


@dataclass(frozen=True)
class Query:
    """Asks for log p(continuation | context) of each continuation. No list in it is empty."""

    context: list[int]
    continuations: list[list[int]]

    @cached_property
    def tails(self) -> list[list[int]]:
        """What the model reads behind the context, a row each.

        The last token of a continuation is predicted, but not read. So if all continuations
        are single tokens, one row with an empty tail gives all of them.
        """
        tails = [continuation[:-1] for continuation in self.continuations]
        return tails if any(tails) else [[]]

    @property
    def length(self) -> int:
        """Tokens in the longest row."""
        return len(self.context) + max(map(len, self.tails))


@dataclass
class QueryBatch:
    """Queries that go through the model together, behind the first `prefix` tokens of each."""

    prefix: int  # tokens of the shared prefix
    members: list[int]  # indices of the queries
    num_rows: int = 0
    row_length: int = 0  # tokens of the longest row, without the prefix

    @property
    def cost(self) -> int:
        """Tokens computed, without the prefix."""
        return self.num_rows * self.row_length


@dataclass(frozen=True)
class PrefixGroup:
    """Queries whose contexts begin with the same `prefix` tokens."""

    prefix: int
    members: list[int]  # indices of the queries
    num_rows: int

    @property
    def tokens_saved(self) -> int:
        """The prefix is computed once and not in every row."""
        return self.prefix * (self.num_rows - 1)


def plan(queries: list[Query], batch_size: int) -> list[QueryBatch]:
    """Return batches that hold each query once. They depend on the arguments alone.

    A batch has at most `batch_size` rows, except that a query with more has a batch of its own.
    """
    groups = group_by_prefix(queries)
    unshared = [group.members[0] for group in groups if group.num_rows == 1]
    batches = split_into_batches(queries, 0, unshared, batch_size)
    for group in groups:
        if group.num_rows > 1:
            batches += split_into_batches(queries, group.prefix, group.members, batch_size)
    return batches


def group_by_prefix(queries: list[Query]) -> list[PrefixGroup]:
    """Group queries that share a prefix. Each query is in exactly one of the returned groups.

    In the sorted order of their contexts, neighbours share most. So each query is compared with
    the group before it only.
    """
    groups: list[PrefixGroup] = []
    for i in sorted(range(len(queries)), key=lambda i: queries[i].context):
        query = queries[i]
        own_prefix = len(query.context) - 1  # the last token is left to be read
        group = PrefixGroup(own_prefix, [i], len(query.tails))
        merged = merge(groups[-1], group, queries) if groups else None
        if merged is None:
            groups.append(group)
        else:
            groups[-1] = merged
    return groups


def merge(group: PrefixGroup, single: PrefixGroup, queries: list[Query]) -> PrefixGroup | None:
    """`group` with the query of `single`; None if the two save more tokens apart."""
    last_context = queries[group.members[-1]].context
    context = queries[single.members[0]].context
    prefix = min(group.prefix, single.prefix, common_prefix(last_context, context))
    merged = PrefixGroup(prefix, group.members + single.members, group.num_rows + single.num_rows)
    is_long_enough = prefix >= MIN_SHARE * single.prefix
    saves_more = merged.tokens_saved >= group.tokens_saved + single.tokens_saved
    return merged if is_long_enough and saves_more else None


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many tokens at the beginning of both are equal."""
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length


def split_into_batches(
    queries: list[Query], prefix: int, members: list[int], batch_size: int
) -> list[QueryBatch]:
    """Batches of similar length, the shortest first.

    A batch ends when it is full, or when the next row would pad its shortest one too much.
    """
    batches: list[QueryBatch] = []
    max_length = 0.0
    for i in sorted(members, key=lambda i: (queries[i].length, i)):
        length = queries[i].length - prefix
        num_rows = len(queries[i].tails)
        is_full = not batches or batches[-1].num_rows + num_rows > batch_size
        if is_full or length > max_length:
            batches.append(QueryBatch(prefix, members=[]))
            max_length = MAX_SPREAD * length + MAX_PADDING
        batch = batches[-1]
        batch.members.append(i)
        batch.num_rows += num_rows
        batch.row_length = length  # lengths rise
    return batches
