"""What can relate objects that lie farther apart than a patch: stages by their receptive field, and classifiers of patches.

python benchmarks/receptive_field.py --work FOLDER --out benchmarks/results/receptive-field.json

The cohort is that of ``wholeslide.demo.distance``. FOLDER gets its slides and the runs; a call that was cut off goes on with them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wholeslide.bench.environment import environment
from wholeslide.demo.distance import PATCH_PX, DistanceCohortConfig, write_distance_cohort
from wholeslide.model.network import LocalNetwork
from wholeslide.train.run import Run

#: timm's smallest ResNet, from random weights; its first stride decides how far its stages see.
FAR, NEAR = 8, 2
STAGES = """--method local-k4 --backbone test_resnet --weights random --lr 1e-3 --head-lr 5e-4 --weight-decay 1e-2 --accumulate 1
--lr-schedule constant --patience 0 --crop-probability 0 --jitter 0 --attention-dropout 0 --no-reconstruction --monitor loss"""
BAGS = f"--backbone efficientnet_lite0 --weights lite0 --first-stride 4 --patch {PATCH_PX}"
INVARIANT = ("max", "average", "abmil", "gabmil", "clam-sb", "clam-mb", "dsmil")
"""Methods that take a slide's patches as a set, trained by their recipes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--epochs", type=int, default=16, help="of the stages that see far enough; the others get half")
    arguments = parser.parse_args()
    config = DistanceCohortConfig()
    slides = arguments.work / "slides"
    manifest = slides / "labels.csv"
    if not manifest.exists():
        write_distance_cohort(slides, config)
    plans: dict[str, Sequence[str]] = {
        f"local-k4, first stride {FAR}": _stages(arguments.epochs, FAR),
        f"local-k4, first stride {NEAR}": _stages(arguments.epochs // 2, NEAR),
        **{name: ["--method", name, *BAGS.split()] for name in INVARIANT},
    }
    rows = []
    for name, options in plans.items():
        run = arguments.work / name.replace(", first stride ", "-")
        rows.append({"method": name, "options": " ".join(options), **_row(manifest, run, options)})
        print(json.dumps(rows[-1]))
    facts = {"distance_px": config.distance_px, "patch_px": PATCH_PX, "slides": 2 * len(config.splits)}
    result = {"environment": environment(), "cohort": facts, "rows": rows}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def _stages(epochs: int, first_stride: int) -> list[str]:
    return [*STAGES.split(), "--epochs", str(epochs), "--first-stride", str(first_stride)]


def _row(manifest: Path, run: Path, options: Sequence[str]) -> dict[str, Any]:
    """Train, unless that is done, and score; the receptive field of each stage's classifier where there are stages."""
    if not (run / "metrics" / "test.json").exists():
        common = ["--mpp", "native", "--precision", "fp32", "--loggers", "csv", "--quiet", "--resume"]
        words = [str(manifest), "--slides", str(manifest.parent), "--out", str(run), *common, *options]
        if "--patch" in options:
            words += ["--features-cache", str(run.parent / "features")]
        for command in (["train", *words], ["evaluate", str(run), "--quiet"]):
            subprocess.run([sys.executable, "-m", "wholeslide", *command], check=True)
    found = json.loads((run / "metrics" / "test.json").read_text())
    network = Run.open(run).build_network(pretrained=False)
    fields: list[int] = []
    if isinstance(network, LocalNetwork):
        fields = [network.classifier_reach(stage).x.field for stage in range(1, network.depth + 1)]
    by_stage = [stage["auroc"]["value"] for stage in found["stages"]]
    return {"auroc": found["auroc"], "receptive_fields_px": fields, "auroc_by_stage": by_stage, "slides": found["n"]}


if __name__ == "__main__":
    main()
