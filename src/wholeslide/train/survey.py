"""Every slide is opened, and a few of its pixels are read, before a run begins."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from wholeslide.errors import WholeslideError
from wholeslide.geometry import Box, Size
from wholeslide.slides.config import AugmentationConfig, SlideConfig
from wholeslide.slides.readers import unreadable
from wholeslide.slides.working import WorkingSlide
from wholeslide.train.progress import progress_bar
from wholeslide.train.views import Entry, open_slide_of

PROBE_PX = 64
MEGAPIXEL = 1e6


@dataclass(frozen=True)
class SlideFacts:
    """What the survey found: the size in working pixels, and how much of it is tissue (0 to 1)."""

    size: Size
    tissue_fraction: float


Finding = SlideFacts | WholeslideError


def survey(
    entries: Sequence[Entry], config: SlideConfig, *, cache: Path | None = None, quiet: bool = False
) -> dict[Path, Finding]:
    """Open every slide and read its middle and its corners; what cannot be read is found as its error."""

    def look(entry: Entry) -> Finding:
        try:
            with closing(open_slide_of(entry, config, cache)) as slide:
                _probe(slide)
                return SlideFacts(slide.size, slide.tissue_fraction)
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


def _probe(slide: WorkingSlide) -> None:
    size = slide.size
    width, height = min(PROBE_PX, size.width), min(PROBE_PX, size.height)
    right, bottom = size.width - width, size.height - height
    for left, top in {(right // 2, bottom // 2), (0, 0), (right, 0), (0, bottom), (right, bottom)}:
        slide.read(Box(left, top, width, height))


def raise_finding(findings: Mapping[Path, Finding], path: Path) -> None:
    """The audit's check of one slide.

    Raises:
        WholeslideError: what the survey met.
    """
    finding = findings[path]
    if not isinstance(finding, SlideFacts):
        raise finding


def facts_of(findings: Mapping[Path, Finding], entries: Sequence[Entry]) -> list[SlideFacts]:
    """The facts of slides that the audit let pass."""
    facts = []
    for entry in entries:
        finding = findings[entry.path]
        assert isinstance(finding, SlideFacts), entry
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
