"""Beyond the context: a completion is one of a model with a raised rotary base."""

from dataclasses import replace

import pytest
import torch

from minillama.errors import UserError
from minillama.generation.decode import Completion, decode, rope_alpha_for, scale_rope
from minillama.generation.sampling import Sampling
from minillama.llama_config import RopeScaling
from tests.conftest import TINY, generate, random_model, random_tokens

GREEDY, SAMPLED = Sampling(temperature=0.0), Sampling(temperature=1.3, top_p=0.9)


@pytest.mark.parametrize(("alpha", "base"), [(2.0, 20221.26), (4.0, 40889.94), (8.0, 82684.62)])
def test_ntk_raises_the_rotary_base_to_the_published_values(alpha: float, base: float) -> None:
    config = replace(TINY, head_dim=128)
    assert scale_rope(config, [Completion([1])], alpha).rope_theta == pytest.approx(base, abs=0.01)


@pytest.mark.parametrize(
    ("length", "alpha"), [(8192, 3.0), (12288, 5.0), (18432, 8.0), (4096, 1.0), (100, 1.0)]
)
def test_alpha_follows_from_the_length_as_in_chinese_llama_alpaca_2(
    length: int, alpha: float
) -> None:
    config = replace(TINY, max_seq_len=4096)
    assert rope_alpha_for(config, Completion([1] * (length - 50), 50)) == alpha
    assert scale_rope(config, [Completion([1] * (length - 50), 50)], 0).rope_theta == pytest.approx(
        config.rope_theta * alpha ** (config.head_dim / (config.head_dim - 2))
    )


def test_a_text_beyond_the_context_is_one_of_a_model_with_the_raised_base() -> None:
    """Fixed from the first token on: reading everything again with that base gives the same."""
    model, prompt = random_model(max_seq_len=16), random_tokens(12).tolist()
    with pytest.raises(
        UserError,
        match=r"exceed the context of 16; use --max_new_tokens 4 or fewer, .*--rope_alpha auto",
    ):
        list(decode(model, [Completion(prompt, 20)], GREEDY))
    answer = Completion(prompt, 20)
    list(decode(model, [answer], GREEDY, rope_alpha=0))
    raised = random_model(max_seq_len=16, rope_theta=TINY.rope_theta * (32 / 8 - 1) ** (4 / 2))
    with torch.no_grad():
        logits = raised.logits(raised(torch.tensor([prompt + answer.ids])))[0]
    assert answer.ids == logits[11:-1].argmax(-1).tolist()
    short = Completion(prompt, 4)
    list(decode(model, [short], GREEDY, rope_alpha=0))
    assert short.ids == list(generate(model, prompt, 4, GREEDY)), (
        "within the context nothing is scaled"
    )
    assert replace(model.config) == model.config


def test_ntk_goes_on_top_of_position_interpolation() -> None:
    model = random_model(rope_scaling=RopeScaling("linear", 4.0))
    assert (
        scale_rope(model.config, [Completion([1])], 2.0).rope_scaling == model.config.rope_scaling
    )


def test_a_checkpoint_that_scales_its_base_itself_is_not_scaled_twice() -> None:
    model = random_model(rope_scaling=RopeScaling("dynamic", 2.0))
    with pytest.raises(UserError, match="rope_scaling, dynamic, scales"):
        scale_rope(model.config, [Completion([1])], 2.0)


def test_automatic_alpha_is_that_of_the_longest_completion() -> None:
    config = replace(TINY, max_seq_len=16)
    short = Completion([1] * 10, 4)
    long = Completion([1] * 30, 4)
    for completions in ([short, long], [long, short]):
        assert scale_rope(config, completions, 0) == scale_rope(config, [long], 0)
