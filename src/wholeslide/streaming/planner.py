"""From a memory limit to tile sizes, and what a step will cost."""

from __future__ import annotations

import re
from dataclasses import dataclass

import psutil
import torch

from wholeslide.errors import ConfigError
from wholeslide.geometry import Size
from wholeslide.model.network import LocalNetwork
from wholeslide.streaming.config import StreamingConfig
from wholeslide.streaming.costs import TileCost, decoder_bytes, gradient_bytes, tile_cost
from wholeslide.streaming.execution import Execution
from wholeslide.streaming.plan import Plan
from wholeslide.streaming.stores import StorePlace, largest_store_bytes, store_bytes
from wholeslide.streaming.timings import remembered_execution

#: Memory for tiles and graphs where the user names no limit.
_DEFAULT_ROOM_BYTES = 2**30
#: Freed memory that may stay resident on a CPU: the more, the fewer page faults. Without a limit, and with one.
_DEFAULT_FREED_BYTES, _LIMITED_FREED_BYTES = 2048 * 2**20, 128 * 2**20
_LARGEST_TILE_PX = 8192
#: Tensors above this leave the cache before they are read again: such tiles take about so many times as long.
_CACHED_BYTES, _COST_OF_CACHE_MISSES = 8 * 2**20, 1.15
#: Where no graph is kept, larger tiles would only take more memory.
_LARGEST_FORWARD_TILE_PX = 1536
#: Windows of another view of the same area may be so many times those of the largest.
_MOST_HALO = 2
#: Of a GPU's free memory, what is planned with where the user names no limit.
_SHARE_OF_FREE = 0.85
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


