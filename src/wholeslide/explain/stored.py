"""An explanation's folder, read back: its maps, their colours, and where the slide has tissue."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wholeslide.errors import RunError
from wholeslide.explain.colours import Scale
from wholeslide.explain.maps import HeatMap, Pair, cells_at
from wholeslide.explain.output import read_description
from wholeslide.streaming.heat import Map


@dataclass(frozen=True, eq=False)
class StoredMap:
    """A map with the scale of its colours."""

    heat: HeatMap
    scale: Scale


@dataclass(frozen=True, eq=False)
class StoredExplanation:
    """What a folder holds.

    Attributes:
        prediction: what the slide was taken for.
        probabilities: of the final classifier, by class.
        maps: of all stages, in order.
        main: which of them is shown first.
    """

    prediction: str
    probabilities: dict[str, float]
    maps: tuple[StoredMap, ...]
    main: int
    _tissue_hw: Map
    _l0_origin: Pair
    _l0_cell: Pair

    @classmethod
    def read(cls, folder: Path) -> StoredExplanation:
        """From the folder that `wholeslide.explain.output.write_explanation` made.

        Raises:
            RunError: it is not there, damaged, or of another format.
        """
        facts = read_description(folder)
        try:
            if facts is None:
                raise ValueError("no explanation of this format")
            with np.load(folder / "maps.npz", allow_pickle=False) as arrays:
                maps = tuple(_map(entry, arrays[entry["array"]]) for entry in facts["maps"])
                tissue = arrays[facts["tissue"]["array"]].astype(np.float32)
            return cls(
                prediction=str(facts["prediction"]),
                probabilities=dict(zip(facts["classes"], facts["probabilities_by_stage"][-1], strict=True)),
                maps=maps,
                main=[entry["title"] for entry in facts["maps"]].index(facts["main"]),
                _tissue_hw=tissue,
                _l0_origin=_pair(facts["tissue"]["l0_origin"]),
                _l0_cell=_pair(facts["tissue"]["l0_cell"]),
            )
        except (OSError, ValueError, KeyError, TypeError, IndexError, zipfile.BadZipFile) as error:
            raise RunError.single(
                "its explanation is damaged", where=str(folder), remedy="delete the folder, and explain the slide again"
            ) from error

    def colours(
        self, number: int, l0_x_w: npt.NDArray[np.float64], l0_y_h: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.uint8]:
        """A map at the crossings of columns and rows of level-0 pixels: red, green, blue, opacity, uint8 of shape (h, w, 4).

        Where there is no tissue, nothing is to be seen.
        """
        shown = self.maps[number]
        tissue = cells_at(self._tissue_hw, self._l0_origin, self._l0_cell, l0_x_w, l0_y_h) > 0
        colours = shown.scale.colours(shown.heat.at(l0_x_w, l0_y_h), tissue)
        return np.rint(255 * colours).astype(np.uint8)


def _map(entry: dict[str, Any], values_hw: Map) -> StoredMap:
    heat = HeatMap(
        entry["kind"], entry["stage"], entry["class"], values_hw, _pair(entry["l0_origin"]), _pair(entry["l0_cell"])
    )
    return StoredMap(heat, Scale(entry["kind"], entry["low"], entry["high"]))


def _pair(values: list[float]) -> Pair:
    x, y = values
    return float(x), float(y)
