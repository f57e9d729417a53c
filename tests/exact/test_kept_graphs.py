"""Graphs that are kept between the two passes change what is computed twice, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from cases import DRAWS, build, gradient_error, gradients_of, random_view, streaming
from torch import Tensor

from wholeslide.geometry import Size
from wholeslide.streaming.tile_runner import TileRunner

EXACT = 1e-9


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9, 1.0, 10.0])
def test_every_fraction_of_kept_graphs_gives_the_same_gradients(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    network, view = build("resnet_tiny", 2, reconstruction_region_px=100).double(), random_view(Size(603, 575))
    runs: list[int] = []
    run_tile = TileRunner.run

    def counted(self: TileRunner, *arguments: Any) -> Tensor:
        runs.append(1)
        return run_tile(self, *arguments)

    monkeypatch.setattr(TileRunner, "run", counted)
    found, counts = [], []
    for kept_px in (0, int(share * view.size.area)):
        engine = streaming(network, 120, kept_px=kept_px)
        network.zero_grad()
        runs.clear()
        engine.step(view, 1, DRAWS)
        found.append(gradients_of(network))
        counts.append(len(runs))
    assert gradient_error(found[1], found[0]) <= EXACT
    tiles = sum(len(engine.runner.tiles(n, network.feature_size(view.size, n - 1))) for n in (1, 2))
    stem_tiles = counts[0] - 2 * tiles
    assert counts[0] > counts[1] >= tiles + stem_tiles  # some tiles were not computed twice
    assert (counts[1] == tiles + stem_tiles) == (share == 10.0)  # and at last none was
