"""A folder, or a file, that one process at a time writes into."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from wholeslide.errors import RunError
from wholeslide.slides.files import cannot_write

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"
HELD = (errno.EAGAIN, errno.EACCES)
UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
FILE_IS_TAKEN = "another process is writing this file"
_REMEDY = "wait until it has ended, or give another --out"


@contextmanager
def alone_in(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes out of a folder for a block; the folder is made where it is missing.

    With ``wait``, a process that is in a block of the folder already is waited for.

    The lock (``flock`` on a file in the folder) is the operating system's and ends with the process, however that ends:
    a file that a killed process left does not block.

    Raises:
        RunError: another process is in a block of the same folder, or the folder cannot be written.
    """
    what = "another process is writing into this folder"
    with _alone(folder / LOCK_NAME, guarded=folder, what=what, wait=wait):
        yield


@contextmanager
def alone_on(file: Path, *, remedy: str = _REMEDY) -> Iterator[None]:
    """Keep other processes from a file for a block, by a lock on ``<file>.lock``, as :func:`alone_in` does.

    Args:
        file: what is written in the block.
        remedy: what a second process is told to do.

    Raises:
        RunError: another process is in a block of the same file, or the folder cannot be written.
    """
    with _alone(file.with_name(f"{file.name}.lock"), guarded=file, what=FILE_IS_TAKEN, remedy=remedy):
        yield


def lock_open_file(handle: int, path: Path) -> None:
    """Lock a file that is open for writing until it is closed, or the process ends.

    Raises:
        RunError: another process has locked it.
    """
    _lock(handle, path, FILE_IS_TAKEN)


@contextmanager
def _alone(lock: Path, *, guarded: Path, what: str, remedy: str = _REMEDY, wait: bool = False) -> Iterator[None]:
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = _locked(lock, guarded, what, remedy, wait=wait)
    except OSError as error:
        raise cannot_write(guarded, error) from error
    try:
        yield
    finally:
        with suppress(OSError):  # removed while it is locked: who waits for it sees that it is gone
            lock.unlink()
        os.close(handle)


def _locked(path: Path, guarded: Path, what: str, remedy: str, *, wait: bool) -> int:
    """An open, locked handle of a file that is still there."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(handle, guarded, what, remedy, wait=wait)
        except BaseException:
            os.close(handle)
            raise
        if os.fstat(handle).st_nlink > 0:
            return handle
        os.close(handle)  # the process before removed it between our opening and our locking


def _lock(handle: int, guarded: Path, what: str, remedy: str = _REMEDY, *, wait: bool = False) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in HELD:
            raise RunError.single(what, where=str(guarded), remedy=remedy) from None
        if error.errno not in UNSUPPORTED:
            raise
        logger.warning("%s: this file system has no locks; see that no other process writes there", guarded)
