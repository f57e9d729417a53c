"""The command line: ``wholeslide COMMAND …``.

Each command lives in a module of its own, which is imported only when it is asked for: ``wholeslide --help`` and
``wholeslide train --help`` answer without importing torch.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from wholeslide import __version__
from wholeslide.cli.command import Command

COMMANDS = {
    "demo": "Train on a made-up cohort and see every part work, in a few minutes.",
    "inspect": "Show how a slide would be read: size, scale, tissue.",
    "cohort gdc": "Build a manifest of TCGA's diagnostic slides from the tables of the GDC portal.",
    "cohort lks": "Build a manifest of the Liver-Kidney-Stomach slides from their folder.",
    "split": "Split a manifest into training, validation and test, or into folds, never cutting a patient.",
    "prepare": "Write slides at the working resolution, so that training reads them faster.",
    "features": "Encode the patches of slides with a frozen network, and write their features.",
    "train": "Train a classifier on whole slides.",
    "evaluate": "Score a run on its test split, or on another cohort, with 95% intervals.",
    "predict": "Classify slides that were never seen before.",
    "explain": "Show what a run looks at on slides: maps, overlays, regions.",
    "view": "Look at a run's slides, and at what it looked at, in a web browser.",
    "report": "Draw the report of a run: a page with curves, scores, slides and facts.",
    "compare": "Compare methods fairly by cross-validation, with tests that were fixed before.",
    "verify": "Show on this machine that streaming tile by tile is exact.",
    "bench memory": "Measure the peak memory and the time of one training step.",
    "bench io": "Measure how fast slides are read, by our reader and by usual ones.",
    "bench speed": "Measure the time from a slide's file to its prediction, beside patch features with attention.",
    "doctor": "Check this installation, and say what to mend.",
}
"""Every command with its summary, in the order in which a newcomer meets them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: The words after ``wholeslide``; those of this process if left out.

    Returns:
        The exit status: 0; 1 for a fault of ours; 2 for what the user can mend, with a line for each problem on stderr;
        130 after SIGINT, 143 after SIGTERM.
    """
    from wholeslide.cli.failures import BROKEN_PIPE, report
    from wholeslide.cli.output import messages

    words = list(sys.argv[1:] if argv is None else argv)
    debug = _take_debug(words)
    try:
        with messages(debug=debug), _raising_on_sigterm():
            status = _dispatch(words)
            sys.stdout.flush()
            return status
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            sys.excepthook(type(error), error, error.__traceback__)
        return report(error)


def load(name: str) -> Command:
    """The command of this name; imports its module."""
    module = importlib.import_module("wholeslide.cli." + name.replace(" ", "_"))
    command: Command = module.COMMAND
    return command


def _dispatch(words: list[str]) -> int:
    from wholeslide.cli.parser import nearest_command, parse

    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(_overview())
        return 0
    if words[0] in ("-V", "--version", "version"):
        sys.stdout.write(f"wholeslide {__version__}\n")
        return 0
    name, rest = _command_name(words)
    if name not in COMMANDS:
        families = {known.split()[0] for known in COMMANDS}
        if name in families and rest and rest[0] in ("-h", "--help"):
            sys.stdout.write(_overview(name))
            return 0
        raise nearest_command(name, COMMANDS)
    command = load(name)
    return command.run(parse(command, rest))


def _command_name(words: list[str]) -> tuple[str, list[str]]:
    """``bench memory --sizes …``: the longest name of a command that the words begin with."""
    two = " ".join(words[:2])
    if two in COMMANDS:
        return two, words[2:]
    if words[0] not in COMMANDS and len(words) > 1 and not words[1].startswith("-"):
        families = {known.split()[0] for known in COMMANDS if " " in known}
        if words[0] in families:
            return two, words[2:]
    return words[0], words[1:]


def _overview(family: str = "") -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{summary}" for name, summary in COMMANDS.items() if name.startswith(family)]
    return "\n".join(
        [
            "usage: wholeslide COMMAND ... [--debug]",
            "",
            "Train, evaluate and run classifiers that see an entire gigapixel slide at once.",
            "",
            *lines,
            "",
            "`wholeslide COMMAND --help` lists the options of a command; `wholeslide demo` is a good first one.",
            "",
        ]
    )


def _take_debug(words: list[str]) -> bool:
    """Remove ``--debug``, which may stand anywhere before a ``--``."""
    end = words.index("--") if "--" in words else len(words)
    if "--debug" not in words[:end]:
        return False
    words[:end] = [word for word in words[:end] if word != "--debug"]
    return True


@contextmanager
def _raising_on_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the stack as SIGINT does, so that files are closed and temporary ones removed."""
    from wholeslide.cli.failures import TERMINATED

    def leave(signal_number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
