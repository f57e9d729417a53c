"""What a step needs while it is at one stage, for any way to cut the stage into tiles. Free of the network: stored with a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wholeslide.geometry import Size
from wholeslide.streaming.costs import TileCost

_LARGEST_TILE_PX = 8192
#: Pixels that pass through a stage in the time that a tile takes besides its arithmetic.
_PX_OF_A_TILE = 64**2
#: Tensors above this leave the cache before they are read again; each doubling of them takes about so much more time.
_CACHED_BYTES, _COST_OF_DOUBLING = 8 * 2**20, 0.05
#: Windows of another view of the same area may be so many times those of the largest.
_MOST_HALO = 2
_MEGAPIXEL = 1e6


@dataclass(frozen=True)
class TileChoice:
    """How a stage is cut into tiles, and the pixels of the windows whose graphs are kept, together."""

    side_px: int
    kept_px: int


@dataclass(frozen=True)
class StageNeeds:
    """Memory and time of a step while it is at one stage, or at the stem, on any view of at most this area.

    Stores, gradients, weights, the grid, the library's kernels and freed memory that stays resident are there all the time; the
    decoder's bytes are taken between the two passes, and ``region_bytes`` of them live on in the second.
    ``features_bytes`` are those of the stage's own x_k, wherever it is kept. Seconds are by megapixels of the tiles' windows,
    ``decoder_seconds`` those of a slide.
    """

    cost: TileCost
    view: Size
    stores_bytes: int
    features_bytes: int
    gradients_bytes: int
    freed_bytes: int
    decoder_bytes: int
    forward_seconds: float
    backward_seconds: float
    decoder_seconds: float
    kernels_bytes: int = 0
    grid_bytes: int = 0
    region_bytes: int = 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StageNeeds:
        """From what :func:`dataclasses.asdict` gave."""
        return cls(**{**values, "cost": TileCost(**values["cost"]), "view": Size(**values["view"])})

    @property
    def fixed_bytes(self) -> int:
        """What does not depend on the tiles."""
        there = (self.stores_bytes, self.gradients_bytes, self.freed_bytes, self.kernels_bytes, self.grid_bytes)
        return self.cost.weight_bytes + sum(there)

    def best_choice(self, budget_bytes: int, side_px: int | None) -> TileChoice | None:
        """The tiles that cost the least computing within ``budget_bytes``; nothing where none fits.

        A ``side_px`` that the user named is taken as it is.
        """
        feasible = []
        for side in self._sides() if side_px is None else [side_px]:
            kept_px = self._affordable_px(side, budget_bytes - self.fixed_bytes)
            if kept_px is not None:
                feasible.append((self._work(side, kept_px), TileChoice(side, kept_px)))
        return min(feasible, key=lambda pair: pair[0])[1] if feasible else None

    def peak_bytes(self, choice: TileChoice) -> int:
        """Of a step on the largest view."""
        window_px = self.cost.tiling(self.view, choice.side_px).window.area
        return self.bytes_of(window_px, min(choice.kept_px, self._windows_px(choice.side_px)))

    def tile_bytes(self, choice: TileChoice) -> int:
        """Of one tile with its graph, of what it writes, and of its share of the weights' gradients."""
        window_px = self.cost.largest_window_px(self.view, choice.side_px)
        written_bytes = int(self.cost.written_bytes_per_px * window_px)
        return (
            self.cost.graph_bytes(window_px)
            + self.cost.flight_bytes(window_px)
            + written_bytes
            + self.cost.weight_bytes
        )

    def bound_bytes(self, side_px: int) -> int:
        """Of a step on any view of at most this area, where no graph is kept."""
        return self.bytes_of(self.cost.largest_window_px(self.view, side_px), 0)

    def bytes_of(self, window_px: int, kept_px: int) -> int:
        """Of a step with windows of at most ``window_px``, and graphs of ``kept_px`` together kept."""
        kept_bytes, flight_bytes = self.cost.graph_bytes(kept_px), self.cost.flight_bytes(window_px)
        computing_bytes = max(kept_bytes, self.cost.graph_bytes(window_px)) + flight_bytes + self.region_bytes
        return self.fixed_bytes + max(computing_bytes, kept_bytes + self.decoder_bytes)

    def tiles(self, choice: TileChoice) -> int:
        """Of the largest view."""
        return self.cost.tiling(self.view, choice.side_px).tiles

    def kept_share(self, choice: TileChoice) -> float | None:
        """Of the largest view's graphs; nothing where there are none, as in the stem and in a prediction."""
        if self.cost.graph_bytes_per_px == 0:
            return None
        return min(1.0, choice.kept_px / self._windows_px(choice.side_px))

    def training_seconds(self, choice: TileChoice) -> float:
        """Of a step on the largest view; what is not kept passes forward twice."""
        kept = self.kept_share(choice)
        twice = 0.0 if kept is None else 1 - kept
        megapixels = self._windows_px(choice.side_px) / _MEGAPIXEL
        return megapixels * ((1 + twice) * self.forward_seconds + self.backward_seconds) + self.decoder_seconds

    def inference_seconds(self, choice: TileChoice) -> float:
        """Of a prediction for the largest view."""
        return self._windows_px(choice.side_px) / _MEGAPIXEL * self.forward_seconds

    def halved(self, choice: TileChoice, *, economical: bool) -> TileChoice:
        """Half the side and no graph kept; while ``economical``, no tiles that are nearly all halo."""
        present_px = min(choice.side_px, max(self.view.width, self.view.height))
        least_px = self.cost.economical_side if economical else self.cost.step_px
        return TileChoice(min(choice.side_px, max(self.cost.rounded(present_px // 2), least_px)), 0)

    def least_bytes(self, side_px: int | None) -> int:
        """With the smallest tiles and no graph kept."""
        return min(self.bound_bytes(side) for side in (self._sides() if side_px is None else [side_px]))

    @property
    def economical_bytes(self) -> int:
        """With the smallest tiles that are not nearly all halo, and no graph kept."""
        return self.bound_bytes(self.cost.economical_side)

    def _affordable_px(self, side_px: int, room_bytes: int) -> int | None:
        """Pixels of windows that may keep their graphs; nothing where not even one window can be computed."""
        window_px = self.cost.largest_window_px(self.view, side_px)
        flight_bytes = self.cost.flight_bytes(window_px) + self.region_bytes
        if max(self.cost.graph_bytes(window_px) + flight_bytes, self.decoder_bytes) > room_bytes:
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
        return sorted((side for side in sides if side <= max(_LARGEST_TILE_PX, self.cost.step_px)), reverse=True)

    def _windows_px(self, side_px: int) -> int:
        tiling = self.cost.tiling(self.view, side_px)
        return tiling.tiles * tiling.window.area

    def _work(self, side_px: int, kept_px: int) -> float:
        """Pixels that pass forward once, backward at twice the cost, and forward again where their graph is not kept."""
        tiling, windows_px = self.cost.tiling(self.view, side_px), self._windows_px(side_px)
        work = 4 * (windows_px + tiling.tiles * _PX_OF_A_TILE) - min(kept_px, windows_px)
        map_bytes = self.cost.largest_map_bytes(tiling.window.area)
        return work * (1 + _COST_OF_DOUBLING * math.log2(max(map_bytes, _CACHED_BYTES) / _CACHED_BYTES))
