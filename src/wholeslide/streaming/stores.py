"""Where the features between two stages are kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from wholeslide.geometry import Box, Size
from wholeslide.model.network import LocalNetwork
from wholeslide.streaming.disk_store import DiskStore, folder_for_features
from wholeslide.streaming.execution import Execution
from wholeslide.streaming.tile_index import TileIndex

StorePlace = Literal["device", "host", "disk"]

#: Memory is taken in pages of this size, so that it is not mixed with what lives shorter.
_PAGE_BYTES = 64 * 2**20


class FeatureStore(Protocol):
    """x_k of one slide: written once, tile by tile, and read by region."""

    size: Size
    channels: int
    constant_c: Tensor | None

    def read(self, cell_box: Box) -> Tensor:
        """A copy of a region, (1, C, h, w), on the computing device."""
        ...

    def regions(self, cell_boxes: Iterable[Box]) -> Iterator[Tensor]:
        """Regions in this order, each as :meth:`read` gives it."""
        ...

    def write(self, cell_own: Box, x_bchw: Tensor) -> None:
        """Keep the cells of a tile, rounded to the store's type; no cell is written twice."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of what was written."""
        ...


class PagePool:
    """Memory that one store hands on to the next, once told to keep any: a system zeroes fresh pages before they are written."""

    def __init__(self) -> None:
        self._keeps = False
        self._pages: list[Tensor] = []

    def keep(self, keeps: bool) -> None:
        """Whether what comes back is kept from here on; if not, what is there goes back to the system."""
        self._keeps = keeps
        if not keeps:
            self._pages.clear()

    def take(self, needed_bytes: int, place: torch.device) -> Tensor:
        """At least so many bytes: the smallest page that serves, or a new one."""
        serving = [
            index for index, page in enumerate(self._pages) if page.nbytes >= needed_bytes and page.device == place
        ]
        if not serving:
            return torch.empty(needed_bytes, dtype=torch.uint8, device=place)
        return self._pages.pop(min(serving, key=lambda index: self._pages[index].nbytes))

    def give_back(self, pages: Iterable[Tensor]) -> None:
        """For the next who takes."""
        if self._keeps:
            self._pages.extend(pages)


class TensorStore:
    """Features in the memory of the device or of the host, tile behind tile, each channels last.

    Cells that no tile wrote are all ``constant_c``, (C,), and take no memory. With ``pool``, pages come from there and go back.
    """

    def __init__(
        self,
        size: Size,
        channels: int,
        *,
        dtype: torch.dtype,
        place: torch.device,
        device: torch.device,
        pool: PagePool | None = None,
    ) -> None:
        self.size = size
        self.channels = channels
        self.constant_c: Tensor | None = None
        self._dtype, self._place, self._device = dtype, place, device
        self._tiles = TileIndex()
        self._features_hwc: list[Tensor] = []
        self._page_cells = max(1, min(size.area, _PAGE_BYTES // (channels * dtype.itemsize)))
        self._page_nc = torch.empty((0, channels), dtype=dtype, device=place)  # what is left of the last page
        self._pool, self._taken = pool or PagePool(), list[Tensor]()

    def read(self, cell_box: Box) -> Tensor:
        shape = (cell_box.height, cell_box.width, self.channels)
        region_hwc = torch.empty(shape, dtype=self._dtype, device=self._place)
        parts = self._tiles.overlapping(cell_box)
        if sum(common.size.area for _, common in parts) < cell_box.size.area:
            assert self.constant_c is not None, "read before it was written"
            region_hwc[:] = self.constant_c
        for index, common in parts:
            rows, columns = common.relative_to(self._tiles.boxes[index]).rows_columns
            region_hwc[common.relative_to(cell_box).rows_columns] = self._features_hwc[index][rows, columns]
        return region_hwc.to(self._device)[None].permute(0, 3, 1, 2)

    def regions(self, cell_boxes: Iterable[Box]) -> Iterator[Tensor]:
        for box in cell_boxes:
            yield self.read(box)

    def write(self, cell_own: Box, x_bchw: Tensor) -> None:
        cells = cell_own.size.area
        if cells > len(self._page_nc):
            page_cells = max(cells, self._page_cells)
            self._page_nc = self._page(page_cells)
        features_hwc = self._page_nc[:cells].view(cell_own.height, cell_own.width, self.channels)
        features_hwc.copy_(x_bchw[0].permute(1, 2, 0))
        self._page_nc = self._page_nc[cells:]
        self._tiles.append(cell_own)
        self._features_hwc.append(features_hwc)

    def close(self) -> None:
        self._features_hwc.clear()
        self._page_nc = self._page_nc.new_empty((0, self.channels))
        self._pool.give_back(self._taken)
        self._taken = []

    def _page(self, cells: int) -> Tensor:
        """Room for at least so many cells, (N, C)."""
        cell_bytes = self.channels * self._dtype.itemsize
        page = self._pool.take(cells * cell_bytes, self._place)
        self._taken.append(page)
        return page[: page.nbytes // cell_bytes * cell_bytes].view(self._dtype).view(-1, self.channels)

    @property
    def nbytes(self) -> int:
        return sum(features.nbytes for features in self._features_hwc)


def open_store(
    place: StorePlace,
    size: Size,
    channels: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    folder: Path | None = None,
    pool: PagePool | None = None,
) -> FeatureStore:
    """An empty store for x_k of ``size`` cells.

    Raises:
        ConfigError: the store is to be on disk, and ``folder`` (by default one for temporary files) does not serve.
    """
    if place == "disk":
        return DiskStore(size, channels, dtype=dtype, folder=folder or folder_for_features(None), device=device)
    where = device if place == "device" else torch.device("cpu")
    return TensorStore(size, channels, dtype=dtype, place=where, device=device, pool=pool)


def feature_bytes(network: LocalNetwork, view: Size, number: int, execution: Execution) -> int:
    """Bytes of the store of x_k, where no background is elided."""
    if not 0 <= number < network.depth:
        return 0  # pixels are not stored, and nobody reads the last stage's features
    channels = network.stage(number).out_channels if number else network.stem.out_channels
    return network.feature_size(view, number).area * channels * execution.store_dtype.itemsize


def store_bytes(network: LocalNetwork, view: Size, number: int, execution: Execution) -> int:
    """Bytes of the stores that are open while stage ``number`` (0 for the stem) is computed: its input's and its output's."""
    return sum(feature_bytes(network, view, k, execution) for k in (number - 1, number))


def largest_store_bytes(network: LocalNetwork, view: Size, execution: Execution) -> int:
    """Bytes of the stores at the moment of a step when they are largest."""
    return max(store_bytes(network, view, number, execution) for number in range(network.depth + 1))
