"""What torchrun says about this process, in its environment: which rank it is, and of how many.

    WORLD_SIZE  number of ranks     RANK  0 to WORLD_SIZE - 1     LOCAL_RANK  on this machine
    MASTER_ADDR, MASTER_PORT        where rank 0 listens

Without these variables a process is alone. This module imports no torch.
"""

import os
import signal
import threading
import time
from typing import NamedTuple

from minillama.errors import UserError

TORCHRUN = "torchrun --nproc_per_node N SCRIPT.py … sets it"


class Launch(NamedTuple):
    rank: int
    size: int
    local_rank: int


def read_launch() -> Launch:
    """Return the ranks of this process. Raises UserError for what torchrun would not say."""
    size = world_size()
    rank = _number("RANK", 0, 2**31, default=0 if size == 1 else None)
    if rank >= size:
        raise UserError(f"RANK={rank}: must be below WORLD_SIZE={size}; {TORCHRUN}")
    if size > 1:
        _number("MASTER_PORT", 1, 65535)
        if not os.environ.get("MASTER_ADDR"):
            raise UserError(f"MASTER_ADDR is missing, the address of rank 0; {TORCHRUN}")
    return Launch(rank, size, _number("LOCAL_RANK", 0, 2**31, default=0))


def world_size() -> int:
    """Return the number of ranks; 1 without torchrun."""
    return _number("WORLD_SIZE", 1, 2**31, default=1)


def ranks_on_machine() -> int:
    """Return the number of ranks that torchrun started on this machine."""
    return _number("LOCAL_WORLD_SIZE", 1, 2**31, default=1)


def rendezvous_address() -> str:
    """Return the address at which the ranks meet, for messages."""
    return f"MASTER_ADDR:MASTER_PORT = {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def launcher() -> str:
    """Return the words before the script's name in the command that started this process."""
    if "LOCAL_WORLD_SIZE" not in os.environ:
        return "python"
    return f"torchrun --nproc_per_node {ranks_on_machine()}"


def _number(name: str, lowest: int, highest: int, default: int | None = None) -> int:
    """Return a variable of the environment as a number from `lowest` to `highest`."""
    text = os.environ.get(name, "")
    if not text and default is not None:
        return default
    if not text:
        raise UserError(f"{name} is missing; {TORCHRUN}")
    if not text.isdecimal() or not lowest <= int(text) <= highest:
        raise UserError(
            f"{name}={text}: must be a whole number from {lowest} to {highest}; {TORCHRUN}"
        )
    return int(text)


def stop_with_launcher() -> None:
    """Send this process a SIGTERM when torchrun, which started it, is gone."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return  # started without torchrun: a shell may end before its job
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
