from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterator

import pytest

from wholeslide import allocator
from wholeslide.allocator import Room, fix_thresholds, return_freed_memory

CREEP = """
import ctypes, sys
from pathlib import Path
from wholeslide.allocator import fix_thresholds, return_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

if sys.argv[1] == "fixed":
    assert fix_thresholds()
blocks = []
for _ in range(3):                      # glibc learns that blocks of 16 MiB come and go
    del blocks[:]
    blocks = [bytearray(16 << 20) for _ in range(4)]
del blocks[:]
before = resident()
held = []
for _ in range(48):                     # then each big block is followed by a small survivor
    big = bytearray(8 << 20)
    held.append((big, bytearray(200_000)))
held = [small for _, small in held]
del big
if sys.argv[1] == "fixed":
    return_freed_memory()
print(resident() - before)
"""


THREADS = """
import sys, threading
from pathlib import Path
from wholeslide.allocator import fix_thresholds

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

if sys.argv[1] == "fixed":
    assert fix_thresholds()
for _ in range(3):                      # glibc learns that blocks of 16 MiB come and go
    bytearray(16 << 20)
gates = [threading.Event() for _ in range(4)]

def read(gate):
    gate.wait()
    held = [bytearray(1 << 20) for _ in range(25)]
    del held[:-1]                       # the last one survives, behind what was freed
    done.release()
    end.wait()

done, end = threading.Semaphore(0), threading.Event()
threads = [threading.Thread(target=read, args=(gate,)) for gate in gates]
for thread in threads:
    thread.start()
before = resident()
for gate in gates:                      # one after another: they need the memory of one
    gate.set()
    done.acquire()
print(resident() - before)
end.set()
"""


def growth_bytes(mode: str, script: str = CREEP) -> int:
    done = subprocess.run([sys.executable, "-c", script, mode], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_blocks_go_back_to_the_system() -> None:
    assert growth_bytes("fixed") < 16 << 20
    assert growth_bytes("as it is") > 64 << 20  # otherwise this test shows nothing


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_what_a_thread_freed_serves_the_others() -> None:
    assert growth_bytes("fixed", THREADS) < 32 << 20
    assert growth_bytes("as it is", THREADS) > 64 << 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.parametrize(("allowed", "trims"), [(100, 0), (40, 1)])
def test_freed_memory_stays_where_there_is_room_for_what_comes(
    allowed: int, trims: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 40 to 100 MiB that may be taken, 30 are, and 30 more are asked for."""
    room, given_back = Room(), list[None]()
    room.begin(allowed << 20)
    monkeypatch.setattr(allocator, "return_freed_memory", lambda: given_back.append(None))
    held = bytearray(30 << 20)
    held[::4096] = b"1" * len(held[::4096])
    room.make(30 << 20)
    assert len(given_back) == trims


def test_may_be_called_again() -> None:
    assert fix_thresholds() == fix_thresholds()


@pytest.fixture
def another_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    allocator._glibc.cache_clear()
    yield
    allocator._glibc.cache_clear()


@pytest.mark.usefixtures("another_library")
def test_does_nothing_elsewhere() -> None:
    assert fix_thresholds.__wrapped__() is False
    return_freed_memory()
