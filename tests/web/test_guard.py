"""The web page's server answers its own page, and nothing else. No gradio is needed here."""

import asyncio
from typing import Any

import pytest

from minillama.generation.web_guard import OwnPageOnly, host_name, is_served

LOCAL = "127.0.0.1:7860"


def status_of(
    path: str = "/", host: str | None = LOCAL, origin: str = "", served: str = "127.0.0.1"
) -> int:
    """The status of a request to a server behind the guard."""
    return answer_to(path, host, origin, served)["status"]


def answer_to(
    path: str, host: str | None = LOCAL, origin: str = "", served: str = "127.0.0.1"
) -> dict[str, Any]:
    """The first message of the answer to a request to a server behind the guard."""

    async def application(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/html")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    sent = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("the body is not read")

    headers = [] if host is None else [(b"Host", host.encode())]
    if origin:
        headers.append((b"origin", origin.encode()))
    scope = {"type": "http", "path": path, "headers": headers}
    asyncio.run(OwnPageOnly(application, served)(scope, receive, send))
    return sent[0]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (LOCAL, 200),
        ("localhost:7860", 200),
        ("LOCALHOST:7860", 200),
        ("[::1]:7860", 200),
        ("evil.example.com", 403),
        ("evil.example.com:7860", 403),
        ("127.0.0.1.evil.example.com:7860", 403),
        ("192.168.1.5:7860", 403),
        ("", 403),
        (None, 403),
    ],
)
def test_a_local_server_answers_under_local_names_only(host: str | None, status: int) -> None:
    assert status_of(host=host) == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (f"http://{LOCAL}", 200),
        ("http://127.0.0.1:8000", 403),  # another server of this machine
        ("https://evil.example.com", 403),
        ("http://evil.example.com:7860", 403),
        ("null", 403),
    ],
)
def test_requests_of_other_pages_are_refused(origin: str, status: int) -> None:
    assert status_of("/gradio_api/queue/join", origin=origin) == status


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/config", 200),
        ("/assets/index.js", 200),
        ("/gradio_api/upload", 403),
        ("/gradio_api/upload/", 403),
        ("/gradio_api/file=/etc/passwd", 403),
        ("/gradio_api/run/ask", 403),
        ("/gradio_api/proxy=http://example.com", 403),
        ("/monitoring", 403),
        ("/monitoring/summary", 403),
        ("/docs", 403),
    ],
)
def test_what_the_page_does_not_use_is_closed(path: str, status: int) -> None:
    assert status_of(path) == status


@pytest.mark.parametrize(
    ("name", "served", "answers"),
    [
        ("192.168.1.5", "0.0.0.0", True),  # numbers are nobody's name
        ("fe80::1", "::", True),
        ("localhost", "0.0.0.0", True),
        ("evil.example.com", "0.0.0.0", False),
        ("192.168.1.5", "192.168.1.5", True),
        ("192.168.1.6", "192.168.1.5", False),
        ("box.lan", "Box.lan", True),
    ],
)
def test_another_host_answers_under_its_own_name(name: str, served: str, answers: bool) -> None:
    assert is_served(name, served) == answers


def test_an_answer_says_that_the_page_loads_nothing_from_elsewhere() -> None:
    """An image that a model names on another server is not fetched."""
    headers = dict(answer_to("/")["headers"])
    assert headers[b"content-type"] == b"text/html"
    policy = headers[b"content-security-policy"].decode()
    assert "default-src 'self'" in policy
    assert "img-src 'self' data:" in policy
    assert "http" not in policy and "*" not in policy


def test_the_port_is_no_part_of_a_name() -> None:
    assert [host_name(host) for host in ("[::1]:80", "a.b:80", "a.b")] == ["::1", "a.b", "a.b"]


def test_two_host_headers_and_web_sockets_are_refused() -> None:
    sent = []

    async def send(message: Any) -> None:
        sent.append(message["type"])

    async def application(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("reached")

    guard = OwnPageOnly(application, "127.0.0.1")
    host = (b"host", LOCAL.encode())
    for scope in (
        {"type": "http", "path": "/", "headers": [host, host]},
        {"type": "websocket", "path": "/gradio_api/queue/join", "headers": [host]},
    ):
        asyncio.run(guard(scope, None, send))
    assert sent == ["http.response.start", "http.response.body", "websocket.close"]
