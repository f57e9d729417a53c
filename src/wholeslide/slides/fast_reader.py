"""Reads compressed tiles directly, reduced while they are decoded, where the file's layout is understood."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, InvalidStateError, wait
from contextlib import suppress
from threading import Lock
from typing import NamedTuple

import numpy as np

from wholeslide.errors import SlideError
from wholeslide.geometry import Box
from wholeslide.slides.decoders import decoding_threads
from wholeslide.slides.readers import WHITE, Pixels, Rgb, SlideReader
from wholeslide.slides.stored_tiles import REDUCTIONS, StoredTiles, mean_of_blocks

logger = logging.getLogger(__name__)

#: Decoded tiles that are kept for the next box, which shares some with this one.
CACHE_BYTES = 64 * 2**20
#: Handing one tile to a thread takes a tenth of the time of decoding it.
_TILES_OF_A_TASK = 8
#: Mean difference, of 255, between two decoders' pixels of one tile; a wrong colour space or place makes ten times as much.
_SAME_PIXELS = 2.0
#: The same between a tile that was reduced while it was decoded and the mean of its pixels; sharp edges in strong colours make 6.
_SAME_MEANS = 12.0


class _Key(NamedTuple):
    level: int
    reduction: int
    number: int


class FastReader(SlideReader):
    """A slide that another reader opened, with the levels whose tiles can be decoded directly.

    A level is read directly only if a tile of it decodes to the pixels that ``plain`` gives there; else ``plain`` reads it. Memory
    is bounded: :data:`CACHE_BYTES` of tiles stay.

    Args:
        plain: the slow reader of the same file, which this one closes.
        found: what seems to be stored; levels are matched by their size.
    """

    def __init__(self, plain: SlideReader, found: Sequence[StoredTiles]) -> None:
        super().__init__(plain.path)
        self.plain = plain
        self.vendor, self.levels, self.l0_mpp = plain.vendor, plain.levels, plain.l0_mpp
        self.l0_bounds, self.is_plain_image, self.description = plain.l0_bounds, plain.is_plain_image, plain.description
        self.icc_profile = plain.icc_profile
        by_size = {tiles.size: tiles for tiles in reversed(found) if tiles.are_complete}
        self._claimed = {i: by_size[level.size] for i, level in enumerate(self.levels) if level.size in by_size}
        self._confirmed: dict[int, tuple[int, ...]] = {}
        self._confirming = Lock()
        self._tiles: OrderedDict[_Key, Future[Pixels]] = OrderedDict()
        self._held_bytes = 0
        self._cache = Lock()

    def reductions(self, level: int) -> tuple[int, ...]:
        """By how much the tiles of a level are known to decode right, largest first; empty where ``plain`` reads it."""
        if level not in self._claimed:
            return ()
        with self._confirming:
            if level not in self._confirmed:
                self._confirmed[level] = self._confirm(level)
            return self._confirmed[level]

    def reduction_for(self, level: int, ratio_x: float, ratio_y: float) -> int:
        stored = self._claimed.get(level)
        if stored is None:
            return 1
        fitting = [r for r in self.reductions(level) if all(_serves(q / r, stored) for q in (ratio_x, ratio_y))]
        return max(fitting, default=1)

    def _read_inside(self, level: int, level_box: Box, background_rgb: Rgb) -> Pixels:
        if self.reductions(level):
            return self._read_reduced(level, 1, level_box)
        pixels = self.plain.read_level(level, level_box, background_rgb)
        self.met_transparency |= self.plain.met_transparency
        return pixels

    def _read_reduced(self, level: int, reduction: int, reduced_box: Box) -> Pixels:
        stored = self._claimed[level]
        width, height = stored.tile.width // reduction, stored.tile.height // reduction
        rows = range(reduced_box.top // height, -(-reduced_box.bottom // height))
        columns = range(reduced_box.left // width, -(-reduced_box.right // width))
        keys = [_Key(level, reduction, row * stored.columns + column) for row in rows for column in columns]
        out = np.empty((reduced_box.height, reduced_box.width, 3), np.uint8)
        decoded = self._futures(keys)
        try:
            wait(decoded.values())  # once: to be woken for each tile costs the decoders time
            for key, future in decoded.items():
                row, column = divmod(key.number, stored.columns)
                tile_box = Box(column * width, row * height, width, height)
                part = tile_box.intersection(reduced_box)
                out[part.relative_to(reduced_box).rows_columns] = future.result()[
                    part.relative_to(tile_box).rows_columns
                ]
        finally:
            wait(decoded.values())  # the file must not be closed under a decoder
            self._forget_failures(decoded)
        return out

    def _futures(self, keys: Sequence[_Key]) -> dict[_Key, Future[Pixels]]:
        """Tiles that are there or under way, each decoded once for all who ask for it at one time."""
        found: dict[_Key, Future[Pixels]] = {}
        missing: list[_Key] = []
        with self._cache:
            for key in keys:
                if key in self._tiles:
                    self._tiles.move_to_end(key)
                else:
                    self._tiles[key] = Future()
                    self._held_bytes += self._tile_bytes(key)
                    missing.append(key)
                found[key] = self._tiles[key]
            while self._held_bytes > CACHE_BYTES and len(self._tiles) > 1:
                oldest, _ = self._tiles.popitem(last=False)
                self._held_bytes -= self._tile_bytes(oldest)
        waiting = list(missing)
        try:
            while waiting:
                task = {key: found[key] for key in waiting[:_TILES_OF_A_TASK]}
                decoding_threads().submit(self._decode, task)
                del waiting[:_TILES_OF_A_TASK]
        except BaseException:
            for key in waiting:  # others may wait for these too
                with suppress(InvalidStateError):
                    found[key].set_exception(RuntimeError("no thread decodes it"))
            wait([found[key] for key in missing])
            self._forget_failures({key: found[key] for key in missing})
            raise
        return found

    def _decode(self, task: dict[_Key, Future[Pixels]]) -> None:
        for key, future in task.items():
            with suppress(InvalidStateError):  # given up
                try:
                    future.set_result(self._decoded(key))
                except InvalidStateError:
                    raise
                except BaseException as error:
                    future.set_exception(error)

    def _decoded(self, key: _Key) -> Pixels:
        """A tile; one that only the direct decoder cannot read as ``plain`` reads it.

        Raises:
            SlideError: neither can.
        """
        stored = self._claimed[key.level]
        try:
            return stored.decode(key.number, key.reduction)
        except SlideError as error:
            level_box = stored.level_box(key.number).intersection(Box.covering(stored.size))
            try:
                pixels = self.plain.read_level(key.level, level_box, WHITE)
            except SlideError:
                raise error from None
            logger.debug("read plainly: %s", error)
            self.met_transparency |= self.plain.met_transparency
            return mean_of_blocks(pixels, key.reduction)

    def _forget_failures(self, decoded: Mapping[_Key, Future[Pixels]]) -> None:
        """Let the next reader try again."""
        failed = {key: future for key, future in decoded.items() if future.exception() is not None}
        with self._cache:
            for key, future in failed.items():
                if self._tiles.get(key) is future:
                    del self._tiles[key]
                    self._held_bytes -= self._tile_bytes(key)

    def _tile_bytes(self, key: _Key) -> int:
        return 3 * self._claimed[key.level].tile.area // key.reduction**2

    def _confirm(self, level: int) -> tuple[int, ...]:
        """The reductions at which the fullest tile and that in the middle decode to what ``plain`` reads there."""
        stored = self._claimed[level]
        middle = stored.rows // 2 * stored.columns + stored.columns // 2
        indices = {int(stored.lengths.argmax()), middle}
        try:
            if not all(self._is_as_read_plainly(level, index) for index in indices):
                logger.debug("%s: level %d is not stored as it seemed, and read plainly", self.path, level)
                return ()
        except SlideError as error:
            logger.debug("%s: level %d is read plainly: %s", self.path, level, error)
            return ()
        return tuple(r for r in REDUCTIONS if r == 1 or all(_reduces(stored, r, index) for index in indices))

    def _is_as_read_plainly(self, level: int, index: int) -> bool:
        stored = self._claimed[level]
        level_box = stored.level_box(index).intersection(Box.covering(stored.size))
        expected = self.plain.read_level(level, level_box, WHITE)
        return _mean_difference(stored.decode(index, 1), expected) <= _SAME_PIXELS

    def _release(self) -> None:
        self._tiles.clear()
        for stored in self._claimed.values():
            stored.close()
        self.plain.close()


def _serves(ratio: float, stored: StoredTiles) -> bool:
    """Whether reduced pixels, ``ratio`` of them along a working pixel, give nearly the mean of the stored ones.

    At a ratio that is not whole a working pixel's edge cuts reduced pixels, whose own stored pixels are then told apart no more.
    """
    return ratio >= stored.codec.least_ratio and (ratio == int(ratio) or ratio >= 2)


def _reduces(stored: StoredTiles, reduction: int, index: int) -> bool:
    if not stored.divides(reduction):
        return False
    try:
        pixels, whole = stored.decode(index, reduction), stored.decode(index, 1)
    except SlideError:
        return False
    height, width = (length // reduction for length in whole.shape[:2])
    blocks = whole[: height * reduction, : width * reduction].reshape(height, reduction, width, reduction, 3)
    return height * width == 0 or _mean_difference(pixels[:height, :width], blocks.mean(axis=(1, 3))) <= _SAME_MEANS


def _mean_difference(one: Pixels, other: np.ndarray) -> float:
    return float(np.abs(one.astype(np.float32) - other).mean()) if one.shape == other.shape else np.inf
