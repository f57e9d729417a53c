"""The slides of a run, with what is known of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import pandas as pd

from wholeslide.cohort.files import SlideFolder, is_feature_file, slide_stem
from wholeslide.explain import explanations_of
from wholeslide.explain.slides import EXPLANATIONS
from wholeslide.slides.config import SlideConfig
from wholeslide.slides.opening import open_slide
from wholeslide.slides.readers import SlideReader, slide_error
from wholeslide.slides.scale import resolve_l0_mpp
from wholeslide.train.run import Run
from wholeslide.train.views import Entry, entries

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Shown:
    """One slide: ``prediction`` and ``probabilities``, by class, are there where the run was scored on it."""

    entry: Entry
    split: str
    prediction: str | None
    probabilities: dict[str, float] | None


class Gallery:
    """A run's slides, in the order of its cohort, each known by its place.

    Args:
        run_dir: the run.
        slides: the folder of its slides; left out: where they were in training.
        pixels: the folder of the slides that features were made of, where the run was trained on such.

    Raises:
        RunError: no such run, or one that has not been trained.
        CohortError: the folder has none of its slides.
    """

    def __init__(self, run_dir: Path, *, slides: Path | None = None, pixels: Path | None = None) -> None:
        run = Run.open(run_dir)
        self.run_dir, self.name, self.classes = run_dir, run_dir.resolve().name, run.classes
        self.method, self.stages = run.config.method, run.config.stages
        self.slides_dir, self.pixels_dir = slides, pixels
        self._slide_config: SlideConfig = run.slide_config
        self._pixels = None if pixels is None else SlideFolder(pixels)
        self._lock = Lock()
        self._explained: tuple[tuple[int | None, ...], dict[str, Path]] | None = None
        self.explained()  # a run without weights has nothing to show
        table = run.cohort(slides, keep_missing=True).table
        scored = _predictions(run_dir / "predictions", self.classes)
        self.shown: tuple[Shown, ...] = tuple(
            Shown(entry, split, *scored.get(entry.file, (None, None)))
            for entry, split in zip(entries(table), table["split"], strict=True)
        )

    def explained(self) -> dict[str, Path]:
        """Folders of explanations by the slides' file names, as they are now; read again where something has changed."""
        changed = tuple(_changed_ns(self.run_dir / name) for name in (EXPLANATIONS, "checkpoints"))
        with self._lock:
            if self._explained is None or self._explained[0] != changed:
                self._explained = changed, explanations_of(self.run_dir)
            return self._explained[1]

    def mpp_of(self, number: int, reader: SlideReader) -> tuple[float, float] | None:
        """Microns per level-0 pixel, x before y; ``None`` where nobody says.

        Raises:
            SlideError: the manifest's scale is none that a slide can have.
        """
        mpp = resolve_l0_mpp(reader, self._slide_config, self.shown[number].entry.mpp)
        return None if mpp is None else (mpp.x, mpp.y)

    def open(self, number: int) -> SlideReader:
        """The slide's file.

        Raises:
            SlideError: it is not there, or cannot be read.
        """
        path = self.shown[number].entry.path
        if is_feature_file(path):
            path = self._pixels_of(path)
        return open_slide(path, icc=self._slide_config.icc, decoders=self._slide_config.decoders)

    def _pixels_of(self, features: Path) -> Path:
        found = () if self._pixels is None else self._pixels.find(slide_stem(features.name))
        if len(found) == 1:
            return found[0]
        remedy = "start the viewer with --pixels and the folder with the one slide that they were made of"
        what = "several slides fit these features" if found else "no slide is known for these features"
        raise slide_error(what, features, remedy)


def _changed_ns(folder: Path) -> int | None:
    """When something was put into a folder or taken out of it."""
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return None


def _predictions(folder: Path, classes: tuple[str, ...]) -> dict[str, tuple[str, dict[str, float]]]:
    """What the run took each file for, with the probabilities."""
    found: dict[str, tuple[str, dict[str, float]]] = {}
    for path in (folder / f"{split}.csv" for split in SPLITS):
        if path.is_file():
            table = pd.read_csv(path, dtype={"file": str, "prediction": str}, keep_default_na=False)
            for row in table.to_dict("records"):
                probabilities = {name: float(row[f"prob_{name}"]) for name in classes}
                found[str(row["file"])] = (str(row["prediction"]), probabilities)
    return found
