"""``bench memory``: rows with real figures, each from a process of its own; wrong choices refused."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from wholeslide.bench.config import MemoryBenchConfig
from wholeslide.bench.memory import bench_memory
from wholeslide.errors import ConfigError

KEYS = {
    "method", "stages", "mode", "store", "dtype", "width", "height", "tissue_fraction", "rfr", "peak_bytes",
    "baseline_bytes", "anonymous_peak_bytes", "store_bytes", "optimizer_bytes", "seconds", "predicted_peak_bytes",
    "gradient_norm", "predicted_error", "dense_flops", "active_flops", "computed_flops", "dense_gemm_fraction",
    "computed_gemm_fraction", "mask_margin_cells",
}  # fmt: skip
MOST_MARGIN_CELLS = 4


def rows_of(**options: Any) -> list[dict[str, Any]]:
    config = MemoryBenchConfig(
        **{"sizes": "700x600", "backbone": "resnet10t", "stages": "2", "dtype": "fp32", **options}
    )
    rows: list[dict[str, Any]] = bench_memory(config).rows
    return rows


@pytest.mark.parametrize(("method", "stages"), [("local", 2), pytest.param("end-to-end", 1, marks=pytest.mark.slow)])
def test_streamed_and_whole_rows_agree_on_the_gradient(method: str, stages: int) -> None:
    streamed, whole = rows_of(methods=method, modes="streamed,whole", over_baseline="2GiB")
    for row in (streamed, whole):
        assert row.keys() >= KEYS
        assert (row["method"], row["stages"]) == (method, stages)
        assert row["peak_bytes"] > row["baseline_bytes"] > 0
        assert row["seconds"] > 0
        assert row["active_flops"] == row["dense_flops"] <= row["computed_flops"]
        assert row["mask_margin_cells"] is None
    assert [row["mode"] for row in (streamed, whole)] == ["streamed", "whole"]
    assert math.isclose(streamed["gradient_norm"], whole["gradient_norm"], rel_tol=1e-4)
    assert streamed["dense_flops"] == whole["dense_flops"] == whole["computed_flops"]
    assert whole["predicted_error"] is None
    assert streamed["predicted_error"] == round(streamed["predicted_peak_bytes"] / streamed["peak_bytes"] - 1, 4)


@pytest.mark.slow
def test_background_is_elided_and_changes_no_gradient() -> None:
    """A disc on white: what is computed once stands for the same gradient, and the mask is the disc."""
    streamed, on_disk, whole = rows_of(
        sizes="2000x1600", crop="off", tissue_fractions="0.1", modes="streamed,whole", stores="host,disk", memory="2GiB"
    )
    for row in (streamed, on_disk):
        assert math.isclose(row["gradient_norm"], whole["gradient_norm"], rel_tol=1e-4)
        assert row["tissue_fraction"] == 0.1
        assert 0 <= row["mask_margin_cells"] <= MOST_MARGIN_CELLS
        assert row["active_flops"] < row["computed_flops"] < row["dense_flops"]
        assert 0 < row["store_bytes"] < 4 * 64 * (2000 // 6) * (1600 // 6) * 2
    assert [row["store"] for row in (streamed, on_disk, whole)] == ["host", "disk", "none"]


def test_a_row_that_cannot_be_measured_says_why() -> None:
    result = bench_memory(
        MemoryBenchConfig(sizes="700x600", backbone="resnet10t", stages="2,9", dtype="fp32", over_baseline="10MiB")
    )
    assert result.environment["gemm_gflops"].keys() == {"fp32", "bf16"}
    too_little, too_many = result.rows
    assert too_little["measured"] is too_many["measured"] is False
    assert too_little["mendable"] is too_many["mendable"] is True
    assert re.match(
        r"not enough memory for a slide of 700x600 pixels \(--over-baseline 10MiB\): give at least \d\.\d\dGiB",
        too_little["reason"],
    )
    assert too_many["reason"].startswith("cannot cut 4 blocks into 9 stages (backbone resnet10t): ")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("methods", "locale", "--methods locale"),
        ("modes", "", "--modes"),
        ("stores", "disc", "choose among host, device, disk"),
        ("store_dir", Path("no-such-folder"), "no such folder"),
        ("tissue_fractions", "0", "give numbers above 0 and up to 1"),
        ("tissue_fractions", "half", "--tissue-fractions half"),
        ("over_baseline", "much", "--over-baseline much"),
        ("memory", "much", "--memory much"),
        ("stages", "0", "give numbers of 1 or more"),
        ("sizes", "12", "write WIDTHxHEIGHT"),
    ],
)
def test_unknown_choices_are_refused(option: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench_memory(MemoryBenchConfig(**{"stores": "host,disk", option: value}))


def test_one_limit_of_memory_is_enough() -> None:
    with pytest.raises(ConfigError, match=r"two limits of memory \(--memory 2GiB --over-baseline 1GiB\): give one"):
        MemoryBenchConfig(memory="2GiB", over_baseline="1GiB")
