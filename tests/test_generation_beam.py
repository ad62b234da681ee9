"""Beam search: transformers' results, scores and samples, and a search worked by hand."""

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minillama.checkpoint.hf_reader import load_model
from minillama.checkpoint.hf_writer import save_model
from minillama.errors import UserError
from minillama.generation.beam import BeamOptions, Finished, beam_search, is_decided, move_rows
from minillama.generation.cache import Cache
from minillama.generation.decode import Completion
from minillama.generation.sampling import Sampling
from minillama.model import Llama
from tests.conftest import TINY, random_model
from tests.peers import open_in_transformers

PLAIN = Sampling(0.0, 0, 1.0)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Llama, object]:
    """The same random model in minillama and in transformers."""
    directory = tmp_path_factory.mktemp("beam")
    save_model(random_model(), directory)
    return load_model(directory), open_in_transformers(directory)


def ours(
    model: Llama,
    prompt: list[int],
    room: int,
    beams: BeamOptions,
    stop: tuple[int, ...],
    returned: int = 1,
    sampling: Sampling = PLAIN,
) -> list[Completion]:
    answers = [Completion(prompt, room) for _ in range(returned)]
    assert list(beam_search(model, answers, beams, sampling, stop, seed=1)) == answers
    return answers


def theirs(
    model: object,
    prompt: list[int],
    room: int,
    beams: BeamOptions,
    stop: tuple[int, ...],
    returned: int = 1,
    **more,
) -> list[tuple]:
    early = {"true": True, "false": False, "never": "never"}[beams.early_stopping]
    out = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=room,
        num_beams=beams.width,
        length_penalty=beams.length_penalty,
        early_stopping=early,
        num_return_sequences=returned,
        eos_token_id=list(stop) or None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **({"do_sample": False} | more),
    )
    texts = []
    for row, score in zip(
        out.sequences[:, len(prompt) :].tolist(), out.sequences_scores.tolist(), strict=True
    ):
        ends = [i for i, token in enumerate(row) if token in stop]
        texts.append((row[: ends[0]] if ends else row, pytest.approx(score, abs=1e-4)))
    return texts


@pytest.mark.parametrize("early", ["true", "false", "never"])
@pytest.mark.parametrize("penalty", [-0.7, 0.0, 1.0, 2.5])
@pytest.mark.parametrize(
    "stop", [(), (4,), (4, 0, 34, 6)], ids=["no stop", "one stop", "four stops"]
)
def test_beams_are_transformers(
    both: tuple, early: str, penalty: float, stop: tuple[int, ...]
) -> None:
    for prompt, width in (([1, 7, 9], 2), ([1, 4, 4, 8, 30], 3)):
        beams = BeamOptions(width, penalty, early)
        found = [
            (answer.ids, answer.score)
            for answer in ours(both[0], prompt, 16, beams, stop, returned=2)
        ]
        assert found == theirs(both[1], prompt, 16, beams, stop, returned=2)


def test_the_three_ways_to_stop_early_find_different_texts(both: tuple) -> None:
    """So the comparison above tells them apart."""
    found = [
        [
            [
                answer.ids
                for answer in ours(
                    both[0], prompt, 16, BeamOptions(width, penalty, early), (4, 0, 34, 6), 2
                )
            ]
            for prompt, width in (([1, 7, 9], 2), ([1, 4, 4, 8, 30], 3))
            for penalty in (-0.7, 0.0, 1.0, 2.5)
        ]
        for early in ("true", "false", "never")
    ]
    assert found[0] != found[1] != found[2]


def test_beams_of_a_trained_llama_are_transformers(shared: Path) -> None:
    directory = shared / "models/stories260K"
    model, peer = load_model(directory), open_in_transformers(directory)
    found = ours(model, [1, 403, 407], 60, BeamOptions(4), (1, 2))
    assert [(found[0].ids, found[0].score)] == theirs(
        peer, [1, 403, 407], 60, BeamOptions(4), (1, 2)
    )


