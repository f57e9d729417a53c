"""One process at a time in a folder, or at a file."""

from __future__ import annotations

import errno
import fcntl
import logging
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from wholeslide.errors import RunError
from wholeslide.slides.lock import LOCK_NAME, alone_in, alone_on, lock_open_file

CHILD = """
import sys, time
from pathlib import Path
from wholeslide.slides.lock import alone_in
with alone_in(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_second_one_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with alone_in(folder):
        for _ in range(2):
            with pytest.raises(RunError) as caught, alone_in(folder):
                pytest.fail("two at once")
        with alone_in(tmp_path / "another"):
            pass
    assert str(caught.value) == (
        f"another process is writing into this folder ({folder}): wait until it has ended, or give another --out"
    )
    with alone_in(folder):
        pass
    assert not list(folder.iterdir()), "nothing is left"


def test_a_file_has_a_lock_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "new" / "out.csv"
    with alone_on(file), alone_on(file.with_name("other.csv")):
        with pytest.raises(RunError) as caught, alone_on(file):
            pytest.fail("two at once")
        with pytest.raises(RunError, match=r"out\.csv\): have patience$"), alone_on(file, remedy="have patience"):
            pytest.fail("two at once")
        assert not file.exists()
    assert str(caught.value) == (
        f"another process is writing this file ({file}): wait until it has ended, or give another --out"
    )
    assert not list(file.parent.iterdir()), "nothing is left"


def test_a_file_that_is_open_is_locked_until_it_is_closed(tmp_path: Path) -> None:
    with (tmp_path / "out.csv").open("wb") as one, (tmp_path / "out.csv").open("ab") as other:
        lock_open_file(one.fileno(), tmp_path / "out.csv")
        with pytest.raises(RunError, match=r"another process is writing this file \(.*out\.csv\): wait until"):
            lock_open_file(other.fileno(), tmp_path / "out.csv")
        one.close()
        lock_open_file(other.fileno(), tmp_path / "out.csv")


def test_a_failure_in_the_block_frees_the_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), alone_in(tmp_path):
        raise KeyboardInterrupt
    with alone_in(tmp_path):
        pass


def test_another_process_is_refused_and_what_a_killed_one_left_is_not_in_the_way(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "locked\n"
        with pytest.raises(RunError, match="another process is writing"), alone_in(tmp_path):
            pass
        child.send_signal(signal.SIGKILL)
    assert (tmp_path / LOCK_NAME).exists()
    with alone_in(tmp_path):
        pass


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, handles = fcntl.flock, []

    def removed_first(handle: int, operation: int) -> None:
        if not handles:
            (tmp_path / LOCK_NAME).unlink()
        handles.append(handle)
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with alone_in(tmp_path):
        assert len(handles) == 2
        with pytest.raises(RunError), alone_in(tmp_path):
            pass


def test_without_locks_of_the_file_system_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(handle: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with caplog.at_level(logging.WARNING), alone_in(tmp_path):
        pass
    assert caplog.messages == [f"{tmp_path}: this file system has no locks; see that no other process writes there"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot be written: .*: check the folder"), alone_in(tmp_path / "file" / "sub"):
        pass
