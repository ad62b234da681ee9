"""Run a function on several ranks: forked processes on this machine that talk through gloo."""

import gc
import multiprocessing
import os
import queue
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any


def run_on_ranks(
    size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 300.0
) -> list[Any]:
    """function(*arguments) on each of `size` ranks, with torchrun's environment; returns the
    results in order of rank.

    A rank that fails raises its traceback here; one that hangs is killed at `timeout`.
    """
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue = context.Queue()
    port = _free_port()
    ranks = [
        context.Process(
            target=_be_rank, args=(rank, size, port, results, function, arguments), daemon=True
        )
        for rank in range(size)
    ]
    for rank in ranks:
        rank.start()
    found: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(found) < size:
            try:
                rank, result, failure = results.get(timeout=max(0.01, deadline - time.monotonic()))
            except queue.Empty:
                silent = ", ".join(str(rank) for rank in range(size) if rank not in found)
                raise TimeoutError(f"rank {silent} did not return within {timeout} s") from None
            assert failure is None, f"rank {rank}:\n{failure}"
            found[rank] = result
    finally:
        for rank in ranks:
            rank.join(timeout=5.0 if len(found) == size else 0.0)
            rank.kill()
    return [found[rank] for rank in range(size)]


def _be_rank(
    rank: int,
    size: int,
    port: int,
    results: multiprocessing.Queue,
    function: Callable[..., Any],
    arguments: tuple,
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    gc.freeze()  # a collection that visits what it shares with the parent would copy all of it
    try:
        results.put((rank, function(*arguments), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
