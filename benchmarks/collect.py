"""Gather the test metrics of several runs of one recipe into one result file.

python benchmarks/collect.py RUN [RUN ...] --command "wholeslide train …" --out benchmarks/results/NAME.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean

import yaml

from wholeslide.bench.environment import environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--command", required=True, help="what was typed, without paths of the machine")
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()
    rows = []
    for run in arguments.runs:
        stored = yaml.safe_load((run / "config.yaml").read_text())
        plan = json.loads((run / "plan.json").read_text())
        metrics = json.loads((run / "metrics" / "test.json").read_text())
        rows.append({"seed": stored["seed"], "execution": plan["execution"], "test": metrics})
    means = {name: round(fmean(row["test"][name]["value"] for row in rows), 4) for name in ("accuracy", "auroc")}
    result = {"command": arguments.command, "environment": environment(), "mean": means, "runs": rows}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(means))


if __name__ == "__main__":
    main()
