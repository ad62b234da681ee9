"""What the web page's server answers: its own page, and nothing else.

A page of a stranger, open in the same browser, can send requests to a server on this machine. Two
headers, which a browser sets and a page cannot change, tell them apart:

    Host      the name in the address bar; a stranger's name can be made to point to this machine
    Origin    the page that sends the request

So a request is answered only if Host is the name that is served, and Origin, if there is one, is
the page itself. Of the many paths of gradio's server only those are open that the page uses: no
uploads, no files, no monitoring.

The page itself may load nothing from elsewhere: an answer could name an image on a stranger's
server, and the browser would fetch it. `CONTENT_POLICY` forbids that.
"""

import ipaddress
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost")
ALL_ADDRESSES = ("0.0.0.0", "::", "")  # names of --host that serve every address of the machine

PATHS = {
    "/",
    "/config",
    "/favicon.ico",
    "/gradio_api/app_id",
    "/gradio_api/cancel",
    "/gradio_api/queue/data",
    "/gradio_api/queue/join",
    "/gradio_api/reset",
    "/gradio_api/startup-events",
    "/manifest.json",
    "/theme.css",
}
# What the browser may load for the page, and that no other page may show it in a frame. gradio's
# page has scripts and styles in its text.
CONTENT_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data:",
        "font-src 'self' data:",
        "frame-ancestors 'none'",
    )
)
PATH_PREFIXES = ("/assets/", "/gradio_api/heartbeat/", "/static/", "/svelte/")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]  # the interface ASGI


class OwnPageOnly:
    """Answers what `refusal` finds nothing against by `application`, and the rest with 403."""

    def __init__(self, application: Application, served_host: str) -> None:
        self.application = application
        self.served_host = served_host

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        reason = ""
        if scope["type"] != "lifespan":  # the start and the end of the server
            reason = refusal(scope, self.served_host)
        if not reason:
            await self.application(scope, receive, _with_policy(send))
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"text/plain; charset=utf-8")]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": reason.encode()})


def _with_policy(send: Send) -> Send:
    """`send`, with `CONTENT_POLICY` among the headers of an answer."""

    async def send_with_policy(message: Message) -> None:
        if message["type"] == "http.response.start":
            policy = (b"content-security-policy", CONTENT_POLICY.encode())
            message = {**message, "headers": [*message.get("headers", []), policy]}
        await send(message)

    return send_with_policy


def refusal(scope: Message, served_host: str) -> str:
    """Why a request is not answered, or ""."""
    headers: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    hosts = headers.get("host", [])
    if len(hosts) != 1 or not is_served(host_name(hosts[0]), served_host):
        return f"this server answers as {served_host} only"
    for origin in headers.get("origin", []):
        if origin.partition("://")[2].lower() != hosts[0].lower():
            return "requests of other pages are not answered"
    path = scope["path"]
    if scope["type"] != "http" or not (path in PATHS or path.startswith(PATH_PREFIXES)):
        return "this page does not use that"
    return ""


def host_name(host: str) -> str:
    """The name in a Host header, without its port: "[::1]:7860" -> "::1"."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


def is_served(name: str, served_host: str) -> bool:
    """Whether the server that was started for `served_host` answers under a name.

    A server of all addresses answers to every number, which no stranger's name can be.
    """
    if served_host in LOCAL_HOSTS:
        return name in LOCAL_HOSTS
    if served_host not in ALL_ADDRESSES:
        return name == served_host.lower()
    own_names = {*LOCAL_HOSTS, socket.gethostname().lower(), socket.getfqdn().lower()}
    return name in own_names or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
