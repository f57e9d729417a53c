"""Every recipe is a file that its command takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from wholeslide.cli.bench_memory import COMMAND as BENCH_MEMORY
from wholeslide.cli.compare import COMMAND as COMPARE
from wholeslide.cli.compare import typed
from wholeslide.cli.parser import parse
from wholeslide.cli.train import COMMAND as TRAIN

RECIPES = Path(__file__).parents[2] / "recipes"
BENCHMARKS = {"ten-gigapixels"}
TRAININGS = ["labels.csv", "--slides", "slides", "--out", "run", "--config"]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_is_taken(path: Path) -> None:
    if path.stem in BENCHMARKS:
        arguments = parse(BENCH_MEMORY, ["--config", str(path), "--out", "found.json"])
        assert (arguments.bench.sizes, arguments.bench.memory, arguments.bench.crop) == ("100000x100000", "3GiB", "off")
    elif path.stem.startswith("compare-"):
        typed(parse(COMPARE, [*TRAININGS, str(path)]).compare).check()
    else:
        parse(TRAIN, [*TRAININGS, str(path)]).train.check()
