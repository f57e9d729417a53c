"""What there is to say of a slide, said once, though the slide is opened anew in every epoch."""

from __future__ import annotations

import logging
from pathlib import Path
from threading import Lock

_said: set[tuple[Path, str]] = set()
_lock = Lock()


def say_once(logger: logging.Logger, level: int, path: Path, message: str, *arguments: object) -> None:
    """Log ``PATH: MESSAGE`` unless the same message, whatever its arguments, was logged of this slide before."""
    with _lock:
        if (path, message) in _said:
            return
        _said.add((path, message))
    logger.log(level, f"%s: {message}", path, *arguments)
