"""What a user can say about slides and their augmentation. Free of heavy imports, so that ``--help`` stays fast."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wholeslide.errors import ConfigError, Problem

Decoders = Literal["auto", "threads", "processes"]

DEFAULT_MPP = 2.0
SMALLEST_MPP = 0.05
LARGEST_MPP = 20.0


def is_usable_mpp(mpp: float) -> bool:
    """Whether a scale is one that a slide scanner can have; anything else is a placeholder and counts as missing."""
    return SMALLEST_MPP <= mpp <= LARGEST_MPP


@dataclass(frozen=True, kw_only=True)
class SlideConfig:
    """At which resolution slides are read, and what becomes of their background.

    Args:
        mpp: Target resolution in microns per pixel, or ``native`` for pixels as they are stored.
        magnification: May stand for ``mpp`` (mpp = 10 / magnification).
        downsample: Whole number of stored pixels, along x and y, that become one; implies ``native``.
        background: ``constant`` makes everything outside the tissue one colour and crops to the tissue, ``keep`` leaves
            the image as it is; ``auto`` is constant for slides and keep for plain images.
        mask_dir: Folder of QuPath GeoJSON files named <stem>.geojson that replace the automatic tissue mask.
        mpp_override: Microns per stored pixel, for files whose scale is missing or wrong.
        icc: Turn colours into sRGB where the file holds the scanner's ICC profile.
        decoders: Where files are decoded: in threads; in processes, so that a decoder that crashes on a damaged file costs
            that slide only; or auto, which takes processes for formats that are none of a scanner's and no everyday image's.
    """

    mpp: float | Literal["native"] = DEFAULT_MPP
    magnification: float | None = None
    downsample: float | None = None
    background: Literal["auto", "constant", "keep"] = "auto"
    mask_dir: Path | None = None
    mpp_override: float | None = None
    icc: bool = False
    decoders: Decoders = "auto"

    def __post_init__(self) -> None:
        problems = self._problems()
        if problems:
            raise ConfigError(problems)

    @property
    def target_mpp(self) -> float | None:
        """Microns per working pixel; ``None`` where pixels are counted as stored (``native`` and ``downsample``)."""
        if self.downsample is not None or self.mpp == "native":
            return None
        return 10.0 / self.magnification if self.magnification is not None else self.mpp

    @property
    def target_downsample(self) -> int:
        """Stored pixels per working pixel where :attr:`target_mpp` is ``None``."""
        return 1 if self.downsample is None else int(self.downsample)

    def _problems(self) -> list[Problem]:
        problems = []
        scale = f"between {SMALLEST_MPP} and {LARGEST_MPP:g} microns per pixel"
        if self.mpp != "native" and not is_usable_mpp(self.mpp):
            problems.append(Problem("not a resolution", f"--mpp {self.mpp}", f"give a value {scale}, or native"))
        if self.magnification is not None and (self.magnification <= 0 or not is_usable_mpp(10.0 / self.magnification)):
            problems.append(
                Problem("not a magnification", f"--magnification {self.magnification}", "give for example 5, 10 or 20")
            )
        elif self.magnification is not None and not self._agrees(10.0 / self.magnification):
            remedy = f"magnification {self.magnification:g} is {10.0 / self.magnification:g} mpp; give one of the two"
            problems.append(
                Problem(
                    "two resolutions that disagree", f"--mpp {self.mpp} --magnification {self.magnification:g}", remedy
                )
            )
        if self.downsample is not None:
            problems += self._downsample_problems()
        if self.mpp_override is not None and not is_usable_mpp(self.mpp_override):
            problems.append(Problem("not a scale", f"--mpp-override {self.mpp_override}", f"give a value {scale}"))
        return problems

    def _downsample_problems(self) -> list[Problem]:
        where = f"--downsample {self.downsample}"
        assert self.downsample is not None
        if self.downsample < 1 or self.downsample != int(self.downsample):
            return [Problem("not a downsample", where, "give a whole number of at least 1")]
        if self.magnification is not None or self.mpp not in ("native", DEFAULT_MPP):
            return [Problem("two resolutions", where, "give either --downsample or --mpp/--magnification")]
        return []

    def _agrees(self, mpp: float) -> bool:
        if self.mpp == "native":
            return False
        return self.mpp == DEFAULT_MPP or abs(self.mpp - mpp) <= 0.02 * mpp


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """Random changes of a whole slide, drawn once a view.

    Args:
        crop_probability: How often a view is cropped.
        crop_minimum: Smallest part of each side that a crop keeps.
        crop_minimum_small: The same for sides shorter than ``small_side_px``.
        small_side_px: Working pixels below which a side counts as small.
        flips: Whether views are mirrored left to right and top to bottom, each half of the time.
        turns: Whether views are turned by 0, 90, 180 or 270 degrees.
        jitter: Strength of the colour jitter: brightness, contrast and saturation change by a factor in 1 ± jitter, hue
            by a part of the colour circle in ± jitter.
    """

    crop_probability: float = 0.6
    crop_minimum: float = 0.5
    crop_minimum_small: float = 0.9
    small_side_px: int = 3000
    flips: bool = True
    turns: bool = True
    jitter: float = 0.1

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.crop_probability <= 1:
            problems.append(Problem("not a probability", f"crop_probability {self.crop_probability}", "give 0 to 1"))
        for name in ("crop_minimum", "crop_minimum_small"):
            if not 0 < getattr(self, name) <= 1:
                problems.append(Problem("not a part of a side", f"{name} {getattr(self, name)}", "give 0 < part <= 1"))
        if not 0 <= self.jitter <= 0.5:
            problems.append(Problem("not a jitter strength", f"jitter {self.jitter}", "give 0 to 0.5"))
        if problems:
            raise ConfigError(problems)
