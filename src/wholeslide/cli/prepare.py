"""``wholeslide prepare``."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from wholeslide.cli.command import Command
from wholeslide.cli.output import format_bytes, write
from wholeslide.errors import RunError, SlideError
from wholeslide.slides.config import SlideConfig

SAMPLED_SLIDES = 8

Row = tuple[Path, float | None]


@dataclass(frozen=True, kw_only=True)
class PrepareArguments:
    """Which slides are prepared, at which resolution, and where they go.

    Args:
        manifest: CSV of the cohort; labels are not needed.
        slides: Folder that is searched, with its subfolders, for the files that the manifest names.
        out: Folder of the prepared slides, for `wholeslide train --cache`; slides that it has are skipped.
        lossless: Keep every pixel, at twice the size or more, instead of JPEG of quality 95.
        quiet: No progress bar.
    """

    manifest: Path
    slides: Path
    out: Path
    reading: SlideConfig
    lossless: bool = False
    quiet: bool = False


def run(arguments: PrepareArguments) -> int:
    """Estimate, then prepare slide after slide."""
    from wholeslide.cohort.manifest import read_cohort
    from wholeslide.slides.prepare import prepare
    from wholeslide.train.progress import progress_bar
    from wholeslide.train.views import entries

    config, out = arguments.reading, arguments.out
    cohort = read_cohort(arguments.manifest, arguments.slides, labelled=False)
    rows: list[Row] = list(dict.fromkeys((entry.path, entry.mpp) for entry in entries(cohort.table)))
    missing = [row for row in rows if not _is_there(row, out, config)]
    if missing:
        _check_space(missing, arguments)
    with progress_bar("prepare", len(missing), quiet=arguments.quiet) as progress:
        done = prepare(
            missing,
            out,
            config,
            lossless=arguments.lossless,
            progress=lambda prepared: progress.advance(f"{prepared.path.name}, {format_bytes(prepared.size_bytes)}"),
        )
    size = format_bytes(sum(prepared.size_bytes for prepared in done))
    before = f", {len(rows) - len(missing)} were there before" if len(rows) > len(missing) else ""
    write(f"{len(done)} slides prepared ({size}){before}: {out}")
    write(f"Next: wholeslide train {arguments.manifest} --slides {arguments.slides} --cache {out} --out RUN")
    return 0


def _is_there(row: Row, out: Path, config: SlideConfig) -> bool:
    from wholeslide.slides.prepare import find_prepared

    path, mpp = row
    try:
        return find_prepared(out, path, config, mpp=mpp) is not None
    except SlideError:  # reported when it is its turn, together with all others
        return False


def _check_space(missing: Sequence[Row], arguments: PrepareArguments) -> None:
    """Say how much disk the slides will take, from a sample of them.

    Raises:
        RunError: more than there is.
    """
    needed = _estimate_bytes(missing, arguments)
    place = next(folder for folder in [arguments.out.absolute(), *arguments.out.absolute().parents] if folder.exists())
    free = shutil.disk_usage(place).free
    write(f"{len(missing)} slides to prepare: about {format_bytes(needed)}, of {format_bytes(free)} free in {place}")
    if needed > free:
        raise RunError.single(
            f"the disk is too full: about {format_bytes(needed)} are needed, {format_bytes(free)} are free",
            where=str(arguments.out),
            remedy="free some space, choose another --out, or a coarser --mpp",
        )


def _estimate_bytes(missing: Sequence[Row], arguments: PrepareArguments) -> float:
    from wholeslide.slides.prepare import estimate_prepared_bytes
    from wholeslide.slides.working import open_working_slide

    found: list[int] = []
    for path, mpp in missing[:: max(1, len(missing) // SAMPLED_SLIDES)]:
        try:
            with closing(open_working_slide(path, arguments.reading, mpp=mpp)) as slide:
                found.append(estimate_prepared_bytes(slide, lossless=arguments.lossless))
        except SlideError:  # reported when it is its turn, together with all others
            continue
    return len(missing) * sum(found) / len(found) if found else 0.0


COMMAND = Command(
    name="prepare",
    summary="Write slides at the working resolution, so that training reads them faster.",
    arguments=PrepareArguments,
    positionals=("manifest",),
    run=run,
    example="wholeslide prepare labels.csv --slides slides/ --out cache/",
)
