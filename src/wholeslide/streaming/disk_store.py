"""Features between two stages in a file, so that a slide of any size needs little memory.

The file has no name: the system frees it when the process ends, however it ends. It is read and written explicitly, not mapped, so
that its pages never count as the process's memory; a thread writes behind the computation, and reads ahead of it.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch import Tensor

from wholeslide.errors import ConfigError, StoreError
from wholeslide.geometry import Box, Size
from wholeslide.streaming.tile_index import TileIndex

_Bytes = npt.NDArray[np.uint8]

#: Tiles that may wait to be written; each holds its memory meanwhile.
MOST_WAITING = 1
#: File systems whose files are memory.
_IN_MEMORY = frozenset({"tmpfs", "ramfs", "hugetlbfs", "devtmpfs"})
#: As many buffers as one call may fill.
_MOST_BUFFERS = 1024


class DiskStore:
    """Features in a file, tile behind tile, each channels last; cells that no tile wrote are all ``constant_c``.

    Args:
        size: of x_k in cells.
        channels: of x_k.
        dtype: what features are rounded to.
        folder: on a disk; see :func:`folder_for_features`.
        device: where regions are needed.

    Raises:
        StoreError: the folder cannot be written any more.
    """

    def __init__(self, size: Size, channels: int, *, dtype: torch.dtype, folder: Path, device: torch.device) -> None:
        self.size = size
        self.channels = channels
        self.constant_c: Tensor | None = None
        self._dtype, self._folder, self._device = dtype, folder, device
        self._cell_bytes = channels * dtype.itemsize
        self._tiles = TileIndex()
        self._offsets: list[int] = []
        self._end = 0
        try:
            self._file = _nameless_file(folder)
        except ConfigError as error:  # the folder served when the engine was made
            raise StoreError(error.problems) from error
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store-write")
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store-read")
        self._waiting: deque[Future[None]] = deque()
        # An error may leave a step with its stores open: then they end with the last reference.
        self._end_of_life = weakref.finalize(self, _let_go, self._file, self._writer, self._reader)

    def read(self, cell_box: Box) -> Tensor:
        """A copy of a region, (1, C, h, w), on the computing device."""
        self._settle(0)
        return self._on_device(self._read(cell_box))

    def regions(self, cell_boxes: Iterable[Box]) -> Iterator[Tensor]:
        """Regions in this order; while one is used, the next is read."""
        self._settle(0)
        ahead: deque[Future[Tensor]] = deque()
        try:
            for box in cell_boxes:
                ahead.append(self._reader.submit(self._read, box))
                if len(ahead) > 1:
                    yield self._on_device(ahead.popleft().result())
            while ahead:
                yield self._on_device(ahead.popleft().result())
        finally:
            for future in ahead:
                future.cancel()

    def write(self, cell_own: Box, x_bchw: Tensor) -> None:
        """Keep the cells of a tile, rounded to the store's type; the file is written on a thread.

        Raises:
            StoreError: the disk is full, or fails; raised by a later call where the thread finds out later.
        """
        self._settle(MOST_WAITING)
        features_hwc = x_bchw[0].permute(1, 2, 0).to(device="cpu", dtype=self._dtype, copy=True).contiguous()
        self._tiles.append(cell_own)
        self._offsets.append(self._end)
        self._waiting.append(self._writer.submit(self._write, features_hwc, self._end))
        self._end += features_hwc.nbytes

    def close(self) -> None:
        """Give the disk's space back. May be called twice."""
        for thread in (self._writer, self._reader):
            thread.shutdown(cancel_futures=True)
        self._end_of_life()

    @property
    def nbytes(self) -> int:
        """Bytes on the disk."""
        return 0 if self._file.closed else self._end

    def _settle(self, waiting: int) -> None:
        """Wait until no more than so many tiles are still to be written."""
        while len(self._waiting) > waiting:
            self._waiting.popleft().result()

    def _write(self, features_hwc: Tensor, offset: int) -> None:
        left = _bytes_of(features_hwc).data
        with self._errors_named("the features of a slide could not be kept"):
            while len(left):
                written = os.pwrite(self._file.fileno(), left, offset)
                left, offset = left[written:], offset + written

    @contextmanager
    def _errors_named(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError.single(
                f"{what}, {error.strerror}",
                where=f"--store-dir {self._folder}",
                remedy="free some space, or name a folder on another disk",
            ) from error

    def _read(self, cell_box: Box) -> Tensor:
        """A region, (h, w, C), in host memory."""
        region_hwc = torch.empty((cell_box.height, cell_box.width, self.channels), dtype=self._dtype)
        if cell_box.empty:
            return region_hwc
        parts = self._tiles.overlapping(cell_box)
        if sum(common.size.area for _, common in parts) < cell_box.size.area:
            assert self.constant_c is not None, "read before it was written"
            region_hwc[:] = self.constant_c.cpu()
        rows_bytes = _bytes_of(region_hwc).reshape(cell_box.height, -1)
        for index, common in parts:
            self._read_part(index, common, rows_bytes, cell_box)
        return region_hwc

    def _read_part(self, index: int, common: Box, rows_bytes: _Bytes, cell_box: Box) -> None:
        """The rows of one tile that lie in a region."""
        tile, lies = self._tiles.boxes[index], common.relative_to(cell_box)
        first, stop = lies.left * self._cell_bytes, lies.right * self._cell_bytes
        buffers = [rows_bytes[row, first:stop].data for row in range(lies.top, lies.bottom)]
        skipped = (common.top - tile.top) * tile.width + common.left - tile.left
        offset, pitch = self._offsets[index] + skipped * self._cell_bytes, tile.width * self._cell_bytes
        together = _MOST_BUFFERS if common.width == tile.width else 1  # whole rows lie one behind the other
        with self._errors_named("the features of a slide could not be read again"):
            for row in range(0, len(buffers), together):
                _fill(self._file.fileno(), buffers[row : row + together], offset + row * pitch)

    def _on_device(self, region_hwc: Tensor) -> Tensor:
        return region_hwc.to(self._device)[None].permute(0, 3, 1, 2)


def _let_go(file: IO[bytes], *threads: ThreadPoolExecutor) -> None:
    """Nothing is under way any more: what is refers to the store."""
    for thread in threads:
        thread.shutdown(wait=False)
    file.close()


def folder_for_features(named: Path | None) -> Path:
    """Where features are kept on disk: the folder that the user named, or one for temporary files.

    Raises:
        ConfigError: it is missing, cannot be written, or its files would be in memory.
    """
    candidates = [named] if named is not None else [Path(tempfile.gettempdir()), Path("/var/tmp"), Path.cwd()]
    there = [folder for folder in candidates if folder.is_dir()]
    if not there:
        raise ConfigError.single("no such folder", where=f"--store-dir {named}", remedy="make it, or name another")
    for folder in there:
        if not _in_memory(folder):
            _nameless_file(folder).close()
            return folder
    raise ConfigError.single(
        "its files are kept in memory, so that nothing would be gained",
        where=f"--store-dir {there[0]}",
        remedy="name a folder on a disk with --store-dir",
    )


def _nameless_file(folder: Path) -> Any:
    """An unbuffered file that ends with its last handle.

    Raises:
        ConfigError: none can be made.
    """
    try:
        return tempfile.TemporaryFile(prefix="wholeslide-features-", dir=folder, buffering=0)
    except OSError as error:
        raise ConfigError.single(
            f"features cannot be kept there, {error.strerror}",
            where=f"--store-dir {folder}",
            remedy="name a folder on a disk that can be written",
        ) from error


def _in_memory(folder: Path) -> bool:
    resolved = folder.resolve()
    partitions = psutil.disk_partitions(all=True)
    above = [p for p in partitions if resolved.is_relative_to(p.mountpoint)]
    closest = max(
        above, key=lambda p: len(p.mountpoint), default=None
    )  # of two on one folder, the later hides the other
    hiding = [p for p in above if closest is not None and p.mountpoint == closest.mountpoint]
    return bool(hiding) and hiding[-1].fstype in _IN_MEMORY


def _bytes_of(tensor: Tensor) -> _Bytes:
    """The memory of a contiguous tensor on the host."""
    array: _Bytes = tensor.view(-1).view(torch.uint8).numpy()
    return array


def _fill(descriptor: int, buffers: list[memoryview], offset: int) -> None:
    """Read a run of the file into buffers, one after the other."""
    wanted = sum(len(buffer) for buffer in buffers)
    got = os.preadv(descriptor, buffers, offset)
    while got < wanted:  # a short read: byte by byte of what is missing, buffer by buffer
        done = got
        for buffer in buffers:
            if done < len(buffer):
                break
            done -= len(buffer)
        else:
            return
        more = os.preadv(descriptor, [buffer[done:]], offset + got)
        assert more > 0, "the file of features is shorter than what was written"
        got += more
