from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from wholeslide.allocator import return_freed_memory

CREEP = """
import ctypes, sys
from pathlib import Path
from wholeslide.allocator import return_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

if sys.argv[1] == "fixed":
    assert return_freed_memory()
blocks = []
for _ in range(3):                      # glibc learns that blocks of 16 MiB come and go
    del blocks[:]
    blocks = [bytearray(16 << 20) for _ in range(4)]
del blocks[:]
before = resident()
held = []
for _ in range(24):                     # then each big block is followed by a small survivor
    big = bytearray(8 << 20)
    held.append((big, bytearray(200_000)))
held = [small for _, small in held]
del big
print(resident() - before)
"""


def growth_bytes(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", CREEP, mode], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_blocks_go_back_to_the_system() -> None:
    assert growth_bytes("fixed") < 16 << 20
    assert growth_bytes("as it is") > 64 << 20  # otherwise this test shows nothing


def test_may_be_called_again() -> None:
    assert return_freed_memory() == return_freed_memory()


def test_does_nothing_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert return_freed_memory.__wrapped__() is False
