"""Work spread over processes, its results in order.

The queue holds one chunk more than there are processes: all of them work while the next one is read, and memory does not grow
with the input.
"""

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

In = TypeVar("In")
Out = TypeVar("Out")


def in_order(work: Callable[[In], Out], chunks: Iterable[In], workers: int) -> Iterator[Out]:
    """work(chunk) of every chunk, in order; by this process for fewer than two workers. What work raises is raised here."""
    if workers < 2:
        yield from map(work, chunks)
        return
    context = get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(workers, context, _begin, (work,)) as pool:
        queue: deque[Future[Out]] = deque()
        for chunk in chunks:
            queue.append(pool.submit(_work_on, chunk))
            if len(queue) > workers:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()


def _begin(work: Callable[[Any], Any]) -> None:
    """A worker's first act: keep `work`, which is sent once, not with every chunk."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to every process; the first one decides
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _work_on(chunk: Any) -> Any:
    return _work(chunk)


def _end_with_parent() -> None:
    parent_process().join()  # one that is killed says nothing
    os._exit(1)
