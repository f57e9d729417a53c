"""What a step on one view will hold, where its background is known and left out."""

from __future__ import annotations

from dataclasses import replace

from wholeslide.geometry import Size
from wholeslide.streaming.background import VaryingPixels
from wholeslide.streaming.tile_runner import TileRunner
from wholeslide.streaming.tiles import STEM_ALIGN, Tile


def peak_bytes_on(runner: TileRunner, view: Size, varying: VaryingPixels) -> int:
    """The expected peak of a step above what the process held before; without background, that of the plan.

    Args:
        runner: with a plan that was made for a view of this size.
        view: in pixels, as the network pads it.
        varying: where it is not background.
    """
    plan, network = runner.plan, runner.network
    if not plan.elide or not varying.anywhere_constant:
        return plan.predicted_peak_bytes
    stem_cells = network.feature_size(view, 0)
    share = float(varying.seen_by(network.stem.locality, stem_cells, side=STEM_ALIGN).mean())
    peaks = [plan.needs[0].peak_bytes(plan.choices[0])]
    for number in range(1, network.depth + 1):
        input_size, size = network.feature_size(view, number - 1), network.feature_size(view, number)
        tiles = runner.tiles(number, input_size, varying)
        share_before, share = share, sum(tile.cell_own.size.area for tile in tiles) / size.area
        needs = plan.needs[number]
        stored_bytes = share_before * plan.needs[number - 1].features_bytes + share * needs.features_bytes
        there = replace(
            needs,
            stores_bytes=int(stored_bytes) if needs.stores_bytes else 0,
            grid_bytes=int(share * needs.grid_bytes),
        )
        peaks.append(there.bytes_of(*_windows_px(runner, number, tiles)))
    return max(peaks)


def _windows_px(runner: TileRunner, number: int, tiles: list[Tile]) -> tuple[int, int]:
    """Pixels of the largest window, and of all windows together whose graphs are kept."""
    windows_px = [runner.window_px(number, tile) for tile in tiles]
    return max(windows_px, default=0), sum(windows_px[runner.first_kept(number, tiles) :])
