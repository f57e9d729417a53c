"""What can be asked of a comparison, and which share of the work a process takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from compare_cases import config

from wholeslide.cli import load
from wholeslide.cli.compare import CompareArguments, typed
from wholeslide.cli.parser import parse
from wholeslide.compare.config import share_of
from wholeslide.errors import ConfigError


def asked(**options: Any) -> Any:
    methods = options.pop("methods", ("max", "abmil"))
    return config(Path("labels.csv"), Path("out"), *methods, **options)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"methods": ("max", "abmil", "max")}, "max is given twice (--methods): give each method once"),
        ({"methods": ("max", "max=abmil")}, "max is given twice (--methods): give each method once"),
        (
            {"methods": ("max", "../x=abmil")},
            "'../x' is no name (--methods): give letters, digits, dashes, dots and plus",
        ),
        ({"methods": ("max", "x=abmill")}, "unknown method 'abmill' (--method): choose local-kN"),
        ({"methods": ("max", "abmill")}, "unknown method 'abmill' (--method): choose local-kN"),
        ({"reference": "dsmil"}, "dsmil is none of the methods (--reference): choose among max, abmil"),
        ({"folds": 2}, "2 is too small (--folds): give 3 or more"),
        ({"seeds": 0}, "0 is too small (--seeds): give 1 or more"),
        ({"resamples": 10}, "10 is too small (--resamples): give 100 or more"),
        ({"cells": "3/2"}, "not a share (--cells 3/2): give I/N with I from 1 to N, or slurm"),
        ({"overrides": {"dsmil": {"lr": 1}}}, "dsmil is none of the methods (--overrides): choose among max, abmil"),
        ({"overrides": {"max": {"rate": 1}}}, "rate is no option of train (--overrides, max): see"),
        (
            {"overrides": {"max": {"unit": "file"}}},
            "unit is the same for every method (--overrides, max): leave it out",
        ),
        ({"overrides": {"max": {"lr": -1.0}}}, "-1.0 is no learning rate (--lr): give a positive number"),
        (
            {"grid": {"all": [{"lr": 1.0}, {"fold": 1}]}},
            "fold is the same for every method (--grid, all): leave it out",
        ),
        (
            {"grid": {"max": [{"lr": 1.0}, {"lr": 2.0}]}},
            "unequal budgets: max 2, abmil 1 (--grid): give every method as",
        ),
        ({"train": {"fold": 1}}, "a comparison chooses this itself (--fold): leave it out"),
        ({"train": {"patch": 1}}, "1 is too small (--patch)"),
    ],
)
def test_what_makes_no_sense_is_told(options: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(line)):
        asked(**options).check()


def test_problems_are_told_together() -> None:
    with pytest.raises(ConfigError) as caught:
        asked(methods=("max", "max"), folds=1, cells="x").check()
    assert len(caught.value.problems) == 3


def test_a_method_gets_its_own_options_over_those_for_all() -> None:
    found = asked(train={"epochs": 7}, overrides={"max": {"epochs": 3}}, grid={"all": [{"lr": 1.0}, {"lr": 2.0}]})
    found.check()
    assert found.train_config("max", found.points("max")[1]).lr == 2.0
    assert (found.train_config("max").epochs, found.train_config("abmil").epochs) == (3, 7)
    assert asked().train_config("abmil").lr == 5e-4  # as published


def test_shares() -> None:
    assert share_of(None) == (0, 1)
    assert share_of("2/5") == (1, 5)
    for wrong in ("0/5", "6/5", "2", "a/b", "-1/5"):
        with pytest.raises(ConfigError, match="not a share"):
            share_of(wrong)


def slurm(first: int, last: int, step: int = 1) -> list[tuple[int, int]]:
    """What the tasks of ``--array=first-last:step`` take."""
    ids = range(first, last + 1, step)
    limits = {"MIN": ids[0], "MAX": ids[-1], "STEP": step, "COUNT": len(ids)}
    names = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in limits.items()}
    return [share_of("slurm", {**names, "SLURM_ARRAY_TASK_ID": str(task)}) for task in ids]


@pytest.mark.parametrize(("first", "last", "step"), [(0, 9, 1), (1, 10, 1), (5, 25, 5)])
def test_the_tasks_of_an_array_take_every_share_once(first: int, last: int, step: int) -> None:
    found = slurm(first, last, step)
    assert sorted(found) == [(number, len(found)) for number in range(len(found))]


def test_outside_an_array_slurm_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=re.escape("this is no task of a SLURM array (--cells slurm): submit it with")
    ):
        share_of("slurm", {"SLURM_ARRAY_TASK_ID": "3"})


def test_the_command_line_takes_trains_options_but_those_that_it_sets() -> None:
    words = [
        "labels.csv",
        "--slides",
        "s",
        "--out",
        "o",
        "--methods",
        "max,local-k2",
        "--epochs",
        "3",
        "--unit",
        "file",
        "--seeds",
        "2",
    ]
    found = parse(load("compare"), words)
    assert isinstance(found, CompareArguments)
    assert found.compare.methods == ("max", "local-k2")
    assert (found.compare.seeds, found.compare.train.epochs, found.compare.train.unit) == (2, 3, "file")
    assert found.compare.train.out == found.out == Path("o")
    with pytest.raises(ConfigError, match=re.escape("unknown option (--method): did you mean --methods")):
        parse(load("compare"), [*words, "--method", "max"])
    with pytest.raises(ConfigError, match=re.escape("unknown option (--fold): did you mean --folds")):
        parse(load("compare"), [*words, "--fold", "1"])


def test_options_of_single_methods_are_read_from_a_file_and_typed(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "overrides:\n  max:\n    lr: 1e-4\n    loggers: [csv]\ngrid:\n  all:\n  - first-stride: 2\n  - epochs: 4\n"
    )
    words = ["labels.csv", "--slides", "s", "--out", "o", "--methods", "max"]
    raw = parse(load("compare"), [*words, "--config", str(tmp_path / "c.yaml")]).compare
    found = typed(raw)
    assert found.overrides == {"max": {"lr": 1e-4, "loggers": ("csv",)}}
    assert found.grid == {"all": [{"first_stride": 2}, {"epochs": 4}]}
    (tmp_path / "c.yaml").write_text("overrides:\n  max:\n    epochs: many\n    patch: much\n")
    raw = parse(load("compare"), [*words, "--config", str(tmp_path / "c.yaml")]).compare
    with pytest.raises(ConfigError) as caught:
        typed(raw)
    assert str(caught.value).splitlines()[0] == (
        "'many' is not a value it takes (--overrides, max, epochs): give a whole number"
    )
    assert len(caught.value.problems) == 2
