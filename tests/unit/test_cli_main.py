from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest

from wholeslide import cli
from wholeslide.cli import COMMANDS, main
from wholeslide.cli.command import Command
from wholeslide.cli.failures import report
from wholeslide.cli.output import format_bytes, print_json, print_table
from wholeslide.errors import Problem, SlideError, WholeslideError


@dataclass(frozen=True, kw_only=True)
class Nothing:
    """No options."""


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch):
    """Makes `wholeslide doctor` do something else."""

    def install(action) -> None:
        def run(arguments: Nothing) -> int:
            return action() or 0

        command = Command(name="doctor", summary="", arguments=Nothing, run=run, example="wholeslide doctor")
        monkeypatch.setattr(cli, "load", lambda name: command)

    return install


def raise_(error: BaseException) -> None:
    raise error


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, summary in COMMANDS.items():
        assert f"  {name} " in text
        assert summary in text


def test_summaries_are_those_of_the_commands() -> None:
    for name in COMMANDS:
        command = cli.load(name)
        assert (command.name, command.summary) == (name, COMMANDS[name])
        assert command.example.startswith(f"wholeslide {name}")


def test_no_words_are_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "wholeslide demo" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("wholeslide ")


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "error: unknown command (trian): did you mean train?\n"


def test_family_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    assert "bench memory" in capsys.readouterr().out
    assert main(["bench", "memry"]) == 2
    assert (
        capsys.readouterr().err
        == "error: unknown command (bench memry): did you mean bench memory or bench speed or bench io?\n"
    )


@pytest.mark.parametrize("words", [["--help"], *(f"{name} --help".split() for name in COMMANDS)])
def test_help_imports_neither_torch_nor_pandas(words: list[str]) -> None:
    code = (
        "import sys\nfrom wholeslide.cli import main\nstatus = main(sys.argv[1:])\n"
        "assert status == 0, status\n"
        "heavy = {'torch', 'torchvision', 'timm', 'lightning', 'skimage', 'openslide', 'pandas', 'numpy'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: wholeslide")


def test_all_problems_on_a_line_each(raising, capsys: pytest.CaptureFixture[str]) -> None:
    raising(lambda: raise_(SlideError([Problem("cannot be read", "a\nb.svs", "mend it"), Problem("x", "y", "z")])))
    assert main(["doctor"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: cannot be read (a b.svs): mend it\nerror: x (y): z\n"
    assert captured.out == ""


def test_a_fault_of_ours(raising, capsys: pytest.CaptureFixture[str]) -> None:
    raising(lambda: raise_(ZeroDivisionError("division by zero")))
    assert main(["doctor"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ZeroDivisionError: division by zero (")
    assert error.endswith("): please report this with what --debug shows\n")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("words", [["--debug", "doctor"], ["doctor", "--debug"]])
def test_debug_shows_the_traceback(raising, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    raising(lambda: raise_(WholeslideError.single("broken", where="here", remedy="mend it")))
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.endswith("error: broken (here): mend it\n")


def os_error(number: int, name: str | None = "/runs/x") -> OSError:
    return OSError(number, os.strerror(number), name) if name else OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (os_error(errno.ENOSPC), "the disk is full (/runs/x): free some space, or write to another disk"),
        (
            os_error(errno.ENOSPC, None),
            "the disk is full (No space left on device): free some space, or write to another disk",
        ),
        (
            RuntimeError("I/O error: No space left on device (os error 28)"),
            "the disk is full (I/O error: No space left on device (os error 28)): "
            "free some space, or write to another disk",
        ),
        (os_error(errno.EACCES), "permission denied (/runs/x): change the permissions, or choose another place"),
        (os_error(errno.EROFS), "permission denied (/runs/x): change the permissions, or choose another place"),
        (os_error(errno.ENOENT), "no such file (/runs/x): check the path"),
        (os_error(errno.EISDIR), "is a directory (/runs/x): move it, or choose another place"),
        (os_error(errno.EMFILE), "too many open files (/runs/x): raise the limit, as with `ulimit -n 4096`"),
        (MemoryError("4 GiB"), "out of memory (4 GiB): give a smaller --memory, or end other programs"),
    ],
)
def test_what_the_system_refuses(error: Exception, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(error) == 2
    assert capsys.readouterr().err == f"error: {line}\n"


def test_the_cause_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    wrapped = RuntimeError("writing failed")
    wrapped.__cause__ = os_error(errno.ENOSPC)
    assert report(wrapped) == 2
    assert "the disk is full (/runs/x)" in capsys.readouterr().err


def test_what_merely_came_before_is_no_cause(capsys: pytest.CaptureFixture[str]) -> None:
    ours = TypeError("ours")
    ours.__context__ = os_error(errno.ENOENT)
    assert report(ours) == 1
    assert "TypeError: ours" in capsys.readouterr().err


def test_interrupted(raising, capsys: pytest.CaptureFixture[str]) -> None:
    raising(lambda: raise_(KeyboardInterrupt()))
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_terminated_unwinds_the_stack(raising) -> None:
    before = signal.getsignal(signal.SIGTERM)
    unwound = []

    def action() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            unwound.append(True)

    raising(action)
    assert main(["doctor"]) == 143
    assert unwound
    assert signal.getsignal(signal.SIGTERM) == before


def test_saved_state_tells_its_own_status(raising) -> None:
    class Saved(KeyboardInterrupt):
        exit_status = 143

    raising(lambda: raise_(Saved()))
    assert main(["doctor"]) == 143


def test_broken_pipe() -> None:
    code = "import sys\nfrom wholeslide.cli import main\nsys.exit(main(['--help']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 141
    assert error == b""


def test_log_goes_to_stderr_and_the_loggers_are_put_back(raising, capsys: pytest.CaptureFixture[str]) -> None:
    def action() -> None:
        logging.getLogger("wholeslide.slides").warning("slide %s is padded", "a.svs")
        logging.getLogger("wholeslide.slides").info("for your information")
        logging.getLogger("wholeslide.slides").debug("not shown")
        logging.getLogger("tifffile").warning("not shown either")
        talkative = logging.getLogger("huggingface_hub.example")
        talkative.setLevel(logging.WARNING)
        talkative.warning("nor what has a level of its own")
        warnings.warn("nor this", stacklevel=1)

    raising(action)
    ours = logging.getLogger("wholeslide")
    before = ours.level, list(ours.handlers)
    assert main(["doctor"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "warning: slide a.svs is padded\nfor your information\n"
    assert captured.out == ""
    assert (ours.level, list(ours.handlers)) == before


def test_debug_shows_what_other_libraries_say(raising, capsys: pytest.CaptureFixture[str]) -> None:
    raising(lambda: logging.getLogger("tifffile").warning("odd tag"))
    assert main(["doctor", "--debug"]) == 0
    assert capsys.readouterr().err == "warning: odd tag\n"


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json([{"a": float("nan"), "b": (1.0, float("inf")), "name": "😐", "path": Path("x")}])
    text = capsys.readouterr().out
    assert json.loads(text) == [{"a": None, "b": [1.0, None], "name": "😐", "path": "x"}]
    assert "😐" in text


def test_tables_are_not_cut_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 300
    print_table(["file", "value"], [[long, float("nan")], ["[bold]", 0.123456]])
    text = capsys.readouterr().out
    assert long in text
    assert "[bold]" in text
    assert "0.1235" in text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (5 << 40, "5.0 TiB")]
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert format_bytes(count) == text
