"""The plan of batches, worked by hand: prefixes are shared where that saves most."""

from minillama.evaluation.batching import Query, QueryBatch, plan
from tests.conftest import random_tokens


def prefixes_and_members(batches: list[QueryBatch]) -> list[tuple[int, list[int]]]:
    return sorted((batch.prefix, batch.members) for batch in batches)


def test_a_shared_prefix_is_computed_once_and_every_query_is_in_one_batch() -> None:
    shots = list(range(100, 140))
    other_shots = list(range(200, 240))
    queries = [Query(shots + [n] * (3 + n), [[1], [2]]) for n in range(5)]
    queries += [Query([*other_shots, n, 7], [[1], [2]]) for n in range(3)]
    queries += [Query([50, 51, 52], [[1], [2]])]
    batches = plan(queries, batch_size=4)
    assert sorted(i for batch in batches for i in batch.members) == list(range(9))
    assert prefixes_and_members(batches) == [
        (0, [8]),
        (40, [0, 1, 2, 3]),
        (40, [4]),
        (40, [5, 6, 7]),
    ]


def test_a_short_shared_prefix_does_not_split_batches() -> None:
    queries = [Query([1, 5, *random_tokens(20 + n, seed=n).tolist()], [[1]]) for n in range(8)]
    assert [batch.prefix for batch in plan(queries, 8)] == [0]


def test_a_longer_prefix_of_fewer_queries_is_preferred_if_it_saves_more() -> None:
    header = list(range(10))
    queries = []
    for shots in (list(range(20, 50)), list(range(60, 90))):
        queries += [Query([*header, *shots, 100 + n, 7], [[1]]) for n in range(4)]
    assert prefixes_and_members(plan(queries, 8)) == [(40, [0, 1, 2, 3]), (40, [4, 5, 6, 7])]


def test_choices_of_several_tokens_share_their_question() -> None:
    queries = [Query(random_tokens(30, seed=n).tolist(), [[1, 2], [3]]) for n in range(2)]
    batches = plan(queries, 8)
    assert prefixes_and_members(batches) == [(29, [0]), (29, [1])]
    assert [batch.cost for batch in batches] == [4, 4]  # two rows: a token of context, and one more


def test_rows_of_a_batch_are_of_similar_length() -> None:
    lengths = random_tokens(40, vocab_size=30, seed=3).tolist()
    queries = [Query([n + 10, *([7] * length)], [[1]]) for n, length in enumerate(lengths)]
    batches = plan(queries, 8)
    for batch in batches:
        longest = max(queries[i].length for i in batch.members)
        assert batch.cost == len(batch.members) * longest
    padded = sum(batch.cost for batch in batches)
    assert padded < 1.3 * sum(query.length for query in queries)
