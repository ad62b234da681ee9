"""Run a script of the project in a forked child, which has imported torch already: 0.1 s for each.

The child goes the way of a command line, through `cli.run`: its exit code, stdout and stderr are
those that a user sees.
"""

import importlib
import json
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from minillama import cli
from tests.faults.injector import Injector

with suppress(ImportError):  # a run draws its losses; to import this takes a second
    importlib.import_module("matplotlib.backends.backend_agg")
    importlib.import_module("matplotlib.figure")

SCRIPTS = {name: importlib.import_module(name) for name in ("train", "generate", "convert", "eval")}


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int  # -9: it was killed, because it did not end in time
    stdout: str
    stderr: str
    operations: list[str]  # on files, as far as it was counted


def run_command(
    command: str,
    folder: Path,
    report: Path,
    kind: str = "",
    at: int = sys.maxsize,
    limit: float = 60.0,
    before: Callable[[], object] | None = None,
) -> Outcome:
    """Run a command line such as "train.py --max_steps 4" in `folder`.

    report: a folder outside of it, for what the command prints.
    kind, at: a fault, as `Injector` has them. limit: seconds.
    before: called in the child, before the command.
    """
    report.mkdir(exist_ok=True)
    (report / "operations").write_text("[]")
    script, *arguments = shlex.split(command)
    child = os.fork()
    if child == 0:
        try:
            _be_command(script.removesuffix(".py"), arguments, folder, report, kind, at, before)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)  # whatever happens, a child never goes on as pytest
    code = _wait(child, limit)
    return Outcome(
        code=code,
        stdout=(report / "stdout").read_text(errors="replace"),
        stderr=(report / "stderr").read_text(errors="replace"),
        operations=json.loads((report / "operations").read_text()),
    )


def _wait(child: int, limit: float) -> int:
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.003)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGKILL


def _be_command(
    script: str,
    arguments: list[str],
    folder: Path,
    report: Path,
    kind: str,
    at: int,
    before: Callable[[], object] | None,
) -> None:
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        handle = os.open(report / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, descriptor)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    os.chdir(folder)
    if before is not None:
        before()
    injector = Injector(kind, at, folder)
    injector.install()
    code = 1
    try:
        cli.run(SCRIPTS[script].main, arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    injector.kind = "over"
    injector.at = -1
    sys.stdout.flush()
    sys.stderr.flush()
    (report / "operations").write_text(json.dumps(injector.operations))
    os._exit(code)
