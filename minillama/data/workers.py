"""Work spread over processes, its results in order.

Chunk i goes to process i modulo N, and results are collected in the same turn, so order needs no bookkeeping. A process holds one
chunk at a time: the next is read while all of them work, and memory does not grow with the input.

    read   0  1  2  3  4  5          process 0:  0     3
    give   0→0 1→1 2→2 …             process 1:     1     4        results 0 1 2 3 4 …
    take   0←0, give 3→0, take 1←1 … process 2:        2     5
"""

import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from minillama.errors import UserError

In = TypeVar("In")
Out = TypeVar("Out")


def in_order(work: Callable[[In], Out], chunks: Iterable[In], workers: int) -> Iterator[Out]:
    """work(chunk) of every chunk, in order; by this process for fewer than two workers. A UserError there is raised here."""
    if workers < 2:
        yield from map(work, chunks)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pipes: list[Connection] = []
    processes: list[BaseProcess] = []
    for _ in range(workers):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=_serve, args=(work, theirs, ours), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    try:
        given = taken = 0
        for chunk in chunks:
            if given - taken == workers:
                yield _take(pipes[taken % workers])
                taken += 1
            pipes[given % workers].send(chunk)
            given += 1
        for number in range(taken, given):
            yield _take(pipes[number % workers])
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join()


def _take(pipe: Connection) -> Any:
    try:
        result = pipe.recv()
    except EOFError:
        raise RuntimeError("a tokenizing process ended before its work; what it said stands above") from None
    if isinstance(result, UserError):
        raise result
    return result


def _serve(work: Callable[[Any], Any], pipe: Connection, other_end: Connection) -> None:
    """A process's life: until the other end is closed, by the first process or by its death."""
    other_end.close()  # inherited; while it is open here, the end of the first process would go unnoticed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to every process; the first one decides
    while True:
        try:
            chunk = pipe.recv()
        except EOFError:
            return
        try:
            result = work(chunk)
        except UserError as error:
            result = error
        pipe.send(result)
