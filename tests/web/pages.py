"""The page in a browser: what is on it, what is typed and clicked."""

import socket
from pathlib import Path

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/model"
QUESTION = "Which number is larger, 31 or 62?"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(browser: object, condition, seconds: int = 60):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, seconds, poll_frequency=0.1).until(
        lambda window: condition(window)
    )


def text_of(browser: object) -> str:
    return browser.execute_script("return document.body.innerText")


def box(browser: object) -> object:
    """The box that messages are typed into."""
    return wait_for(
        browser, lambda window: window.find_element("css selector", "textarea[placeholder^=Ask]")
    )


def ask(browser: object, message: str) -> None:
    wait_for(browser, lambda window: is_shown(window, "Send"))
    box(browser).send_keys(message)
    click(browser, "Send")


def click(browser: object, name: str) -> None:
    browser.execute_script(
        "[...document.querySelectorAll('button')]"
        ".find(b => b.innerText.trim() == arguments[0]).click()",
        name,
    )


def bubbles(browser: object) -> list[str]:
    """What the conversation shows, question and answer in turn."""
    return browser.execute_script(
        "return [...document.querySelectorAll('[data-testid=user], [data-testid=bot]')]"
        ".map(message => message.innerText.trim())"
    )


def wait_for_bubbles(browser: object, *texts: str) -> None:
    wait_for(browser, lambda window: bubbles(window) == list(texts))


def is_shown(browser: object, name: str) -> bool:
    """Whether a button of this name can be seen."""
    return browser.execute_script(
        "return [...document.querySelectorAll('button')]"
        ".some(b => b.innerText.trim() == arguments[0] && b.offsetParent)",
        name,
    )
