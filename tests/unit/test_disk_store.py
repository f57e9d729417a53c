"""Features on disk: in no folder's listing, not in memory, and gone when the process is."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from wholeslide.errors import ConfigError, StoreError
from wholeslide.geometry import Box, Size
from wholeslide.streaming.disk_store import DiskStore, folder_for_features

CPU = torch.device("cpu")


def disk_store(folder: Path, size: Size | None = None, channels: int = 8) -> DiskStore:
    return DiskStore(size or Size(40, 30), channels, dtype=torch.float32, folder=folder, device=CPU)


def test_the_file_has_no_name_and_ends_with_the_store(tmp_path: Path) -> None:
    store = disk_store(tmp_path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    store.write(Box(0, 0, 40, 30), torch.ones(1, 8, 30, 40))
    assert float(store.read(Box(5, 5, 1, 1)).sum()) == 8
    assert list(tmp_path.iterdir()) == []
    store.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before - 1


def test_a_store_that_an_error_left_open_ends_with_its_last_reference(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    store = disk_store(tmp_path)
    store.write(Box(0, 0, 40, 30), torch.ones(1, 8, 30, 40))
    del store
    patience = time.monotonic() + 10  # the writer may hold on to its last tile for a moment
    while len(list(Path("/proc/self/fd").iterdir())) > before and time.monotonic() < patience:
        time.sleep(0.01)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_process_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import os, signal, torch; from pathlib import Path; from wholeslide.geometry import Box, Size;"
        "from wholeslide.streaming.disk_store import DiskStore;"
        f"s = DiskStore(Size(9, 9), 4, dtype=torch.float32, folder=Path({str(tmp_path)!r}), device=torch.device('cpu'));"
        "s.write(Box(0, 0, 9, 9), torch.ones(1, 4, 9, 9)); s.read(Box(0, 0, 9, 9));"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_does_not_stay_in_memory(tmp_path: Path) -> None:
    """Sixty-four tiles of 16 MiB: the process grows by a few of them at most, which the allocator may hold on to."""
    store, tile = disk_store(tmp_path, Size(16384, 256), 64), torch.ones(1, 64, 256, 256)
    process, before = psutil.Process(), psutil.Process().memory_info().rss
    for left in range(0, 16384, 256):
        store.write(Box(left, 0, 256, 256), tile)
    for left in range(0, 16384, 256):
        assert float(store.read(Box(left, 0, 1, 1)).sum()) == 64
    assert store.nbytes == 16384 * 256 * 64 * 4
    assert process.memory_info().rss - before < store.nbytes / 3
    store.close()


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = disk_store(tmp_path)

    def full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    store.write(Box(0, 0, 40, 30), torch.ones(1, 8, 30, 40))
    with pytest.raises(StoreError) as caught:
        store.read(Box(0, 0, 1, 1))
    assert str(caught.value) == (
        f"the features of a slide could not be kept, No space left on device (--store-dir {tmp_path}): "
        "free some space, or name a folder on another disk"
    )


def test_a_disk_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = disk_store(tmp_path)
    store.write(Box(0, 0, 40, 30), torch.ones(1, 8, 30, 40))

    def fails(*arguments: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(StoreError) as caught:
        store.read(Box(0, 0, 1, 1))
    assert str(caught.value) == (
        f"the features of a slide could not be read again, Input/output error (--store-dir {tmp_path}): "
        "free some space, or name a folder on another disk"
    )


def test_calls_that_read_and_write_a_part_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may do less than it is asked for."""
    preadv, pwrite = os.preadv, os.pwrite

    def little(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return preadv(descriptor, [buffers[0][:5]], offset)

    monkeypatch.setattr(os, "preadv", little)
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: pwrite(descriptor, data[:7], offset))
    store, x = disk_store(tmp_path, Size(4, 3), 2), torch.randn(1, 2, 3, 4)
    store.write(Box(0, 0, 4, 2), x[:, :, :2])
    store.write(Box(0, 2, 4, 1), x[:, :, 2:])
    assert torch.equal(store.read(Box.covering(store.size)), x)
    assert torch.equal(store.read(Box(1, 1, 2, 2)), x[:, :, 1:, 1:3])


@pytest.mark.parametrize("fstype", ["tmpfs", "ramfs"])
def test_a_ram_disk_is_refused(fstype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partitions = [
        SimpleNamespace(mountpoint="/", fstype="ext4"),
        SimpleNamespace(mountpoint=str(tmp_path), fstype=fstype),
    ]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: partitions)
    inside = tmp_path / "a"
    inside.mkdir()
    with pytest.raises(ConfigError) as caught:
        folder_for_features(inside)
    assert str(caught.value) == (
        f"its files are kept in memory, so that nothing would be gained (--store-dir {inside}): "
        "name a folder on a disk with --store-dir"
    )
    partitions.append(SimpleNamespace(mountpoint=str(inside), fstype="ext4"))
    assert folder_for_features(inside) == inside
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert folder_for_features(None) != tmp_path


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        folder_for_features(tmp_path / "no")
    assert str(caught.value) == f"no such folder (--store-dir {tmp_path / 'no'}): make it, or name another"


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    where = f"features cannot be kept there, Operation not permitted (--store-dir {tmp_path})"
    with pytest.raises(ConfigError) as caught:
        folder_for_features(tmp_path)
    assert str(caught.value).startswith(where)
    with pytest.raises(StoreError) as lost:  # it could be written when training began: what was done is saved
        DiskStore(Size(10, 10), 4, dtype=torch.float32, folder=tmp_path, device=torch.device("cpu"))
    assert str(lost.value).startswith(where)
