"""What the commands that measure have in common: the command that is recorded, pictures, and what a failure means."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from wholeslide.cli.failures import MENDABLE, UNEXPECTED, write_line
from wholeslide.cli.output import write
from wholeslide.errors import ConfigError

PICTURES = (".png", ".svg", ".pdf")


def check_picture(plot: Path | None) -> None:
    """Refuse what no picture can be written to.

    Raises:
        ConfigError: the file's ending is none of a picture.
    """
    if plot is not None and plot.suffix.lower() not in PICTURES:
        raise ConfigError.single("not a picture", where=f"--plot {plot}", remedy=f"end it in {', '.join(PICTURES)}")


def command_line(name: str, bench: Any, **others: object) -> str:
    """The command with every option spelled out, so that it stays the same whatever the defaults become."""
    words = ["wholeslide", *name.split()]
    chosen = {field.name: getattr(bench, field.name) for field in dataclasses.fields(bench)}
    for option, value in {**chosen, **others}.items():
        words += [] if value is None else ["--" + option.replace("_", "-"), str(value)]
    return shlex.join(words)


def write_picture(plot: Path, draw: Callable[[Path], None]) -> None:
    """Draw, and say where."""
    from wholeslide.train.checkpoint import disk_errors

    plot.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(plot):
        draw(plot)
    write(f"Drawn in {plot}")


def status_of(rows: Sequence[dict[str, Any]]) -> int:
    """0; where nothing could be measured, 2 if the user can mend that, else 1."""
    if any(row.get("measured", True) for row in rows):
        return 0
    if not all(row.get("mendable", False) for row in rows):
        return UNEXPECTED
    for reason in dict.fromkeys(row["reason"] for row in rows):
        write_line(f"error: {reason}")
    return MENDABLE
