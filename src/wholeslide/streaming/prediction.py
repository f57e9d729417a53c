"""What one step on one view will hold: its background left out, and the gradients that it makes on the way."""

from __future__ import annotations

from dataclasses import replace

from wholeslide.geometry import Size
from wholeslide.streaming.background import VaryingPixels
from wholeslide.streaming.costs import gradient_bytes
from wholeslide.streaming.tile_runner import TileRunner
from wholeslide.streaming.tiles import Tile


def peak_bytes_on(runner: TileRunner, view: Size, varying: VaryingPixels) -> int:
    """The expected peak of a step above what the process held before, where no gradients were there yet.

    A plan supposes that all are, as in the later steps of an accumulation, and that nothing is background.

    Args:
        runner: with a plan that was made for a view of this size.
        view: in pixels, as the network pads it.
        varying: where it is not background.
    """
    network, plan = runner.network, runner.plan
    elided = plan.elide and varying.anywhere_constant
    parts = [part for tile in runner.stem_tiles(view) for part in runner.needed_of_stem(tile, view, varying)]
    share = _share(parts, network.feature_size(view, 0)) if elided else 1.0
    peaks = [replace(plan.needs[0], gradients_bytes=0).peak_bytes(plan.choices[0])]
    for number in range(1, network.depth + 1):
        tiles = runner.tiles(number, network.feature_size(view, number - 1), varying if elided else None)
        cells = sum(tile.cell_own.size.area for tile in tiles)
        share_before, share = share, cells / network.feature_size(view, number).area
        needs, features_before_bytes = plan.needs[number], plan.needs[number - 1].features_bytes
        there = replace(
            needs,
            stores_bytes=int(share_before * features_before_bytes + share * needs.features_bytes)
            * (needs.stores_bytes > 0),
            grid_bytes=int(share * needs.grid_bytes),
            gradients_bytes=gradient_bytes(network, through=number),
        )
        peaks.append(there.bytes_of(*_windows_px(runner, number, tiles)))
    return max(peaks)


def _share(tiles: list[Tile], size: Size) -> float:
    """Of cells that tiles own."""
    return sum(tile.cell_own.size.area for tile in tiles) / size.area


def _windows_px(runner: TileRunner, number: int, tiles: list[Tile]) -> tuple[int, int]:
    """Pixels of the largest window, and of all windows together whose graphs are kept."""
    windows_px = [runner.window_px(number, tile) for tile in tiles]
    return max(windows_px, default=0), sum(windows_px[runner.first_kept(number, tiles) :])
