"""What a stage costs in memory, counted on small windows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from wholeslide.geometry import Size
from wholeslide.model.network import LocalNetwork
from wholeslide.model.reconstruction import region_count, region_side
from wholeslide.streaming.execution import Execution
from wholeslide.streaming.tiles import STEM_ALIGN

#: Sides of the windows on which tensors are counted; two, so that halos and constants fall out.
_PROBES_PX = (384, 576)
#: Tensors as large as the largest of a graph that are in flight besides it: gradients and the kernels' workspace.
_IN_FLIGHT = 2
#: Windows of pixels that live at once in the stem: three for the one that is computed, as many for each that is read and jittered.
_PIXELS_IN_FLIGHT = 9
#: Of all regions, how often what comes in lives at once; of one, the fp32 maps that live on its way through the decoder and back.
_INPUTS_OF_REGIONS, _MAPS_OF_ONE_REGION = 2, 12
#: Of the weights of a classifier's first layer, beside their gradient: a product's own gradient; a convolution reorders them, too.
_COPIES_IN_A_PRODUCT, _COPIES_IN_A_CONVOLUTION = 1, 2
#: A tile smaller than this is nearly all halo.
_SMALLEST_TILE_PX = 192


@dataclass(frozen=True)
class Tiling:
    """How many tiles a view is cut into, and the largest window of one, in pixels."""

    tiles: int
    window: Size


@dataclass(frozen=True)
class TileCost:
    """Memory of a tile of the stem or of a stage, by the pixels of its window.

    ``graph_bytes_per_px`` stay between the two passes where the tile is kept, ``flight_bytes_per_px`` come on top while it is
    computed. ``weight_bytes`` are shared by all tiles: the folded weights, their casts and gradients, and what a product with the
    classifier's first layer takes. A tile's side is a
    multiple of ``step_px``; its halo adds ``halo_px`` to the side of its window. ``read_bytes_per_px`` of features come in,
    ``written_bytes_per_px`` go out, and ``map_bytes_per_px`` are those of the largest tensor on the way.
    """

    graph_bytes_per_px: float
    flight_bytes_per_px: float
    weight_bytes: int
    step_px: int
    halo_px: int
    read_bytes_per_px: float = 0.0
    written_bytes_per_px: float = 0.0
    map_bytes_per_px: float = 0.0

    def with_disk_buffers(self) -> TileCost:
        """The same where features are on disk: a window is read ahead, and two tiles are about to be written."""
        buffers_bytes = self.read_bytes_per_px + 2 * self.written_bytes_per_px
        return replace(self, flight_bytes_per_px=self.flight_bytes_per_px + buffers_bytes)

    def graph_bytes(self, window_px: int) -> int:
        """Of windows of so many pixels together."""
        return int(self.graph_bytes_per_px * window_px)

    def flight_bytes(self, window_px: int) -> int:
        """Of one window of so many pixels."""
        return int(self.flight_bytes_per_px * window_px)

    def largest_map_bytes(self, window_px: int) -> int:
        """Of any one tensor of a window's graph."""
        return int(self.map_bytes_per_px * window_px)

    def largest_window_px(self, view: Size, side_px: int) -> int:
        """Pixels of the largest window that tiles of ``side_px`` may have on any view of at most this area."""
        return min((self.rounded(side_px) + self.halo_px) ** 2, view.area)

    def tiling(self, view: Size, side_px: int) -> Tiling:
        """Even shares of a view for tiles of at most ``side_px``."""
        (columns, width), (rows, height) = (self._shares(length, side_px) for length in (view.width, view.height))
        return Tiling(columns * rows, Size(width, height))

    def rounded(self, side_px: int) -> int:
        """The side, rounded up to whole steps."""
        return -(-side_px // self.step_px) * self.step_px

    @property
    def economical_side(self) -> int:
        """As large as its halo: a window at most four times what the tile owns."""
        return self.rounded(max(self.halo_px, _SMALLEST_TILE_PX))

    def _shares(self, length_px: int, side_px: int) -> tuple[int, int]:
        """Tiles along an axis and the length of the largest window."""
        own_px = self.rounded(-(-length_px // -(-length_px // self.rounded(side_px))))
        return -(-length_px // own_px), min(own_px + self.halo_px, length_px)


def tile_cost(
    network: LocalNetwork, number: int, execution: Execution, device: torch.device, *, training: bool
) -> TileCost:
    """Of a tile of stage ``number``, or of the stem (0), which is never trained."""
    part = network.stage(number) if number else network.stem
    training = training and number > 0
    cell_px = part.stride // part.locality.stride
    step_px = part.stride * (network.head(number).kernel if number else STEM_ALIGN)
    sides = [max(px, steps * step_px) // cell_px for steps, px in enumerate(_PROBES_PX, start=1)]
    counted = [_window_bytes(network, number, cells, execution, device, training=training) for cells in sides]
    small_px, large_px = ((cells * cell_px) ** 2 for cells in sides)
    graph, flight, largest = ((large - small) / (large_px - small_px) for small, large in zip(*counted, strict=True))
    weights = part.step_weights(trained=training, dtype=execution.multiplied_dtype)
    copies = _COPIES_IN_A_CONVOLUTION if training and not execution.channels_last else _COPIES_IN_A_PRODUCT
    grid_weight_bytes = int(network.head(number).to_grid.weight.nbytes) if number else 0
    halo_cells = max(axis.halo_before + axis.halo_after for axis in (part.locality.x, part.locality.y))
    return TileCost(
        graph_bytes_per_px=graph,
        flight_bytes_per_px=flight,
        weight_bytes=weights.own_bytes + grid_weight_bytes * copies,
        step_px=step_px,
        halo_px=halo_cells * part.stride,
        read_bytes_per_px=part.in_channels * execution.store_dtype.itemsize / cell_px**2 if number else 0.0,
        map_bytes_per_px=largest,
        written_bytes_per_px=part.out_channels * execution.store_dtype.itemsize / part.stride**2,
    )


def decoder_bytes(network: LocalNetwork, number: int, view: Size, execution: Execution) -> int:
    """The regions of stage ``number`` of a view on their way through its decoder and back."""
    decoder = network.decoder(number) if number else None
    if decoder is None:
        return 0
    stage, dtype = network.stage(number), execution.store_dtype
    cells, inner_cells = (_region_cells(network, number, view) * factor for factor in (1, decoder.stride**2))
    of_all = _INPUTS_OF_REGIONS * cells * stage.out_channels + inner_cells * (stage.in_channels + stage.out_channels)
    of_one = _MAPS_OF_ONE_REGION * inner_cells // _region_count(network, view) * stage.out_channels
    return of_all * dtype.itemsize + of_one * torch.promote_types(dtype, torch.float32).itemsize


def grid_bytes(network: LocalNetwork, number: int, view: Size) -> int:
    """Of z of stage ``number``."""
    if not number:
        return 0
    head, size = network.head(number), network.feature_size(view, number)
    cells = head.grid_length(size.width) * head.grid_length(size.height)
    return cells * head.to_grid.out_channels * torch.finfo(torch.float32).bits // 8


def region_bytes(network: LocalNetwork, number: int, view: Size, execution: Execution) -> int:
    """Of the gradients of the regions of stage ``number``."""
    if not number or network.decoder(number) is None:
        return 0
    return _region_cells(network, number, view) * network.stage(number).out_channels * execution.store_dtype.itemsize


def region_px(network: LocalNetwork, number: int, view: Size) -> int:
    """Pixels of all regions of a view that stage ``number`` reconstructs."""
    if not number or network.decoder(number) is None:
        return 0
    return _region_cells(network, number, view) * network.stage(number).stride ** 2


def _region_cells(network: LocalNetwork, number: int, view: Size) -> int:
    config = network.config
    side = region_side(config.reconstruction_region_px, network.stage(number).stride)
    return _region_count(network, view) * min(side**2, network.feature_size(view, number).area)


def _region_count(network: LocalNetwork, view: Size) -> int:
    config = network.config
    return region_count(view.area, config.reconstruction_region_px, config.reconstruction_regions)


def gradient_bytes(network: LocalNetwork, through: int | None = None) -> int:
    """Of all trained parameters, or of those of the stages up to ``through``, with their classifiers and decoders."""
    parts: list[nn.Module | None] = [network]
    if through is not None:
        numbers = range(1, through + 1)
        parts = [part for k in numbers for part in (network.stage(k), network.head(k), network.decoder(k))]
    trained = {p for part in parts if part is not None for p in part.parameters() if p.requires_grad}
    return sum(p.numel() * p.element_size() for p in trained)


def _aligned(x_bchw: Tensor, kernel: int) -> Tensor:
    """As many cells as a tile owns that no border cuts: nothing is padded."""
    height, width = (length - length % kernel for length in x_bchw.shape[-2:])
    return x_bchw[:, :, :height, :width]


def _window_bytes(
    network: LocalNetwork, number: int, cells: int, execution: Execution, device: torch.device, *, training: bool
) -> tuple[int, int, int]:
    """Bytes of a square window: of its graph with its input, of what is in flight while it is computed, and of its largest map."""
    saved_bytes: dict[int, int] = {}
    feature_bytes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved_bytes[storage.data_ptr()] = storage.nbytes()
        if tensor.ndim == 4 and tensor.shape[0] == 1:  # and not a convolution's weights
            feature_bytes.append(int(tensor.nbytes))
        return tensor

    part = network.stage(number) if number else network.stem
    dtype = execution.store_dtype if number else execution.parameter_dtype
    x_bchw = execution.arrange(torch.zeros((1, part.in_channels, cells, cells), dtype=dtype, device=device))
    x_bchw.requires_grad_(number == 0)  # or nothing of the stem would be noted
    weights = part.step_weights(trained=number > 0, dtype=execution.multiplied_dtype)
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with torch.enable_grad(), hooks, execution.autocast(device):
        output = weights(x_bchw)
        grid = network.head(number).grid(_aligned(output, network.head(number).kernel)) if number else None
    largest = max(feature_bytes)
    if grid is None:
        # Pixels are read, turned to the network's numbers and cast, and the next tile's are read meanwhile.
        return 0, largest + 2 * int(output.nbytes) + _PIXELS_IN_FLIGHT * int(x_bchw.nbytes), largest
    shared = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *weights.tensors)}
    graph_bytes = sum(size for key, size in saved_bytes.items() if key not in shared)
    flight_bytes = _IN_FLIGHT * largest
    return (graph_bytes, flight_bytes, largest) if training else (0, flight_bytes + int(x_bchw.nbytes), largest)
