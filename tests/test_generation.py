"""Generation: transformers' greedy tokens, a cache that changes nothing, and draws that follow their distribution."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minillama import chat
from minillama.checkpoint.hf_format import find_checkpoint, load_model, save_model
from minillama.errors import UserError
from minillama.generation.cache import Cache
from minillama.generation.config import GenerationConfig
from minillama.generation.decode import Completion
from minillama.generation.engine import ChatSession, Engine
from minillama.generation.sampling import (
    Sampling,
    keep_top_k,
    keep_top_p,
    next_tokens,
    penalise,
    tokens_seen,
)
from minillama.llama_config import RopeScaling
from minillama.model import Llama
from minillama.tokenizer import open_tokenizer
from tests.conftest import generate, random_model, random_tokens
from tests.peers import open_in_transformers

GREEDY = Sampling(temperature=0.0)
GOLDEN = Path(__file__).parent / "golden/model"
QUESTION = "Which number is larger, 31 or 62?"
REPEAT = "Please repeat cat, dog and owl."


def their_greedy(directory: Path, prompt: list[int], count: int) -> list[int]:
    model = open_in_transformers(directory)
    text = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return text[0, len(prompt) :].tolist()


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
    cache = Cache(model.config, 2, 20, torch.float32, torch.device("cpu"))
    parts = [model(part, cache=cache.extend(part.shape[1])) for part in tokens.split(steps, dim=1)]
    assert torch.allclose(torch.cat(parts, 1), model(tokens), atol=1e-5)


def test_cached_decoding_equals_reading_everything_again() -> None:
    model, text = random_model(), [1, 7, 9]
    for token in generate(model, text, 30, GREEDY):
        with torch.no_grad():
            assert token == int(model.logits(model(torch.tensor([text]))[0, -1]).argmax())
        text = [*text, token]


# Sampling

LOGITS = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("k", [1, 5, 39, 40, 100])
def test_top_k_is_transformers(k: int) -> None:
    transformers = pytest.importorskip("transformers")
    assert torch.equal(keep_top_k(LOGITS[0], k), transformers.TopKLogitsWarper(k)(None, LOGITS)[0])


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
    """By hand: masses 0.5, 0.3, 0.2. To reach 0.6 two are needed; 0.5 is reached by the first alone."""
    logits = torch.tensor([0.3, 0.5, 0.2]).log()
    assert keep_top_p(logits, 0.6).isfinite().tolist() == [True, True, False]
    assert keep_top_p(logits, 0.49).isfinite().tolist() == [False, True, False]


def test_draws_follow_the_distribution() -> None:
    """Chi-square of 4000 draws with a fixed seed, 4 degrees of freedom: below 18.5 but once in a thousand seeds."""
    logits, generator, T = (
        torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5]),
        torch.Generator().manual_seed(0),
        0.7,
    )
    draws = next_tokens(logits.expand(4000, -1), None, Sampling(T, 0, 1.0), [generator] * 4000)
    expected = 4000 * (logits / T).softmax(0)
    assert float(((draws.bincount(minlength=5) - expected).square() / expected).sum()) < 18.5


def test_what_top_k_and_top_p_remove_is_never_drawn() -> None:
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


# Where a text ends


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


@pytest.fixture
def engine() -> Engine:
    model = load_model(GOLDEN)
    config = GenerationConfig(template="llama_factory_default", greedy=True, max_new_tokens=24)
    return Engine(model, open_tokenizer(GOLDEN), config, model.config.eos_ids)


def complete(engine: Engine, text: str, **changes) -> Completion:
    """The whole completion of one prompt, with changes of the engine's config."""
    engine = replace(engine, config=replace(engine.config, **changes))
    completion = engine.new_completion(engine.encode_prompt(text))
    streamed = [piece.text for piece in engine.stream([completion], None)]
    assert "".join(streamed) == completion.text
    return completion


