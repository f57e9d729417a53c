"""From slides to files of patch features, one a slide; what is there and would be made alike is not made again."""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from wholeslide import __version__
from wholeslide.baselines.bag import Bag, Fact
from wholeslide.baselines.config import Layout
from wholeslide.baselines.encoder import PatchEncoder
from wholeslide.baselines.feature_files import read_made_with, write_bag, write_tensor
from wholeslide.baselines.patches import LEAST_TISSUE, read_batches, tissue_patches
from wholeslide.cohort.files import slide_stem
from wholeslide.errors import CohortError, FeatureError, Problem, RunError, SlideError
from wholeslide.slides.config import SlideConfig
from wholeslide.slides.content import slide_key
from wholeslide.slides.files import part_name
from wholeslide.slides.lock import alone_in
from wholeslide.slides.notices import say_once
from wholeslide.slides.readers import unreadable
from wholeslide.slides.working import WorkingSlide, open_working_slide

logger = logging.getLogger(__name__)

BATCH = 64
FORMAT_VERSION = 1
"""Raised where the same slide and options give other features."""

_SAMPLED_SLIDES = 8
_FILE_BYTES = 8192
_CLAM_FOLDERS = ("h5_files", "pt_files")
_SAYS_NOTHING = ("weights", "wholeslide_version")
"""Attributes in which files made alike may differ."""

Row = tuple[Path, float | None]
"""A slide's file, and its microns per stored pixel where the manifest gives them."""


@dataclass(frozen=True)
class Extracted:
    """A slide's file of features: where it lies, its number of patches, and whether it was there before."""

    slide: Path
    file: Path
    patches: int
    was_there: bool


@dataclass(frozen=True)
class Extraction:
    """The slides whose features are there, and the problems of each that cannot be read, both in order."""

    done: tuple[Extracted, ...]
    failed: Mapping[Path, tuple[Problem, ...]]


@dataclass(frozen=True)
class ExtractionEstimate:
    """About what slides will take: ``size_bytes`` on disk, and ``seconds`` of computing, reading not counted."""

    patches: int
    size_bytes: int
    seconds: float


def bag_of(
    slide: WorkingSlide, encoder: PatchEncoder, *, least_tissue: float = LEAST_TISSUE, batch: int = BATCH
) -> Bag:
    """The features of a slide's patches of tissue; those that :func:`extract_features` writes, bit by bit on a CPU.

    Args:
        slide: open, at the resolution of the patches.
        encoder: from :func:`~wholeslide.baselines.encoder.build_encoder`.
        least_tissue: the part of a patch that has to be tissue.
        batch: patches that are computed at a time.

    Raises:
        SlideError: the file cannot be decoded.
        FeatureError: the encoder gives what are no finite numbers.
    """
    return _bag_of(slide, encoder, encoding_of(encoder, least_tissue), least_tissue, batch)


def extract_features(
    rows: Iterable[Row],
    out: Path,
    encoder: PatchEncoder,
    slide_config: SlideConfig,
    *,
    least_tissue: float = LEAST_TISSUE,
    layout: Layout = "trident",
    on_slide: Callable[[Path], None] | None = None,
) -> Extraction:
    """Write a file of features for each slide. What is there is kept, so an interrupted run goes on where it stopped.

    Args:
        rows: the slides.
        out: the folder, made where it is missing.
        encoder: from :func:`~wholeslide.baselines.encoder.build_encoder`.
        slide_config: the resolution of the patches and how tissue is found.
        least_tissue: the part of a patch that has to be tissue.
        layout: TRIDENT's, ``<slide>.h5``, or CLAM's, ``h5_files/<slide>.h5`` and ``pt_files/<slide>.pt``.
        on_slide: told of every slide that is done with, read or not.

    Raises:
        CohortError: slides whose files would have one name.
        RunError: the folder holds files of features made otherwise; the disk is full, the folder cannot be written, or another
            process writes into it.
    """
    folder = FeatureFolder(out, encoder, slide_config, least_tissue=least_tissue, layout=layout)
    return folder.extract(list(rows), on_slide)


