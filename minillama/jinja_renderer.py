"""Render a chat template in a process of its own: see jinja_program.py for why.

The process is started at the first rendering and kept. One that has ended is started again. A
process that was forked from this one starts its own: two writers of one pipe would get each other's
answers. An interrupted wait ends the process, whose answer would be taken for the next one.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

from minillama.errors import UserError

PROGRAM = Path(__file__).with_name("jinja_program.py")
CPU_SECONDS = 5  # for the compilation, and for each request
WAIT_SECONDS = 120.0  # for an answer, on systems that do not limit CPU time
REMEDY = "use another template: --template NAME, or FILE.jinja"


class JinjaRenderer:
    """A chat template and its process. Threads may share it.

    variables: what the template can use besides the messages, such as bos_token.
    """

    def __init__(self, source: str, variables: dict[str, str]) -> None:
        self.source = source
        self.variables = variables
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0  # the id of the process that started it
        self._lock = threading.Lock()

    def render(self, calls: list[dict[str, Any]]) -> list[str]:
        """The text of each call: {"messages": [{"role", "content"}, …], "add_generation_prompt"}.

        Raises UserError for a template that is wrong, refuses the messages, or breaks a limit.
        """
        with self._lock:
            if not self._is_running():
                self._start()
            answer = self._ask({"variables": self.variables, "calls": calls})
        texts: list[str] = answer["texts"]
        return texts

    def _is_running(self) -> bool:
        """Whether the process that this one started can be asked."""
        if self._process is None or self._owner != os.getpid():
            return False
        return self._process.poll() is None

    def _start(self) -> None:
        self._owner = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(PROGRAM), str(CPU_SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )
        weakref.finalize(self, _end, self._process)
        try:
            self._ask(self.source)
        except UserError:
            self._process.kill()
            self._process.wait()
            raise

    def _ask(self, message: Any) -> dict[str, Any]:
        """Send a message and wait for the answer. Raises UserError for one that is an error."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        clock = threading.Timer(WAIT_SECONDS, process.kill)
        clock.start()
        try:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        except BaseException:  # such as Ctrl-C
            process.kill()
            process.wait()
            raise
        finally:
            clock.cancel()
        if not line:
            raise UserError(f"the chat template is not used: {self._why_it_ended()}; {REMEDY}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UserError(f"the chat template cannot be used: {answer['error']}; {REMEDY}")
        return answer

    def _why_it_ended(self) -> str:
        assert self._process is not None
        code = self._process.wait()
        if code == -getattr(signal, "SIGXCPU", 0):
            return f"it runs for more than {CPU_SECONDS} seconds"
        return f"its process ended with code {code}, as one does that runs or grows too long"


def _end(process: subprocess.Popen[str]) -> None:
    """End a process: its input ends."""
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):  # of a process that has ended
            if pipe is not None:
                pipe.close()
    process.wait()
