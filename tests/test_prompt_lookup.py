"""Prompt lookup writes the greedy completion, in fewer steps."""

from pathlib import Path

import pytest
import torch

import generate
from minillama.errors import UserError
from minillama.generation.config import GenerationConfig
from minillama.generation.decode import Completion, decode
from minillama.generation.engine import Engine
from minillama.generation.lookup import GREEDY, count_right, decode_with_lookup, guess
from minillama.model import Llama
from minillama.tokenizer import open_tokenizer
from tests.conftest import TINY, random_model

GOLDEN = Path(__file__).parent / "golden/model"
PROMPTS = ([5], [1, 7, 9, 7, 9], [3, 8, 3, 8, 3, 8, 3], list(range(1, 30)))


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        ([1, 2, 3, 4, 1, 2], 3, [3, 4, 1]),
        ([1, 2, 3, 4, 1, 2], 9, [3, 4, 1, 2]),  # to the end of the text
        ([1, 2, 3, 1, 2, 4, 1, 2], 1, [4]),  # the last place, not the first
        ([6, 6, 6], 5, [6]),  # the two places overlap
        ([1, 2, 3, 4], 3, []),
        ([1], 3, []),
        ([1, 2, 1, 2], 0, []),
    ],
)
def test_guesses_are_what_followed_the_last_two_tokens(
    text: list[int], count: int, expected: list[int]
) -> None:
    assert guess(text, count) == expected


def test_guesses_are_right_up_to_the_first_that_differs() -> None:
    assert count_right([4, 5, 6], [4, 5, 9, 6]) == 2
    assert count_right([4, 5], [4, 5, 9]) == 2
    assert count_right([4], [5, 4]) == 0
    assert count_right([], [5]) == 0


class CountingLlama(Llama):
    """Counts its forward passes."""

    def forward(self, tokens: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        self.num_passes = getattr(self, "num_passes", 0) + 1
        return super().forward(tokens, *args, **kwargs)


def counting_model() -> CountingLlama:
    model = CountingLlama(TINY)
    model.load_state_dict(random_model().state_dict())
    return model


def greedy(prompt: list[int], room: int, stop_ids: tuple[int, ...] = ()) -> Completion:
    completion = Completion(prompt, room)
    list(decode(random_model(), [completion], GREEDY, stop_ids))
    return completion


@pytest.mark.parametrize("num_guesses", [1, 3, 10])
@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_the_completion_is_the_greedy_one_in_fewer_steps(
    prompt: list[int], num_guesses: int
) -> None:
    """A random model soon repeats itself, so most guesses are right. The room is the whole context:
    the cache never holds more than that."""
    room = TINY.max_seq_len - len(prompt)
    expected = greedy(prompt, room)
    model = counting_model()
    completion = Completion(prompt, room)
    seen = [len(c.ids) for c in decode_with_lookup(model, completion, num_guesses)]
    assert completion.ids == expected.ids
    assert completion.finish_reason == "length"
    assert seen == list(range(1, room + 1)), "it is yielded for every token"
    assert model.num_passes < 0.9 * room
    assert model.num_passes >= room / (1 + num_guesses)


def test_it_ends_at_a_stop_token_and_where_its_consumer_says() -> None:
    """Also in the middle of the tokens of one step."""
    prompt = PROMPTS[2]
    whole = greedy(prompt, 40)
    for stop in set(whole.ids):
        stopped = Completion(prompt, 40)
        list(decode_with_lookup(random_model(), stopped, 10, (stop,)))
        assert (stopped.ids, stopped.finish_reason) == (greedy(prompt, 40, (stop,)).ids, "eos")
    for length in range(1, 40):
        completion = Completion(prompt, 40)
        for _ in decode_with_lookup(random_model(), completion, 10):
            if len(completion.ids) == length:
                completion.finish("stop")
        assert completion.ids == whole.ids[:length]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"greedy": True, "num_beams": 2},
        {"greedy": True, "repetition_penalty": 1.1},
    ],
    ids=str,
)
def test_it_is_refused_where_decoding_is_not_greedy(settings: dict) -> None:
    with pytest.raises(UserError, match="--prompt_lookup is for greedy decoding"):
        GenerationConfig(prompt_lookup=3, **settings)
    with pytest.raises(UserError, match="--prompt_lookup -1: must be at least 0"):
        GenerationConfig(prompt_lookup=-1, greedy=True)


def test_an_engine_completes_prompts_one_at_a_time_with_the_same_texts() -> None:
    tokenizer = open_tokenizer(GOLDEN)
    texts = {}
    for num_guesses in (0, 4):
        config = GenerationConfig(
            template="none", greedy=True, max_new_tokens=12, prompt_lookup=num_guesses
        )
        engine = Engine(random_model(), tokenizer, config)
        requests = engine.new_completions([[1, 5], [1, 9, 9], [4]], num_samples=1)
        list(engine.stream_all(requests, batch_size=8, seed=None))
        texts[num_guesses] = [completions[0].ids for completions in requests.values()]
    assert texts[0] == texts[4]


def test_the_flag_writes_the_same_text(capsys: pytest.CaptureFixture) -> None:
    words = ["--ckpt", str(GOLDEN), "--template", "llama_factory_default", "--greedy"]
    words += ["--prompt", "Please repeat cat, dog and owl.", "--max_new_tokens", "24"]
    generate.main(words)
    expected = capsys.readouterr().out
    generate.main([*words, "--prompt_lookup", "8"])
    assert capsys.readouterr().out == expected
    for other in ("--web", "--mode=all"):
        with pytest.raises(UserError, match=f"--prompt_lookup .*{other.partition('=')[0]}"):
            generate.parse([*words[:4], other, "--prompt_lookup", "8"])
