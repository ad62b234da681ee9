"""Stop requests. SIGTERM and SIGINT are noted, and the training loop looks at its next micro-batch.

A second signal raises KeyboardInterrupt at once.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def listening() -> Iterator[list[str]]:
    """Listen for SIGTERM and SIGINT while the block runs.

    Yields a list that is empty until one comes, and then holds its name. In a thread other than the
    main one, where Python allows no handlers, it stays empty.
    """
    received: list[str] = []

    def note(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
