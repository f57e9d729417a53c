"""Which file a slide is, so that another one that takes its place is not taken for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wholeslide.slides.readers import slide_error

_CHANGED_REMEDY = "begin again when nothing writes to it any more, with --resume where there is something to go on with"


@dataclass(frozen=True)
class SlideFile:
    """A file, or a folder of DICOM files, as it was when it was opened: what replaces it later is another one.

    ``content`` has the time of change in nanoseconds and the size in bytes of each file. ``fast`` is whether tiles are
    decoded directly.
    """

    path: Path
    content: tuple[tuple[int, int], ...]
    inodes: tuple[int, ...]
    fast: bool

    @classmethod
    def of(cls, path: Path, *, fast: bool) -> SlideFile:
        """What lies there now.

        Raises:
            OSError: there is nothing.
        """
        files = sorted(filter(_is_dicom, path.iterdir())) if path.is_dir() else [path]
        found = [file.stat() for file in files]
        content = tuple((file.st_mtime_ns, file.st_size) for file in found)
        return cls(path, content, tuple(file.st_ino for file in found), fast)

    def check(self) -> None:
        """See that it is the same still. Some network drives give a file another inode at any time: that alone is no change.

        Raises:
            SlideError: it is not.
        """
        try:
            same = SlideFile.of(self.path, fast=self.fast).content == self.content
        except OSError:
            same = False
        if not same:
            raise slide_error("the file was changed or removed while it was read", self.path, _CHANGED_REMEDY)


def _is_dicom(file: Path) -> bool:
    """Whether it begins as the files of a slide do; what else comes and goes in a folder does not change the slide."""
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(132).endswith(b"DICM")
