"""Small pictures of slides with what the run looked at, as data to be put into a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from wholeslide.explain.output import read_description

_SIDE_PX = 320
_JPEG_QUALITY = 80


@dataclass(frozen=True)
class Picture:
    """A slide's thumbnail and the same under its main map, as ``data:`` addresses; ``title`` says which map."""

    thumbnail: str
    overlay: str
    title: str


def picture_of(folder: Path) -> Picture | None:
    """From the folder of a slide's explanation; ``None`` where it is damaged."""
    facts = read_description(folder)
    try:
        if facts is None:
            return None
        main = next(entry for entry in facts["maps"] if entry["title"] == facts["main"])
        return Picture(_data(folder / "thumbnail.png"), _data(folder / main["picture"]), _described(main))
    except (OSError, KeyError, StopIteration):
        return None


def _described(entry: Mapping[str, str]) -> str:
    return f"{entry['title']}, up to {float(entry['high']):.2g}"


def _data(path: Path) -> str:
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((_SIDE_PX, _SIDE_PX))
    written = io.BytesIO()
    small.save(written, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(written.getvalue()).decode("ascii")
