"""Where the features between two stages are kept."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from wholeslide.geometry import Box, Size
from wholeslide.model.network import LocalNetwork
from wholeslide.streaming.execution import Execution


class FeatureStore(Protocol):
    """x_k of one slide: written once, tile by tile, and read by region."""

    size: Size
    channels: int

    def read(self, cell_box: Box) -> Tensor:
        """A copy of a region, (1, C, h, w), on the computing device."""
        ...

    def write(self, cell_box: Box, x_bchw: Tensor) -> None:
        """Keep a region, rounded to the store's type."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that the store holds."""
        ...


class TensorStore:
    """Features in one tensor, in the memory of the device or of the host, channels last so that a region is a few long runs."""

    def __init__(
        self, size: Size, channels: int, *, dtype: torch.dtype, place: torch.device, device: torch.device
    ) -> None:
        self.size = size
        self.channels = channels
        self._device = device
        self._features_hwc = torch.empty((size.height, size.width, channels), dtype=dtype, device=place)

    def read(self, cell_box: Box) -> Tensor:
        rows, columns = cell_box.rows_columns
        region_hwc = self._features_hwc[rows, columns].to(self._device, copy=True)
        return region_hwc[None].permute(0, 3, 1, 2)

    def write(self, cell_box: Box, x_bchw: Tensor) -> None:
        rows, columns = cell_box.rows_columns
        self._features_hwc[rows, columns] = x_bchw[0].permute(1, 2, 0).to(self._features_hwc)

    def close(self) -> None:
        self._features_hwc = self._features_hwc.new_empty((0, 0, self.channels))

    @property
    def nbytes(self) -> int:
        return self._features_hwc.nbytes


def open_store(
    place: Literal["device", "host"], size: Size, channels: int, *, dtype: torch.dtype, device: torch.device
) -> FeatureStore:
    """An empty store for x_k of ``size`` cells."""
    where = device if place == "device" else torch.device("cpu")
    return TensorStore(size, channels, dtype=dtype, place=where, device=device)


def store_bytes(network: LocalNetwork, view: Size, number: int, execution: Execution) -> int:
    """Bytes of the stores that are open while stage ``number`` (0 for the stem) is computed: its input's and its output's."""

    def of(k: int) -> int:
        if not 0 <= k < network.depth:
            return 0  # pixels are not stored, and nobody reads the last stage's features
        channels = network.stage(k).out_channels if k else network.stem.out_channels
        return network.feature_size(view, k).area * channels * execution.store_dtype.itemsize

    return of(number - 1) + of(number)


def largest_store_bytes(network: LocalNetwork, view: Size, execution: Execution) -> int:
    """Bytes of the stores at the moment of a step when they are largest."""
    return max(store_bytes(network, view, number, execution) for number in range(network.depth + 1))
