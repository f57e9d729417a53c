"""``bench io``: every reader reads the same slide, each row from a process of its own."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wholeslide.bench.config import IoBenchConfig
from wholeslide.bench.io import bench_io
from wholeslide.cli import main
from wholeslide.errors import ConfigError

KEYS = {
    "reader", "format", "mpp", "threads", "megapixels_per_second", "seconds", "open_seconds", "width", "height",
}  # fmt: skip
#: Of 255: resizing and averaging differ that much at most in the mean of a corner.
SAME_MEAN = 3
FASTSLIDE = importlib.util.find_spec("fastslide") is not None


def test_every_reader_reads_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "io.json"
    assert main(["bench", "io", "--out", str(out), "--sizes", "700x530", "--threads", "1", "--mpp", "3"]) == 0
    content = json.loads(out.read_text())
    assert content["environment"]["gemm_gflops"]
    assert content["command"].startswith("wholeslide bench io --sizes 700x530 --readers fast,openslide-patch,")
    rows = content["rows"]
    assert [row["reader"] for row in rows] == ["fast", "openslide-patch", "openslide-region", "fastslide"]
    measured = [row for row in rows if row.get("measured", True)]
    assert len(measured) == 3 + FASTSLIDE
    for row in measured:
        assert row.keys() >= KEYS
        assert (row["width"], row["height"], row["format"]) == (466, 353, "jpeg")
        rate = 466 * 353 / 1e6 / row["seconds"]
        assert row["megapixels_per_second"] == pytest.approx(rate, rel=0.05)
        assert np.abs(np.subtract(row["mean_rgb"], measured[0]["mean_rgb"])).max() < SAME_MEAN
    shown = capsys.readouterr()
    assert "openslide-region" in shown.out
    assert "fast jpeg 466x353 on 1: " in shown.err


@pytest.mark.skipif(FASTSLIDE, reason="the package fastslide is installed")
def test_a_reader_that_is_not_there_and_threads_without_cores() -> None:
    rows = bench_io(IoBenchConfig(sizes="300x200", readers="fastslide,fast", threads="1000")).rows
    assert [row["measured"] for row in rows] == [False, False]
    assert "cores (--threads 1000): measure with no more threads than cores" in rows[1]["reason"]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("readers", "slow", "--readers slow"),
        ("formats", "png", "choose among jpeg, jpeg-rgb, jpeg2000"),
        ("threads", "0", "give numbers of 1 or more"),
        ("sizes", "12", "write WIDTHxHEIGHT"),
        ("mpp", 0.5, "give 1 to 20 microns per pixel"),
    ],
)
def test_unknown_choices_are_refused(option: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench_io(IoBenchConfig(**{option: value}))
