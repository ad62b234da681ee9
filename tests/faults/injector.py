"""Faults at the N-th operation on files: the process dies, a write is cut, or the disk is full.

Python announces every opened, renamed and removed file to its audit hooks, whatever function asks
for it, so nothing that the package does can pass by unseen. What hooks are not told of, writing and
flushing, is replaced where the package does it: `OutputFile.write` and `os.fsync`.

A hook stays for the life of its process: install an injector in a forked child only.
"""

import errno
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minillama.files import OutputFile

KILLED = 137  # the exit code of a process that `kill -9` ended, as a shell says it
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
NEEDS_SPACE = {"open", "os.mkdir", "write", "fsync"}  # what a full disk refuses


@dataclass
class Injector:
    """Counts the operations on files below a folder, and makes one of them fail.

    kind "kill": the process ends before operation `at`.
    kind "cut":  likewise, and half of the bytes are written if the operation is a write.
    kind "full": from operation `at` on, the disk is full: half of the bytes are written.
    """

    kind: str
    at: int
    folder: Path
    operations: list[str] = field(default_factory=list)  # "what path" of each

    def install(self) -> None:
        """Watch this process from now on."""
        write = OutputFile.write
        fsync = os.fsync

        def watched_write(file: OutputFile, content: Any) -> int:
            def write_half() -> None:
                view = memoryview(content).cast("B")
                write(file, view[: len(view) // 2])

            self.operation("write", str(file.name), write_half)
            return write(file, content)

        def watched_fsync(handle: int) -> None:
            self.operation("fsync", os.readlink(f"/proc/self/fd/{handle}"))
            fsync(handle)

        OutputFile.write = watched_write  # type: ignore[method-assign]
        os.fsync = watched_fsync
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple) -> None:
        if event != "open" and event not in CHANGES:
            return
        if isinstance(arguments[0], int):
            return  # an open file, such as one that is already counted
        path = os.fsdecode(arguments[0])
        if event == "open":
            is_change = bool(arguments[2] & WRITING)
        elif event == "os.mkdir":
            is_change = not os.path.exists(path)
        elif event == "os.remove":
            is_in_directory = arguments[1] >= 0  # by a handle: rmtree
            is_change = is_in_directory or os.path.lexists(path)
        else:
            is_change = True
        if is_change:
            self.operation(event, path)

    def operation(self, what: str, path: str, write_half: Callable[[], None] | None = None) -> None:
        """Count an operation that is about to be done, and let it fail if it is its turn."""
        if not os.path.abspath(path).startswith(str(self.folder)):
            return
        number = len(self.operations)
        self.operations.append(f"{what} {path}")
        if self.kind == "full":
            if number >= self.at and what in NEEDS_SPACE:
                if write_half is not None:
                    write_half()
                full = os.strerror(errno.ENOSPC)
                if what == "fsync":  # takes no name, so its error has none
                    raise OSError(errno.ENOSPC, full)
                raise OSError(errno.ENOSPC, full, path)
        elif number == self.at:
            if self.kind == "cut" and write_half is not None:
                write_half()
            os._exit(KILLED)
