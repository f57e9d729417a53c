"""Tables on stdout; progress, warnings and notes on stderr."""

from __future__ import annotations

import csv
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from wholeslide.cli.failures import write_line


class _StderrHandler(logging.Handler):
    """One line a message: ``warning: …``; what is only said for information stands as it is."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        write_line(prefix + record.getMessage())


@contextmanager
def messages(*, debug: bool) -> Iterator[None]:
    """Send the library's log to stderr for a block; what other libraries warn of is for developers (``debug``)."""
    ours, others = logging.getLogger("wholeslide"), logging.getLogger()
    before = [(logger, logger.level, logger.propagate, list(logger.handlers)) for logger in (ours, others)]
    ours.setLevel(logging.DEBUG if debug else logging.INFO)
    ours.propagate = False
    ours.addHandler(_StderrHandler())
    others.addHandler(_StderrHandler() if debug else logging.NullHandler())
    os.environ.setdefault("HF_HUB_VERBOSITY", "debug" if debug else "error")  # it has a handler of its own
    try:
        with warnings.catch_warnings():
            if not debug and not sys.warnoptions:
                warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level, propagate, handlers in before:
            logger.setLevel(level)
            logger.propagate = propagate
            logger.handlers[:] = handlers


def print_json(value: Any) -> None:
    """As JSON that any parser reads: what is not a number is null."""
    write(json.dumps(_finite(value), indent=2, ensure_ascii=False, default=str))


def write(text: str) -> None:
    """A line on stdout."""
    sys.stdout.write(text + "\n")


def write_csv_line(values: Sequence[object]) -> None:
    """A line of CSV on stdout, at once."""
    csv.writer(sys.stdout, lineterminator="\n").writerow(values)
    sys.stdout.flush()


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None) -> None:
    """A table on stdout, as wide as its content where stdout is no terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*[Text(_cell(value)) for value in row])
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 1000, soft_wrap=False)
    console.print(table)


def format_bytes(count: float) -> str:
    """``1.5 GiB``."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and value != value):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value
