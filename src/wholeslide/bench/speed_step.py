"""One row of ``bench speed``: predictions of one slide in a fresh process, whole, and its two halves alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any, TypeVar

import numpy as np
import torch

from wholeslide.allocator import return_freed_memory
from wholeslide.bench.environment import gemm_gflops
from wholeslide.bench.pipelines.case import SpeedCase
from wholeslide.bench.pipelines.local import LocalPipeline
from wholeslide.bench.pipelines.pipeline import Pipeline
from wholeslide.bench.pipelines.tuned import TunedPipeline
from wholeslide.bench.pipelines.usual import UsualPipeline
from wholeslide.bench.process_memory import WorkersPeak, reset_peak, status_bytes

Result = TypeVar("Result")

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


def measure(case: SpeedCase) -> dict[str, Any]:
    """What a prediction takes; networks, their weights, and what they choose for this machine are there before.

    ``total_seconds`` are from opening the file to the probabilities, ``read_seconds`` of the same reading without computing,
    ``compute_seconds`` of the same computing on pixels that are in memory. Each is the median of the case's repeats, which are as
    many for every pipeline, and none of which is the first that this process computes.
    ``peak_bytes`` is VmHWM of the predictions, ``baseline_bytes`` VmRSS before them; processes that read for the pipeline hold
    ``workers_peak_bytes`` of their own besides.

    Raises:
        WholeslideError: the pipeline cannot compute so, or the slide is too small for it.
    """
    pipeline = _pipeline(case)
    return_freed_memory()
    baseline_bytes = status_bytes("VmRSS")
    reset_peak()
    with WorkersPeak() as workers:
        pipeline.warm_up()
        total_seconds, probabilities = _timed(pipeline.predict, case.repeats)
    peak_bytes = status_bytes("VmHWM")
    read_seconds, _ = _timed(pipeline.read, case.repeats)
    pipeline.load()
    compute_seconds, again = _timed(pipeline.compute, case.repeats)
    assert np.isfinite(probabilities).all(), probabilities
    assert np.allclose(probabilities, again, atol=1e-3), (probabilities, again)
    flops, facts, rate_gflops = pipeline.flops(), pipeline.facts(), gemm_gflops(_DTYPES[case.dtype])
    pipeline.close()
    return {
        "read_seconds": round(read_seconds, 4),
        "compute_seconds": round(compute_seconds, 4),
        "total_seconds": round(total_seconds, 4),
        "flops": flops,
        "gemm_gflops": rate_gflops,
        "peak_fraction": round(flops / compute_seconds / rate_gflops / 1e9, 4),
        "peak_bytes": peak_bytes,
        "baseline_bytes": baseline_bytes,
        "workers_peak_bytes": workers.peak_bytes,
        "probabilities": [round(float(value), 6) for value in probabilities],
        **facts,
    }


def _pipeline(case: SpeedCase) -> Pipeline:
    if case.pipeline == "gabmil-usual":
        return UsualPipeline(case)
    return TunedPipeline(case) if case.pipeline == "gabmil-tuned" else LocalPipeline(case)


def _timed(work: Callable[[], Result], repeats: int) -> tuple[float, Result]:
    """The median of the seconds of so many times, and what the last gave."""
    seconds: list[float] = []
    for _ in range(repeats):
        begun = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - begun)
    return median(seconds), result
