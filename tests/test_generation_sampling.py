"""Sampling: transformers' filters, and samples that follow their distribution."""

import pytest
import torch

from minillama.errors import UserError
from minillama.generation.sampling import (
    Sampling,
    filter_logits,
    keep_top_k,
    keep_top_p,
    next_tokens,
    penalise,
    tokens_seen,
)
from tests.conftest import generate, random_model

LOGITS = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)) * 3


GREEDY = Sampling(temperature=0.0)


@pytest.mark.parametrize("k", [1, 5, 39, 40, 100])
def test_top_k_is_transformers(k: int) -> None:
    transformers = pytest.importorskip("transformers")
    assert torch.equal(keep_top_k(LOGITS[0], k), transformers.TopKLogitsWarper(k)(None, LOGITS)[0])


def test_top_k_keeps_every_token_as_likely_as_the_last_as_in_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    kept = keep_top_k(logits, 2)
    assert kept.isfinite().sum() == 4
    assert torch.equal(kept, transformers.TopKLogitsWarper(2)(None, logits))


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.999])
def test_top_p_is_transformers(p: float) -> None:
    transformers = pytest.importorskip("transformers")
    assert torch.equal(keep_top_p(LOGITS[0], p), transformers.TopPLogitsWarper(p)(None, LOGITS)[0])


@pytest.mark.parametrize("penalty", [0.5, 1.3, 10.0])
def test_the_repetition_penalty_is_transformers(penalty: float) -> None:
    transformers = pytest.importorskip("transformers")
    text = [3, 7, 7, 3, 12, 0, 39]
    theirs = transformers.RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([text]), LOGITS.clone()
    )
    assert torch.equal(penalise(LOGITS, tokens_seen([text], LOGITS), penalty), theirs)


def test_top_p_keeps_the_token_that_crosses_p() -> None:
    """By hand: masses 0.5, 0.3, 0.2. For 0.6 two tokens are needed; for 0.49 the first."""
    logits = torch.tensor([0.3, 0.5, 0.2]).log()
    assert keep_top_p(logits, 0.6).isfinite().tolist() == [True, True, False]
    assert keep_top_p(logits, 0.49).isfinite().tolist() == [False, True, False]


@pytest.mark.parametrize("p", [0.25, 0.5, 0.75])
def test_top_p_ends_where_p_is_reached_exactly(p: float) -> None:
    """Four tokens of mass 1/4: transformers keeps as many as make p, and no further one."""
    transformers = pytest.importorskip("transformers")
    logits = torch.zeros(1, 4)
    kept = keep_top_p(logits, p).isfinite().sum()
    assert kept == transformers.TopPLogitsWarper(p)(None, logits).isfinite().sum() == 4 * p


def test_temperature_top_k_and_top_p_come_in_transformers_order() -> None:
    """Temperature changes the masses that top-p adds up."""
    transformers = pytest.importorskip("transformers")
    for temperature in (0.5, 2.0):
        theirs = LOGITS.clone()
        for warper in (
            transformers.TemperatureLogitsWarper(temperature),
            transformers.TopKLogitsWarper(20),
            transformers.TopPLogitsWarper(0.8),
        ):
            theirs = warper(None, theirs)
        assert torch.equal(filter_logits(LOGITS, Sampling(temperature, 20, 0.8)), theirs)


def test_samples_follow_the_distribution() -> None:
    """Chi-square of 4000 samples, 4 degrees of freedom: below 18.5 for 999 of 1000 seeds."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])
    generator = torch.Generator().manual_seed(0)
    T = 0.7
    samples = next_tokens(logits.expand(4000, -1), None, Sampling(T, 0, 1.0), [generator] * 4000)
    expected = 4000 * (logits / T).softmax(0)
    assert float(((samples.bincount(minlength=5) - expected).square() / expected).sum()) < 18.5


def test_what_top_k_and_top_p_remove_is_never_sampled() -> None:
    generators = [torch.Generator().manual_seed(0)] * 200
    logits = torch.tensor([3.0, 2.9, 2.8, 2.7]).expand(200, -1)
    assert set(next_tokens(logits, None, Sampling(5.0, 2, 1.0), generators).tolist()) == {0, 1}
    assert set(next_tokens(logits, None, Sampling(1.0, 0, 0.5), generators).tolist()) == {0, 1}


def test_the_same_seed_gives_the_same_text_and_another_seed_another() -> None:
    model, sampling = random_model(), Sampling(temperature=1.5, top_p=1.0)
    one, same, other = (list(generate(model, [1], 30, sampling, seed=seed)) for seed in (5, 5, 6))
    assert one == same
    assert one != other


def test_temperature_near_zero_is_greedy() -> None:
    model = random_model()
    assert list(generate(model, [1], 20, Sampling(1e-4), seed=0)) == list(
        generate(model, [1], 20, GREEDY)
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"repetition_penalty": 0.0},
    ],
    ids=str,
)
def test_impossible_sampling_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError, match="expected temperature >= 0"):
        Sampling(**wrong)


def test_top_p_looks_beyond_the_likeliest_where_their_mass_is_too_small() -> None:
    """The first 256 of 1000 tokens have 0.29 of the mass if it is even, all if it is peaked."""
    transformers = pytest.importorskip("transformers")
    flat = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0)) * 0.1
    for logits, p in (
        (flat, 0.2),
        (flat, 0.9),
        (flat * 80, 0.9),
        (torch.cat((flat[:1], 80 * flat[1:])), 0.7),
    ):
        assert torch.equal(keep_top_p(logits, p), transformers.TopPLogitsWarper(p)(None, logits))
