"""What the web page shows, and how Stop and Clear end an answer. No gradio is needed here."""

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from minillama.chat import Turn
from minillama.generation import web_handlers
from minillama.generation.config import GenerationConfig
from minillama.generation.engine import ChatSession, Engine
from minillama.generation.loading import LoadOptions, load_engine
from minillama.generation.web_conversation import (
    LEFT_CONTEXT,
    STOPPED,
    Conversation,
    as_safe_markdown,
    as_typed,
)
from tests.test_terminal import GOLDEN, QUESTION

UNCHANGED = object()
GRADIO = SimpleNamespace(skip=lambda: UNCHANGED, update=lambda visible: visible is True)
SETTINGS = ("", "llama_factory_default", 0.0, 0, 0.95, 1.0, 24)  # as web_handlers.SETTINGS
Page = tuple[Conversation, web_handlers.Handlers]


@pytest.fixture(scope="module")
def engine() -> Engine:
    config = GenerationConfig(template="llama_factory_default", greedy=True, max_new_tokens=24)
    return load_engine(LoadOptions(str(GOLDEN), device="cpu"), config)


@pytest.fixture
def page(engine: Engine) -> Page:
    return Conversation(), web_handlers.Handlers(GRADIO, engine, seed=0)


def ask(page: Page, message: str, settings: tuple = SETTINGS) -> list[tuple]:
    """All that the page is told while a message is answered, `show` at the end included."""
    conversation, handlers = page
    updates = list(handlers.ask(message, conversation, *settings))
    return [*updates, handlers.show(conversation)]


def contents(shown: Any) -> list[str]:
    """The texts of the messages in an update of the page."""
    return [message["content"] for message in shown[1]]


def test_an_answer_is_shown_with_its_message_and_kept_for_a_reload(page: Page) -> None:
    first, *_, last = ask(page, QUESTION)
    box, messages, note, send, stop, saved = first
    assert (box, note, send, stop, saved) == ("", "", False, True, UNCHANGED)
    assert [message["content"] for message in messages] == [QUESTION]
    assert contents(last) == [QUESTION, "62"]
    assert last[3:] == (True, False, {"turns": [[QUESTION, "62"]], "num_dropped": 0})
    again = Conversation()
    assert contents(page[1].restore(last[5], again)) == [QUESTION, "62"]
    assert again.turns == [Turn(QUESTION, "62")]


def test_an_empty_message_does_nothing(page: Page) -> None:
    for message in ("", "  \n"):
        assert list(page[1].ask(message, page[0], *SETTINGS)) == [(UNCHANGED,) * 6]


@pytest.mark.parametrize(
    ("message", "settings", "reason"),
    [
        ("cat " * 600, SETTINGS, "this message alone has"),
        (QUESTION, ("", "none", 0.0, 0, 0.95, 1e-9, 24), "repetition_penalty"),
        (QUESTION + "\ud800", SETTINGS, "surrogate"),
    ],
    ids=["too long", "a setting", "not text"],
)
def test_a_refused_message_stays_where_it_was_typed(
    page: Page, message: str, settings: tuple, reason: str
) -> None:
    ask(page, QUESTION)
    (update,) = page[1].ask(message, page[0], *settings)
    assert reason in update[2]
    assert update[:2] == (UNCHANGED, UNCHANGED)
    shown = page[1].show(page[0])
    assert shown[0] is UNCHANGED
    assert contents(shown) == [QUESTION, "62"]


