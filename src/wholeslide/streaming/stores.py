"""Where the features between two stages are kept."""

from __future__ import annotations

from itertools import pairwise
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
        return region_hwc.permute(2, 0, 1)[None]

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


def store_bytes(network: LocalNetwork, largest: Size, execution: Execution) -> int:
    """The two largest neighbouring stores: x_{k−1} and x_k live together."""
    item = execution.store_dtype.itemsize
    sizes = [network.feature_size(largest, 0).area * network.stem.out_channels * item]
    for number in range(1, network.depth):
        sizes.append(network.feature_size(largest, number).area * network.stage(number).out_channels * item)
    sizes.append(0)
    return max(a + b for a, b in pairwise(sizes))
