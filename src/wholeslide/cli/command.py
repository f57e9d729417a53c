"""What a command is: its arguments as a dataclass, and a function that runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command of ``wholeslide``.

    Args:
        name: As it is typed, ``bench memory`` with its space.
        summary: One sentence for the help.
        arguments: The dataclass whose fields are the options.
        positionals: The fields that are given by position; the last takes all that follow if it is a list.
        run: Takes an instance of ``arguments`` and returns the exit status.
        example: A command line that a newcomer can adapt.
        without: Fields that are no options of this command, though its arguments have them; they keep their defaults.
    """

    name: str
    summary: str
    arguments: type
    run: Callable[[Any], int]
    example: str
    positionals: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