def test_stop_keeps_what_was_written(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation, handlers = page
    monkeypatch.setattr(web_handlers, "SECONDS_BETWEEN_UPDATES", -1.0)
    updates = handlers.ask("Please repeat cat, dog and owl.", conversation, *SETTINGS)
    for _ in range(3):  # the message alone, then two tokens
        next(updates)
    handlers.stop(conversation)
    assert list(updates) == []
    assert contents(handlers.show(conversation)) == ["Please repeat cat, dog and owl.", "cat"]


def test_a_message_that_is_stopped_before_its_first_token_goes_back_to_the_box(page: Page) -> None:
    conversation, handlers = page
    updates = handlers.ask(QUESTION, conversation, *SETTINGS)
    next(updates)
    handlers.stop(conversation)
    assert list(updates) == []
    shown = handlers.show(conversation)
    assert shown[0] == QUESTION
    assert contents(shown) == []
    assert handlers.show(conversation)[0] is UNCHANGED  # only once


@pytest.mark.parametrize("num_updates", range(5))
def test_after_clear_an_answer_that_is_still_written_changes_nothing(
    page: Page, num_updates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is shown, before the first token, after it, and so on."""
    conversation, handlers = page
    monkeypatch.setattr(web_handlers, "SECONDS_BETWEEN_UPDATES", -1.0)
    updates = handlers.ask("Please repeat cat, dog and owl.", conversation, *SETTINGS)
    for _ in range(num_updates):
        next(updates)
    cleared = handlers.clear(conversation)
    if num_updates:
        assert list(updates) == []
    assert contents(cleared) == contents(handlers.show(conversation)) == []
    assert cleared[3:] == (True, False, {"turns": [], "num_dropped": 0})


def test_a_message_that_was_sent_before_clear_and_comes_after_it_is_not_answered(
    page: Page,
) -> None:
    conversation, handlers = page
    handlers.clear(conversation)
    assert list(handlers.ask(QUESTION, conversation, *SETTINGS)) == [(UNCHANGED,) * 6]
    assert contents(handlers.end_clear(conversation)) == []
    assert contents(ask(page, QUESTION)[-1]) == [QUESTION, "62"]


def test_clear_while_a_message_is_encoded_ends_its_answer(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation, handlers = page
    fit_prompt = ChatSession.fit_prompt

    def clear_meanwhile(self: ChatSession, text: str) -> Any:
        handlers.clear(conversation)
        return fit_prompt(self, text)

    monkeypatch.setattr(ChatSession, "fit_prompt", clear_meanwhile)
    updates = list(handlers.ask(QUESTION, conversation, *SETTINGS))
    assert contents(updates[-1]) == []
    assert updates[-1][3:5] == (True, False)
    assert contents(handlers.end_clear(conversation)) == []


def slow_reply(self: ChatSession, text: str, seed: int | None) -> Iterator[str]:
    """An answer of many tokens, without a model."""
    earlier = self.turns
    for length in range(200):
        time.sleep(0.0002)
        self.turns = [*earlier, Turn(text, "x" * length)]
        yield "x"


def test_a_hundred_clears_during_answers_in_threads(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each, the conversation is empty once the answer has ended, and stays so."""
    conversation, handlers = page
    monkeypatch.setattr(ChatSession, "reply", slow_reply)
    monkeypatch.setattr(web_handlers, "SECONDS_BETWEEN_UPDATES", -1.0)
    for number in range(100):
        answering = threading.Thread(target=lambda: list(ask(page, QUESTION)))
        answering.start()
        time.sleep(0.0005 * (number % 30))
        handlers.clear(conversation)
        answering.join(timeout=300)
        assert contents(handlers.end_clear(conversation)) == [], number


def test_turns_that_left_the_context_stay_visible_and_are_marked(page: Page) -> None:
    conversation, _ = page
    conversation.turns = [Turn(f"question {i}", "an answer of some length") for i in range(40)]
    shown = contents(ask(page, QUESTION)[-1])
    mark = shown.index(LEFT_CONTEXT)
    assert shown[0] == "question 0"
    assert mark == 2 * conversation.num_dropped > 0
    assert shown[mark + 1] == f"question {conversation.num_dropped}"
    assert len(shown) == 2 * 41 + 1
    dropped = conversation.num_dropped
    ask(page, QUESTION)
    assert conversation.num_dropped >= dropped


def test_an_event_that_ends_during_an_answer_shows_the_answer(page: Page) -> None:
    """The page is still loading when the first message is sent."""
    conversation, handlers = page
    updates = handlers.ask(QUESTION, conversation, *SETTINGS)
    next(updates)
    box, messages, _, send, stop, _ = handlers.restore({"turns": [["a", "b"]]}, conversation)
    assert [message["content"] for message in messages] == [QUESTION]
    assert (box, send, stop) == (UNCHANGED, False, True)
    list(updates)
    assert handlers.show(conversation)[3:5] == (True, False)
    assert contents(handlers.show(conversation)) == [QUESTION, "62"]


def test_an_answer_that_fails_does_not_leave_the_page_waiting(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: ChatSession, text: str, seed: int | None) -> Iterator[str]:
        yield from ()
        raise RuntimeError("out of memory")

    conversation, handlers = page
    monkeypatch.setattr(ChatSession, "reply", fail)
    with pytest.raises(RuntimeError):
        list(handlers.ask(QUESTION, conversation, *SETTINGS))
    shown = handlers.show(conversation)
    assert (shown[0], shown[3:5]) == (QUESTION, (True, False))


def test_an_answer_without_text_is_marked_as_stopped() -> None:
    conversation = Conversation(turns=[Turn("a", "")])
    assert conversation.shown()[1]["content"] == STOPPED


@pytest.mark.parametrize(
    "saved",
    [
        None,
        5,
        {"turns": 5},
        {"turns": [["a"]], "num_dropped": 0},
        {"turns": [["a", 5]], "num_dropped": 0},
        {"turns": [["a", "b"]], "num_dropped": 2},
        {"turns": [["a", "b"]], "num_dropped": None},
        {"turns": [["a", "b"]]},
    ],
)
def test_what_a_browser_kept_is_checked(saved: Any) -> None:
    conversation = Conversation(turns=[Turn("old", "old")])
    conversation.restore(saved)
    assert conversation.turns == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("**bold** and 1 < 2", "**bold** and 1 < 2"),
        ("use <stdio.h>", "use &lt;stdio.h>"),
        ("</div><!-- x --><?php", "&lt;/div>&lt;!-- x -->&lt;?php"),
        ("`<b>` and ``` <b>", "`<b>` and ``` <b>"),
        ("```c\n#include <a.h>\n```\n<b>", "```c\n#include <a.h>\n```\n&lt;b>"),
        ("```c\n#include <a.h>", "```c\n#include <a.h>"),  # still being written
        ("a ` b <i>", "a ` b &lt;i>"),
        ("![x](http://example.com/x.png)", "!\\[x](http://example.com/x.png)"),
    ],
)
def test_an_answer_is_markdown_without_tags_and_images(text: str, shown: str) -> None:
    assert as_safe_markdown(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (QUESTION, QUESTION),
        ("*a* _b_ `c` [d](e) $f$ | ~g~", "\\*a\\* \\_b\\_ \\`c\\` \\[d\\](e) \\$f\\$ \\| \\~g\\~"),
        ("# a\n> b\n- c\n+ d\n1. e\n2) f\n=", "\\# a\n\\> b\n\\- c\n\\+ d\n1\\. e\n2\\) f\n\\="),
        ("<b> &lt; 1 < 2 & 3", "&lt;b> &amp;lt; 1 < 2 & 3"),
        ("a\n    b\n\tc", "a\n" + 4 * "&nbsp;" + "b\n" + 4 * "&nbsp;" + "c"),
        ("玄德曰：备今日得见天日。", "玄德曰：备今日得见天日。"),
    ],
)
def test_a_message_is_shown_as_typed(text: str, shown: str) -> None:
    assert as_typed(text) == shown
