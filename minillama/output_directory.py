"""Directories that are complete or absent, and locks.

    write        into .NAME.partial, which is locked       an old NAME is still there
    fsync        of every file in it
    rename       NAME becomes .NAME.old                    a rename cannot replace a directory
    rename       .NAME.partial becomes NAME
    remove       .NAME.old

A rename can replace an empty directory only. A run that is killed leaves the old directory or the
new one. Only between the two renames there is neither: `restore` puts .NAME.old back, and the next
writer clears the rest. The kernel releases a lock when its process ends, however it ends.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from minillama.errors import UserError
from minillama.files import flush_to_disk, hidden_sibling, named_errors

GB = 10**9
HAS_LOCKS = find_spec("fcntl") is not None  # not on Windows
HEADROOM = 16 * 2**20  # bytes for headers, config and tokenizer
CANNOT_LOCK = (errno.EBADF, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)  # some network disks


@contextmanager
def new_directory(
    path: Path,
    replace: bool | Callable[[Path], bool] = False,
    needed_bytes: int = 0,
    writer: str = "process",
) -> Iterator[Path]:
    """Yield an empty directory that becomes `path` when the block ends.

    After an exception in the block, `path` is as before.

    replace: whether a directory with files may be replaced, or a function of its path that tells.
    needed_bytes: how much will be written (0: unknown, not checked).
    writer: what the other process is called in the error, such as "conversion".

    Raises UserError if `path` may not be replaced, another process is writing it, the disk has too
    little room, or an operation on files fails, in the block too.
    """
    path = path.resolve()
    partial = hidden_sibling(path, "partial")
    old = hidden_sibling(path, "old")
    lock_message = f"{path}: another {writer} is writing this output; wait for it, or name another"
    try:
        _refuse_links(partial, old)
        partial.mkdir(parents=True, exist_ok=True)
        with _locked(partial, lock_message):
            try:
                _settle(path, old)
                _clear(partial)
                _refuse_existing(path, replace)
                _refuse_full_disk(path, needed_bytes)
                yield partial
                _publish(partial, path, old)
            finally:
                _settle(path, old)
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"{error.filename or path}: {error.strerror or error}; no output was written, "
            "and what was there before is untouched"
        ) from error


def final_hint(directory: Path, name: str) -> str:
    """Return what to give in place of the directory of a run, if its final/ has `name`; else ""."""
    if not (directory / "final" / name).is_file():
        return ""
    return f"; this is the directory of a run: give {directory / 'final'}"


def restore(path: Path) -> None:
    """Put back the old directory if a run was killed after moving it aside.

    Readers call this before they look for `path`.
    """
    path = path.resolve()
    if path.exists():
        return
    old = hidden_sibling(path, "old")
    if old.is_symlink() or not old.is_dir():
        return
    partial = hidden_sibling(path, "partial")
    if partial.is_dir() and _is_locked(partial):
        return  # its writer is alive and about to put the new one in place
    with suppress(FileNotFoundError):  # another reader was first
        old.rename(path)


def refuse_overlap(output: Path, inputs: Iterable[Path]) -> None:
    """Raise UserError if writing `output` would replace an input, whatever both are called.

    An input may be a directory that holds the output's, such as its parent.
    """
    target = output.resolve()
    for path in inputs:
        place = path.resolve()
        if target == place or target in place.parents:
            raise UserError(
                f"{output}: the output would replace the input {path}; name another output"
            )


@contextmanager
def lock_directory(path: Path) -> Iterator[None]:
    """Hold a directory, created if it is missing, for this process while the block runs.

    Raises UserError if another process holds it. The lock is on the directory itself, so no file is
    left, and a directory that was created and is still empty is removed again. If the system or
    the disk has no locks, the block runs without one.
    """
    created = [place for place in (path, *path.parents) if not place.exists()]
    path.mkdir(parents=True, exist_ok=True)
    lock_message = (
        f"{path}: another process is writing there; wait for it, or name another directory"
    )
    with _locked(path, lock_message), _removed_if_empty(created):
        yield


@contextmanager
def _removed_if_empty(directories: list[Path]) -> Iterator[None]:
    """Remove directories, inner ones first, when the block ends, up to the first with a file."""
    try:
        yield
    finally:
        with suppress(OSError):
            for directory in directories:
                directory.rmdir()


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk that holds `path`, or will hold it once it is created."""
    place = path.resolve()
    while not place.exists():
        place = place.parent
    with named_errors(path):
        return shutil.disk_usage(place).free


def take_lock(handle: int, path: Path, lock_message: str) -> None:
    """Lock an open file or directory until `handle` is closed.

    Raises UserError with the message `lock_message` if another process holds the lock. If the
    system or the disk has no locks, nothing happens.
    """
    if not HAS_LOCKS:
        return
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(lock_message) from None
    except OSError as error:
        if error.errno not in CANNOT_LOCK:
            error.filename = str(path)
            raise
    if not path.exists() or not os.path.samestat(os.fstat(handle), path.stat()):
        # another process renamed or removed it after it was opened here
        raise UserError(lock_message)


@contextmanager
def _locked(directory: Path, lock_message: str) -> Iterator[None]:
    """Hold the lock of a directory. Raises UserError with `lock_message` if it is held."""
    if not HAS_LOCKS:
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        take_lock(handle, directory, lock_message)
        yield
    finally:
        os.close(handle)


def _is_locked(directory: Path) -> bool:
    try:
        with _locked(directory, ""):
            return False
    except (UserError, OSError):
        return True


def _settle(path: Path, old: Path) -> None:
    """Put the old directory back if nothing took its place, and remove it otherwise."""
    if old.exists() and not path.exists():
        old.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _clear(directory: Path) -> None:
    for remains in directory.iterdir():
        if remains.is_dir() and not remains.is_symlink():
            shutil.rmtree(remains)
        else:
            remains.unlink()


def _publish(partial: Path, path: Path, old: Path) -> None:
    for inner in partial.rglob("*"):
        if not inner.is_symlink():
            flush_to_disk(inner)
    flush_to_disk(partial)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    flush_to_disk(path.parent)


def _refuse_links(*temporary: Path) -> None:
    for path in temporary:
        if path.is_symlink():
            raise UserError(
                f"{path}: a symbolic link in the place of a temporary directory; remove it"
            )


def _refuse_existing(path: Path, replace: bool | Callable[[Path], bool]) -> None:
    if not path.exists():
        return
    is_directory = path.is_dir()
    if is_directory and not any(path.iterdir()):
        return
    if replace is False:
        raise UserError(
            f"{path}: already exists; --overwrite replaces it once the new one is complete"
        )
    if not is_directory or not (replace is True or replace(path)):
        raise UserError(
            f"{path}: not a plain checkpoint directory, so --overwrite does not remove it; "
            "name another output"
        )


def _refuse_full_disk(path: Path, needed_bytes: int) -> None:
    if needed_bytes == 0:
        return
    free = free_bytes(path)
    if needed_bytes + HEADROOM > free:
        raise UserError(
            f"{path}: needs {needed_bytes / GB:.2f} GB, and {free / GB:.2f} GB are free there; "
            "make room, or write to another disk"
        )
