"""From a memory limit to tile sizes, and what a step will cost."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from wholeslide.errors import ConfigError
from wholeslide.geometry import Size
from wholeslide.model.network import LocalNetwork
from wholeslide.streaming.config import StreamingConfig
from wholeslide.streaming.execution import Execution
from wholeslide.streaming.plan import Plan
from wholeslide.streaming.stores import store_bytes
from wholeslide.streaming.timings import remembered_execution

#: Tensors saved for backward understate the peak of a tile by about this factor (kernels' workspace, gradients in flight).
_PEAK_OVER_SAVED = 1.45
#: Memory for one tile's graph where the user names no limit.
_DEFAULT_TILE_BYTES = 384 * 2**20
#: A tile smaller than this is nearly all halo.
_SMALLEST_TILE_PX = 192
_LARGEST_TILE_PX = 8192
#: Side of the windows on which saved tensors are counted; two, so that halos and constants fall out.
_PROBES_PX = (384, 576)
#: Resident memory of the interpreter with torch and its kernels loaded; 1.0 GiB was measured.
_LIBRARIES_BYTES = 1100 * 2**20
_UNITS = {
    "": 1,
    "b": 1,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
#: Tensors of a decoder's input size that live at once in its forward and backward pass, losses in fp32 counted twice.
_MAPS_OF_A_DECODER = 10
#: Memory for one tile's graph where the user asks for the smallest plan and nothing else needs more.
_SMALLEST_TILE_BYTES = 128 * 2**20


def parse_memory(text: str) -> int:
    """``"8GiB"``, ``"900 MB"`` or a number of bytes, in bytes.

    Raises:
        ConfigError: the text is not a size of memory.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = match[2].lower() if match else ""
    if match is None or unit not in _UNITS or float(match[1]) <= 0:
        raise ConfigError.single(
            "not a size of memory", where=f"--memory {text}", remedy="write for example 8GiB or 900MiB"
        )
    return int(float(match[1]) * _UNITS[unit])


def make_plan(network: LocalNetwork, largest: Size, config: StreamingConfig, device: torch.device) -> Plan:
    """Choose precision, layout, store and tile sizes for slides of up to ``largest`` pixels.

    Args:
        network: what is trained; moved to ``device``.
        largest: the largest view of the cohort, in pixels.
        config: what the user chose.
        device: where tiles are computed.

    Raises:
        ConfigError: the memory that the user named is not enough for the smallest tiles.
    """
    network = network.to(device)
    if config.precision == "fp64":
        network = network.double()
    execution, timing = remembered_execution(network, config.precision, device)
    largest = network.padded_size(largest)
    fixed_bytes = store_bytes(network, largest, execution) + _gradient_bytes(network)
    decoder_bytes = _decoder_bytes(network, execution)
    costs = [_tile_cost(network, number, execution, device) for number in range(network.depth + 1)]
    if config.tile is not None:
        sides = [config.tile] * len(costs)
    elif config.memory is None or config.memory == "smallest":
        # Below the decoder's share, smaller tiles would lower no peak.
        room_bytes = _DEFAULT_TILE_BYTES if config.memory is None else max(decoder_bytes, _SMALLEST_TILE_BYTES)
        sides = [max(cost.affordable_side(room_bytes), cost.economical_side) for cost in costs]
    else:
        held_bytes = _process_bytes(network, device) + fixed_bytes
        room_bytes = parse_memory(config.memory) - held_bytes
        sides = [cost.affordable_side(room_bytes) for cost in costs]
        if min(sides) == 0 or room_bytes < decoder_bytes:
            needed_bytes = held_bytes + max(decoder_bytes, *(cost.peak_bytes(cost.step_px) for cost in costs))
            raise ConfigError.single(
                f"not enough memory for a slide of {largest} pixels",
                where=f"--memory {config.memory}",
                remedy=f"give at least {needed_bytes / 2**30 + 0.005:.2f}GiB, or more --stages",
            )
    longest = max(largest.width, largest.height)
    return Plan(
        execution=execution,
        store=_place(config, network, largest, execution, device),
        tile_px=tuple(sides),
        largest=largest,
        predicted_peak_bytes=fixed_bytes
        + max(decoder_bytes, *(cost.peak_bytes(min(side, longest)) for cost, side in zip(costs, sides, strict=True))),
        seconds_per_megapixel=timing.training_seconds,
        inference_seconds_per_megapixel=timing.forward_seconds,
    )


