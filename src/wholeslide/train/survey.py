"""Every slide is opened, and a few of its pixels are read, before a run begins."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wholeslide.baselines.feature_files import read_bag
from wholeslide.cohort.files import is_feature_file
from wholeslide.errors import WholeslideError
from wholeslide.geometry import Box, Mpp, Size
from wholeslide.slides.config import AugmentationConfig, SlideConfig
from wholeslide.slides.readers import unreadable
from wholeslide.slides.working import WorkingSlide, read_working_mpp
from wholeslide.train.progress import progress_bar
from wholeslide.train.views import Entry, open_slide_of

PROBE_PX = 64
#: Working scales of one cohort that differ more than this are told.
SCALES_DIFFER = 1.2
MEGAPIXEL = 1e6


@dataclass(frozen=True)
class SlideFacts:
    """What the survey found.

    ``size`` is in working pixels, ``tissue_fraction`` the share of it that is tissue (0 to 1), ``mpp`` the microns per working
    pixel (``None`` where the file has no scale), ``one_colour`` whether all pixels that were looked at are equal.
    """

    size: Size
    tissue_fraction: float
    mpp: float | None
    one_colour: bool


@dataclass(frozen=True)
class BagFacts:
    """What the survey found of a file of features: number of patches, and features of each."""

    patches: int
    width: int


Finding = SlideFacts | BagFacts | WholeslideError


def survey(
    entries: Sequence[Entry], config: SlideConfig, *, cache: Path | None = None, quiet: bool = False
) -> dict[Path, Finding]:
    """Open every slide and read its middle and its corners; what cannot be read is found as its error.

    Files of features are read.
    """

    def look(entry: Entry) -> Finding:
        try:
            if is_feature_file(entry.path):
                bag = read_bag(entry.path)
                return BagFacts(len(bag), bag.width)
            with closing(open_slide_of(entry, config, cache)) as slide:
                one_colour = _probe(slide)
                return SlideFacts(slide.size, slide.tissue_fraction, _one_scale(slide.working_mpp), one_colour)
        except WholeslideError as error:
            return error
        except OSError as error:
            return unreadable(entry.path, error)

    found: dict[Path, Finding] = {}
    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool, progress_bar("slides", len(entries), quiet=quiet) as bar:
        for entry, finding in zip(entries, pool.map(look, entries), strict=True):
            found[entry.path] = finding
            bar.advance(entry.file)
    return found


def oddities(facts: Mapping[str, SlideFacts]) -> list[str]:
    """What is allowed, but seldom meant: scales that differ, and slides that show nothing. Keys are files."""
    found = [f"{file} has one colour wherever it was looked at" for file, fact in facts.items() if fact.one_colour]
    return found + scale_oddities(
        {file: fact.mpp for file, fact in facts.items()}, remedy="give one for all with --mpp"
    )


def working_scales(entries: Sequence[Entry], config: SlideConfig) -> dict[str, float | None]:
    """By file the microns per working pixel, told by the files' headers alone.

    Slides that cannot be opened are passed over: they are reported when it is their turn.
    """
    found: dict[str, float | None] = {}
    for entry in entries:
        with suppress(WholeslideError, OSError):
            found[entry.file] = _one_scale(read_working_mpp(entry.path, config, mpp=entry.mpp))
    return found


def scale_oddities(mpp_of_file: Mapping[str, float | None], *, remedy: str) -> list[str]:
    """Working scales that differ, and files without one among others, from the microns per working pixel of each file."""
    found = []
    scales = sorted((mpp, file) for file, mpp in mpp_of_file.items() if mpp is not None)
    if scales and scales[-1][0] > SCALES_DIFFER * scales[0][0]:
        (finest, fine), (coarsest, coarse) = scales[0], scales[-1]
        found.append(
            f"slides differ {coarsest / finest:.1f}-fold in scale, from {finest:.3g} µm per pixel ({fine}) to {coarsest:.3g} "
            f"({coarse}): {remedy}"
        )
    if scales and len(scales) < len(mpp_of_file):
        found.append(
            f"{len(mpp_of_file) - len(scales)} of {len(mpp_of_file)} slides have no scale, and the others have"
        )
    return found


def _one_scale(mpp: Mpp | None) -> float | None:
    return None if mpp is None else math.sqrt(mpp.x * mpp.y)


def _probe(slide: WorkingSlide) -> bool:
    """Read the middle and the corners; whether they are all of one colour."""
    size = slide.size
    width, height = min(PROBE_PX, size.width), min(PROBE_PX, size.height)
    colours: set[tuple[int, ...]] = set()
    right, bottom = size.width - width, size.height - height
    for left, top in {(right // 2, bottom // 2), (0, 0), (right, 0), (0, bottom), (right, bottom)}:
        colours.update(
            map(tuple, np.unique(slide.read(Box(left, top, width, height)).reshape(-1, 3), axis=0)[:2].tolist())
        )
    return len(colours) == 1


def raise_finding(findings: Mapping[Path, Finding], path: Path) -> None:
    """The audit's check of one slide.

    Raises:
        WholeslideError: what the survey met.
    """
    finding = findings[path]
    if isinstance(finding, WholeslideError):
        raise finding


def facts_of(findings: Mapping[Path, Finding], entries: Sequence[Entry]) -> list[SlideFacts | BagFacts]:
    """The facts of slides that the audit let pass."""
    facts: list[SlideFacts | BagFacts] = []
    for entry in entries:
        finding = findings[entry.path]
        assert not isinstance(finding, WholeslideError), entry
        facts.append(finding)
    return facts


def megapixels(facts: Sequence[SlideFacts]) -> float:
    """Working pixels of some slides, in millions."""
    return sum(fact.size.area for fact in facts) / MEGAPIXEL


def augmented_megapixels(facts: Sequence[SlideFacts], augmentation: AugmentationConfig | None) -> float:
    """What is expected to be left by the random crops. Sides are drawn evenly between their minimum and the whole."""
    if augmentation is None:
        return megapixels(facts)
    total = 0.0
    for fact in facts:
        part = 1.0
        for side in (fact.size.width, fact.size.height):
            small = side < augmentation.small_side_px
            part *= (1 + (augmentation.crop_minimum_small if small else augmentation.crop_minimum)) / 2
        total += fact.size.area * (1 - augmentation.crop_probability * (1 - part))
    return total / MEGAPIXEL
