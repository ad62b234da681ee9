"""Decoding: transformers' greedy tokens, with and without cache, and where it ends."""

from pathlib import Path

import pytest
import torch

from minillama.checkpoint.hf_reader import load_model
from minillama.checkpoint.hf_writer import save_model
from minillama.checkpoint.run_directory import find_checkpoint
from minillama.errors import UserError
from minillama.generation.cache import Cache
from minillama.generation.sampling import (
    Sampling,
)
from minillama.llama_config import RopeScaling
from minillama.model import Llama
from minillama.tokenizer import open_tokenizer
from tests.conftest import generate, random_model, random_tokens
from tests.peers import open_in_transformers

GREEDY = Sampling(temperature=0.0)


def their_greedy(
    directory: Path, prompt: list[int], count: int, repetition_penalty: float = 1.0
) -> list[int]:
    model = open_in_transformers(directory)
    text = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=count,
        do_sample=False,
        repetition_penalty=repetition_penalty,
        eos_token_id=None,
        pad_token_id=0,
    )
    return text[0, len(prompt) :].tolist()


def test_greedy_tokens_with_a_repetition_penalty_equal_transformers(tmp_path: Path) -> None:
    """The penalty falls on tokens of the prompt and on those that were written."""
    prompt = random_tokens(40).tolist()
    save_model(random_model(max_seq_len=128), tmp_path)
    theirs = their_greedy(tmp_path, prompt, 40, repetition_penalty=1.3)
    sampling = Sampling(temperature=0.0, repetition_penalty=1.3)
    model = load_model(tmp_path)
    assert list(generate(model, prompt, 40, sampling)) == theirs
    assert theirs != list(generate(model, prompt, 40, GREEDY))


def test_greedy_tokens_of_a_really_trained_llama_equal_transformers(shared: Path) -> None:
    directory = shared / "models/stories260K"
    model, tokenizer = load_model(directory), open_tokenizer(directory)
    for text in ("Once upon a time", "Lily and Tom", "The"):
        prompt = [1, *tokenizer.encode(text)]
        assert list(generate(model, prompt, 100, GREEDY)) == their_greedy(directory, prompt, 100)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_heads": 1, "head_dim": 6},
        {"rope_scaling": RopeScaling("llama3", 4.0, original_max_seq_len=16)},
    ],
    ids=str,
)
def test_greedy_tokens_of_a_random_llama_equal_transformers(changes: dict, tmp_path: Path) -> None:
    save_model(random_model(**changes), tmp_path)
    assert list(generate(load_model(tmp_path), [1, 7, 9], 40, GREEDY)) == their_greedy(
        tmp_path, [1, 7, 9], 40
    )


@pytest.mark.parametrize("steps", [[20], [1] * 20, [7, 1, 1, 6, 5], [1, 19]], ids=str)
@torch.no_grad()
def test_reading_through_the_cache_in_any_steps_equals_reading_at_once(steps: list[int]) -> None:
    model, tokens = random_model(), random_tokens(2, 20)
    cache = Cache.for_model(model, model.config, 2, 20)
    parts = [model(part, cache=cache.extend(part.shape[1])) for part in tokens.split(steps, dim=1)]
    assert torch.allclose(torch.cat(parts, 1), model(tokens), atol=1e-5)


def test_cached_decoding_equals_reading_everything_again() -> None:
    """The keys and values of earlier tokens never change, so they may be kept."""
    model, text = random_model(), [1, 7, 9]
    for token in generate(model, text, 30, GREEDY):
        with torch.no_grad():
            assert token == int(model.logits(model(torch.tensor([text]))[0, -1]).argmax())
        text = [*text, token]


def test_generation_ends_before_any_of_the_stop_ids() -> None:
    model = random_model()
    free = list(generate(model, [1, 2], 20, GREEDY))
    stop = free[5]
    assert list(generate(model, [1, 2], 20, GREEDY, stop=(49, stop))) == free[: free.index(stop)]


def test_a_prompt_that_leaves_no_room_is_refused_with_the_number_that_fits() -> None:
    model = random_model(max_seq_len=32)
    with pytest.raises(
        UserError, match=r"prompt of 30 tokens .* context of 32; use --max_new_tokens 2"
    ):
        list(generate(model, [1] * 30, 3, GREEDY))
    with pytest.raises(UserError, match="shorten the prompt"):
        list(generate(model, [1] * 32, 1, GREEDY))
    with pytest.raises(UserError, match="the prompt is empty"):
        list(generate(model, [], 1, GREEDY))
    assert len(list(generate(model, [1] * 30, 2, GREEDY))) == 2


@torch.no_grad()
def test_cached_decoding_in_16_bits_stays_near_fp32() -> None:
    exact, rounded = random_model(), random_model().bfloat16()
    tokens = random_tokens(1, 12)
    cache = Cache.for_model(rounded, rounded.config, 1, 12)
    last = [rounded(tokens[:, i : i + 1], cache=cache.extend(1)) for i in range(12)][-1]
    reference = Llama.forward(exact, tokens)[0, -1]
    assert (last[0, 0].float() - reference).abs().max() < 0.1 * reference.abs().max()


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (["consolidated.00.pth", "params.json"], "convert.py meta --input"),
        ([], "holds no model"),
        (None, "no such directory"),
    ],
    ids=["meta", "empty", "absent"],
)
def test_what_is_no_checkpoint_is_told_for_what_it_is(
    files: list[str] | None, named: str, tmp_path: Path
) -> None:
    directory = tmp_path / "weights"
    if files is not None:
        directory.mkdir()
    for name in files or ():
        (directory / name).write_text("{}")
    with pytest.raises(UserError, match=named):
        find_checkpoint(directory)