def parse_memory(text: str, *, option: str = "--memory") -> int:
    """``"8GiB"``, ``"900 MB"`` or a number of bytes, in bytes; ``option`` is where a user wrote it.

    Raises:
        ConfigError: the text is not a size of memory.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = match[2].lower() if match else ""
    if match is None or unit not in _UNITS or float(match[1]) <= 0:
        raise ConfigError.single(
            "not a size of memory", where=f"{option} {text}", remedy="write for example 8GiB or 900MiB"
        )
    return int(float(match[1]) * _UNITS[unit])


def make_plan(
    network: LocalNetwork,
    largest: Size,
    config: StreamingConfig,
    device: torch.device,
    *,
    training: bool = True,
    over_baseline_bytes: int | None = None,
) -> Plan:
    """Choose precision, layout, store and tile sizes for slides of up to ``largest`` pixels.

    Args:
        network: what is trained; moved to ``device``.
        largest: the view of the cohort with the largest area, in pixels.
        config: what the user chose.
        device: where tiles are computed.
        training: whether gradients will be asked for; a prediction needs less memory.
        over_baseline_bytes: what a step may hold above the process as it is then, in place of the limit in ``config``.

    Raises:
        ConfigError: the memory that the user named is not enough for the smallest tiles.
    """
    network = network.to(device)
    if config.precision == "fp64":
        network = network.double()
    execution, timing = remembered_execution(network, config.precision, device)
    largest = network.padded_size(largest)
    held_bytes = process_bytes(network, device, training=training)
    place = _place(config, network, largest, execution, device, held_bytes)
    freed_bytes = _freed_bytes(config, device)
    # A GPU's budget has nothing to do with stores in host memory, and neither has the disk.
    counted = place == "device" or (place == "host" and device.type == "cpu")
    costs = [tile_cost(network, number, execution, device, training=training) for number in range(network.depth + 1)]
    if place == "disk" and device.type == "cpu":
        costs = [cost.with_disk_buffers() for cost in costs]
    stages = [
        _StageNeeds(
            cost=cost,
            view=largest,
            stores_bytes=store_bytes(network, largest, number, execution) if counted else 0,
            gradients_bytes=gradient_bytes(network) if training else 0,
            freed_bytes=min(freed_bytes, _LIMITED_FREED_BYTES),
            decoder_bytes=decoder_bytes(network, number, largest, execution) if training else 0,
        )
        for number, cost in enumerate(costs)
    ]
    choices = _choices(stages, config, device, held_bytes, over_baseline_bytes)
    trained = list(zip(stages, choices, strict=True))[1:]
    twice = sum(stage.computed_twice(choice) for stage, choice in trained) / len(trained)
    return Plan(
        execution=execution,
        store=place,
        tile_px=tuple(choice.side_px for choice in choices),
        kept_px=tuple(choice.kept_px for choice in choices),
        largest=largest,
        freed_bytes=freed_bytes,
        predicted_peak_bytes=max(stage.peak_bytes(choice) for stage, choice in zip(stages, choices, strict=True)),
        seconds_per_megapixel=timing.training_seconds + twice * timing.forward_seconds,
        inference_seconds_per_megapixel=timing.forward_seconds,
    )


def _choices(
    stages: list[_StageNeeds],
    config: StreamingConfig,
    device: torch.device,
    held_bytes: int,
    over_baseline_bytes: int | None,
) -> list[_Choice]:
    """The best tiles of each stage within what the process leaves."""
    if over_baseline_bytes is None:
        budget_bytes, named = _budget_bytes(config, stages, device, held_bytes), f"--memory {config.memory}"
    else:
        budget_bytes, named, held_bytes = over_baseline_bytes, f"--over-baseline {over_baseline_bytes / 2**20:g}MiB", 0
    found = [stage.best_choice(budget_bytes, config.tile) for stage in stages]
    choices = [choice for choice in found if choice is not None]
    if len(choices) < len(stages):
        needed_bytes = held_bytes + max(stage.least_bytes(config.tile) for stage in stages)
        raise ConfigError.single(
            f"not enough memory for a slide of {stages[0].view} pixels",
            where=named,
            remedy=f"give at least {needed_bytes / 2**30 + 0.005:.2f}GiB, or more --stages",
        )
    return choices


@dataclass(frozen=True)
class _Choice:
    """How a stage is cut into tiles, and the pixels of the windows whose graphs are kept."""

    side_px: int
    kept_px: int


@dataclass(frozen=True)
class _StageNeeds:
    """Memory that a step holds while it is at one stage, or at the stem, on any view of at most this area.

    Stores, gradients, weights and freed memory that stays resident are there all the time; the decoder's bytes are taken between
    the two passes.
    """

    cost: TileCost
    view: Size
    stores_bytes: int
    gradients_bytes: int
    freed_bytes: int
    decoder_bytes: int

    @property
    def fixed_bytes(self) -> int:
        """What does not depend on the tiles."""
        return self.cost.weight_bytes + self.stores_bytes + self.gradients_bytes + self.freed_bytes

    def best_choice(self, budget_bytes: int, side_px: int | None) -> _Choice | None:
        """The tiles that cost the least computing within ``budget_bytes``; nothing where none fits.

        A ``side_px`` that the user named is taken as it is.
        """
        feasible = []
        for side in self._sides() if side_px is None else [side_px]:
            kept_px = self._affordable_px(side, budget_bytes - self.fixed_bytes)
            if kept_px is not None:
                feasible.append((self._work(side, kept_px), _Choice(side, kept_px)))
        return min(feasible, key=lambda pair: pair[0])[1] if feasible else None

    def peak_bytes(self, choice: _Choice) -> int:
        """Of a step."""
        window_px = self.cost.largest_window_px(self.view, choice.side_px)
        kept_bytes, flight_bytes = self.cost.graph_bytes(choice.kept_px), self.cost.flight_bytes(window_px)
        computing_bytes = max(kept_bytes, self.cost.graph_bytes(window_px)) + flight_bytes
        return self.fixed_bytes + max(computing_bytes, kept_bytes + self.decoder_bytes)

    def computed_twice(self, choice: _Choice) -> float:
        """The share of the largest view whose graphs are not kept."""
        return 1 - min(1.0, choice.kept_px / self._windows_px(choice.side_px))

    def least_bytes(self, side_px: int | None) -> int:
        """With the smallest tiles and no graph kept."""
        return min(self.peak_bytes(_Choice(side, 0)) for side in (self._sides() if side_px is None else [side_px]))

    @property
    def economical_bytes(self) -> int:
        """With the smallest tiles that are not nearly all halo, and no graph kept."""
        return self.peak_bytes(_Choice(self.cost.economical_side, 0))

    def _affordable_px(self, side_px: int, room_bytes: int) -> int | None:
        """Pixels of windows that may keep their graphs; nothing where not even one window can be computed."""
        window_px = self.cost.largest_window_px(self.view, side_px)
        flight_bytes = self.cost.flight_bytes(window_px)
        if self.cost.graph_bytes(window_px) + flight_bytes > room_bytes or self.decoder_bytes > room_bytes:
            return None
        if self.cost.graph_bytes_per_px == 0:
            return 0
        kept_px = int((room_bytes - max(flight_bytes, self.decoder_bytes)) / self.cost.graph_bytes_per_px)
        return min(kept_px, _MOST_HALO * self._windows_px(side_px))

    def _sides(self) -> list[int]:
        """Even shares of the view's longer side, from one tile down to the smallest."""
        longest = max(self.view.width, self.view.height)
        most = -(-longest // self.cost.step_px)
        sides = {self.cost.rounded(-(-longest // count)) for count in range(1, most + 1)}
        largest = _LARGEST_TILE_PX if self.cost.graph_bytes_per_px else _LARGEST_FORWARD_TILE_PX
        return sorted((side for side in sides if side <= max(largest, self.cost.step_px)), reverse=True)

    def _windows_px(self, side_px: int) -> int:
        tiling = self.cost.tiling(self.view, side_px)
        return tiling.tiles * tiling.window.area

    def _work(self, side_px: int, kept_px: int) -> float:
        """Pixels that pass forward once, backward at twice the cost, and forward again where their graph is not kept."""
        windows_px = self._windows_px(side_px)
        work = 4 * windows_px - min(kept_px, windows_px)
        cached = self.cost.largest_map_bytes(self.cost.tiling(self.view, side_px).window.area) <= _CACHED_BYTES
        return work if cached else work * _COST_OF_CACHE_MISSES


def _freed_bytes(config: StreamingConfig, device: torch.device) -> int:
    if device.type != "cpu":
        return 0
    return _DEFAULT_FREED_BYTES if config.memory is None else _LIMITED_FREED_BYTES


def _budget_bytes(config: StreamingConfig, stages: list[_StageNeeds], device: torch.device, held_bytes: int) -> int:
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


def _place(
    config: StreamingConfig,
    network: LocalNetwork,
    largest: Size,
    execution: Execution,
    device: torch.device,
    held_bytes: int,
) -> StorePlace:
    """The first place that leaves at least half of the memory to the tiles."""
    if config.store != "auto":
        return config.store
    stores_bytes, named = largest_store_bytes(network, largest, execution), config.memory not in (None, "smallest")
    if device.type == "cuda":
        limit_bytes = parse_memory(str(config.memory)) if named else torch.cuda.mem_get_info(device)[0]
        if 2 * stores_bytes < limit_bytes:
            return "device"
    elif config.memory == "smallest":
        return "disk"
    on_cpu = named and device.type == "cpu"
    room_bytes = parse_memory(str(config.memory)) - held_bytes if on_cpu else psutil.virtual_memory().total // 2
    return "host" if 2 * stores_bytes < room_bytes else "disk"
