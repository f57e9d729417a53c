"""Every recipe is a file that its command takes."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from wholeslide.cli import load
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


PAPER = {"tcga-nsclc": (1e-5, 2e-5), "tcga-rcc": (1e-5, 2e-5), "lks": (2e-5, 4e-5)}
"""The learning rates of backbone and classifiers, section 3.2."""
PAPER_SIZES = {"tcga-nsclc": "663,166,214", "tcga-rcc": "603,150,186", "lks": "383,96,205"}
"""Slides for training, validation and test, section 3.1."""


@pytest.mark.parametrize("name", PAPER)
def test_a_recipe_of_the_paper_has_its_values(name: str) -> None:
    """Sections 3.1 and 3.2; the epochs are those of the public code."""
    config = parse(TRAIN, [*TRAININGS, str(RECIPES / f"{name}.yaml")]).train
    recipe = config.recipe()
    assert (config.method, config.depth, config.backbone, config.first_stride) == ("local", 4, "resnet34", 3)
    assert (recipe.lr, config.classifier_lr()) == PAPER[name]
    assert (recipe.optimizer, recipe.weight_decay, recipe.accumulate) == ("adamw", 1e-6, 8)
    assert (recipe.epochs, recipe.lr_schedule, config.schedule) == (55, "plateau", "simultaneous")
    assert (config.reconstruction, config.reconstruction_weight) == (True, 1)
    assert (config.reconstruction_regions, config.reconstruction_region_px) == (10, 768)
    assert (config.unit, config.group, config.on_unreadable) == ("slide", "patient", "exclude")
    reading = config.slide_config()
    if name == "lks":
        assert (reading.target_mpp, reading.target_downsample, reading.background) == (None, 4, "keep")
    else:
        assert (reading.target_mpp, reading.background) == (2, "auto")


@pytest.mark.parametrize("name", PAPER)
def test_a_recipe_of_the_paper_says_how_its_manifest_is_made(name: str) -> None:
    """The commands in its head and in the document are taken by the command line, and end in the recipe."""
    commands = [line.removeprefix("#   ") for line in (RECIPES / f"{name}.yaml").read_text("utf-8").splitlines()]
    commands = [line for line in commands if line.startswith("wholeslide ")]
    assert [command.split()[1] for command in commands] == ["cohort", "split", "train"]
    cohort, split, train = (shlex.split(command)[1:] for command in commands)
    made = parse(load(" ".join(cohort[:2])), cohort[2:])
    drawn = parse(load("split"), split[1:])
    trained = parse(TRAIN, [*train[1:-1], str(RECIPES.parent / train[-1])]).train
    assert drawn.manifest == made.out
    assert drawn.draw.sizes == tuple(map(int, PAPER_SIZES[name].split(",")))
    assert drawn.draw.keep_test == (name == "lks")
    assert trained.manifest == drawn.out
    assert train[-1] == f"recipes/{name}.yaml"
    document = (RECIPES.parent / "docs" / "recipes.md").read_text("utf-8")
    assert [command for command in commands if command not in document] == []
