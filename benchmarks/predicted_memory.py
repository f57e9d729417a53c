"""How well plans predict the memory of a step: on combinations that a seed draws, each measured by ``bench memory``.

python benchmarks/predicted_memory.py --out benchmarks/results/predicted-memory.json

A run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wholeslide.bench.result import Result
from wholeslide.geometry import Size
from wholeslide.model.config import ModelConfig
from wholeslide.model.network import build_network
from wholeslide.streaming.config import StreamingConfig
from wholeslide.streaming.planner import execution_of, least_memory

SEED = 20261123
COMBINATIONS = 12
#: Each is drawn equally often, with one of these numbers of stages.
BACKBONES = {"resnet34": (1, 2, 4, 8), "efficientnet_lite0": (1, 2, 4), "convnext_atto": (1, 2, 4)}
SMALLEST_SIDE_PX, LARGEST_SIDE_PX = 1500, 5500
#: The budget is at most so many times the least that the planner takes.
LARGEST_BUDGET = 3.0


@dataclass(frozen=True)
class Combination:
    """One step: ``budget`` is over the least memory that the planner takes."""

    backbone: str
    stages: int
    width: int
    height: int
    tissue_fraction: float
    store: str
    budget: float


def draw(seed: int) -> Iterator[Combination]:
    """The combinations of a seed."""
    rng = np.random.default_rng(seed)
    backbones = rng.permutation(np.repeat(list(BACKBONES), COMBINATIONS // len(BACKBONES)))
    for backbone in backbones.tolist():
        width, height = rng.integers(SMALLEST_SIDE_PX, LARGEST_SIDE_PX, size=2, endpoint=True).tolist()
        yield Combination(
            backbone,
            stages=int(rng.choice(BACKBONES[backbone])),
            width=width,
            height=height,
            tissue_fraction=1.0 if rng.random() < 0.5 else round(float(rng.uniform(0.2, 0.9)), 2),
            store=str(rng.choice(["host", "disk"])),
            budget=round(float(rng.uniform(1.0, LARGEST_BUDGET)), 2),
        )


def budget_mib(combination: Combination) -> int:
    """Of the process, in MiB."""
    network = build_network(
        ModelConfig(backbone=combination.backbone, stages=combination.stages, weights="random"),
        classes=2,
        pixel_mean=(0.6, 0.6, 0.6),
        pixel_std=(0.15, 0.15, 0.15),
        seed=0,
    )
    config, device = StreamingConfig(store=combination.store, precision="auto"), torch.device("cpu")  # type: ignore[arg-type]
    execution = execution_of(network, config, device)
    least = least_memory(network, Size(combination.width, combination.height), config, execution, device)
    return int(-(-least * combination.budget // 2**20))


def measured(combination: Combination, memory_mib: int) -> dict[str, Any]:
    """The row of ``wholeslide bench memory``."""
    options = {
        "--sizes": f"{combination.width}x{combination.height}",
        "--methods": "local" if combination.stages > 1 else "end-to-end",
        "--stages": combination.stages,
        "--backbone": combination.backbone,
        "--stores": combination.store,
        "--tissue-fractions": combination.tissue_fraction,
        "--memory": f"{memory_mib}MiB",
        "--dtype": "auto",
        "--crop": "off",  # the budget is for the whole size
    }
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        words = [str(word) for pair in options.items() for word in pair]
        subprocess.run([sys.executable, "-m", "wholeslide", "bench", "memory", *words, "--out", str(out)], check=True)
        row: dict[str, Any] = json.loads(out.read_text())["rows"][0]
    budget_bytes = memory_mib * 2**20
    in_training_bytes = row["peak_bytes"] + row["optimizer_bytes"]  # which the budget is for
    return {**row, "budget_bytes": budget_bytes, "within_budget": in_training_bytes <= budget_bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    result = Result(
        arguments.out, f"python benchmarks/predicted_memory.py --seed {arguments.seed} --out {arguments.out}"
    )
    result.begin()
    done = result.rows
    for combination in list(draw(arguments.seed))[len(done) :]:
        result.add({**asdict(combination), **measured(combination, budget_mib(combination))})
    result.finish()
    errors = [row["predicted_error"] for row in done]
    print(f"predicted over measured, less one: {min(errors):+.1%} to {max(errors):+.1%}")
    print(f"within their budget: {sum(row['within_budget'] for row in done)} of {len(done)}")


if __name__ == "__main__":
    main()
