"""What the viewer answers: the page, the slides, their tiles, and the maps over them."""

from __future__ import annotations

import io
import secrets
from collections.abc import Callable, Collection
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from wholeslide.errors import WholeslideError
from wholeslide.explain import StoredExplanation
from wholeslide.explain.colours import COLOUR_MAPS
from wholeslide.explain.output import DESCRIPTION
from wholeslide.slides.readers import SlideReader
from wholeslide.viewer.explaining import Explaining
from wholeslide.viewer.gallery import Gallery
from wholeslide.viewer.guard import Guard
from wholeslide.viewer.pixels import SlidePixels
from wholeslide.viewer.pyramid import TILE_PX, Tile, TilePyramid

_STATIC = Path(__file__).with_name("static")
_JPEG_QUALITY = 90
_KEPT = {"Cache-Control": "private, max-age=3600"}
_FRESH = {"Cache-Control": "no-store"}
_KEPT_EXPLANATIONS = 3


class _IndexConvertor(Convertor[int]):
    """Whole numbers that no slide needs more digits for."""

    regex = "[0-9]{1,9}"

    def convert(self, value: str) -> int:
        return int(value)

    def to_string(self, value: int) -> str:
        return str(value)


register_url_convertor("index", _IndexConvertor())


def make_app(gallery: Gallery, *, hosts: Collection[str] | None, token: str | None = None) -> Starlette:
    """The viewer of a gallery, as an ASGI application.

    Args:
        gallery: what is shown, and nothing else is served.
        hosts: names and addresses that it answers under; ``None``: any.
        token: what must be known to be answered; ``None``: nothing.
    """
    viewer = _Viewer(gallery)
    routes = [
        Route("/", viewer.page),
        Mount("/static", StaticFiles(directory=_STATIC)),
        Route("/api/run", viewer.run),
        Route("/api/slides/{number:index}", viewer.slide),
        Route("/api/slides/{number:index}/explanation", viewer.explanation, methods=["GET", "POST"]),
        Route("/api/slides/{number:index}/tiles/{level:index}/{column:index}/{row:index}.jpg", viewer.tile),
        Route(
            "/api/slides/{number:index}/maps/{map:index}/{level:index}/{column:index}/{row:index}.png", viewer.map_tile
        ),
        Route("/api/slides/{number:index}/thumbnail.jpg", viewer.thumbnail),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, hosts=hosts, token=token)],
        exception_handlers={WholeslideError: _told, HTTPException: _refused},
    )


async def _told(request: Request, error: Exception) -> Response:
    """What the user can mend, in the words of the command line."""
    return JSONResponse({"problem": str(error)}, 422, _FRESH)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"problem": error.detail}, error.status_code, _FRESH)


