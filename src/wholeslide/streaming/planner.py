"""From a memory limit to tile sizes, and what a step will cost."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch

from wholeslide.errors import ConfigError
from wholeslide.geometry import Size
from wholeslide.model.network import LocalNetwork
from wholeslide.streaming.config import StreamingConfig
from wholeslide.streaming.costs import TileCost, Tiling, decoder_bytes, gradient_bytes, tile_cost
from wholeslide.streaming.execution import Execution
from wholeslide.streaming.plan import Plan
from wholeslide.streaming.stores import largest_store_bytes, store_bytes
from wholeslide.streaming.timings import remembered_execution

#: Memory for tiles and graphs where the user names no limit.
_DEFAULT_ROOM_BYTES = 2**30
#: Freed memory that may stay resident on a CPU: the more, the fewer page faults. Without a limit, and with one.
_DEFAULT_FREED_BYTES, _LIMITED_FREED_BYTES = 2048 * 2**20, 128 * 2**20
_LARGEST_TILE_PX = 8192
#: Tensors above this leave the cache before they are read again: such tiles take about so many times as long.
_CACHED_BYTES, _COST_OF_CACHE_MISSES = 8 * 2**20, 1.15
#: The stem keeps no graph: larger tiles would only take more memory.
_LARGEST_STEM_TILE_PX = 1536
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
    freed_bytes = _freed_bytes(config, device)
    stages = [
        _stage_needs(network, number, largest, execution, device, freed_bytes) for number in range(network.depth + 1)
    ]
    if config.tile is not None:
        choices = [_Choice(config.tile, kept_tiles=1) for _ in stages]
    else:
        budget_bytes = _budget_bytes(network, config, stages, device)
        found = [stage.best_choice(budget_bytes) for stage in stages]
        choices = [choice for choice in found if choice is not None]
        if len(choices) < len(stages):
            needed_bytes = _process_bytes(network, device) + max(stage.least_bytes for stage in stages)
            raise ConfigError.single(
                f"not enough memory for a slide of {largest} pixels",
                where=f"--memory {config.memory}",
                remedy=f"give at least {needed_bytes / 2**30 + 0.005:.2f}GiB, or more --stages",
            )
    trained = list(zip(stages, choices, strict=True))[1:]
    twice = sum(stage.computed_twice(choice) for stage, choice in trained) / len(trained)
    return Plan(
        execution=execution,
        store=_place(config, network, largest, execution, device),
        tile_px=tuple(choice.side_px for choice in choices),
        kept_tiles=tuple(choice.kept_tiles for choice in choices),
        largest=largest,
        freed_bytes=freed_bytes,
        predicted_peak_bytes=max(stage.peak_bytes(choice) for stage, choice in zip(stages, choices, strict=True)),
        seconds_per_megapixel=timing.training_seconds + twice * timing.forward_seconds,
        inference_seconds_per_megapixel=timing.forward_seconds,
    )


@dataclass(frozen=True)
class _Choice:
    """How a stage is cut into tiles, and how many of them keep their graphs."""

    side_px: int
    kept_tiles: int


@dataclass(frozen=True)
class _StageNeeds:
    """Memory that a step holds while it is at one stage, or at the stem.

    ``fixed_bytes`` are those of stores, of all gradients and of freed memory that stays resident; the decoder's are taken
    between the two passes.
    """

    cost: TileCost
    view: Size
    fixed_bytes: int
    decoder_bytes: int
    is_stem: bool

    def best_choice(self, budget_bytes: int) -> _Choice | None:
        """The tiles that cost the least computing within ``budget_bytes``; nothing where none fits."""
        feasible = []
        for side_px in self._sides():
            tiling = self.cost.tiling(self.view, side_px)
            kept = self._affordable_kept(tiling, budget_bytes - self.fixed_bytes)
            if kept is not None:
                # One forward pass over all windows, two for backward, and one where a tile is computed twice.
                work = tiling.window.area * (4 * tiling.tiles - kept)
                if self.cost.largest_map_bytes(tiling.window) > _CACHED_BYTES:
                    work = int(work * _COST_OF_CACHE_MISSES)
                feasible.append((work, _Choice(side_px, kept)))
        return min(feasible, key=lambda pair: pair[0])[1] if feasible else None

    def peak_bytes(self, choice: _Choice) -> int:
        """Of a step on the largest view."""
        tiling = self.cost.tiling(self.view, choice.side_px)
        graph_bytes, flight_bytes = self.cost.graph_bytes(tiling.window), self.cost.flight_bytes(tiling.window)
        kept_bytes = min(choice.kept_tiles, tiling.tiles) * graph_bytes
        return self.fixed_bytes + max(max(kept_bytes, graph_bytes) + flight_bytes, kept_bytes + self.decoder_bytes)

    def computed_twice(self, choice: _Choice) -> float:
        """The share of the largest view's tiles that keep no graph."""
        return 1 - min(1.0, choice.kept_tiles / self.cost.tiling(self.view, choice.side_px).tiles)

    @property
    def least_bytes(self) -> int:
        """With the smallest tiles and no graph kept."""
        return min(self.peak_bytes(_Choice(side_px, 0)) for side_px in self._sides())

    @property
    def economical_bytes(self) -> int:
        """With the smallest tiles that are not nearly all halo, and no graph kept."""
        return self.peak_bytes(_Choice(self.cost.economical_side, 0))

    def _affordable_kept(self, tiling: Tiling, room_bytes: int) -> int | None:
        """Tiles that may keep their graphs; nothing where not even one can be computed."""
        graph_bytes, flight_bytes = self.cost.graph_bytes(tiling.window), self.cost.flight_bytes(tiling.window)
        if graph_bytes + flight_bytes > room_bytes or self.decoder_bytes > room_bytes:
            return None
        if self.is_stem:
            return 0
        return min(tiling.tiles, (room_bytes - max(flight_bytes, self.decoder_bytes)) // max(1, graph_bytes))

    def _sides(self) -> list[int]:
        """Even shares of the view's longer side, from one tile down to the smallest."""
        longest = max(self.view.width, self.view.height)
        most = -(-longest // self.cost.step_px)
        sides = {self.cost.rounded(-(-longest // count)) for count in range(1, most + 1)}
        largest = _LARGEST_STEM_TILE_PX if self.is_stem else _LARGEST_TILE_PX
        return sorted((side for side in sides if side <= max(largest, self.cost.step_px)), reverse=True)


def _stage_needs(
    network: LocalNetwork, number: int, view: Size, execution: Execution, device: torch.device, freed_bytes: int
) -> _StageNeeds:
    return _StageNeeds(
        cost=tile_cost(network, number, execution, device),
        view=view,
        fixed_bytes=store_bytes(network, view, number, execution) + gradient_bytes(network) + freed_bytes,
        decoder_bytes=decoder_bytes(network, number, execution),
        is_stem=number == 0,
    )


def _freed_bytes(config: StreamingConfig, device: torch.device) -> int:
    if device.type != "cpu":
        return 0
    return _DEFAULT_FREED_BYTES if config.memory is None else _LIMITED_FREED_BYTES


def _budget_bytes(
    network: LocalNetwork, config: StreamingConfig, stages: list[_StageNeeds], device: torch.device
) -> int:
    """What a step may hold above the process."""
    if config.memory is None:
        return max(stage.economical_bytes for stage in stages) + _DEFAULT_ROOM_BYTES
    if config.memory == "smallest":
        return max(stage.economical_bytes for stage in stages)
    return parse_memory(config.memory) - _process_bytes(network, device)


def _process_bytes(network: LocalNetwork, device: torch.device) -> int:
    """What a training process holds beside a step: libraries on a CPU, weights and AdamW's two moments everywhere.

    A fixed allowance and not what is resident now: two runs of one configuration must get the same tiles.
    """
    weights: int = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    return weights + 2 * gradient_bytes(network) + (_LIBRARIES_BYTES if device.type == "cpu" else 0)


def _place(
    config: StreamingConfig, network: LocalNetwork, largest: Size, execution: Execution, device: torch.device
) -> Literal["device", "host"]:
    if config.store != "auto":
        return config.store
    if device.type != "cuda":
        return "host"
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return "device" if 2 * largest_store_bytes(network, largest, execution) < free_bytes else "host"
