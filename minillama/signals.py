"""A request to stop: SIGTERM or SIGINT sets a flag that the training loop looks at; a second one ends the process at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class StopRequest:
    """Whether this process was asked to stop, and by what."""

    def __init__(self) -> None:
        self.by = ""

    def __call__(self, number: int, frame: object) -> None:
        if self.by:
            raise KeyboardInterrupt
        self.by = signal.Signals(number).name


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Listen for SIGTERM and SIGINT while the body runs."""
    request = StopRequest()
    before = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
