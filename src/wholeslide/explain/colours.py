"""How values become colours: a scale for each map, by what it shows on tissue."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib
import numpy as np
import numpy.typing as npt

from wholeslide.explain.maps import HeatMap, Kind
from wholeslide.slides.readers import Pixels
from wholeslide.streaming.heat import Map

COLOUR_MAPS: dict[Kind, str] = {"attention": "inferno", "evidence": "RdBu_r"}
"""Matplotlib's names. Evidence is red where it speaks for the class and blue where it speaks against it."""

STRONGEST = 0.75
"""The opacity of the highest value; that of no attention, and of no evidence, is none."""

_PERCENTILE = 99.5


@dataclass(frozen=True)
class Scale:
    """Values from ``low`` to ``high`` span the colours; what is beyond has the last of them."""

    kind: Kind
    low: float
    high: float

    @classmethod
    def of(cls, heat: HeatMap, shown: Map) -> Scale:
        """For a map, from its values on tissue, NaN apart: attention from 0, evidence as far on both sides of 0."""
        values = np.abs(shown[np.isfinite(shown)])
        high = float(np.percentile(values, _PERCENTILE)) if values.size else 0.0
        high = high if high > 0 else 1.0
        return cls(heat.kind, 0.0 if heat.kind == "attention" else -high, high)

    def strength(self, values_hw: Map) -> Map:
        """How strong each value is, 0 to 1; 0 where there is none."""
        found: Map = np.nan_to_num(np.clip(np.abs(values_hw) / np.float32(self.high), 0, 1))
        return found

    def colours(self, values_hw: Map, tissue_hw: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
        """Red, green, blue and opacity, 0 to 1, (h, w, 4): more opaque the stronger a value is, and only on tissue."""
        span = np.nan_to_num((values_hw - self.low) / (self.high - self.low))
        found: npt.NDArray[np.float64] = matplotlib.colormaps[COLOUR_MAPS[self.kind]](np.clip(span, 0, 1))
        found[..., 3] = STRONGEST * self.strength(values_hw) * tissue_hw
        return found

    def blended(self, values_hw: Map, pixels_hwc: Pixels, tissue_hw: npt.NDArray[np.bool_]) -> Pixels:
        """Values over pixels; uint8, (h, w, 3)."""
        colours = self.colours(values_hw, tissue_hw)
        opacity = colours[..., 3:]
        blended: Pixels = np.rint(255 * colours[..., :3] * opacity + pixels_hwc * (1 - opacity)).astype(np.uint8)
        return blended
