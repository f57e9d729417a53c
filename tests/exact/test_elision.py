"""Background that is computed once: every loss and gradient is that of the whole slide, and less is computed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    CPU,
    DRAWS,
    SHAPES,
    STORES_AND_KEPT,
    ArrayView,
    build,
    gradient_error,
    gradients_of,
    output_error,
    painted,
    plan_for,
)
from oracle import Oracle, OracleStep
from PIL import Image

from wholeslide.geometry import Box, Size
from wholeslide.model.network import LocalNetwork
from wholeslide.slides.config import AugmentationConfig, SlideConfig
from wholeslide.slides.view import make_view
from wholeslide.slides.working import open_working_slide
from wholeslide.streaming.engine import StreamingEngine
from wholeslide.streaming.stage_pass import StagePass
from wholeslide.streaming.tile_runner import TileRunner

EXACT = 1e-9
#: Of the stores and kept shares, what the quick tests take: every one of each, not every pair.
USUAL = ("host", "host, all kept", "disk, half kept")


def run(network: LocalNetwork, view: Any, tile_px: int, **choices: Any) -> tuple[Any, ...]:
    """A step's result and gradients, and the share of each stage's grid that was computed."""
    shares: list[float] = []
    made = StagePass.__init__

    def noted(self: StagePass, *arguments: Any, **options: Any) -> None:
        made(self, *arguments, **options)
        shares.append(len(self.layout.cell_n) / self.layout.size.area)

    network.zero_grad()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StagePass, "__init__", noted)
        plan = plan_for(network, tile_px, **choices)
        result = StreamingEngine(network, plan, CPU).step(view, 1, DRAWS)
    return result, gradients_of(network), shares


@dataclass
class Painted:
    shape: str
    network: LocalNetwork
    view: ArrayView
    step: OracleStep


@pytest.fixture(scope="module", params=SHAPES)
def case(request: pytest.FixtureRequest) -> Painted:
    network = build("resnet_tiny", 8, reconstruction_region_px=160).double()
    view = painted(request.param, Size(1403, 1207))
    return Painted(request.param, network, view, Oracle(network).step(view.pixels_hwc, 1, DRAWS))


@pytest.mark.parametrize(
    "how", [name if name in USUAL else pytest.param(name, marks=pytest.mark.slow) for name in STORES_AND_KEPT]
)
def test_background_that_is_computed_once_changes_nothing(case: Painted, how: str) -> None:
    (store, kept), step = STORES_AND_KEPT[how], case.step
    kept_px = int(kept * case.view.size.area / 4)  # less is computed than the slide has
    result, gradients, shares = run(case.network, case.view, 90, store=store, kept_px=kept_px)
    assert output_error(result, step) <= EXACT
    assert gradient_error(gradients, step.gradients) <= EXACT
    assert len(shares) == 8
    if case.shape == "everywhere":
        assert shares == [1.0] * 8
    else:
        assert shares[0] < 0.7
        assert sum(shares) < 0.95 * len(shares)
        assert shares[0] < shares[-1]  # the border's influence grows


@pytest.mark.parametrize(
    ("backbone", "stages", "size", "tile_px"),
    [
        ("resnet_tiny", 1, "3001x2003", 400),
        ("resnet_tiny", 3, "2003x2201", 240),
        pytest.param("resnet18", 8, "1203x607", 240, marks=pytest.mark.slow),
        ("mobilenetv2_050", 6, "513x417", 160),
        pytest.param("efficientnet_lite0", 6, "641x481", 160, marks=pytest.mark.slow),
        pytest.param("test_convnext", 3, "703x633", 160, marks=pytest.mark.slow),
        pytest.param("regnetx_002", 4, "723x767", 160, marks=pytest.mark.slow),
    ],
)
def test_every_family_and_depth(backbone: str, stages: int, size: str, tile_px: int) -> None:
    network = build(backbone, stages, reconstruction_region_px=160).double()
    view = painted("corner", Size.parse(size))
    dense_result, dense, all_shares = run(network, view, tile_px, elide=False)
    result, gradients, shares = run(network, view, tile_px)
    assert all_shares == [1.0] * stages
    assert min(shares) < 0.8
    assert output_error(result, dense_result) <= EXACT
    assert gradient_error(gradients, dense) <= EXACT


def test_predictions_are_those_of_the_whole_slide() -> None:
    network = build("resnet_tiny", 4).double()
    view = painted("pieces", Size(1203, 1007))
    found, expected = (
        StreamingEngine(network, plan_for(network, 120, elide=elide), CPU).predict(view) for elide in (True, False)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_a_masked_slide_with_every_augmentation(seed: int, tmp_path: Path) -> None:
    """Crops, flips, turns and jitter move and colour the background; the view says where it is without reading."""
    rng = np.random.default_rng(seed)
    pixels = np.full((1300, 1500, 3), 255, np.uint8)
    for left, top, right, bottom in ((200, 100, 600, 500), (1100, 900, 1400, 1250)):
        pixels[top:bottom, left:right] = rng.integers(60, 200, (bottom - top, right - left, 3))
    Image.fromarray(pixels).save(tmp_path / "slide.png")
    network = build("resnet_tiny", 4, reconstruction_region_px=160).double()

    def view() -> Any:
        slide = open_working_slide(tmp_path / "slide.png", SlideConfig(mpp="native", background="constant"))
        config = AugmentationConfig(crop_probability=0.5)
        return make_view(slide, augmentation=config, rng=np.random.default_rng(seed), padded_size=network.padded_size)

    drawn = view()
    assert drawn.augmentation.jitter is not None
    everything = drawn.read(Box.covering(drawn.size))
    assert (everything == drawn.background).all(axis=2).mean() > 0.3
    known = [box for box in _blocks(drawn.size, 64) if drawn.is_background(box)]
    assert known
    assert all((drawn.read(box) == drawn.background).all() for box in known)
    expected_result, expected, _ = run(network, view(), 120, elide=False)
    result, gradients, shares = run(network, drawn, 120)
    assert min(shares) < 0.8
    assert output_error(result, expected_result) <= EXACT
    assert gradient_error(gradients, expected) <= EXACT


def _blocks(size: Size, side: int) -> list[Box]:
    whole = Box.covering(size)
    return [
        Box(left, top, side, side).intersection(whole)
        for top in range(0, size.height, side)
        for left in range(0, size.width, side)
    ]


@pytest.mark.parametrize(("size", "stages"), [("403x391", 1), ("403x701", 2), ("1203x1007", 4)])
def test_no_window_is_larger_than_those_without_elision(
    size: str, stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is planned for these: the lone tile has no edge that cuts it."""
    network = build("resnet_tiny", stages, reconstruction=False).double()
    windows: list[int] = []
    run_tile = TileRunner.run

    def noted(self: TileRunner, weights: Any, window_bchw: torch.Tensor, tile: Any) -> torch.Tensor:
        if weights.tensors[0].requires_grad:  # of a stage, not of the stem
            windows.append(window_bchw.shape[-1] * window_bchw.shape[-2])
        return run_tile(self, weights, window_bchw, tile)

    monkeypatch.setattr(TileRunner, "run", noted)
    view = painted("corner", Size.parse(size))
    largest = []
    for elide in (False, True):
        windows.clear()
        run(network, view, 200, elide=elide)
        largest.append(max(windows))
    assert largest[1] <= largest[0]


