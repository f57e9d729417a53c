"""What a worker process runs; see :mod:`wholeslide.slides.workers`."""

from __future__ import annotations

import signal
from collections import OrderedDict
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from wholeslide.errors import Problem, SlideError
from wholeslide.slides.opening import open_here
from wholeslide.slides.readers import CONVERT_REMEDY, Rgb, SlideReader
from wholeslide.slides.slide_file import SlideFile
from wholeslide.slides.workers import Failure

#: Slides that a worker keeps open.
_OPEN_SLIDES = 2


def serve(handle: int) -> None:
    """Open and read slides for the process at the other end of the socket ``handle``, until it ends."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches all processes of a terminal; this one ends with the other
    connection = Connection(handle)
    connection.send(None)  # it is there
    Serving(open_here).run(connection)


class Serving:
    """Opens slides as they are asked for."""

    def __init__(self, open_slide: Any) -> None:
        self._open_slide = open_slide
        self._readers: OrderedDict[SlideFile, SlideReader] = OrderedDict()

    def run(self, connection: Connection) -> None:
        """Answer until the other side ends."""
        with suppress(EOFError, OSError):
            while True:
                opened, slide, method, arguments = connection.recv()
                for other in self._readers.keys() - opened:
                    self._readers.pop(other).close()
                connection.send(None if slide is None else self._answer(slide, method, arguments))

    def _answer(self, slide: SlideFile, method: str, arguments: tuple[Any, ...]) -> Any:
        try:
            return getattr(self, method)(self._reader(slide), *arguments)
        except SlideError as error:
            return Failure(error.problems)
        except Exception as error:
            return Failure((Problem(f"cannot be read: {error!r}", str(slide.path), CONVERT_REMEDY),))

    def describe(self, reader: SlideReader) -> dict[str, Any]:
        """The attributes of the reader, by name."""
        names = ("vendor", "levels", "l0_mpp", "l0_bounds", "is_plain_image", "description", "icc_profile")
        return {name: getattr(reader, name) for name in names}

    def reduction_for(self, reader: SlideReader, level: int, ratio_x: float, ratio_y: float) -> int:
        """As the reader tells."""
        return reader.reduction_for(level, ratio_x, ratio_y)

    def read_level(self, reader: SlideReader, level: int, box: Any, background_rgb: Rgb, reduction: int) -> Any:
        """Pixels, and whether any so far was transparent."""
        pixels = reader.read_level(level, box, background_rgb, reduction=reduction)
        return pixels, reader.met_transparency

    def _reader(self, slide: SlideFile) -> SlideReader:
        if slide not in self._readers:
            while len(self._readers) >= _OPEN_SLIDES:
                self._readers.popitem(last=False)[1].close()
            self._readers[slide] = self._opened_anew(slide)
        self._readers.move_to_end(slide)
        return self._readers[slide]

    def _opened_anew(self, slide: SlideFile) -> SlideReader:
        """A reader of the file that was opened first, which other workers may still read.

        Raises:
            SlideError: it cannot be opened, or is another one by now.
        """
        slide.check()
        reader: SlideReader = self._open_slide(slide.path, fast=slide.fast)
        try:
            slide.check()
        except BaseException:
            reader.close()
            raise
        return reader
