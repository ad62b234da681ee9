"""What the user got wrong: one exception, one line, exit code 2.

A mistake that a user can mend is a `UserError`; its text names the thing, where it is, and what to do. Everything else
is a defect of ours and keeps its traceback. `run` is the only place that turns the first kind into `error: …`.
"""

import difflib
import signal
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """A mistake the user can mend. The message says what, where, and the remedy."""


def closest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'learning_rate'?)` for the known name nearest to `name`, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {match[0]!r}?)" if match else ""


def run(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> None:
    """Run a script's `main` and exit: 0 done, 2 the user's mistake (one line on stderr), 130 interrupted.

    `--debug` anywhere in the arguments shows the traceback of a user's mistake too.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    if debug:
        argv.remove("--debug")
    signal.signal(signal.SIGPIPE, signal.SIG_DFL) if hasattr(signal, "SIGPIPE") else None
    try:
        sys.exit(main(argv) or 0)
    except UserError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
