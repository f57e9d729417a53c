"""A folder that one process at a time writes into."""

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


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder for a block; the folder is made where it is missing.

    The lock (``flock`` on a file in the folder) is the operating system's and ends with the process, however that ends:
    a file that a killed process left does not block.

    Raises:
        RunError: another process is in a block of the same folder, or the folder cannot be written.
    """
    path = folder / LOCK_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _locked(path)
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        yield
    finally:
        with suppress(OSError):  # removed while it is locked: who waits for it sees that it is gone
            path.unlink()
        os.close(handle)


def _locked(path: Path) -> int:
    """An open, locked handle of a file that is still there."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(handle, path)
        except BaseException:
            os.close(handle)
            raise
        if os.fstat(handle).st_nlink > 0:
            return handle
        os.close(handle)  # the process before removed it between our opening and our locking


def _lock(handle: int, path: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            raise RunError.single(
                "another process is writing into this folder",
                where=str(path.parent),
                remedy="wait until it has ended, or give another --out",
            ) from None
        if error.errno not in UNSUPPORTED:
            raise
        logger.warning("%s: this file system has no locks; see that no other process writes there", path.parent)