def test_the_repetition_penalty_works_on_log_probabilities_as_in_transformers(both: tuple) -> None:
    found = ours(both[0], [1, 7, 9], 20, BeamOptions(3), (2,), sampling=Sampling(0.0, 0, 1.0, 1.5))
    assert [(found[0].ids, found[0].score)] == theirs(
        both[1], [1, 7, 9], 20, BeamOptions(3), (2,), repetition_penalty=1.5
    )


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1.0, 0, 1.0), Sampling(0.7, 10, 1.0), Sampling(1.2, 0, 0.6), Sampling(1.0, 1, 0.1)],
    ids=str,
)
def test_sampled_beams_are_transformers(
    both: tuple, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same stream of random numbers on both sides gives the same texts."""
    monkeypatch.setattr(
        "minillama.generation.beam.generator_for", lambda *_: torch.Generator().manual_seed(11)
    )
    for prompt in ([1, 7, 9], [4], [1, 2, 3, 5, 8]):
        beams = BeamOptions(3, sample=True)
        found = [
            (answer.ids, answer.score)
            for answer in ours(both[0], prompt, 16, beams, (2, 17), 2, sampling)
        ]
        torch.manual_seed(11)
        assert found == theirs(
            both[1],
            prompt,
            16,
            beams,
            (2, 17),
            2,
            do_sample=True,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
        )


def test_a_search_over_every_hypothesis_finds_the_likeliest_sequence() -> None:
    """As many beams as there are texts of two tokens: an exhaustive search."""
    model = random_model(vocab_size=6)
    best = ours(model, [1, 3], 3, BeamOptions(36), ())[0]
    with torch.no_grad():
        texts = [list(text) for text in itertools.product(range(6), repeat=3)]
        log_p = model.logits(model(torch.tensor([[1, 3, *text] for text in texts]))).log_softmax(-1)
    scores = [
        sum(float(log_p[i, 1 + place, token]) for place, token in enumerate(text)) / 3
        for i, text in enumerate(texts)
    ]
    assert best.ids == texts[max(range(216), key=scores.__getitem__)]
    assert best.score == pytest.approx(max(scores), abs=1e-5)


def test_a_child_keeps_its_parents_row_and_only_further_children_are_copied() -> None:
    """Children of rows 2, 2, 0: the first stays in 2, the second gets row 1, the third stays in 0.

    Positions before 4 are the prompt, which all rows share.
    """
    cache = Cache.for_model(random_model(), TINY, 3, 8)
    for kept in (*cache.keys, *cache.values):
        kept[:] = torch.arange(3.0).view(3, 1, 1, 1)
    cache.filled = [6, 6, 6]
    assert move_rows(cache, [2, 2, 0], start=4) == [2, 1, 0]
    assert cache.keys[0][:, 0, :6, 0].tolist() == [[0] * 6, [1] * 4 + [2] * 2, [2] * 6]


def test_more_texts_than_beams_are_refused() -> None:
    with pytest.raises(UserError, match=r"num_samples = 3: .*beams, 2"):
        ours(random_model(), [1], 3, BeamOptions(2), (), returned=3)


class Toy:
    """Tokens A, B, E (the end) and a start; the next token depends on the last one alone.

    It is the example of docs/decoding.md.
    """

    P = torch.tensor(
        [[0.35, 0.25, 0.40, 0], [0.05, 0.05, 0.90, 0], [0, 0, 1, 0], [0.5, 0.4, 0.1, 0]]
    )  # after A, B, E, start
    config, lm_head = replace(TINY, dim=4), torch.nn.Linear(4, 4)
    model = SimpleNamespace(layers=[], embed_tokens=lm_head)  # nothing is stored in the cache

    def __call__(
        self, tokens: torch.Tensor, documents: object = None, cache: object = None
    ) -> torch.Tensor:
        return torch.nn.functional.one_hot(tokens, 4).float()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.P.clamp(min=1e-30).log()


@pytest.mark.parametrize(("penalty", "scores"), [(1.0, [-0.511, -0.805]), (0.0, [-1.022, -1.609])])
def test_the_search_worked_by_hand(penalty: float, scores: list[float]) -> None:
    """Greedy goes to A, then the end: 0.5 · 0.4 = 0.20.

    Two beams keep B as well, and find B, then the end: 0.4 · 0.9 = 0.36.
    """
    A, B, E, START = range(4)
    (greedy,) = ours(Toy(), [START], 5, BeamOptions(1), (E,))
    assert greedy.ids == [A]
    found = ours(Toy(), [START], 5, BeamOptions(2, penalty), (E,), returned=2)
    assert [answer.ids for answer in found] == [[B], [A]]
    assert [answer.score for answer in found] == pytest.approx(scores, abs=1e-3)
    page = (Path(__file__).parents[1] / "docs/decoding.md").read_text(encoding="utf-8")
    assert all(f"{abs(score):.3f}" in page for score in scores)


@pytest.mark.parametrize("early_stopping", ["false", "never"])
@pytest.mark.parametrize(
    ("score", "decided"), [(-0.5, False), (-1.0, True)], ids=["can enter", "cannot"]
)
def test_with_a_penalty_below_zero_never_is_the_same_as_false(
    early_stopping: str, score: float, decided: bool
) -> None:
    """At length 4 the scores are -2 and -4, and the worst finished one has -3.

    Growing can only lower such a score, so the full length says nothing.
    """
    options = BeamOptions(2, length_penalty=-1.0, early_stopping=early_stopping)
    finished = [Finished(-1.0, [1]), Finished(-3.0, [2])]
    scores = torch.tensor([score, -9.0])
    assert is_decided(finished, scores, 4, 10, options) == decided
