"""``wholeslide explain``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wholeslide.cli.command import Command
from wholeslide.cli.failures import MENDABLE, write_problem
from wholeslide.cli.output import write
from wholeslide.slides.config import Decoders


@dataclass(frozen=True, kw_only=True)
class ExplainArguments:
    """What is explained, and by which run.

    Args:
        run: The run directory.
        inputs: Slides, folders that are searched for slides, and manifests (CSV, no labels needed).
        out: Folder that gets a folder a slide: overlay.ome.tif and regions.geojson for QuPath, a picture of each map, and
            their numbers in maps.npz and maps.ome.tif.
        slides: Folder of the slides that a manifest names, left out: the manifest's own folder; or of the slides that files of
            features were made of.
        mpp_override: Microns per stored pixel, for files whose scale is missing or wrong.
        decoders: Where files are decoded: in threads; in processes, so that a decoder that crashes on a damaged file costs
            that slide only; or auto, as for train. Left out: as in training.
        memory: Most memory to use, as 8GiB; left out: as in training.
        resume: Keep what this checkpoint has made before, and replace what others have.
        quiet: No progress bar.
    """

    run: Path
    inputs: list[Path]
    out: Path
    slides: Path | None = None
    mpp_override: float | None = None
    decoders: Decoders | None = None
    memory: str | None = None
    resume: bool = False
    quiet: bool = False


def run(arguments: ExplainArguments) -> int:
    """Explain; 2 where a slide could not be read."""
    from wholeslide.explain import explain

    result = explain(
        arguments.run,
        arguments.inputs,
        arguments.out,
        slides=arguments.slides,
        mpp_override=arguments.mpp_override,
        decoders=arguments.decoders,
        memory=arguments.memory,
        resume=arguments.resume,
        on_error=write_problem,
        quiet=arguments.quiet,
    )
    before = sum(one.was_there for one in result.done)
    said = f", {before} of them before" if before else ""
    write(f"{len(result.done)} slides explained{said}, {len(result.errors)} could not be: {arguments.out}")
    return MENDABLE if result.errors else 0


COMMAND = Command(
    name="explain",
    summary="Show what a run looks at on slides: maps, overlays, regions.",
    arguments=ExplainArguments,
    positionals=("run", "inputs"),
    run=run,
    example="wholeslide explain runs/first new-slides/ --out explained",
)