def test_a_kept_background_is_elided_only_where_every_pixel_has_its_colour() -> None:
    network = build("resnet_tiny", 4, reconstruction=False).double()
    view = painted("none", Size(1003, 807))
    view.pixels_hwc = view.pixels_hwc.copy()
    view.pixels_hwc[400, 500, 1] += 1e-3
    step = Oracle(network).step(view.pixels_hwc, 1, DRAWS)
    result, gradients, _ = run(network, view, 120)
    assert output_error(result, step) <= EXACT
    assert gradient_error(gradients, step.gradients) <= EXACT


@pytest.mark.parametrize("wrong", ["constant", "gradient", "border"])
def test_a_fault_in_elision_is_found(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from wholeslide.model.locality import Locality
    from wholeslide.streaming.background import VaryingPixels

    network = build("resnet_tiny", 4, reconstruction_region_px=160).double()
    view = painted("disc", Size(1203, 1007))
    expected = run(network, view, 120, elide=False)[1]
    if wrong == "constant":
        keep = StagePass.keep

        def shifted(self: StagePass, tile: Any, own: torch.Tensor, grid: torch.Tensor | None) -> None:
            keep(self, tile, own * 1.001 if tile is self.lone else own, grid)

        monkeypatch.setattr(StagePass, "keep", shifted)
    elif wrong == "gradient":
        monkeypatch.setattr("wholeslide.streaming.stage_pass._share_of_the_constant", lambda *args: None)
    else:
        seen_by = VaryingPixels.seen_by

        def blind(self: VaryingPixels, locality: Locality, *args: Any, **options: Any) -> Any:
            seen = seen_by(self, locality, *args, **options)
            seen[0] = seen[:, 0] = False
            return seen

        monkeypatch.setattr(VaryingPixels, "seen_by", blind)
    assert gradient_error(run(network, view, 120)[1], expected) > 1e-6