class _Viewer:
    """The answers; what takes time is done in threads."""

    def __init__(self, gallery: Gallery) -> None:
        self._gallery = gallery
        self._pixels = SlidePixels(gallery.open)
        self._explaining = Explaining(gallery)
        self._version = secrets.token_hex(4)  # in addresses, so that no browser takes another run's pictures for these
        self._stored = lru_cache(maxsize=_KEPT_EXPLANATIONS)(_read_stored)

    async def page(self, request: Request) -> Response:
        return FileResponse(_STATIC / "index.html", headers=_FRESH)

    async def run(self, request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(self._described_run), headers=_FRESH)

    async def slide(self, request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(self._described, self._number(request)), headers=_FRESH)

    async def explanation(self, request: Request) -> Response:
        number = self._number(request)
        work: Callable[[str], Any] = self._explaining.ask if request.method == "POST" else self._explaining.progress
        await run_in_threadpool(work, self._gallery.shown[number].entry.file)
        return JSONResponse(await run_in_threadpool(self._described_explanation, number), headers=_FRESH)

    async def tile(self, request: Request) -> Response:
        return await run_in_threadpool(self._tile, self._number(request), _tile_of(request))

    async def thumbnail(self, request: Request) -> Response:
        number = self._number(request)
        pyramid = await run_in_threadpool(self._pyramid, number)
        return await run_in_threadpool(self._tile, number, Tile(pyramid.coarsest, 0, 0))

    async def map_tile(self, request: Request) -> Response:
        parameters = request.path_params
        return await run_in_threadpool(self._map_tile, self._number(request), parameters["map"], _tile_of(request))

    def _number(self, request: Request) -> int:
        number: int = request.path_params["number"]
        if number >= len(self._gallery.shown):
            raise HTTPException(404, f"the run has {len(self._gallery.shown)} slides")
        return number

    def _described_run(self) -> dict[str, Any]:
        gallery, explained = self._gallery, self._gallery.explained()
        slides = [
            {
                "number": number,
                "file": shown.entry.file,
                "patient": shown.entry.patient,
                "label": shown.entry.label,
                "split": shown.split,
                "prediction": shown.prediction,
                "probabilities": shown.probabilities,
                "explained": shown.entry.file in explained,
            }
            for number, shown in enumerate(gallery.shown)
        ]
        ramps = {
            kind: [[round(255 * part) for part in matplotlib.colormaps[name](at)[:3]] for at in np.linspace(0, 1, 33)]
            for kind, name in COLOUR_MAPS.items()
        }
        facts = {"name": gallery.name, "method": gallery.method, "classes": list(gallery.classes)}
        return {**facts, "version": self._version, "colours": ramps, "slides": slides}

    def _described(self, number: int) -> dict[str, Any]:
        def facts(reader: SlideReader) -> dict[str, Any]:
            pyramid = TilePyramid(reader.l0_size)
            return {
                "width": reader.l0_size.width,
                "height": reader.l0_size.height,
                "mpp": self._gallery.mpp_of(number, reader),
                "format": reader.vendor,
                "tile_px": TILE_PX,
                "coarsest": pyramid.coarsest,
                "finest": pyramid.finest,
            }

        return {**self._pixels.ask(number, facts), "explanation": self._described_explanation(number)}

    def _described_explanation(self, number: int) -> dict[str, Any]:
        file = self._gallery.shown[number].entry.file
        progress = self._explaining.progress(file)
        said: dict[str, Any] = {"state": progress.state, "problem": progress.problem}
        if progress.state != "there":
            return said
        stored = self._explanation_of(number)
        maps = [
            {
                "kind": shown.heat.kind,
                "stage": shown.heat.stage,
                "class": shown.heat.label,
                "title": shown.heat.title,
                "low": shown.scale.low,
                "high": shown.scale.high,
            }
            for shown in stored.maps
        ]
        version = f"{self._version}-{_changed_ns(self._gallery.explained()[file])}"
        answer = {"prediction": stored.prediction, "probabilities": stored.probabilities, "version": version}
        return {**said, **answer, "maps": maps, "main": stored.main}

    def _explanation_of(self, number: int) -> StoredExplanation:
        folder = self._gallery.explained().get(self._gallery.shown[number].entry.file)
        if folder is None:
            raise HTTPException(404, "the slide is not explained yet")
        return self._stored(folder, _changed_ns(folder))

    def _pyramid(self, number: int) -> TilePyramid:
        return TilePyramid(self._pixels.ask(number, lambda reader: reader.l0_size))

    def _tile(self, number: int, tile: Tile) -> Response:
        if self._pyramid(number).box(tile) is None:
            raise HTTPException(404, "the slide has no such tile")
        return _image(Image.fromarray(self._pixels.tile(number, tile)), "JPEG", quality=_JPEG_QUALITY)

    def _map_tile(self, number: int, map_number: int, tile: Tile) -> Response:
        pyramid = self._pyramid(number)
        box = pyramid.box(tile)
        stored = self._explanation_of(number)
        if box is None or map_number >= len(stored.maps):
            raise HTTPException(404, "the slide has no such map or tile")
        l0_px = pyramid.l0_px(tile.level)
        columns = np.arange(box.left, box.right, dtype=np.float64)
        rows = np.arange(box.top, box.bottom, dtype=np.float64)
        colours = stored.colours(map_number, (columns + 0.5) * l0_px, (rows + 0.5) * l0_px)
        return _image(Image.fromarray(colours), "PNG", compress_level=1)


def _changed_ns(folder: Path) -> int:
    """When an explanation was made."""
    return (folder / DESCRIPTION).stat().st_mtime_ns


def _read_stored(folder: Path, changed_ns: int) -> StoredExplanation:
    """A folder that was made anew is read anew."""
    del changed_ns
    return StoredExplanation.read(folder)


def _tile_of(request: Request) -> Tile:
    found = request.path_params
    return Tile(found["level"], found["column"], found["row"])


def _image(image: Image.Image, kind: str, **options: Any) -> Response:
    written = io.BytesIO()
    image.save(written, kind, **options)
    return Response(written.getvalue(), media_type=f"image/{kind.lower()}", headers=_KEPT)
