"""From a memory limit to tile sizes, and what a step will cost."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import psutil
import torch

from wholeslide.errors import ConfigError, Problem
from wholeslide.geometry import Size
from wholeslide.model.network import LocalNetwork
from wholeslide.model.strips import StripConv2d
from wholeslide.streaming.config import StreamingConfig
from wholeslide.streaming.costs import decoder_bytes, gradient_bytes, grid_bytes, region_bytes, region_px, tile_cost
from wholeslide.streaming.execution import Execution, Timing
from wholeslide.streaming.needs import StageNeeds, TileChoice
from wholeslide.streaming.plan import Plan
from wholeslide.streaming.stores import StorePlace, feature_bytes, largest_store_bytes, store_bytes
from wholeslide.streaming.timings import remembered_execution

#: Memory for tiles and graphs where the user names no limit.
_DEFAULT_ROOM_BYTES = 2**30
#: Freed memory that may stay resident on a CPU: the more, the fewer page faults. Without a limit, with one, and with the lowest.
_DEFAULT_FREED_BYTES, _LIMITED_FREED_BYTES, _LEAST_FREED_BYTES = 512 * 2**20, 64 * 2**20, 48 * 2**20
#: Of a GPU's free memory, what is planned with where the user names no limit.
_SHARE_OF_FREE = 0.85
#: What oneDNN keeps for the shapes of one wide convolution; for ResNet-34's 36, 80 to 100 MiB were measured.
_KERNEL_BYTES = 2 * 2**20 + 2**19
#: Resident memory of the interpreter with torch and its kernels loaded; 1.0 GiB was measured.
_LIBRARIES_BYTES = 1100 * 2**20
#: Less than this is a number whose unit was forgotten.
_LEAST_NAMED_BYTES = 2**20
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


def parse_memory(text: str, *, option: str = "--memory") -> int:
    """``"8GiB"``, ``"900 MB"`` or a number of bytes, in bytes; ``option`` is where a user wrote it.

    Raises:
        ConfigError: the text is not a size of memory.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = match[2].lower() if match else ""
    if match is None or unit not in _UNITS or float(match[1]) * _UNITS[unit] < _LEAST_NAMED_BYTES:
        raise ConfigError.single(
            "not a size of memory", where=f"{option} {text}", remedy="write for example 8GiB or 900MiB"
        )
    return int(float(match[1]) * _UNITS[unit])


def gib(needed_bytes: int) -> str:
    """What a user may write to get at least so many bytes."""
    return f"{math.ceil(needed_bytes / 2**30 * 100) / 100:.2f}GiB"


class NotEnoughMemoryError(ConfigError):
    """The memory that the user named is not enough for the smallest tiles of the largest slide: ``needed_bytes`` would be."""

    def __init__(self, problems: Iterable[Problem], needed_bytes: int) -> None:
        super().__init__(problems)
        self.needed_bytes = needed_bytes


def make_plan(
    network: LocalNetwork,
    largest: Size,
    config: StreamingConfig,
    device: torch.device,
    *,
    training: bool = True,
    over_baseline_bytes: int | None = None,
    execution: Execution | None = None,
) -> Plan:
    """Choose precision, layout, store and tile sizes for slides of up to ``largest`` pixels.

    Args:
        network: what is trained; moved to ``device``.
        largest: the view of the cohort with the largest area, in pixels.
        config: what the user chose.
        device: where tiles are computed.
        training: whether gradients will be asked for; a prediction needs less memory.
        over_baseline_bytes: what a step may hold above the process as it is then, in place of the limit in ``config``.
        execution: precision and layout, where they are given; then nothing is timed, and the plan expects no seconds.

    Raises:
        NotEnoughMemoryError: the memory that the user named is not enough for the smallest tiles.
    """
    network = _at(network, config, device)
    timing: Timing | None = None
    if execution is None:
        execution, timing = remembered_execution(network, config.precision, device)
    largest = network.padded_size(largest)
    held_bytes = process_bytes(network, device, training=training)
    freed_bytes = _freed_bytes(config, device)
    places = _places(config, network, largest, execution, device, held_bytes)
    for place in places:
        stages = _needs(network, largest, execution, device, place, freed_bytes, training=training, timing=timing)
        try:
            choices = _choices(stages, config, device, held_bytes, over_baseline_bytes)
        except NotEnoughMemoryError:
            if place == places[-1]:
                raise
            continue
        break
    return Plan.of(stages, choices, execution=execution, store=place)


def least_memory(
    network: LocalNetwork,
    largest: Size,
    config: StreamingConfig,
    execution: Execution,
    device: torch.device,
    *,
    training: bool = True,
) -> int:
    """Bytes of memory without which :func:`make_plan` refuses slides of up to ``largest`` pixels."""
    network = _at(network, config, device)
    largest = network.padded_size(largest)
    held_bytes = process_bytes(network, device, training=training)
    freed_bytes = min(_freed_bytes(config, device), _LIMITED_FREED_BYTES)  # as where a limit is named
    place = _places(config, network, largest, execution, device, held_bytes)[-1]
    stages = _needs(network, largest, execution, device, place, freed_bytes, training=training, timing=None)
    return held_bytes + max(stage.least_bytes(config.tile) for stage in stages)


def execution_of(network: LocalNetwork, config: StreamingConfig, device: torch.device) -> Execution:
    """The arithmetic that a plan of this network has."""
    return remembered_execution(_at(network, config, device), config.precision, device)[0]


def memory_limit(config: StreamingConfig, device: torch.device) -> int:
    """Most bytes that a process may hold: what the user named, else most of a GPU, else what the machine has."""
    if config.memory is not None and config.memory != "smallest":
        return parse_memory(config.memory)
    if device.type == "cuda":
        return int(_SHARE_OF_FREE * torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().total)


