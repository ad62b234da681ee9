"""The page in a real browser: headless Chromium asks, reads the answer and clears.

Needs gradio, selenium and a Chromium with its driver (CONTRIBUTING.md has the commands). Without
them these tests are skipped.
"""

import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden/model"
QUESTION = "Which number is larger, 31 or 62?"


def test_without_gradio_the_command_to_install_it_is_shown() -> None:
    program = (
        "import runpy, sys; sys.modules['gradio'] = None; "
        f"sys.argv = ['generate.py', '--ckpt', {str(GOLDEN)!r}, '--web']; "
        "runpy.run_path('generate.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2,
        "error: --web needs gradio; pip install 'minillama[web]'",
    )


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    pytest.importorskip("gradio")
    port = free_port()
    server = subprocess.Popen(
        [
            sys.executable,
            "generate.py",
            "--ckpt",
            str(GOLDEN),
            "--web",
            "--port",
            str(port),
            "--greedy",
            "--template",
            "llama_factory_default",
            "--max_new_tokens",
            "24",
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SHARE": "True"},
    )
    assert server.stdout.readline().startswith(f"http://127.0.0.1:{port}")
    yield f"http://127.0.0.1:{port}"
    server.send_signal(signal.SIGINT)
    assert server.wait(timeout=30) == 130


@pytest.fixture(scope="module")
def browser(address: str) -> Iterator[object]:
    selenium = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip(
            "no chromium with chromedriver here: apt-get install -y chromium chromium-driver"
        )
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-dev-shm-usage",
        "--window-size=1100,1000",
        "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
    ):
        options.add_argument(flag)
    window = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    window.get(address)
    yield window
    window.quit()


def wait_for(browser: object, condition, seconds: int = 60):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, seconds, poll_frequency=0.1).until(
        lambda window: condition(window)
    )


def text_of(browser: object) -> str:
    return browser.execute_script("return document.body.innerText")


def ask(browser: object, question: str) -> None:
    box = wait_for(
        browser, lambda window: window.find_element("css selector", "textarea[placeholder^=Ask]")
    )
    box.send_keys(question)
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


def test_the_page_answers_what_the_terminal_answers_and_remembers(browser: object) -> None:
    wait_for(browser, lambda window: "conversation" in text_of(window))
    ask(browser, QUESTION)
    wait_for(
        browser,
        lambda window: (
            re.search(r"[\d.]+ tokens/s", text_of(window))
            and len(bubbles(window)) == 2
            and bubbles(window)[1]
        ),
    )
    wait_for(browser, lambda window: bubbles(window) == [QUESTION, "62"])
    ask(browser, "Please repeat cat, dog and owl.")
    wait_for(browser, lambda window: len(bubbles(window)) == 4)
    assert bubbles(browser)[:2] == [QUESTION, "62"]
    if "MINILLAMA_SCREENSHOT" in os.environ:
        browser.save_screenshot(os.environ["MINILLAMA_SCREENSHOT"])


def test_clear_starts_over(browser: object) -> None:
    click(browser, "Clear")
    wait_for(browser, lambda window: bubbles(window) == [])
    ask(browser, QUESTION)
    wait_for(browser, lambda window: bubbles(window) == [QUESTION, "62"])


def test_the_server_listens_on_this_machine_only_in_any_environment(
    address: str,
) -> None:
    """GRADIO_SERVER_NAME and GRADIO_SHARE ask for more; only --host may."""
    port = int(address.rsplit(":", 1)[1])
    with open("/proc/net/tcp", encoding="ascii") as table:
        listening = [line.split()[1] for line in table if line.split()[3] == "0A"]
    assert [place for place in listening if place.endswith(f":{port:04X}")] == [
        f"0100007F:{port:04X}"
    ]


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/", {}, 200),
        ("/", {"Host": "evil.example.com"}, 403),
        ("/", {"Origin": "https://evil.example.com"}, 403),
        ("/gradio_api/upload", {}, 403),
        ("/gradio_api/info", {}, 403),
        ("/monitoring", {}, 403),
    ],
)
def test_the_server_answers_its_own_page_only(
    address: str, path: str, headers: dict[str, str], status: int
) -> None:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
    connection.request("GET", path, headers=headers)
    assert connection.getresponse().status == status
    connection.close()


def test_a_port_in_use_is_told(address: str) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "generate.py",
            "--ckpt",
            str(GOLDEN),
            "--web",
            "--port",
            address.rsplit(":", 1)[1],
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2
    assert "error: --port" in done.stderr.splitlines()[-1]
