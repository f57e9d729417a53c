"""What the rows of ``bench speed`` are made of and compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from wholeslide.bench import speed_step
from wholeslide.bench.config import SpeedBenchConfig
from wholeslide.bench.paper import TABLE_3
from wholeslide.bench.pipelines.case import MEANT, SpeedCase
from wholeslide.bench.pipelines.local import LocalPipeline
from wholeslide.bench.pipelines.patches import patches_of, random_encoder, whole_boxes
from wholeslide.bench.pipelines.pipeline import Pipeline, open_tissue
from wholeslide.bench.pyramid import texture_tiles, write_pyramid
from wholeslide.bench.speed import combinations
from wholeslide.bench.speed_picture import draw_speed
from wholeslide.bench.speed_ratios import AS_MEANT, EQUAL, paper_ratio, ratios
from wholeslide.errors import ConfigError
from wholeslide.geometry import Box, Size


def row(pipeline: str, dtype: str, stride: int, seconds: float, **others: Any) -> dict[str, Any]:
    return {
        **{"pipeline": pipeline, "dtype": dtype, "first_stride": stride, "width": 8698, "height": 7496},
        **{"tissue_fraction": 1.0, "total_seconds": seconds, "read_seconds": 1.0, "compute_seconds": seconds / 2},
        **{"flops": 10 * stride, **others},
    }


def test_like_is_compared_with_like_and_the_usual_with_the_papers() -> None:
    found = ratios(
        [
            row("local", "bf16", 3, 2.0),
            row("local", "fp32", 2, 4.0),
            row("gabmil-usual", "fp32", 2, 20.0),
            row("gabmil-tuned", "bf16", 3, 3.0, read_seconds=0.5),
            row("gabmil-tuned", "bf16", 2, 5.0),
        ]
    )
    assert [(r.gabmil, r.local, r.kind, r.total) for r in found] == [
        ("gabmil-usual fp32 /2", "local bf16 /3", AS_MEANT, 10.0),
        ("gabmil-usual fp32 /2", "local fp32 /2", EQUAL, 5.0),
        ("gabmil-tuned bf16 /3", "local bf16 /3", EQUAL, 1.5),
        ("gabmil-tuned bf16 /2", "local bf16 /3", AS_MEANT, 2.5),
    ]
    assert (found[2].read, found[2].compute, found[2].flops) == (0.5, 1.5, 1.0)
    assert found[0].flops == pytest.approx(2 / 3)
    assert found[0].paper_total == pytest.approx(2.9 / 0.3)


def test_rows_as_they_are_meant_are_one_a_pipeline() -> None:
    found = [
        (v["pipeline"], v["dtype"], v["first_stride"])
        for v in combinations(SpeedBenchConfig(sizes="700x600", rows="meant"))
    ]
    assert found == [(name, *way) for name, way in MEANT.items()]
    assert len(list(combinations(SpeedBenchConfig(sizes="700x600")))) == 3 * 4 + 2


def test_other_slides_and_what_was_not_measured_are_not_compared() -> None:
    local = row("local", "bf16", 3, 2.0)
    others: list[dict[str, Any]] = [{"tissue_fraction": 0.3}, {"width": 700}, {"measured": False}]
    assert ratios([local, *(row("gabmil-tuned", "bf16", 3, 2.0, **other) for other in others)]) == []
    assert (
        ratios([row("local", "bf16", 3, 2.0, width=700), row("gabmil-tuned", "bf16", 3, 3.0, width=700)])[0].paper_total
        is None
    )


def test_the_papers_own_ratios() -> None:
    assert [round(ratio, 1) for size in TABLE_3 if (ratio := paper_ratio(size)) is not None] == [9.7, 7.3, 9.5]
    assert paper_ratio(Size(1, 1)) is None
    for seconds in TABLE_3.values():
        assert seconds.tiling + seconds.features == pytest.approx(seconds.total)


@pytest.mark.parametrize("ending", [".png", ".svg"])
def test_the_picture_is_drawn(ending: str, tmp_path: Path) -> None:
    rows = [row("local", "bf16", 3, 2.0), row("gabmil-usual", "fp32", 2, 20.0), row("gabmil-tuned", "bf16", 3, 3.0)]
    rows += [{**each, "tissue_fraction": 0.3} for each in rows]
    draw_speed(rows, tmp_path / f"speed{ending}")
    draw_speed(rows[:1], tmp_path / f"local{ending}")
    assert (tmp_path / f"speed{ending}").stat().st_size > 10_000


def test_patches_cover_the_slide() -> None:
    boxes = patches_of(Size(600, 300))
    assert boxes == [Box(left, top, 256, 256) for top in (0, 44) for left in (0, 256, 344)]
    assert len(patches_of(Size(8698, 7496))) == 34 * 30
    with pytest.raises(ConfigError, match=r"smaller than a patch \(--sizes 255x300\)"):
        patches_of(Size(255, 300))


def test_patches_of_the_tissue_are_at_least_half_of_it(tmp_path: Path) -> None:
    size = Size(2048, 1536)
    write_pyramid(tmp_path / "slide.svs", size, texture_tiles(None, seed=0), seed=0, tissue_fraction=0.3)
    asked = case(tmp_path / "slide.svs", size, tissue_fraction=0.3)
    slide, chosen = open_tissue(asked), whole_boxes(asked, fast=True)
    assert {box for box in patches_of(size) if slide.mask.covers(box)} <= set(chosen)
    assert all(slide.mask.pixels(box).mean() >= 0.5 for box in chosen)
    assert sum(box.size.area for box in chosen) / size.area == pytest.approx(0.3, abs=0.06)
    slide.close()


def case(path: Path, size: Size, *, tissue_fraction: float) -> SpeedCase:
    return SpeedCase(
        path=str(path),
        width=size.width,
        height=size.height,
        tissue_fraction=tissue_fraction,
        pipeline="gabmil-usual",
        dtype="fp32",
        first_stride=2,
        stages=2,
        backbone="resnet10t",
        repeats=1,
        seed=0,
    )


@pytest.mark.parametrize("stride", [2, 3])
def test_the_encoder_strides_as_it_is_told_and_averages(stride: int) -> None:
    chosen = SpeedCase(**{**vars(case(Path("a.svs"), Size(256, 256), tissue_fraction=1)), "first_stride": stride})
    encoder = random_encoder(chosen)
    patches = torch.from_numpy(np.random.default_rng(0).random((2, 3, 96, 96), dtype=np.float32))
    maps = encoder.backbone(patches)
    assert maps.shape == (2, 512, -(-96 // (16 * stride)), -(-96 // (16 * stride)))
    torch.testing.assert_close(encoder(patches), maps.flatten(2).mean(2))


def test_a_predictions_arithmetic_is_what_torch_counts(tmp_path: Path) -> None:
    """Layer by layer from the graph, against the multiplications that torch sees while a slide is predicted in one tile."""
    size = Size(576, 480)
    write_pyramid(tmp_path / "slide.svs", size, texture_tiles(None, seed=0), seed=0)
    asked = {**vars(case(tmp_path / "slide.svs", size, tissue_fraction=1)), "pipeline": "local"}
    pipeline = LocalPipeline(SpeedCase(**asked))
    pipeline.load()
    with FlopCounterMode(display=False) as counted:
        pipeline.compute()
    assert pipeline.flops() == pytest.approx(counted.get_total_flops(), rel=1e-3)
    pipeline.close()


class Slow(Pipeline):
    """Takes so many seconds of a clock that is not the machine's; notes what it is asked."""

    def __init__(self, seconds: list[float]) -> None:
        self.now, self.asked = 0.0, list[str]()
        self._seconds = seconds

    def _take(self, what: str) -> np.ndarray:
        self.now += self._seconds[self.asked.count(what) % len(self._seconds)]
        self.asked.append(what)
        return np.array([0.5, 0.5])

    def warm_up(self) -> None:
        self._take("warm_up")

    def predict(self) -> np.ndarray:
        return self._take("predict")

    def read(self) -> None:
        self._take("read")

    def load(self) -> None:
        self._take("load")

    def compute(self) -> np.ndarray:
        return self._take("compute")

    def flops(self) -> int:
        return 10**12

    def facts(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_every_pipeline_is_timed_as_often_and_not_cold(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow([3 * scale, scale, 7 * scale])
    monkeypatch.setattr(speed_step, "_pipeline", lambda _: slow)
    monkeypatch.setattr(speed_step, "gemm_gflops", lambda _: 100.0)
    monkeypatch.setattr(speed_step.time, "perf_counter", lambda: slow.now)
    asked = SpeedCase(**{**vars(case(Path("a.svs"), Size(256, 256), tissue_fraction=1)), "repeats": 3})
    row = speed_step.measure(asked)
    assert slow.asked == ["warm_up", *["predict"] * 3, *["read"] * 3, "load", *["compute"] * 3]
    assert [row[f"{part}_seconds"] for part in ("total", "read", "compute")] == [3 * scale] * 3
