"""Draws depend on what they are for, and on nothing else."""

from __future__ import annotations

import itertools

import numpy as np

from wholeslide.draws import Draws


def first(draws: Draws, purpose: str, stage: int = 0) -> float:
    return float(draws.rng(purpose, stage=stage).random())


def test_every_part_of_the_key_matters() -> None:
    values = [
        first(Draws(seed, epoch, slide), purpose, stage)
        for seed, epoch, slide, purpose, stage in itertools.product(
            (0, 1), (0, 1), ("a.svs", "b.svs"), ("dropout", "regions"), (0, 1)
        )
    ]
    assert len(set(values)) == len(values) == 32


def test_parts_cannot_run_into_each_other() -> None:
    assert first(Draws(1, 11, "a"), "x") != first(Draws(11, 1, "a"), "x")
    assert first(Draws(1, 1, "a, 1"), "x") != first(Draws(1, 1, "a"), "1, x")


def test_a_draw_repeats_whatever_was_drawn_before() -> None:
    draws = Draws(3, 4, "slide.svs")
    expected = first(draws, "dropout", 2)
    draws.rng("regions").random(1000)
    np.random.default_rng(0).random(7)
    assert first(draws, "dropout", 2) == expected
    assert first(Draws(3, 4, "slide.svs"), "dropout", 2) == expected


def test_draws_are_the_same_on_every_machine_and_in_every_version() -> None:
    """A changed value would break resuming a run that an earlier version began."""
    assert Draws(5, 1, "a.svs").rng("dropout", stage=2).integers(0, 2**32) == 3679215756