class FeatureFolder:
    """A folder with features of slides, all made alike. See :func:`extract_features` for the arguments."""

    def __init__(
        self,
        path: Path,
        encoder: PatchEncoder,
        slide_config: SlideConfig,
        *,
        least_tissue: float = LEAST_TISSUE,
        layout: Layout = "trident",
    ) -> None:
        self.path = path
        self._encoder, self._slide_config, self._layout = encoder, slide_config, layout
        self._least_tissue = least_tissue
        self._encoding = encoding_of(encoder, least_tissue)
        self._options = {**self._encoding, **_reading(slide_config)}

    def pending(self, rows: Sequence[Row]) -> list[Row]:
        """The slides whose features are not there yet, each once.

        Raises:
            CohortError: slides whose files would have one name.
            RunError: the folder holds files of features made otherwise, all of them named together.
        """
        rows = list(dict.fromkeys(rows))
        self._refuse_same_names(rows)
        problems: list[Problem] = []
        pending: list[Row] = []
        for row in rows:
            try:
                if self._held(row) is None:
                    pending.append(row)
            except SlideError:  # reported when it is its turn, together with all others
                pending.append(row)
            except RunError as error:
                problems += error.problems
        if problems:
            raise RunError(problems)
        return pending

    def estimate(self, rows: Sequence[Row]) -> ExtractionEstimate:
        """From the patches of a sample of the slides; those that cannot be opened are passed over."""
        counts = []
        for path, mpp in rows[:: max(1, len(rows) // _SAMPLED_SLIDES)]:
            try:
                with closing(open_working_slide(path, self._slide_config, mpp=mpp)) as slide:
                    counts.append(len(tissue_patches(slide, self._encoder.patch_px, least_tissue=self._least_tissue)))
            except (SlideError, OSError):  # reported when it is its turn, together with all others
                continue
        patches = round(len(rows) * sum(counts) / len(counts)) if counts else 0
        side_px = self._encoder.patch_px
        width = self._encoder.encode(np.zeros((1, side_px, side_px, 3), np.uint8)).shape[1]
        files = 2 if self._layout == "clam" else 1
        size_bytes = patches * (4 * width * files + 16) + _FILE_BYTES * len(rows)
        return ExtractionEstimate(patches, size_bytes, patches * self._encoder.seconds_a_patch())

    def extract(self, rows: Sequence[Row], on_slide: Callable[[Path], None] | None = None) -> Extraction:
        """See :func:`extract_features`."""
        done: list[Extracted] = []
        failed: dict[Path, tuple[Problem, ...]] = {}
        with alone_in(self.path):
            self._remove_leftovers()
            self.pending(rows)  # what stands in the way is told before anything is computed
            for row in dict.fromkeys(rows):
                try:
                    done.append(self._held(row) or self._make(row))
                except (SlideError, FeatureError) as error:
                    failed[row[0]] = error.problems
                if on_slide is not None:
                    on_slide(row[0])
        return Extraction(tuple(done), failed)

    def _held(self, row: Row) -> Extracted | None:
        """What is there of a slide, if it would be made alike.

        Raises:
            SlideError: the slide's content cannot be read.
            RunError: what is there was made otherwise.
        """
        (path, mpp), (file, *others) = row, self._files_of(row[0])
        if not file.exists():
            return None
        try:
            made_with, patches = read_made_with(file)
        except FeatureError as error:
            say_once(logger, logging.WARNING, file, "%s; it is made again", error.problems[0].what)
            return None
        self._refuse_otherwise(file, made_with)
        same = made_with.get("key") == bag_key(self._encoding, slide_key(path, self._slide_config, mpp))
        return Extracted(path, file, patches, was_there=True) if same and all(map(Path.exists, others)) else None

    def _make(self, row: Row) -> Extracted:
        """Encode a slide and write its files.

        Raises:
            SlideError: it cannot be read.
            RunError: its files cannot be written.
        """
        path, mpp = row
        try:
            with closing(open_working_slide(path, self._slide_config, mpp=mpp)) as slide:
                bag = _bag_of(slide, self._encoder, self._encoding, self._least_tissue, BATCH)
        except OSError as error:
            raise unreadable(path, error) from error
        file, *tensors = self._files_of(path)
        for tensor in tensors:
            write_tensor(bag, tensor)
        write_bag(
            replace(bag, made_with={**self._options, **bag.made_with}), file
        )  # last: with it the slide counts as done
        return Extracted(path, file, len(bag), was_there=False)

    def _files_of(self, slide: Path) -> list[Path]:
        """The HDF5 file, and what the layout has beside it."""
        name = slide_stem(slide.name)
        if self._layout == "trident":
            return [self.path / f"{name}.h5"]
        return [self.path / "h5_files" / f"{name}.h5", self.path / "pt_files" / f"{name}.pt"]

    def _refuse_same_names(self, rows: Sequence[Row]) -> None:
        slides = defaultdict(list)
        for path, _ in rows:
            slides[self._files_of(path)[0]].append(str(path))
        remedy = "rename one of them, or extract them into two folders"
        problems = [
            Problem(f"{len(paths)} slides whose features would be one file, {file.name}", ", ".join(paths), remedy)
            for file, paths in slides.items()
            if len(paths) > 1
        ]
        if problems:
            raise CohortError(problems)

    def _refuse_otherwise(self, file: Path, made_with: Mapping[str, Fact]) -> None:
        differing = [name for name, value in self._options.items() if made_with.get(name) != value]
        differing = [name for name in differing if name not in _SAYS_NOTHING]
        remedy = "give another --out, or remove it"
        if "wholeslide_features" not in made_with:
            raise RunError.single("features that this program did not write", where=str(file), remedy=remedy)
        if differing:
            told = [
                "other weights"
                if name == "weights_hash"
                else f"{name} {made_with.get(name)}, not {self._options[name]}"
                for name in differing
            ]
            raise RunError.single(f"features made with {'; '.join(told)}", where=str(file), remedy=remedy)

    def _remove_leftovers(self) -> None:
        """Remove what a killed process had begun; no other process is at work in the folder."""
        for folder in (self.path, *(self.path / name for name in _CLAM_FOLDERS)):
            for beside in [*folder.glob(part_name("*.h5")), *folder.glob(part_name("*.pt"))]:
                beside.unlink()


def _bag_of(
    slide: WorkingSlide, encoder: PatchEncoder, encoding: Mapping[str, Fact], least_tissue: float, batch: int
) -> Bag:
    whole_boxes = tissue_patches(slide, encoder.patch_px, least_tissue=least_tissue)
    with closing(read_batches(slide, whole_boxes, batch)) as batches:
        features_nd = np.concatenate([encoder.encode(patches_bhwc) for patches_bhwc in batches])
    whole_n2 = np.array([(box.left, box.top) for box in whole_boxes], np.float64)
    downsample = (slide.sampling.downsample_x + slide.sampling.downsample_y) / 2
    mpp = None if slide.working_mpp is None else slide.working_mpp.mean
    made_with = {
        **encoding,
        "key": bag_key(encoding, slide.key),
        "slide": slide.path.name,
        "slide_key": slide.key,
        "l0_patch_px": encoder.patch_px * downsample,
        **({} if mpp is None else {"mpp": mpp}),
    }
    try:
        return Bag(
            features_nd,
            np.rint(slide.l0_from_whole(whole_n2)).astype(np.int64),
            l0_patch_px=encoder.patch_px * downsample,
            patch_px=encoder.patch_px,
            mpp=mpp,
            made_with=made_with,
        )
    except FeatureError as error:
        raise FeatureError(replace(problem, where=str(slide.path)) for problem in error.problems) from error


def encoding_of(encoder: PatchEncoder, least_tissue: float) -> dict[str, Fact]:
    """All that features depend on beside the slide."""
    versions: dict[str, Fact] = {"wholeslide_features": FORMAT_VERSION, "wholeslide_version": __version__}
    return {**versions, **encoder.facts(), "least_tissue": least_tissue}


def _reading(config: SlideConfig) -> dict[str, Fact]:
    """How slides are read, as far as it is the same for all; a slide's own key has the rest."""
    return {
        "target_mpp": config.target_mpp or "native",
        "target_downsample": config.target_downsample,
        "background": config.background,
        "mpp_override": config.mpp_override or "none",
        "icc": "on" if config.icc else "off",
        "masks": "found" if config.mask_dir is None else "drawn",
    }


def bag_key(encoding: Mapping[str, Fact], slide_key: str) -> str:
    """Of features: a hash of everything that decides them."""
    decides = sorted((name, value) for name, value in encoding.items() if name not in _SAYS_NOTHING)
    return hashlib.blake2b(repr((decides, slide_key)).encode(), digest_size=16).hexdigest()
