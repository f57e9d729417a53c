"""Files that are either there and complete, or not there."""

from __future__ import annotations

import errno
import glob
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from wholeslide.errors import Problem, RunError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where a disk, a quota or a limit is full."""
_TOKEN_BYTES = 4


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Write a file beside its place, and rename it there when the block ends well; else nothing is left.

    Of several processes that write it at the same time, each has a place of its own: the file is the last one's, whole.

    Yields:
        The path to write to.

    Raises:
        RunError: the disk is full, or the folder cannot be written.
    """
    beside = own_part(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        with beside.open("rb") as stream:
            os.fsync(stream.fileno())
        beside.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):  # nothing was written, or the folder itself is gone
            beside.unlink()


def part_name(name: str) -> str:
    """What a file is called until it is complete."""
    return f".{name}.part"


def own_part(path: Path) -> Path:
    """A place beside a file to write it, which no other writer has."""
    return path.with_name(part_name(f"{secrets.token_hex(_TOKEN_BYTES)}.{path.name}"))


def left_parts(path: Path) -> list[Path]:
    """What writers of a file left that were killed; nobody may be writing it."""
    return list(path.parent.glob(part_name(f"{'?' * 2 * _TOKEN_BYTES}.{glob.escape(path.name)}")))


def cannot_write(path: Path, error: OSError) -> RunError:
    """The error of a file that could not be written."""
    if error.errno in FULL:
        return RunError([Problem("the disk is full", str(path), "free some space, or choose another folder")])
    reason = error.strerror or str(error)
    return RunError([Problem(f"cannot be written: {reason}", str(path), "check the folder and its permissions")])


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
