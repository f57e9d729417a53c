"""``wholeslide features``."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from wholeslide.baselines.config import EncoderConfig, Layout
from wholeslide.cli.command import Command
from wholeslide.cli.output import format_bytes, write
from wholeslide.errors import SlideError
from wholeslide.slides.config import SlideConfig

if TYPE_CHECKING:
    from wholeslide.baselines.encoder import PatchEncoder
    from wholeslide.baselines.extraction import FeatureFolder, Row

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FeaturesArguments:
    """Which slides' patches are encoded, by which network, and where their features go.

    Args:
        manifest: CSV of the cohort; labels are not needed.
        slides: Folder that is searched, with its subfolders, for the files that the manifest names.
        out: Folder that gets an HDF5 file a slide; slides that it has are skipped.
        layout: TRIDENT's, OUT/SLIDE.h5; or CLAM's, OUT/h5_files/SLIDE.h5 and OUT/pt_files/SLIDE.pt.
        on_unreadable: Exit with 2 if slides are missing or cannot be read, or exclude and list them; the others are done
            in either case.
        quiet: No progress bar.
    """

    manifest: Path
    slides: Path
    out: Path
    encoding: EncoderConfig
    reading: SlideConfig
    layout: Layout = "trident"
    on_unreadable: Literal["stop", "exclude"] = "stop"
    quiet: bool = False


def run(arguments: FeaturesArguments) -> int:
    """Estimate, then encode slide after slide; 2 where some cannot be read, unless they are to be excluded."""
    from wholeslide.baselines.encoder import build_encoder
    from wholeslide.baselines.extraction import FeatureFolder
    from wholeslide.cohort.manifest import read_cohort
    from wholeslide.train.progress import progress_bar
    from wholeslide.train.views import entries

    exclude = arguments.on_unreadable == "exclude"
    cohort = read_cohort(arguments.manifest, arguments.slides, labelled=False, keep_missing=exclude)
    rows = list(dict.fromkeys((entry.path, entry.mpp) for entry in entries(cohort.table)))
    encoder = build_encoder(arguments.encoding)
    folder = FeatureFolder(
        arguments.out,
        encoder,
        arguments.reading,
        least_tissue=arguments.encoding.least_tissue,
        layout=arguments.layout,
    )
    pending = folder.pending(rows)
    if pending:
        _say_estimate(folder, pending, encoder)
    with progress_bar("features", len(pending), quiet=arguments.quiet) as progress:
        found = folder.extract(pending, lambda path: progress.advance(path.name))
    before = f", {len(rows) - len(pending)} were there before" if len(rows) > len(pending) else ""
    patches = sum(extracted.patches for extracted in found.done)
    write(f"{len(found.done)} slides encoded ({patches} patches){before}: {arguments.out}")
    problems = [problem for of_slide in found.failed.values() for problem in of_slide]
    if problems and (not exclude or len(found.failed) == len(rows)):
        raise SlideError(problems)
    for problem in problems:
        logger.warning("left out: %s", problem)
    return 0


def _say_estimate(folder: FeatureFolder, pending: list[Row], encoder: PatchEncoder) -> None:
    from wholeslide.train.tables import clock

    found = folder.estimate(pending)
    arithmetic = f"{encoder.made_of['backbone']} in {encoder.execution.precision}"
    write(
        f"{len(pending)} slides to encode: about {found.patches} patches, {format_bytes(found.size_bytes)}, "
        f"{clock(found.seconds)} of computing ({arithmetic}), reading not counted"
    )


COMMAND = Command(
    name="features",
    summary="Encode the patches of slides with a frozen network, and write their features.",
    arguments=FeaturesArguments,
    positionals=("manifest",),
    run=run,
    example="wholeslide features labels.csv --slides slides/ --out features/ --backbone resnet50",
)
