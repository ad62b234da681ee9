"""A server of the page, and a headless Chromium.

Needs gradio, selenium and a Chromium with its driver (CONTRIBUTING.md has the commands). Without
them the tests that use these fixtures are skipped.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.web.pages import GOLDEN, ROOT, free_port


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
