"""``wholeslide inspect``."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wholeslide.cli.command import Command
from wholeslide.cli.failures import MENDABLE, write_problem
from wholeslide.cli.output import print_json, print_table, write
from wholeslide.errors import ConfigError, Problem, WholeslideError
from wholeslide.slides.config import SlideConfig


@dataclass(frozen=True, kw_only=True)
class InspectArguments:
    """Which slides are looked at, and how they would be read.

    Args:
        slide: Slides: files, or folders of DICOM files.
        json: Write JSON.
        overlay: Folder for a picture of each slide with the outline of its tissue.
    """

    slide: list[Path]
    json: bool = False
    overlay: Path | None = None
    reading: SlideConfig

    def __post_init__(self) -> None:
        clashes: dict[str, list[Path]] = {}
        for path, name in self.pictures().items() if self.overlay is not None else ():
            clashes.setdefault(name, []).append(path)
        remedy = "look at one of them at a time, each with an --overlay of its own"
        problems = [
            Problem(f"{len(paths)} slides would get the same picture {name}", ", ".join(map(str, paths)), remedy)
            for name, paths in clashes.items()
            if len(paths) > 1
        ]
        if problems:
            raise ConfigError(problems)

    def pictures(self) -> dict[Path, str]:
        """Each slide's picture: named without the slide's ending, unless two slides differ in nothing else."""
        stems = Counter(path.stem for path in self.slide)
        return {path: f"{path.stem if stems[path.stem] == 1 else path.name}.png" for path in self.slide}


def run(arguments: InspectArguments) -> int:
    """Describe every slide that can be read; 2 where one cannot."""
    from wholeslide.slides.inspect import inspect_slide, write_overlay

    found: list[dict[str, Any]] = []
    pictures, status = arguments.pictures(), 0
    for path in arguments.slide:
        try:
            found.append(inspect_slide(path, arguments.reading))
            if arguments.overlay is not None:
                picture = write_overlay(path, arguments.overlay / pictures[path], arguments.reading)
                if not arguments.json:
                    write(f"Tissue of {path}: {picture}")
        except WholeslideError as error:
            for problem in error.problems:
                write_problem(problem)
            status = MENDABLE
    if arguments.json:
        print_json(found)
    elif found:
        _show(found)
    return status


def _show(found: list[dict[str, Any]]) -> None:
    rows = []
    for slide in found:
        scale = "none" if slide["mpp_x"] is None else f"{slide['mpp_x']:.4g} x {slide['mpp_y']:.4g}"
        working_mpp = "" if slide["working_mpp"] is None else f" at {slide['working_mpp']:.4g}"
        rows.append(
            [
                slide["file"],
                slide["vendor"],
                f"{slide['width']}x{slide['height']}",
                len(slide["levels"]),
                scale,
                f"{slide['tissue_fraction']:.0%}",
                f"{slide['working_width']}x{slide['working_height']}{working_mpp}",
            ]
        )
    print_table(["file", "vendor", "size (px)", "levels", "mpp", "tissue", "working size (px, mpp)"], rows)


COMMAND = Command(
    name="inspect",
    summary="Show how a slide would be read: size, scale, tissue.",
    arguments=InspectArguments,
    positionals=("slide",),
    run=run,
    example="wholeslide inspect slides/*.svs --overlay pictures/",
)