def _at(network: LocalNetwork, config: StreamingConfig, device: torch.device) -> LocalNetwork:
    network = network.to(device)
    return network.double() if config.precision == "fp64" else network


def _needs(
    network: LocalNetwork,
    largest: Size,
    execution: Execution,
    device: torch.device,
    place: StorePlace,
    freed_bytes: int,
    *,
    training: bool,
    timing: Timing | None,
) -> list[StageNeeds]:
    """Of the stem and of each stage; without a timing, seconds are zero."""
    # A GPU's budget has nothing to do with stores in host memory, and neither has the disk.
    counted = place == "device" or (place == "host" and device.type == "cpu")
    numbers = range(network.depth + 1)
    costs = [tile_cost(network, number, execution, device, training=training) for number in numbers]
    if place == "disk" and device.type == "cpu":
        costs = [cost.with_disk_buffers() for cost in costs]
    convolutions = sum(StripConv2d.replaces(layer) for layer in network.modules())
    kernels_bytes = _KERNEL_BYTES * convolutions if device.type == "cpu" else 0
    timing = timing or Timing(*[(0.0,) * len(costs)] * 3)
    stores_bytes = [store_bytes(network, largest, number, execution) for number in numbers]
    if not training:  # the memory of a prediction's stores is handed on from one to the next
        stores_bytes = [max(stores_bytes)] * len(stores_bytes)
    return [
        StageNeeds(
            cost=costs[number],
            view=largest,
            stores_bytes=stores_bytes[number] if counted else 0,
            features_bytes=feature_bytes(network, largest, number, execution),
            gradients_bytes=gradient_bytes(network) if training else 0,
            freed_bytes=freed_bytes,
            decoder_bytes=decoder_bytes(network, number, largest, execution) if training else 0,
            forward_seconds=timing.forward_seconds[number],
            backward_seconds=timing.backward_seconds[number],
            grid_bytes=grid_bytes(network, number, largest),
            region_bytes=region_bytes(network, number, largest, execution) if training else 0,
            kernels_bytes=kernels_bytes,
            decoder_seconds=timing.decoder_seconds[number] * region_px(network, number, largest) / 1e6,
        )
        for number in numbers
    ]


def _choices(
    stages: list[StageNeeds],
    config: StreamingConfig,
    device: torch.device,
    held_bytes: int,
    over_baseline_bytes: int | None,
) -> list[TileChoice]:
    """The best tiles of each stage within what the process leaves."""
    if over_baseline_bytes is None:
        budget_bytes, named = _budget_bytes(config, stages, device, held_bytes), f"--memory {config.memory}"
    else:
        budget_bytes, named, held_bytes = over_baseline_bytes, f"--over-baseline {over_baseline_bytes / 2**20:g}MiB", 0
    found = [stage.best_choice(budget_bytes, config.tile) for stage in stages]
    choices = [choice for choice in found if choice is not None]
    if len(choices) < len(stages):
        needed_bytes = held_bytes + max(stage.least_bytes(config.tile) for stage in stages)
        problem = Problem(
            f"not enough memory for a slide of {stages[0].view} pixels",
            named,
            f"give at least {gib(needed_bytes)}",
        )
        raise NotEnoughMemoryError([problem], needed_bytes)
    return choices


def _freed_bytes(config: StreamingConfig, device: torch.device) -> int:
    if device.type != "cpu":
        return 0
    if config.memory is None:
        return _DEFAULT_FREED_BYTES
    return _LEAST_FREED_BYTES if config.memory == "smallest" else _LIMITED_FREED_BYTES


def _budget_bytes(config: StreamingConfig, stages: list[StageNeeds], device: torch.device, held_bytes: int) -> int:
    """What a step may hold above the process."""
    if config.memory is not None and config.memory != "smallest":
        return parse_memory(config.memory) - held_bytes
    if config.tile is not None:
        least_bytes = max(stage.least_bytes(config.tile) for stage in stages)
    else:
        least_bytes = max(stage.economical_bytes for stage in stages)
    if config.memory == "smallest":
        return least_bytes
    if device.type == "cuda":
        return max(least_bytes, int(_SHARE_OF_FREE * torch.cuda.mem_get_info(device)[0]) - held_bytes)
    return least_bytes + _DEFAULT_ROOM_BYTES


def process_bytes(network: LocalNetwork, device: torch.device, *, training: bool) -> int:
    """What a process holds beside a step: libraries on a CPU, weights, and AdamW's two moments where it trains.

    A fixed allowance and not what is resident now: two runs of one configuration must get the same tiles.
    """
    weights: int = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    moments: int = 2 * gradient_bytes(network) if training else 0
    return weights + moments + (_LIBRARIES_BYTES if device.type == "cpu" else 0)


def _places(
    config: StreamingConfig,
    network: LocalNetwork,
    largest: Size,
    execution: Execution,
    device: torch.device,
    held_bytes: int,
) -> list[StorePlace]:
    """Those that leave at least half of the memory to the tiles, and at last the disk."""
    if config.store != "auto":
        return [config.store]
    stores_bytes, named = largest_store_bytes(network, largest, execution), config.memory not in (None, "smallest")
    if config.memory == "smallest" and device.type == "cpu":
        return ["disk"]
    places: list[StorePlace] = []
    if device.type == "cuda":
        limit_bytes = parse_memory(str(config.memory)) if named else torch.cuda.mem_get_info(device)[0]
        if 2 * stores_bytes < limit_bytes:
            places.append("device")
    on_cpu = named and device.type == "cpu"
    room_bytes = parse_memory(str(config.memory)) - held_bytes if on_cpu else psutil.virtual_memory().total // 2
    if 2 * stores_bytes < room_bytes:
        places.append("host")
    return [*places, "disk"]
