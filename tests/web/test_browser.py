"""The page in a real browser: headless Chromium asks, reads the answer, stops and clears."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from minillama.generation.examples import INSTRUCTIONS
from tests.web.pages import (
    GOLDEN,
    QUESTION,
    ROOT,
    ask,
    box,
    bubbles,
    click,
    free_port,
    is_shown,
    text_of,
    wait_for,
    wait_for_bubbles,
)

SLOW_SERVER = """
import sys, time
from minillama.chat import Turn
from minillama.generation import web
from minillama.generation.config import GenerationConfig
from minillama.generation.engine import ChatSession
from minillama.generation.loading import LoadOptions, load_engine

ANSWER = (
    "**bold** <script>alert(1)</script> <img src=x onerror=alert(1)> "
    "![x](http://example.com/x.png)\\n```\\ncode <b>\\n```\\n" + 40 * "word " + "end."
)

def reply(self, text, seed):
    earlier = self.turns
    for length in range(1, len(ANSWER) + 1):
        time.sleep(0.01)
        self.turns = [*earlier, Turn(text, ANSWER[:length])]
        yield ""

ChatSession.reply = reply
config = GenerationConfig(template="alpaca", greedy=True, max_new_tokens=24)
engine = load_engine(LoadOptions(sys.argv[1], device="cpu"), config)
web.serve(engine, "", None, "127.0.0.1", int(sys.argv[2]))
"""


def test_the_page_says_what_it_is_and_what_can_be_asked(browser: object) -> None:
    wait_for(browser, lambda window: "conversation" in text_of(window))
    shown = text_of(browser)
    assert "model" in shown.splitlines()[0]
    assert "prompt template: llama_factory_default" in shown
    for example in INSTRUCTIONS:
        assert example in shown
    assert "temperature" not in shown  # folded
    assert browser.title == "model · minillama"


def test_the_page_answers_what_the_terminal_answers_and_remembers(browser: object) -> None:
    ask(browser, QUESTION)
    wait_for(browser, lambda window: re.search(r"[\d.]+ tokens/s", text_of(window)))
    wait_for_bubbles(browser, QUESTION, "62")
    ask(browser, "Please repeat cat, dog and owl.")
    wait_for(browser, lambda window: len(bubbles(window)) == 4)
    assert bubbles(browser)[:2] == [QUESTION, "62"]
    if "MINILLAMA_SCREENSHOT" in os.environ:
        browser.save_screenshot(os.environ["MINILLAMA_SCREENSHOT"])


def test_the_conversation_is_still_there_when_the_page_is_loaded_again(
    browser: object, address: str
) -> None:
    wait_for(browser, lambda window: is_shown(window, "Send"))
    before = bubbles(browser)
    browser.get(address)
    wait_for_bubbles(browser, *before)


def test_clear_starts_over(browser: object) -> None:
    click(browser, "Clear")
    wait_for_bubbles(browser)
    ask(browser, QUESTION)
    wait_for_bubbles(browser, QUESTION, "62")
    wait_for(browser, lambda window: is_shown(window, "Send"))


def test_an_empty_message_does_nothing(browser: object) -> None:
    before = bubbles(browser)
    ask(browser, "  ")
    time.sleep(1)
    assert bubbles(browser) == before
    box(browser).clear()


def test_a_message_that_is_refused_stays_in_its_box(browser: object) -> None:
    before = bubbles(browser)
    ask(browser, "cat " * 600)
    wait_for(browser, lambda window: "Not answered: this message alone has" in text_of(window))
    assert box(browser).get_attribute("value").startswith("cat cat")
    assert bubbles(browser) == before
    box(browser).clear()


def test_an_example_is_asked_when_it_is_chosen(browser: object) -> None:
    click(browser, "Clear")
    wait_for(browser, lambda window: INSTRUCTIONS[0] in text_of(window))
    click(browser, INSTRUCTIONS[0])
    wait_for(browser, lambda window: bubbles(window)[:1] == [INSTRUCTIONS[0]])
    wait_for(browser, lambda window: is_shown(window, "Send"))


def test_the_page_fits_a_phone(browser: object) -> None:
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        width = browser.execute_script("return document.documentElement.scrollWidth")
        assert width == 390
        assert box(browser).rect["width"] > 300
        assert is_shown(browser, "Send") and is_shown(browser, "Clear")
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.fixture(scope="module")
def slow_page(browser: object) -> Iterator[object]:
    """The page over answers of some seconds, in Markdown that is not harmless."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-c", SLOW_SERVER, str(GOLDEN), str(port)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert server.stdout.readline().startswith("http://")
    browser.get(f"http://127.0.0.1:{port}")
    wait_for(browser, lambda window: "conversation" in text_of(window))
    yield browser
    server.send_signal(signal.SIGINT)
    server.wait(timeout=30)


def test_stop_is_shown_only_while_an_answer_is_written_and_keeps_it(slow_page: object) -> None:
    assert not is_shown(slow_page, "Stop")
    ask(slow_page, "one")
    wait_for(slow_page, lambda window: is_shown(window, "Stop") and len(bubbles(window)) == 2)
    assert not is_shown(slow_page, "Send")
    click(slow_page, "Stop")
    wait_for(slow_page, lambda window: is_shown(window, "Send"))
    assert not is_shown(slow_page, "Stop")
    stopped = bubbles(slow_page)
    assert stopped[0] == "one"
    time.sleep(1)
    assert bubbles(slow_page) == stopped


def test_clear_during_an_answer_leaves_an_empty_page(slow_page: object) -> None:
    """Twelve times, at other moments of an answer; nothing comes back."""
    for number in range(12):
        ask(slow_page, f"message {number}")
        time.sleep(0.07 * number)
        click(slow_page, "Clear")
        wait_for(slow_page, lambda window: is_shown(window, "Send") and not bubbles(window))
    time.sleep(2)
    assert bubbles(slow_page) == []
    slow_page.refresh()
    wait_for(slow_page, lambda window: INSTRUCTIONS[0] in text_of(window))
    assert bubbles(slow_page) == []


def test_an_answer_is_shown_as_markdown_and_its_tags_as_text(slow_page: object) -> None:
    ask(slow_page, "<b>two</b> *stars*")
    wait_for(slow_page, lambda window: len(bubbles(window)) == 2 and "end." in bubbles(window)[1])
    message, answer = bubbles(slow_page)
    assert message == "<b>two</b> *stars*"
    assert "<script>alert(1)</script>" in answer
    assert "<img src=x onerror=alert(1)>" in answer
    assert "![x](http://example.com/x.png)" in answer

    def count(selector: str) -> int:
        return len(slow_page.find_elements("css selector", f"[data-testid=bot] {selector}"))

    assert count("strong") == 1
    assert count("pre code") == 1
    assert count("img") == count("script") == 0
