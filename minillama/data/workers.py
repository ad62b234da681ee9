"""Apply a function to a stream of chunks in several processes, and keep the order of the results.

With N workers, N + 1 chunks are in flight: while N are worked on, the next one is ready. So the
workers never wait for the reader, and memory stays bounded whatever the size of the input.

    chunks in     0 1 2 3 4 …
    3 workers     [1] [2] [3]      chunk 4 is queued
    result out    0
"""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import parent_process
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_work: Callable[[Any], Any]  # set in each worker process, and nowhere else


def map_in_order(
    work: Callable[[Item], Result], chunks: Iterable[Item], workers: int
) -> Iterator[Result]:
    """work(chunk) of every chunk, in order. With fewer than two workers, in this process.

    An exception that `work` raises is raised here.
    """
    if workers < 2:
        yield from map(work, chunks)
        return
    with ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(work,)) as pool:
        in_flight: deque[Future[Result]] = deque()
        for chunk in chunks:
            in_flight.append(pool.submit(_work_on, chunk))
            if len(in_flight) > workers:
                yield in_flight.popleft().result()
        while in_flight:
            yield in_flight.popleft().result()


def _start_worker(work: Callable[[Any], Any]) -> None:
    """Prepare a new process. `work` is sent once a process, and not with every chunk."""
    global _work
    _work = work
    # Ctrl-C reaches every process of the terminal. Only the first one decides what to do.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _work_on(chunk: Any) -> Any:
    return _work(chunk)


def _exit_with_parent() -> None:
    """End this process when the first one ends. If that one is killed, it sends no message."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
