"""A request to stop: SIGTERM or SIGINT is noted, and the training loop looks; a second one ends the process at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def listening() -> Iterator[list[str]]:
    """Listen for SIGTERM and SIGINT while the body runs; the list is empty until one comes, and then holds its name."""
    received: list[str] = []

    def note(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
