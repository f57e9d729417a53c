"""Bags of slides as they are asked for, in files that are named by all that decides them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing
from functools import cached_property
from pathlib import Path

from wholeslide.baselines.bag import Bag, Fact
from wholeslide.baselines.encoder import PatchEncoder
from wholeslide.baselines.extraction import bag_key, bag_of, encoding_of
from wholeslide.baselines.feature_files import read_bag, write_bag
from wholeslide.errors import FeatureError
from wholeslide.slides.notices import say_once
from wholeslide.slides.working import WorkingSlide

logger = logging.getLogger(__name__)


class BagCache:
    """Encodes slides, each once, however many processes and runs share the folder.

    Args:
        encoder: from :func:`~wholeslide.baselines.encoder.build_encoder`; its weights do not change after the first slide.
        least_tissue: the part of a patch that has to be tissue.
        folder: where files are kept; ``None`` keeps none.
    """

    def __init__(self, encoder: PatchEncoder, *, least_tissue: float, folder: Path | None) -> None:
        self._encoder, self._least_tissue, self._folder = encoder, least_tissue, folder
        self._files: dict[Path, Path] = {}

    @cached_property
    def _encoding(self) -> dict[str, Fact]:
        return encoding_of(self._encoder, self._least_tissue)

    def holds(self, path: Path) -> bool:
        """Whether a slide's features are kept already, so that it need not be opened."""
        return path in self._files

    def bag(self, path: Path, open_slide: Callable[[], WorkingSlide]) -> Bag:
        """The features of a slide's patches of tissue.

        Args:
            path: the slide's.
            open_slide: opens it, at the resolution of the patches; called where that is needed.

        Raises:
            SlideError: it cannot be read.
            FeatureError: the encoder gives what are no finite numbers.
            RunError: the folder cannot be written.
        """
        if path not in self._files:
            return self._first(path, open_slide)
        return read_bag(self._files[path])

    def _first(self, path: Path, open_slide: Callable[[], WorkingSlide]) -> Bag:
        with closing(open_slide()) as slide:
            if self._folder is None:
                return bag_of(slide, self._encoder, least_tissue=self._least_tissue)
            file = self._folder / f"{bag_key(self._encoding, slide.key)}.h5"
            bag = _held(file)
            if bag is None:
                bag = bag_of(slide, self._encoder, least_tissue=self._least_tissue)
                self._folder.mkdir(parents=True, exist_ok=True)
                write_bag(bag, file)
        self._files[path] = file
        return bag


def _held(file: Path) -> Bag | None:
    if not file.exists():
        return None
    try:
        return read_bag(file)
    except FeatureError as error:
        say_once(logger, logging.WARNING, file, "%s; it is made again", error.problems[0].what)
        return None