@dataclass(frozen=True)
class _TileCost:
    """Memory of one tile of the stem or of a stage: ``constant_bytes`` and so many more for each pixel of its window.

    Tiles grow by ``step_px``; their halo adds ``halo_px`` to a side.
    """

    constant_bytes: float
    bytes_per_pixel: float
    step_px: int
    halo_px: int

    def peak_bytes(self, side_px: int) -> int:
        side_px = -(-side_px // self.step_px) * self.step_px
        return int(_PEAK_OVER_SAVED * (self.constant_bytes + self.bytes_per_pixel * (side_px + self.halo_px) ** 2))

    def affordable_side(self, tile_bytes: int) -> int:
        """The largest side whose peak fits; zero where not even the smallest does."""
        room_bytes = tile_bytes / _PEAK_OVER_SAVED - self.constant_bytes
        side_px = int(max(0.0, room_bytes / self.bytes_per_pixel) ** 0.5) - self.halo_px
        return min(_LARGEST_TILE_PX, max(0, side_px)) // self.step_px * self.step_px

    @property
    def economical_side(self) -> int:
        """As large as its halo: a window at most four times what the tile owns."""
        return -(-max(self.halo_px, _SMALLEST_TILE_PX) // self.step_px) * self.step_px


def _process_bytes(network: LocalNetwork, device: torch.device) -> int:
    """What a training process holds beside a step: libraries on a CPU, weights and AdamW's two moments everywhere.

    A fixed allowance and not what is resident now: two runs of one configuration must get the same tiles.
    """
    weights: int = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    moments: int = 2 * _gradient_bytes(network)
    return weights + moments + (_LIBRARIES_BYTES if device.type == "cpu" else 0)


def _gradient_bytes(network: LocalNetwork) -> int:
    return sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)


def _decoder_bytes(network: LocalNetwork, execution: Execution) -> int:
    """The largest batch of regions on its way through a decoder and back."""
    config, largest_map_bytes = network.config, 0
    for number in range(1, network.depth):
        decoder = network.decoder(number)
        if decoder is not None:
            stage = network.stage(number)
            cells = (config.reconstruction_region_px // stage.stride * decoder.stride) ** 2
            map_bytes = cells * config.reconstruction_regions * stage.out_channels * execution.store_dtype.itemsize
            largest_map_bytes = max(largest_map_bytes, map_bytes)
    return _MAPS_OF_A_DECODER * largest_map_bytes


def _tile_cost(network: LocalNetwork, number: int, execution: Execution, device: torch.device) -> _TileCost:
    """Count what the graph of a window keeps, at two sizes; for the stem (``number`` 0), what passes through it."""
    part = network.stage(number) if number else network.stem
    step_px = part.stride * (network.head(number).kernel if number else 1)
    cell_px = part.stride // part.locality.stride
    small_bytes, large_bytes = (_window_bytes(network, number, px // cell_px, execution, device) for px in _PROBES_PX)
    small_px, large_px = ((px // cell_px * cell_px) ** 2 for px in _PROBES_PX)
    bytes_per_pixel = (large_bytes - small_bytes) / (large_px - small_px)
    halo_cells = max(axis.halo_before + axis.halo_after for axis in (part.locality.x, part.locality.y))
    constant_bytes = max(0.0, small_bytes - bytes_per_pixel * small_px)
    return _TileCost(constant_bytes, bytes_per_pixel, step_px, halo_cells * part.stride)


def _window_bytes(network: LocalNetwork, number: int, cells: int, execution: Execution, device: torch.device) -> int:
    """Bytes of a square window's input, of what its graph saves for backward, and of three tensors in flight."""
    saved_bytes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved_bytes[storage.data_ptr()] = storage.nbytes()
        return tensor

    part = network.stage(number) if number else network.stem
    dtype = execution.store_dtype if number else execution.parameter_dtype
    x_bchw = execution.arrange(torch.zeros((1, part.in_channels, cells, cells), dtype=dtype, device=device))
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with torch.set_grad_enabled(number > 0), hooks, execution.autocast(device):
        output = part(x_bchw)
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept = sum(size for key, size in saved_bytes.items() if key not in own)
    return kept + 3 * int(output.nbytes) + int(x_bchw.nbytes)


def _place(
    config: StreamingConfig, network: LocalNetwork, largest: Size, execution: Execution, device: torch.device
) -> Literal["device", "host"]:
    if config.store != "auto":
        return config.store
    if device.type != "cuda":
        return "host"
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return "device" if 2 * store_bytes(network, largest, execution) < free_bytes else "host"
