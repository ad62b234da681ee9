"""Rules: which tokens a protocol scores, and which choice wins."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minillama.evaluation.batching import Query
from minillama.evaluation.likelihood import QueryResult
from minillama.evaluation.multiple_choice import decide
from minillama.evaluation.protocols import TASKS
from minillama.tokenizer import Tokenizer, open_tokenizer


def test_the_penalised_rule_is_that_of_transformers_logits_processors(
    benchmark: Callable, small_tokenizer: Tokenizer
) -> None:
    """The next token's logits, penalised where the prompt has the token, and the best letter."""
    transformers = pytest.importorskip("transformers")
    test = benchmark("cmmlu", max_length=10_000, limit=2)
    spaced = [small_tokenizer.encode(letter)[-1] for letter in "ABCD"]
    bare = [small_tokenizer.encode(f"：{letter}")[-1] for letter in "ABCD"]
    query = next(iter(test.queries.values()))
    assert query.continuations == [[token] for token in spaced + bare]
    penalise = transformers.RepetitionPenaltyLogitsProcessor(1.1)
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(1, small_tokenizer.size, generator=generator).abs()
    for logits in (random, -random):
        expected = penalise(torch.tensor([query.context]), logits)[0] / 0.2
        token_logits = [logits[0, token].item() for token in spaced + bare]
        result = QueryResult(logprobs=[0.0] * 8, logits=token_logits, greedy=0)
        predicted, scores = decide(test.protocol, small_tokenizer, query, result)
        sums = [(expected[a] + expected[b]).item() for a, b in zip(spaced, bare, strict=True)]
        assert list(scores.values()) == pytest.approx(sums, rel=1e-6)
        assert predicted == max(scores, key=scores.get)


class FixedDecoder:
    """A tokenizer that decodes every id as one text."""

    def __init__(self, text: str) -> None:
        self.text = text

    def decode(self, ids: list[int]) -> str:
        return self.text


@pytest.mark.parametrize(
    ("task", "written", "predicted"),
    [
        ("mmlu", "A", "A"),
        ("mmlu", "D.", "D"),
        ("mmlu", "Both", "B"),
        ("mmlu", "xC.", "C"),
        ("mmlu", "xC", ""),
        ("mmlu", " A", ""),
        ("mmlu", "a", ""),
        ("mmlu", "|", "|"),
        ("ceval", "A", "A"),
        ("ceval", "A.", ""),
        ("ceval", "Both", ""),
        ("ceval", "", ""),
    ],
)
def test_what_ascend_takes_for_an_answer(task: str, written: str, predicted: str) -> None:
    protocol = TASKS[task].protocols["ascend"]
    query = Query([1], [[1]] * 4)
    result = QueryResult([0.0] * 4, [0.0] * 4, greedy=5)
    assert decide(protocol, FixedDecoder(written), query, result).predicted == predicted


@pytest.mark.parametrize(("name", "predicted"), [("ascend", "yes"), ("lm_eval", "no")])
def test_equal_scores_go_to_the_protocols_first_choice(name: str, predicted: str) -> None:
    protocol = TASKS["boolq"].protocols[name]
    tie = QueryResult([-1.0] * 2, [0.0] * 2, greedy=0)
    decision = decide(protocol, FixedDecoder(""), Query([1], [[1]] * 2), tie)
    assert decision.predicted == predicted


@pytest.mark.parametrize(
    ("task", "tokens"),
    [
        ("boolq", [3869, 1939]),  # ▁Yes ▁No
        ("ceval", [319, 350, 315, 360, 29909, 29933, 29907, 29928]),  # ▁A … ▁D, A … D
        ("mmlu", [319, 350, 315, 360]),  # ▁A … ▁D
    ],
)
def test_the_tokens_of_llamas_vocabulary_that_default_protocols_compare(
    task: str, tokens: list[int], shared: Path, benchmark: Callable
) -> None:
    tokenizer = open_tokenizer(shared / "tokenizers/llama/tokenizer.model")
    test = benchmark(task, max_length=10_000, tokenizer=tokenizer)
    query = next(iter(test.queries.values()))
    assert query.continuations == [[token] for token in tokens]
