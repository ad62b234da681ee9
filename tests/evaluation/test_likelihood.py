"""Likelihoods are transformers' own; neither batches nor shared prefixes change them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minillama.comm import Mesh
from minillama.evaluation import likelihood, runner
from minillama.evaluation.batching import Query, QueryBatch, plan, split_into_batches
from minillama.evaluation.likelihood import QueryResult, score_queries
from minillama.grid import make_grid
from minillama.model import Llama
from minillama.tokenizer import Tokenizer, open_tokenizer
from tests.conftest import random_tokens
from tests.peers import open_in_transformers


def results_of(model: Llama, queries: list[Query], batches: list[QueryBatch]) -> list[QueryResult]:
    """The result of each query, in order."""
    results = {}
    for batch in score_queries(model, queries, batches):
        results.update(batch)
    return [results[i] for i in range(len(queries))]


@torch.inference_mode()
def log_likelihood(peer, context: list[int], continuation: list[int]) -> float:
    """By one plain forward pass of transformers over one row."""
    logprobs = peer(torch.tensor([context + continuation])).logits[0].log_softmax(-1)
    last = len(context) - 1
    return sum(logprobs[last + j, token].item() for j, token in enumerate(continuation))


@pytest.mark.parametrize(
    ("task", "protocol", "n_shots", "limit"),
    [
        ("boolq", "ascend", 0, 8),
        ("boolq", "lm_eval", 0, 8),
        ("mmlu", "hendrycks", 1, 2),
        ("mmlu", "lm_eval", 0, 2),
        ("cmmlu", "chinese_alpaca", 0, 3),
    ],
)
def test_likelihoods_and_predictions_are_those_of_transformers_with_real_weights_and_questions(
    shared: Path, benchmark: Callable, task: str, protocol: str, n_shots: int, limit: int
) -> None:
    """stories260K has 512 tokens: " yes" and " no" are several, so continuations vary in length."""
    transformers = pytest.importorskip("transformers")
    directory = shared / "models/stories260K"
    model = load(directory)
    peer = open_in_transformers(directory)
    tokenizer = transformers.LlamaTokenizer.from_pretrained(directory)
    path = shared / "eval" / task
    test = benchmark(
        task,
        tokenizer=open_tokenizer(directory),
        data=str(path / "sample_of_dev.jsonl" if task == "boolq" else path),
        protocol=protocol,
        n_shots=n_shots,
        limit=limit,
    )
    records = runner.predict(model, test, 8, None, {"dtype": "float32"}, make_grid(Mesh()))
    assert len(records) == len(test.queries)
    for record in records:
        query = test.queries[record["id"]]
        prompt = test.protocol.prompt(test.questions[record["id"]], [])
        is_whole = protocol in ("hendrycks", "lm_eval") and not test.prompts_cut
        if is_whole and not n_shots:
            assert query.context == tokenizer(prompt).input_ids
        if test.protocol.rule != "penalised":
            scores = record["scores"].values()
            for continuation, score in zip(query.continuations, scores, strict=True):
                expected = log_likelihood(peer, query.context, continuation)
                assert score == pytest.approx(expected, abs=1e-4), record["id"]
        if (task, protocol) == ("boolq", "lm_eval"):
            assert any(len(continuation) > 1 for continuation in query.continuations)
            prompt_length = len(tokenizer(prompt).input_ids)
            no, yes = (
                log_likelihood(
                    peer, query.context, tokenizer(prompt + text).input_ids[prompt_length:]
                )
                for text in (" no", " yes")
            )
            assert record["predicted"] == ("yes" if yes > no else "no")


def load(directory: Path) -> Llama:
    from minillama.checkpoint.hf_reader import load_model

    return load_model(directory).eval()


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize(
    "changes", [{}, {"n_kv_heads": 1}, {"n_kv_heads": 6, "tie_embeddings": True}]
)
def test_likelihoods_are_those_of_transformers_however_queries_share_and_batch(
    tiny_checkpoint: Callable, batch_size: int, changes: dict
) -> None:
    directory = tiny_checkpoint(**changes)
    model = load(directory)
    peer = open_in_transformers(directory)
    ids = random_tokens(60).tolist()
    queries = []
    for n in range(5):  # single tokens behind a shared prefix
        queries.append(Query(ids[:20] + ids[25 + n : 30 + 2 * n], [[n + 1], [7], [3]]))
    queries += [
        Query(ids[30:45], [[5, 6, 7], [8], [9, 4]]),
        Query(ids[:20], [[5, 6], [8]]),
        Query(ids[:1], [[1], [2]]),
        Query(ids[:1], [ids[1:40]]),
        queries[0],
    ]
    results = results_of(model, queries, plan(queries, batch_size))
    for query, result in zip(queries, results, strict=True):
        expected = [log_likelihood(peer, query.context, c) for c in query.continuations]
        assert result.logprobs == pytest.approx(expected, abs=1e-5)
        logits = peer(torch.tensor([query.context])).logits[0, -1]
        first_logits = [logits[c[0]].item() for c in query.continuations]
        assert result.logits == pytest.approx(first_logits, abs=1e-5)
        assert result.greedy == logits.argmax()


def test_another_prefix_of_the_same_length_is_computed_anew(model: Llama) -> None:
    ids = random_tokens(20).tolist()
    queries = [Query(ids[:10], [[1]]), Query(ids[10:], [[1]])]
    alone = results_of(model, queries, [QueryBatch(0, [0]), QueryBatch(0, [1])])
    shared = results_of(model, queries, [QueryBatch(6, [0]), QueryBatch(6, [1])])
    for one, other in zip(alone, shared, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@pytest.mark.parametrize("task", ["mmlu", "boolq"])
def test_scores_do_not_depend_on_batches_sharing_or_the_chunks_of_the_head(
    task: str,
    model: Llama,
    benchmark: Callable,
    small_tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queries = list(benchmark(task, protocol="lm_eval").queries.values())

    def logprobs(batches: list[QueryBatch]) -> list[float]:
        return [value for r in results_of(model, queries, batches) for value in r.logprobs]

    assert any(batch.prefix for batch in plan(queries, 8))
    expected = logprobs(plan(queries, 8))
    monkeypatch.setattr(likelihood, "LOGIT_CHUNK", 3 * small_tokenizer.size)
    everything = list(range(len(queries)))
    for batch_size in (1, 5, 100):
        unshared = split_into_batches(queries, 0, everything, batch_size)
        for batches in (plan(queries, batch_size), unshared, unshared[::-1]):
            assert logprobs(batches) == pytest.approx(expected, abs=1e-5)