def test_a_completion_ends_at_eos_or_at_its_length(engine: Engine) -> None:
    completion = complete(engine, QUESTION)
    assert (completion.text.strip(), completion.finish_reason) == ("62", "eos")
    completion = complete(engine, QUESTION, ignore_eos=True, max_new_tokens=5)
    assert (len(completion.ids), completion.finish_reason) == (5, "length")


def test_a_stop_string_ends_a_completion_even_across_tokens_and_is_not_emitted(
    engine: Engine,
) -> None:
    whole = complete(engine, REPEAT).text
    assert len(whole) > 6
    for stop in (whole[3:6], whole[4]):
        completion = complete(engine, REPEAT, stop=(stop,))
        assert completion.text == whole[: whole.index(stop)]
        assert completion.finish_reason == "stop"


def test_text_held_back_for_a_stop_string_is_emitted_when_the_string_does_not_follow(
    engine: Engine,
) -> None:
    whole = complete(engine, REPEAT).text
    stop = (whole[-2:] + "!", whole[2:4] + "###")
    assert complete(engine, REPEAT, stop=stop).text == whole


def test_streamed_text_is_the_decoded_text(engine: Engine) -> None:
    completion = complete(engine, REPEAT)
    assert completion.text == engine.tokenizer.decode(completion.ids)


def test_the_oldest_turns_are_dropped_when_the_context_is_full(engine: Engine) -> None:
    """The window slides by whole turns; the prompt is the conversation of the remaining turns."""
    session = ChatSession(engine)
    session.turns = [chat.Turn(f"question {i}", "an answer of some length") for i in range(40)]
    ids, num_dropped = session.fit_prompt(REPEAT)
    assert 0 < num_dropped < 40
    assert len(ids) + engine.config.max_new_tokens <= engine.model.config.max_seq_len
    remaining = [f"question {i}" for i in range(num_dropped, 40)]
    assert [turn.user for turn in session.turns] == remaining
    fresh = ChatSession(engine)
    fresh.turns = list(session.turns)
    assert fresh.fit_prompt(REPEAT) == (ids, 0)


def test_a_question_longer_than_the_context_is_refused(engine: Engine) -> None:
    session = ChatSession(engine)
    with pytest.raises(UserError, match="this question alone has"):
        session.ask("cat " * 600)
    assert list(session.reply("cat " * 600)) == [""]
    assert "this question alone has" in session.note
    assert session.turns == []


def test_a_conversation_is_the_template_of_its_turns(engine: Engine) -> None:
    session = ChatSession(engine)
    first, _ = session.fit_prompt(QUESTION)
    assert "".join(session.reply(QUESTION)).strip() == "62"
    assert session.turns == [chat.Turn(QUESTION, "62")]
    ids, _ = session.fit_prompt(REPEAT)
    assert ids[: len(first)] == first
    answer = session.ask(REPEAT)
    assert answer == session.turns[1].answer
    assert [turn.user for turn in session.turns] == [QUESTION, REPEAT]


def test_without_a_template_a_prompt_is_the_text_after_bos(engine: Engine) -> None:
    engine.config = replace(engine.config, template="none")
    assert engine.encode_prompt("cat") == [1, *engine.tokenizer.encode("cat")]


@torch.no_grad()
def test_cached_decoding_in_16_bits_stays_near_fp32() -> None:
    exact, rounded = random_model(), random_model().bfloat16()
    tokens = random_tokens(1, 12)
    cache = Cache(rounded.config, 1, 12, torch.bfloat16, torch.device("cpu"))
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


def test_top_p_looks_beyond_the_likeliest_where_their_mass_is_too_small() -> None:
    """Of 1000 nearly even tokens the first 256 hold a quarter of the mass; and of a peaked distribution they hold all."""
    transformers = pytest.importorskip("transformers")
    flat = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0)) * 0.1
    for logits, p in (
        (flat, 0.2),
        (flat, 0.9),
        (flat * 80, 0.9),
        (torch.cat((flat[:1], 80 * flat[1:])), 0.7),
    ):
        assert torch.equal(keep_top_p(logits, p), transformers.TopPLogitsWarper(p)(None, logits))
