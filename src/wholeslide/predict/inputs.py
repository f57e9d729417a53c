"""What a user names for prediction: slides, folders of slides, manifests."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from wholeslide.cohort.manifest import COLUMNS, cohort_from_files, read_cohort
from wholeslide.errors import CohortError, Problem, SlideError

MANIFEST_SUFFIXES = (".csv", ".tsv", ".txt")


@dataclass(frozen=True)
class Inputs:
    """``table`` has a row a slide and the columns of a cohort; ``missing`` what was named but is not there."""

    table: pd.DataFrame
    missing: tuple[tuple[str, SlideError], ...]

    @property
    def all(self) -> pd.DataFrame:
        """What is missing, then ``table``; what is missing has a path and a name alone."""
        missing = [{"file": name, "path": name, "slide": "", "patient": ""} for name, _ in self.missing]
        return pd.DataFrame([*missing, *self.table.to_dict("records")], columns=list(COLUMNS), dtype=object)


def find_inputs(paths: Sequence[Path], *, slides: Path | None = None) -> Inputs:
    """The slides to predict, each once; where two manifests give two slides one name, they are named by their paths.

    Args:
        paths: Slides, folders that are searched for slides, and manifests (CSV; labels are not needed).
        slides: Folder of the slides that manifests name; left out: the folder of each manifest.

    Raises:
        CohortError: everything that is wrong with the manifests; nothing to predict.
    """
    manifests = [path for path in paths if path.suffix.lower() in MANIFEST_SUFFIXES and path.is_file()]
    others = [path for path in paths if path not in manifests]
    missing = [(str(path), _missing(path)) for path in dict.fromkeys(others) if not path.exists()]
    present = [path for path in others if path.exists()]
    tables: list[pd.DataFrame] = []
    problems: list[Problem] = []
    if present or not paths:
        try:
            tables.append(cohort_from_files(present).table)
        except CohortError as error:
            problems += error.problems
    for manifest in manifests:
        try:
            tables.append(read_cohort(manifest, slides or manifest.parent, labelled=False).table)
        except CohortError as error:
            problems += error.problems
    if problems:
        raise CohortError(problems)
    if not tables:
        return Inputs(pd.DataFrame(columns=list(COLUMNS)), tuple(missing))
    table = pd.concat([part.loc[:, list(COLUMNS)] for part in tables], ignore_index=True)
    repeated = table["path"].map(lambda path: Path(path).resolve()).duplicated()
    table = table[~repeated].reset_index(drop=True)
    same_name = table["file"].duplicated(keep=False)
    return Inputs(table.assign(file=table["file"].where(~same_name, table["path"])), tuple(missing))


def shares(sizes_bytes: Sequence[int], count: int) -> list[list[int]]:
    """Positions of slides, dealt to ``count`` processes: the largest first, each to whoever has the least so far.

    No share takes more than 4/3 of what the best dealing would (Graham, 1969). Each keeps the slides' order.
    """
    found: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, 0, rank) for rank in range(count)]  # bytes, slides, rank: equal bytes go to who has fewer slides
    for position in sorted(range(len(sizes_bytes)), key=lambda position: -sizes_bytes[position]):
        load_bytes, slides, rank = heapq.heappop(loads)
        found[rank].append(position)
        heapq.heappush(loads, (load_bytes + sizes_bytes[position], slides + 1, rank))
    return [sorted(share) for share in found]


def file_bytes(path: Path) -> int:
    """Size of a slide's file; 0 where it cannot be told.

    Glass compresses well, so that bytes follow the tissue, which takes the time; opening every slide would tell more,
    and take minutes where there are thousands.
    """
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _missing(path: Path) -> SlideError:
    return SlideError([Problem("no such slide or folder", str(path), "check the path")])
