"""From an exception to lines on stderr and an exit status."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Iterator

from wholeslide.errors import Problem, WholeslideError

MENDABLE, UNEXPECTED = 2, 1
INTERRUPTED, TERMINATED, BROKEN_PIPE = 130, 143, 141

FULL = "No space left on device"


def report(error: BaseException) -> int:
    """Write ``error: WHAT (WHERE): REMEDY`` for each problem to stderr, and return the exit status."""
    if isinstance(error, KeyboardInterrupt):
        write_line("interrupted")
        return int(getattr(error, "exit_status", INTERRUPTED))
    problems = problems_of(error)
    if problems:
        for problem in problems:
            write_problem(problem)
        return MENDABLE
    name = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    write_problem(Problem(name, _origin(error), "please report this with what --debug shows"))
    return UNEXPECTED


def problems_of(error: BaseException) -> list[Problem]:
    """What the user can mend about an exception, or about what caused it; empty if it is a fault of ours."""
    for cause in _causes(error):
        if isinstance(cause, WholeslideError):
            return list(cause.problems)
        problem = _system_problem(cause)
        if problem is not None:
            return [problem]
    return []


def write_problem(problem: Problem) -> None:
    """One line on stderr."""
    write_line(f"error: {problem}")


def write_line(text: str) -> None:
    """A text on stderr, as one line whatever it holds; its indentation and the gaps in a table stay."""
    indentation = text[: len(text) - len(text.lstrip(" "))]
    sys.stderr.write(indentation + " ".join(part.strip() for part in text.splitlines()) + "\n")
    sys.stderr.flush()


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exception and what it was explicitly raised from; what merely happened before it may be no cause."""
    current: BaseException | None = error
    seen: set[int] = set()
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__


def _system_problem(error: BaseException) -> Problem | None:
    """Disk, permissions and memory: what the system refused."""
    if isinstance(error, OSError):
        return _file_problem(error)
    if FULL in str(error):
        return Problem("the disk is full", _detail(error), "free some space, or write to another disk")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return Problem("out of memory", _detail(error), "give a smaller --memory, or end other programs")
    return None


def _file_problem(error: OSError) -> Problem | None:
    where = str(error.filename or error.filename2 or error.strerror or error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return Problem("the disk is full", where, "free some space, or write to another disk")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return Problem("permission denied", where, "change the permissions, or choose another place")
    if error.errno == errno.ENOENT:
        return Problem("no such file", where, "check the path")
    if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
        return Problem((error.strerror or "in the way").lower(), where, "move it, or choose another place")
    if error.errno == errno.EMFILE:
        return Problem("too many open files", where, "raise the limit, as with `ulimit -n 4096`")
    return None


def _detail(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else text[:157] + "..."


def _origin(error: BaseException) -> str:
    """The innermost line of ours that the error passed."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "wholeslide" in frame.filename]
    return f"{frames[-1].name}, line {frames[-1].lineno}" if frames else "wholeslide"
