"""Text in, text out: stop strings, streaming, and a conversation within the context."""

import io
from dataclasses import replace
from pathlib import Path

import pytest

from minillama import chat
from minillama.checkpoint.hf_reader import load_model
from minillama.errors import UserError
from minillama.generation.config import GenerationConfig
from minillama.generation.decode import Completion
from minillama.generation.engine import ChatSession, Engine, first_stop, longest_stop_prefix
from minillama.generation.prompts import record_of
from minillama.generation.terminal import chat_in_terminal
from minillama.tokenizer import open_tokenizer

GOLDEN = Path(__file__).parent / "golden/model"


QUESTION = "Which number is larger, 31 or 62?"


REPEAT = "Please repeat cat, dog and owl."


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


def test_the_system_text_is_kept_when_the_oldest_turns_are_dropped(engine: Engine) -> None:
    session = ChatSession(engine, system="Be brief.")
    session.turns = [chat.Turn(f"question {i}", "an answer of some length") for i in range(40)]
    ids, num_dropped = session.fit_prompt(REPEAT)
    assert num_dropped > 0
    assert engine.tokenizer.decode(ids).startswith("Be brief.")


def test_the_earliest_stop_string_ends_a_text() -> None:
    assert first_stop("a b", ("b", "a")) == 0
    assert first_stop("b a", ("b", "a")) == 0
    assert first_stop("c", ("b", "a")) is None


def test_a_message_longer_than_the_context_is_refused(engine: Engine) -> None:
    session = ChatSession(engine)
    with pytest.raises(UserError, match="this message alone has"):
        session.ask("cat " * 600)
    with pytest.raises(UserError, match="this message alone has"):
        list(session.reply("cat " * 600))
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


@pytest.mark.parametrize("bad_line", [b"\xd0\xfe", b"\xff", "玄德".encode("utf-16")])
def test_a_message_that_is_not_utf8_does_not_end_the_chat(engine, monkeypatch, capsys, bad_line):
    lines = io.BytesIO(bad_line.replace(b"\n", b" ") + b"\nrepeat cat\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(lines, encoding="utf-8"))
    chat_in_terminal(engine)
    first, second = capsys.readouterr().out.split("Answer: ")[1:]
    assert "lone surrogate" in first
    assert "tokens/s" in second


def test_prompts_that_need_different_rotary_bases_are_not_completed_together(
    engine: Engine,
) -> None:
    """Two within the context, two beyond it by the same length, one further beyond."""
    engine.config = replace(engine.config, rope_alpha=0.0)
    context = engine.model.config.max_seq_len
    lengths = [10, 2 * context, 30, 2 * context, 3 * context]
    requests = engine.new_completions([[1] * length for length in lengths], 1)
    batches = engine.group_requests(requests, batch_size=8)
    assert [sorted(batch) for batch in batches] == [[4], [1, 3], [0, 2]]


def test_the_end_of_a_text_that_may_begin_a_stop_string_is_found() -> None:
    assert longest_stop_prefix("text ab", ("abc", "bx")) == 2
    assert longest_stop_prefix("text b", ("abc", "bx")) == 1
    assert longest_stop_prefix("text", ("abc", "bx")) == 0


def test_the_speed_of_a_record_counts_the_tokens_of_all_its_samples(engine: Engine) -> None:
    first = Completion([1], ids=[5, 6], finish_reason="eos", seconds=1.0)
    second = Completion([1], ids=[5, 6, 7, 8], finish_reason="length", seconds=2.0)
    record = record_of(engine, "prompt", [first, second])
    assert record["seconds"] == 2.0
    assert record["tokens_per_second"] == 6 / 2
