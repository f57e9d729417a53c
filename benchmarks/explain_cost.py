"""Time and memory of `explain` beside those of `predict`, on one synthetic slide.

python benchmarks/explain_cost.py --work FOLDER --out benchmarks/results/explain.json [--size 23849x10257]

The network is trained for one pass over a few small slides: what it has learned costs no time. FOLDER gets slides and run. Each
command runs in a process of its own; the peak is VmHWM, the baseline what is resident when everything is imported.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from wholeslide.bench.environment import environment
from wholeslide.bench.process_memory import reset_peak, status_bytes
from wholeslide.bench.pyramid import texture_tiles, write_pyramid
from wholeslide.demo.cohort import DemoCohortConfig, write_cohort
from wholeslide.explain import explain
from wholeslide.geometry import Size
from wholeslide.predict import predict
from wholeslide.train.config import TrainConfig
from wholeslide.train.loop import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--size", type=Size.parse, default=Size(23849, 10257))
    parser.add_argument("--stages", type=int, default=8)
    parser.add_argument("--tissue-fraction", type=float, default=1.0)
    parser.add_argument("--memory", help="most memory that each may use, as 2GiB; left out: as the run")
    parser.add_argument("--only", choices=("predict", "explain"), help="measure one, and print its figures")
    arguments = parser.parse_args()
    run, slide = arguments.work / f"run-k{arguments.stages}", arguments.work / f"{arguments.size}.svs"
    if arguments.only:
        print(json.dumps(_measured(arguments.only, run, slide, arguments.work / "explained", arguments.memory)))
        return
    _prepare(run, slide, arguments)
    rows = [_in_process(only) for only in ("predict", "explain")]
    facts = {name: getattr(arguments, name) for name in ("stages", "tissue_fraction", "memory")}
    facts["size"] = str(arguments.size)
    ratio = rows[1]["seconds"] / rows[0]["seconds"]
    found = {"environment": environment(), **facts, "rows": rows, "explain_seconds_of_predict": round(ratio, 3)}
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def _prepare(run: Path, slide: Path, arguments: argparse.Namespace) -> None:
    if not slide.exists():
        patterns = texture_tiles(None, seed=0)
        write_pyramid(slide, arguments.size, patterns, seed=0, tissue_fraction=arguments.tissue_fraction)
    if not run.exists():
        cohort = run.with_name("cohort")
        shutil.rmtree(cohort, ignore_errors=True)
        manifest = write_cohort(
            cohort, DemoCohortConfig(train_pairs=3, valid_pairs=2, test_pairs=2, tissue_px=(560, 600))
        )
        train(
            TrainConfig(
                manifest=manifest, slides=cohort / "slides", out=run, backbone="resnet34", weights="random",
                stages=arguments.stages, reconstruction=False, epochs=1, group="pair", precision="fp32",
            )
        )  # fmt: skip


def _in_process(only: str) -> dict[str, Any]:
    command = [sys.executable, *sys.argv, "--only", only]
    return {"command": only, **json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)}


def _measured(only: str, run: Path, slide: Path, out: Path, memory: str | None) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    baseline = status_bytes("VmRSS")
    reset_peak()
    began = time.perf_counter()
    is_predict = only == "predict"
    found = predict(run, [slide], memory=memory) if is_predict else explain(run, [slide], out, memory=memory)
    seconds = time.perf_counter() - began
    assert not found.errors, found.errors
    return {"seconds": round(seconds, 2), "baseline_bytes": baseline, "peak_bytes": status_bytes("VmHWM")}


if __name__ == "__main__":
    main()
