"""The features of a slide's patches, wherever they come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wholeslide.errors import FeatureError, Problem

Fact = str | int | float
"""What HDF5 and JSON keep as it is."""

AGAIN = "extract the slide's features again"


@dataclass(frozen=True, eq=False)
class Bag:
    """A slide as a bag of N patches.

    Attributes:
        features_nd: float32 of shape (N, D), finite, N and D at least 1.
        l0_coords_n2: int64 of shape (N, 2), the upper left corners of the patches, x before y, in level-0 pixels of the slide;
            ``None`` where they are not known.
        l0_patch_px: the side of a patch in level-0 pixels; ``None`` where it is not known.
        patch_px: the side in pixels as the network saw it, ``mpp`` microns each; ``None`` where they are not known.
        mpp: see ``patch_px``.
        made_with: what is known of how the features were made, by the names that their file has for it.
        source: the file; ``None`` where the features were never in one.

    Raises:
        FeatureError: everything that is wrong with the arrays.
    """

    features_nd: npt.NDArray[np.float32]
    l0_coords_n2: npt.NDArray[np.int64] | None = None
    l0_patch_px: float | None = None
    patch_px: int | None = None
    mpp: float | None = None
    made_with: Mapping[str, Fact] = field(default_factory=dict)
    source: Path | None = None

    def __post_init__(self) -> None:
        where = str(self.source or "features in memory")
        problems = [Problem(what, where, remedy) for what, remedy in self._faults()]
        if problems:
            raise FeatureError(problems)
        assert self.features_nd.dtype == np.float32, self.features_nd.dtype
        assert self.l0_coords_n2 is None or self.l0_coords_n2.dtype == np.int64, self.l0_coords_n2.dtype

    def __len__(self) -> int:
        return len(self.features_nd)

    @property
    def width(self) -> int:
        """The number D of features of a patch."""
        return int(self.features_nd.shape[1])

    def _faults(self) -> Iterator[tuple[str, str]]:
        features, coords = self.features_nd, self.l0_coords_n2
        if features.ndim != 2:
            shape = "one vector a slide" if features.ndim == 1 else f"features of shape {features.shape}"
            yield f"{shape}, where each of its patches needs a row", "give the features of patches, not of slides"
        elif 0 in features.shape:
            yield f"no features, an array of shape {features.shape}", f"{AGAIN}, or leave it out"
        elif not np.isfinite(features).all():
            rows = int((~np.isfinite(features)).any(axis=1).sum())
            yield f"{rows} of {len(features)} patches have features that are not finite numbers", AGAIN
        if coords is not None and (coords.ndim != 2 or coords.shape[1] != 2):
            yield f"coordinates of shape {coords.shape}, where each patch needs x and y", AGAIN
        elif coords is not None and features.ndim == 2 and len(coords) != len(features):
            yield f"{len(features)} patches with features and {len(coords)} with coordinates", AGAIN
