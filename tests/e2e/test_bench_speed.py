"""``bench speed``: rows with real figures, each from a process of its own; patches are the same in both of GABMIL's pipelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wholeslide.bench.config import SpeedBenchConfig
from wholeslide.bench.speed import bench_speed
from wholeslide.cli import main
from wholeslide.errors import ConfigError

KEYS = {
    "pipeline", "width", "height", "tissue_fraction", "dtype", "first_stride", "read_seconds", "compute_seconds",
    "total_seconds", "flops", "repeats", "peak_fraction", "peak_bytes", "baseline_bytes", "workers_peak_bytes",
}  # fmt: skip
TINY = {
    "sizes": "700x530",
    "backbone": "resnet10t",
    "stages": "2",
    "dtype": "fp32",
    "first-stride": "3",
    "repeats": "1",
}


def command(out: Path, **options: str) -> list[str]:
    words = ["bench", "speed", "--out", str(out)]
    for name, value in {**TINY, **options}.items():
        words += [f"--{name}", value]
    return words


def test_rows_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "new" / "speed.json", tmp_path / "speed.png"
    assert main(command(out, plot=str(picture), **{"tissue-fractions": "0.4"})) == 0
    content = json.loads(out.read_text())
    assert content["command"].startswith("wholeslide bench speed --sizes 700x530 --pipelines local,local-int8,")
    rows = {row["pipeline"]: row for row in content["rows"]}
    int8 = rows.pop("local-int8")
    assert (int8["dtype"], int8["first_stride"]) == ("int8", 3)
    assert int8.get("measured", True) or "int8" in int8["reason"]
    for row in rows.values():
        assert row.keys() >= KEYS
        assert max(row["read_seconds"], row["compute_seconds"]) > 0
        assert row["total_seconds"] > 0
        assert row["peak_bytes"] > row["baseline_bytes"] > 0
        expected = row["flops"] / row["compute_seconds"] / row["gemm_gflops"] / 1e9
        assert row["peak_fraction"] == pytest.approx(expected, rel=0.05)
    usual, tuned = rows["gabmil-usual"], rows["gabmil-tuned"]
    assert (usual["patches"], usual["flops"]) == (tuned["patches"], tuned["flops"])
    assert 1 <= usual["patches"] < 9
    assert np.allclose(usual["probabilities"], tuned["probabilities"], atol=0.02)
    shown = capsys.readouterr()
    assert "gabmil-tuned fp32 /3" in shown.out
    assert "a GPU (Zhang et al., MICCAI 2022, Table 3)" in shown.out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("pipelines", "gabmil", "choose among local, local-int8, gabmil-usual, gabmil-tuned"),
        ("dtype", "fp16", "--dtype fp16"),
        ("first_stride", "0", "--first-stride 0"),
        ("tissue_fractions", "0", "give numbers above 0 and up to 1"),
        ("sizes", "12", "write WIDTHxHEIGHT"),
        ("repeats", 0, "give 1 or more"),
    ],
)
def test_unknown_choices_are_refused(option: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench_speed(SpeedBenchConfig(**{option: value}))
