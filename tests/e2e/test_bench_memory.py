"""``bench memory``: rows with real figures, each from a process of its own; wrong choices refused."""

from __future__ import annotations

import math

import pytest

from wholeslide.bench.config import MemoryBenchConfig
from wholeslide.bench.memory import bench_memory
from wholeslide.errors import ConfigError

KEYS = {
    "method", "stages", "mode", "store", "dtype", "width", "height", "tissue_fraction", "rfr", "peak_bytes",
    "baseline_bytes", "anonymous_peak_bytes", "store_bytes", "optimizer_bytes", "seconds", "predicted_peak_bytes",
    "gradient_norm",
}  # fmt: skip


def test_streamed_and_whole_rows_agree_on_the_gradient() -> None:
    config = MemoryBenchConfig(sizes="700x600", backbone="resnet10t", stages="2", modes="streamed,whole", dtype="fp32")
    result = bench_memory(config)
    streamed, whole = result["rows"]
    assert streamed.keys() >= KEYS
    assert result["environment"]["gemm_gflops"].keys() == {"fp32", "bf16"}
    assert (streamed["mode"], whole["mode"]) == ("streamed", "whole")
    assert math.isclose(streamed["gradient_norm"], whole["gradient_norm"], rel_tol=1e-4)
    assert streamed["peak_bytes"] > streamed["baseline_bytes"] > 0
    assert streamed["seconds"] > 0


def test_a_row_that_cannot_be_measured_says_why() -> None:
    [row] = bench_memory(MemoryBenchConfig(sizes="300x300", backbone="resnet10t", stages="9"))["rows"]
    assert row["measured"] is False
    assert "cannot cut 4 blocks into 9 stages" in row["reason"]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("methods", "locale", "--methods locale"),
        ("modes", "", "--modes"),
        ("stores", "disc", "choose among host, device"),
        ("stages", "0", "give numbers of 1 or more"),
        ("sizes", "12", "write WIDTHxHEIGHT"),
    ],
)
def test_unknown_choices_are_refused(option: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench_memory(MemoryBenchConfig(**{option: value}))
