"""The server of the web page: where it listens, what it answers, and what ends it."""

import http.client
import socket
import struct
import subprocess
import sys
from importlib import metadata

import pytest

from tests.web.pages import GOLDEN, ROOT


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


def test_the_pins_of_the_tests_satisfy_gradio() -> None:
    """constraints.txt serves both, so that the extra `web` installs beside the tests' packages."""
    pytest.importorskip("gradio")
    requirements = pytest.importorskip("packaging.requirements")
    lines = (ROOT / "constraints.txt").read_text().split()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines)
    for text in metadata.requires("gradio"):
        requirement = requirements.Requirement(text)
        if requirement.marker is None:
            name = requirement.name.lower().replace("_", "-")
            assert requirement.specifier.contains(pins[name]), text


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


def test_a_visitor_who_leaves_does_not_end_the_server(address: str) -> None:
    """Connections that are reset while they are answered."""
    port = int(address.rsplit(":", 1)[1])
    for _ in range(30):
        with socket.create_connection(("127.0.0.1", port)) as visitor:
            host = f"Host: 127.0.0.1:{port}\r\n\r\n"
            visitor.sendall(f"GET / HTTP/1.1\r\n{host}GET /config HTTP/1.1\r\n{host}".encode())
            visitor.recv(1)
            visitor.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
    connection.request("GET", "/")
    assert connection.getresponse().status == 200


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
        timeout=300,
    )
    assert done.returncode == 2
    assert "error: --port" in done.stderr.splitlines()[-1]
