"""Batches: a completion does not depend on the rest of the batch, or on how prompts are read."""

from pathlib import Path

import pytest
import torch

from minillama.checkpoint.hf_reader import load_model
from minillama.errors import UserError
from minillama.generation import decode as decoding
from minillama.generation.cache import Cache
from minillama.generation.decode import Completion, decode, prefill
from minillama.generation.sampling import Sampling
from minillama.model import Llama
from minillama.ops import Documents
from minillama.parallel.tensor import set_sizes
from minillama.tokenizer import open_tokenizer
from tests.conftest import TINY, generate, random_model, random_tokens

GREEDY, SAMPLED = Sampling(temperature=0.0), Sampling(temperature=1.3, top_p=0.9)


PROMPTS = [[1, 7, 9], [1], [1, 4, 4, 8, 30, 2, 11, 19, 3, 5], [1, 7, 9, 13], [5] * 20]


def together(
    model: Llama,
    prompts: list[list[int]],
    room: int,
    sampling: Sampling,
    stop: tuple[int, ...] = (),
    seed: int | None = 3,
) -> list[Completion]:
    answers = [Completion(prompt, room) for prompt in prompts]
    assert all(answer in answers for answer in decode(model, answers, sampling, stop, seed))
    return answers


@pytest.mark.parametrize(
    "sampling",
    [GREEDY, SAMPLED, Sampling(0.0, repetition_penalty=1.4), Sampling(0.9, 7, 0.8, 1.2)],
    ids=str,
)
@pytest.mark.parametrize("chunk", [512, 4], ids=["read at once", "read in chunks of 4"])
def test_every_text_of_a_batch_is_the_text_it_would_be_alone(
    sampling: Sampling, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Different lengths, and stop tokens that end some early: rows leave, and others move."""
    model = random_model()
    alone = [
        list(generate(model, prompt, 25, sampling, (17, 30, 41), seed=3)) for prompt in PROMPTS
    ]
    assert len({len(ids) for ids in alone}) > 2, "some end early, at different times"
    monkeypatch.setattr(decoding, "CHUNK", chunk)
    answers = together(model, PROMPTS, 25, sampling, (17, 30, 41))
    assert [answer.ids for answer in answers] == alone
    assert [answer.finish_reason for answer in answers] == [
        "length" if len(ids) == 25 else "eos" for ids in alone
    ]


def test_texts_of_a_trained_llama_are_the_same_in_a_batch(shared: Path) -> None:
    directory = shared / "models/stories260K"
    model, tokenizer = load_model(directory), open_tokenizer(directory)
    prompts = [
        [1, *tokenizer.encode(text)]
        for text in ("Once upon a time", "The", "Lily and Tom went to the park with a big red ball")
    ]
    alone = [list(generate(model, prompt, 120, GREEDY, (1, 2))) for prompt in prompts]
    assert [answer.ids for answer in together(model, prompts, 120, GREEDY, (1, 2))] == alone


def test_a_batch_may_hold_more_texts_than_each_has_tokens() -> None:
    model, prompts = random_model(), [[1 + n, 7][: 1 + n % 2] for n in range(8)]
    alone = [list(generate(model, prompt, 3, GREEDY)) for prompt in prompts]
    assert [answer.ids for answer in together(model, prompts, 3, GREEDY)] == alone


@torch.no_grad()
def test_prompts_read_end_to_end_or_in_chunks_leave_what_each_leaves_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Logits, and the cache: long prompts by themselves, the others packed, equal ones once."""
    model = random_model()
    monkeypatch.setattr(decoding, "CHUNK", 8)
    prompts = [*PROMPTS, PROMPTS[0], random_tokens(30).tolist()]
    cache = Cache.for_model(model, model.config, len(prompts), 32)
    logits = prefill(model, cache, prompts)
    for row, prompt in enumerate(prompts):
        alone = Cache.for_model(model, model.config, 1, 32)
        hidden = model(torch.tensor([prompt]), cache=alone.extend(len(prompt)))
        assert torch.allclose(logits[row], model.logits(hidden)[0, -1], atol=1e-5)
        theirs = [*alone.keys, *alone.values]
        for kept, expected in zip([*cache.keys, *cache.values], theirs, strict=True):
            assert torch.allclose(
                kept[row, :, : len(prompt)], expected[0, :, : len(prompt)], atol=1e-5
            )
    assert cache.filled == [len(prompt) for prompt in prompts]


def test_equal_prompts_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = random_model(), []
    forward = Llama.forward
    monkeypatch.setattr(
        Llama,
        "forward",
        lambda self, tokens, *rest, **named: (
            read.append(tokens.numel()) or forward(self, tokens, *rest, **named)
        ),
    )
    answers = [Completion([1, 7, 9], 3, number) for number in range(4)]
    list(decode(model, answers, SAMPLED, seed=1))
    assert read == [3, 4, 4]
    assert len({tuple(answer.ids) for answer in answers}) > 1, (
        "each sample has random numbers of its own"
    )


def test_equal_prompts_of_several_lengths_are_copied_whole() -> None:
    model = random_model()
    prompts = [[1], [5] * 20, [5] * 20, [1]]
    answers = together(model, prompts, 10, GREEDY)
    assert [answer.ids for answer in answers] == [
        list(generate(model, prompt, 10, GREEDY)) for prompt in prompts
    ]


def test_a_finished_row_costs_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rooms of 2, 5 and 5 tokens: three rows twice, then two."""
    model, rows = random_model(), []
    forward = Llama.forward
    monkeypatch.setattr(
        Llama,
        "forward",
        lambda self, tokens, *rest, **named: (
            rows.append(len(tokens)) or forward(self, tokens, *rest, **named)
        ),
    )
    list(
        decode(model, [Completion([1, 2], 2), Completion([3, 4, 5], 5), Completion([6], 5)], GREEDY)
    )
    assert rows == [1, 3, 2, 2, 2]  # the first is the prompts' one run


def test_a_caller_may_end_a_completion() -> None:
    model = random_model()
    answers = [Completion([1, 7, 9], 10), Completion([4], 10)]
    for answer in decode(model, answers, GREEDY):
        if answer is answers[0] and len(answer.ids) == 3:
            answer.finish("stop")
    assert [len(answer.ids) for answer in answers] == [3, 10]
    assert answers[1].ids == list(generate(model, [4], 10, GREEDY))


@torch.no_grad()
def test_rows_of_different_length_take_several_tokens_at_once() -> None:
    """Ragged rows of the cache extended by four tokens each equal each row's whole text."""
    model, lengths = random_model(), [9, 2, 6]
    texts = [random_tokens(length + 4, seed=length).tolist() for length in lengths]
    cache = Cache.for_model(model, model.config, 3, 16)
    run = torch.tensor([[token for text in texts for token in text[:-4]]])
    documents = Documents(lengths)
    model(run, documents, cache.pack(documents, [0, 1, 2]))
    hidden = model(torch.tensor([text[-4:] for text in texts]), cache=cache.extend(4))
    for row, text in enumerate(texts):
        assert torch.allclose(hidden[row], model(torch.tensor([text]))[0, -4:], atol=1e-5)


def test_the_cache_holds_shared_heads_once_and_every_position_once() -> None:
    cache = Cache.for_model(random_model().bfloat16(), TINY, 3, 10)
    num_bytes = sum(stored.nbytes for stored in (*cache.keys, *cache.values))
    assert num_bytes == 2 * TINY.n_layers * 3 * 10 * TINY.n_kv_heads * TINY.head_dim * 2


def test_the_cache_of_a_rank_that_holds_some_of_the_heads_holds_those() -> None:
    """One of the three key/value heads: rows 4 to 8 of k_proj."""
    model = random_model()
    for layer in model.model.layers:
        weight = layer.self_attn.k_proj.weight
        layer.self_attn.k_proj.weight = torch.nn.Parameter(weight[4:8])
        set_sizes(layer.self_attn.k_proj)
    cache = Cache.for_model(model, TINY, 3, 10)
    assert {stored.shape for stored in (*cache.keys, *cache.values)} == {(3, 1, 10, TINY.head_dim)}


def test_the_same_seed_gives_the_same_text_in_any_batch_and_order() -> None:
    model = random_model()
    texts = {tuple(a.prompt_ids): a.ids for a in together(model, PROMPTS, 20, SAMPLED, seed=5)}
    backwards = {
        tuple(a.prompt_ids): a.ids for a in together(model, PROMPTS[::-1], 20, SAMPLED, seed=5)
    }
    assert texts == backwards
    assert texts[1, 7, 9] == list(generate(model, [1, 7, 9], 20, SAMPLED, seed=5))
    assert texts != {
        tuple(a.prompt_ids): a.ids for a in together(model, PROMPTS, 20, SAMPLED, seed=6)
    }


def test_logits_that_are_no_numbers_are_an_error_and_not_a_text() -> None:
    model = random_model()
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    for sampling in (GREEDY, SAMPLED):
        with pytest.raises(UserError, match="logits are not finite"):
            list(generate(model, [1, 2], 3, sampling))
