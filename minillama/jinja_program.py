"""A program that renders one chat template: the process in which a stranger's Jinja code runs.

A chat template is code that came with a checkpoint. Jinja's sandbox keeps it from files and from
Python's internals, but not from running for ever or filling the memory, and a single expression
such as `10 ** 10 ** 10` cannot be interrupted. So it runs in a process of its own, whose CPU time
and memory the operating system limits. jinja_renderer.py starts it, and talks to it in lines of
JSON:

    in     "{% for message in messages %}…"                          the template, once
    out    {}                                                        or {"error": "…"}
    in     {"variables": {…}, "calls": [{"messages": […], …}, …]}
    out    {"texts": ["…", …]}                                       or {"error": "…"}

What a template can use is what transformers offers: `messages`, `add_generation_prompt`,
`bos_token` and the like, `raise_exception`, `strftime_now`, the filter `tojson`, `break` and
`continue`, and `{% generation %}`, which changes nothing here. Tools and documents are none.

This file is run by its path, so it imports nothing of this package.
"""

import json
import signal
import sys
import time
from datetime import datetime
from typing import Any

MEMORY_BYTES = 2**30  # of the address space
MAX_CHARACTERS = 2**21  # that a rendering may add to its messages
MAX_COPIES = 16  # how often a rendering may repeat its messages


class Refusal(Exception):
    """A conversation that the template does not take; its text says why."""


def main() -> None:
    """Answer the lines of stdin until its end. Its argument: seconds of CPU time a line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    seconds = int(sys.argv[1])
    _limit_memory()
    try:
        _limit_time(seconds)
        template = _compile(json.loads(sys.stdin.readline()))
    except Exception as error:  # whatever the template did: the other process reports it
        _answer({"error": _describe(error)})
        return
    _answer({})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            _limit_time(seconds)
            _answer({"texts": _render_all(template, request)})
        except Exception as error:
            _answer({"error": _describe(error)})


def _compile(source: str) -> Any:
    """The jinja2.Template of a text, in the environment that transformers gives to it."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} … {% endgeneration %}: what the model writes. It renders as it is."""

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    Generation.tags = {"generation"}

    def raise_exception(message: str) -> None:
        raise Refusal(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _render_all(template: Any, request: dict[str, Any]) -> list[str]:
    """A text for each call of a request. All of them see the same time."""
    now = datetime.now()
    variables = {
        **request["variables"],
        "strftime_now": now.strftime,
        "tools": None,
        "documents": None,
    }
    return [_render(template, {**variables, **call}) for call in request["calls"]]


def _render(template: Any, variables: dict[str, Any]) -> str:
    """The rendering. Raises ValueError if it grows beyond its limit."""
    num_given = sum(len(message["content"]) for message in variables["messages"])
    limit = MAX_CHARACTERS + MAX_COPIES * num_given
    parts = []
    num_written = 0
    for part in template.generate(**variables):
        num_written += len(part)
        if num_written > limit:
            raise ValueError(f"it writes more than {limit:,} characters")
        parts.append(part)
    return "".join(parts)


def _describe(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, MemoryError):
        return f"it needs more than {MEMORY_BYTES:,} bytes of memory"
    if isinstance(error, RecursionError):
        return "it calls itself too often"
    if isinstance(error, ImportError):
        return f"the package jinja2 is missing ({error}); pip install jinja2"
    lines = str(error).splitlines() or [type(error).__name__]
    if isinstance(error, Refusal):
        return f"it refuses this conversation ({lines[0]})"
    line = getattr(error, "lineno", None)
    return f"line {line}: {lines[0]}" if line else lines[0]


def _limit_memory() -> None:
    """Limit the address space. On Windows, only the time of the other process is a limit."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_time(seconds: int) -> None:
    """Let the operating system end this process after so many more seconds of CPU time."""
    try:
        import resource
    except ImportError:
        return
    used = int(time.process_time()) + 1
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (used + seconds, most))


def _answer(content: dict[str, Any]) -> None:
    print(json.dumps(content), flush=True)


if __name__ == "__main__":
    main()
