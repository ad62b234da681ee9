"""Measures anonymous memory: what the system cannot drop.

Pages of a mapped file count in a process's resident set too, but the system drops them when memory
is short. So a promise about memory is about RssAnon, the anonymous part of the resident set.
"""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path


def anonymous_bytes(process_id: int) -> int:
    """The anonymous resident memory of a process; 0 when it has ended."""
    try:
        status = Path(f"/proc/{process_id}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    match = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
    return 1024 * int(match[1]) if match else 0


def peak_growth(action: Callable[[], object]) -> int:
    """The most that anonymous memory grows while a forked process runs `action`."""
    start = anonymous_bytes(os.getpid())
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    peak = 0
    while True:
        peak = max(peak, anonymous_bytes(child))
        process_id, wait_status = os.waitpid(child, os.WNOHANG)
        if process_id != 0:
            break
        time.sleep(0.001)
    assert wait_status == 0, "the action failed"
    return peak - start
