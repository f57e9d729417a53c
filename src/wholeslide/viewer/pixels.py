"""Tiles of a gallery's slides, with a few files kept open and the last tiles kept decoded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from threading import Lock
from typing import TypeVar

from wholeslide.slides.readers import Pixels, ReaderClosedError, SlideReader
from wholeslide.viewer.pyramid import Tile, read_tile

_OPEN_SLIDES = 8
_KEPT_TILES = 1024
"""Of 192 KiB each."""

Found = TypeVar("Found")


class SlidePixels:
    """Thread-safe.

    Args:
        open_slide: opens a slide by its number.
    """

    def __init__(self, open_slide: Callable[[int], SlideReader]) -> None:
        self._open_slide = open_slide
        self._readers: OrderedDict[int, SlideReader] = OrderedDict()
        self._lock = Lock()
        self._kept_tile = lru_cache(maxsize=_KEPT_TILES)(self._read_tile)

    def tile(self, number: int, tile: Tile) -> Pixels:
        """A tile that the slide has, uint8 of shape (height, width, 3).

        Raises:
            SlideError: the file cannot be read.
        """
        return self._kept_tile(number, tile)

    def ask(self, number: int, question: Callable[[SlideReader], Found]) -> Found:
        """What ``question`` finds in an open slide; it may be asked again, where another slide took this one's place.

        Raises:
            SlideError: the file cannot be read.
        """
        while True:
            try:
                return question(self._reader(number))
            except ReaderClosedError:
                continue

    def close(self) -> None:
        """Close all slides."""
        with self._lock:
            readers, self._readers = list(self._readers.values()), OrderedDict()
        for reader in readers:
            reader.close()

    def _read_tile(self, number: int, tile: Tile) -> Pixels:
        return self.ask(number, lambda reader: read_tile(reader, tile, lambda finer: self.tile(number, finer)))

    def _reader(self, number: int) -> SlideReader:
        with self._lock:
            if number in self._readers:
                self._readers.move_to_end(number)
                return self._readers[number]
        opened, behind = self._open_slide(number), []
        with self._lock:
            if number in self._readers:  # another thread was quicker
                behind.append(opened)
            else:
                self._readers[number] = opened
            self._readers.move_to_end(number)
            while len(self._readers) > _OPEN_SLIDES:
                behind.append(self._readers.popitem(last=False)[1])
            reader = self._readers[number]
        for other in behind:
            other.close()
        return reader
