"""From a memory limit to tile sizes, and what a step will cost."""

from __future__ import annotations

import re
from typing import Literal

import psutil
import torch
from torch import Tensor

from wholeslide.errors import ConfigError
from wholeslide.geometry import Size
from wholeslide.model.network import LocalNetwork
from wholeslide.streaming.config import StreamingConfig
from wholeslide.streaming.execution import Execution, choose_execution
from wholeslide.streaming.plan import Plan
from wholeslide.streaming.tiles import tile_side

#: Tensors saved for backward understate the peak of a tile by about this factor (kernels' workspace, gradients in flight).
_PEAK_OVER_SAVED = 1.45
#: Memory for one tile's graph where the user names no limit.
_DEFAULT_TILE_BYTES = 384 * 2**20
#: A tile smaller than this is nearly all halo.
_SMALLEST_TILE_PX = 192
_LARGEST_TILE_PX = 8192
#: Side of the windows on which saved tensors are counted; two, so that halos and constants fall out.
_PROBE_PX = 384
_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_SAVED_BYTES_OF_DECODER_PER_INPUT_BYTE = 8


def parse_memory(text: str) -> int:
    """``"8GiB"``, ``"900 MB"`` or a number of bytes, in bytes.

    Raises:
        ConfigError: the text is not a size of memory.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = match[2].lower() if match else ""
    if match is None or unit not in _UNITS or float(match[1]) <= 0:
        raise ConfigError.single("not a size of memory", where=f"--memory {text}", remedy="write for example 8GiB or 900MiB")
    return int(float(match[1]) * _UNITS[unit])


def make_plan(network: LocalNetwork, largest: Size, config: StreamingConfig, device: torch.device) -> Plan:
    """Choose precision, layout, store and tile sizes for slides of up to ``largest`` pixels.

    Args:
        network: what is trained.
        largest: the largest view of the cohort, in pixels.
        config: what the user chose.
        device: where tiles are computed.

    Raises:
        ConfigError: the memory that the user named is not enough for the smallest tiles.
    """
    network = network.to(device)
    execution, timing = choose_execution(network, config.precision, device)
    largest = network.padded_size(largest)
    fixed_bytes = _store_bytes(network, largest, execution) + _fixed_bytes(network, execution)
    tile_bytes = _DEFAULT_TILE_BYTES
    if config.memory is not None:
        tile_bytes = parse_memory(config.memory) - _process_bytes(device) - fixed_bytes
    per_pixel = [_saved_bytes_per_pixel(network, number, execution, device) for number in range(network.depth + 1)]
    sides = [_affordable_side(network, number, tile_bytes, per_pixel[number]) for number in range(network.depth + 1)]
    if config.tile is not None:
        sides = [config.tile] * (network.depth + 1)
    elif config.memory is not None and min(sides) < _SMALLEST_TILE_PX:
        smallest = max(
            _window_bytes(network, number, _SMALLEST_TILE_PX, per_pixel[number]) for number in range(network.depth + 1)
        )
        needed = _process_bytes(device) + fixed_bytes + smallest
        raise ConfigError.single(
            f"{config.memory} is not enough for a slide of {largest} pixels",
            where="--memory",
            remedy=f"give at least {needed / 2**30:.2f}GiB, or more --stages",
        )
    peak = fixed_bytes + max(
        _window_bytes(network, number, min(sides[number], max(largest.width, largest.height)), per_pixel[number])
        for number in range(network.depth + 1)
    )
    return Plan(
        execution=execution,
        store=_place(config, network, largest, execution, device),
        tile_px=tuple(sides),
        largest=largest,
        predicted_peak_bytes=peak,
        seconds_per_megapixel=timing.training_seconds,
        inference_seconds_per_megapixel=timing.forward_seconds,
    )


def _process_bytes(device: torch.device) -> int:
    """What the process holds already: resident memory, or reserved memory of a CUDA device."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    return int(psutil.Process().memory_info().rss)


def _store_bytes(network: LocalNetwork, largest: Size, execution: Execution) -> int:
    """The two largest neighbouring stores: x_{k−1} and x_k live together."""
    item = execution.store_dtype.itemsize
    sizes = [network.feature_size(largest, 0).area * network.stem.out_channels * item]
    for number in range(1, network.depth):
        sizes.append(network.feature_size(largest, number).area * network.stage(number).out_channels * item)
    sizes.append(0)
    return max(a + b for a, b in zip(sizes, sizes[1:], strict=False)) if len(sizes) > 1 else sizes[0]


def _fixed_bytes(network: LocalNetwork, execution: Execution) -> int:
    """Gradients of all parameters, and the largest batch of regions on its way through a decoder."""
    gradients = sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)
    config, decoder_bytes = network.config, 0
    for number in range(1, network.depth):
        decoder = network.decoder(number)
        if decoder is None:
            continue
        stage = network.stage(number)
        cells = (config.reconstruction_region_px // stage.stride * decoder.stride) ** 2 * config.reconstruction_regions
        one_map = cells * stage.out_channels * execution.store_dtype.itemsize
        decoder_bytes = max(decoder_bytes, _SAVED_BYTES_OF_DECODER_PER_INPUT_BYTE * one_map)
    return int(gradients + decoder_bytes)


def _saved_bytes_per_pixel(network: LocalNetwork, number: int, execution: Execution, device: torch.device) -> float:
    """Bytes that a tile's graph keeps for backward, per pixel of its window; for the stem, of its output."""
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
    part = network.stage(number) if number else network.stem
    cells = _PROBE_PX // (part.stride // part.locality.stride)
    dtype = execution.parameter_dtype if number == 0 else execution.store_dtype
    x_bchw = execution.arrange(torch.zeros((1, part.in_channels, cells, cells), dtype=dtype, device=device))
    with torch.set_grad_enabled(number > 0), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        with execution.autocast(device):
            output = part(x_bchw)
    working = 3 * output.nbytes + x_bchw.nbytes
    return (sum(size for key, size in saved.items() if key not in parameters) + working) / (cells * part.stride / part.locality.stride) ** 2


def _window_bytes(network: LocalNetwork, number: int, side_px: int, bytes_per_pixel: float) -> int:
    """The peak of one tile of ``side_px`` with its halo."""
    part = network.stage(number) if number else network.stem
    align = network.head(number).kernel if number else 1
    halo = max(part.locality.x.halo_before + part.locality.x.halo_after, part.locality.y.halo_before + part.locality.y.halo_after)
    window_px = (tile_side(side_px, stride_px=part.stride, align=align) + halo) * part.stride
    return int(_PEAK_OVER_SAVED * bytes_per_pixel * window_px**2)


def _affordable_side(network: LocalNetwork, number: int, tile_bytes: int, bytes_per_pixel: float) -> int:
    """The largest side of a tile whose peak fits; zero where not even the smallest does."""
    part = network.stage(number) if number else network.stem
    step = part.stride * (network.head(number).kernel if number else 1)
    side = 0
    for candidate in range(step, _LARGEST_TILE_PX + 1, step):
        if _window_bytes(network, number, candidate, bytes_per_pixel) > tile_bytes:
            break
        side = candidate
    return side if side == 0 or side >= _SMALLEST_TILE_PX else max(side, step)


def _place(
    config: StreamingConfig, network: LocalNetwork, largest: Size, execution: Execution, device: torch.device
) -> Literal["device", "host"]:
    if config.store != "auto":
        return config.store
    if device.type != "cuda":
        return "host"
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return "device" if 2 * _store_bytes(network, largest, execution) < free_bytes else "host"
