"""What every split must keep, whatever the cohort."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

from wholeslide.cohort.manifest import Cohort
from wholeslide.cohort.splits import _counts, _joined_groups, fold_cohort, split_cohort
from wholeslide.errors import CohortError

FRACTIONS = ((0.7, 0.15, 0.15), (0.5, 0.25, 0.25), (0.8, 0.2, 0.0), (0.34, 0.33, 0.33))


def cohort_of(rows: list[tuple[int, int]]) -> Cohort:
    """Rows of (patient, label)."""
    files = [f"f{n:03}" for n in range(len(rows))]
    table = pd.DataFrame({"file": files, "path": "", "slide": files})
    table["patient"] = [f"p{patient}" for patient, _ in rows]
    table["label"] = [f"c{label}" for _, label in rows]
    table["pair"] = [f"pair{patient // 2}" for patient, _ in rows]
    table = table.assign(split="", mpp=np.nan)
    return Cohort(table=table, classes=tuple(sorted(set(table["label"]))), slides_dir=Path())


@st.composite
def pure_cohorts(draw: st.DrawFn) -> Cohort:
    """Each patient has one label and one to four files."""
    rows = []
    for label in range(draw(st.integers(2, 4))):
        for patient in range(draw(st.integers(3, 25))):
            rows += [(100 * label + patient, label)] * draw(st.integers(1, 4))
    return cohort_of(draw(st.permutations(rows)))


mixed_cohorts = st.lists(st.tuples(st.integers(0, 14), st.integers(0, 2)), min_size=6, max_size=60).map(cohort_of)
fractions = st.sampled_from(FRACTIONS)
seeds = st.integers(0, 2**32)


def attempt(split: Callable[..., Cohort], cohort: Cohort, **options: Any) -> pd.DataFrame | None:
    try:
        return split(cohort, **options).table
    except CohortError:
        return None


@settings(max_examples=60, deadline=None)
@given(st.one_of(pure_cohorts(), mixed_cohorts), fractions, seeds, st.sampled_from(["patient", "pair"]))
def test_no_patient_and_no_group_is_in_two_splits(cohort: Cohort, parts: Any, seed: int, group: str) -> None:
    table = attempt(split_cohort, cohort, fractions=parts, seed=seed, group=group)
    if table is None:
        return
    assert table.groupby("patient")["split"].nunique().max() == 1
    assert table.groupby(group)["split"].nunique().max() == 1
    pd.testing.assert_series_equal(table["file"], cohort.table["file"])
    wanted = {name for name, part in zip(("train", "valid", "test"), parts, strict=True) if part}
    assert set(table["split"]) == wanted
    assert (table.groupby("split")["label"].nunique() == table["label"].nunique()).all()


@settings(max_examples=40, deadline=None)
@given(st.one_of(pure_cohorts(), mixed_cohorts), st.integers(2, 5), seeds)
def test_every_file_is_in_one_fold_with_its_patient(cohort: Cohort, folds: int, seed: int) -> None:
    table = attempt(fold_cohort, cohort, folds=folds, seed=seed)
    if table is None:
        return
    assert table.groupby("patient")["fold"].nunique().max() == 1
    assert set(table["fold"]) == {str(fold) for fold in range(folds)}
    assert (table.groupby("fold")["label"].nunique() == table["label"].nunique()).all()


@settings(max_examples=40, deadline=None)
@given(st.one_of(pure_cohorts(), mixed_cohorts), seeds, st.randoms(use_true_random=False))
def test_the_rows_order_does_not_matter(cohort: Cohort, seed: int, random: Any) -> None:
    order = list(range(len(cohort.table)))
    random.shuffle(order)
    shuffled = Cohort(table=cohort.table.iloc[order].reset_index(drop=True), classes=cohort.classes, slides_dir=Path())
    one, other = attempt(split_cohort, cohort, seed=seed), attempt(split_cohort, shuffled, seed=seed)
    assert (one is None) == (other is None)
    if one is not None and other is not None:
        assert dict(zip(one["file"], one["split"], strict=True)) == dict(
            zip(other["file"], other["split"], strict=True)
        )


@settings(max_examples=40, deadline=None)
@given(pure_cohorts(), fractions, seeds)
def test_each_class_is_divided_in_the_asked_proportions(cohort: Cohort, parts: Any, seed: int) -> None:
    table = split_cohort(cohort, fractions=parts, seed=seed).table.drop_duplicates("patient")
    for _, rows in table.groupby("label"):
        for name, part in zip(("train", "valid", "test"), parts, strict=True):
            # the one or two patients that rounding leaves over may go to one part, which the other classes left behind; and what
            # a part gives up so that others of a small class have one at least
            given_up = sum(max(0.0, 1 - len(rows) * other) for other in parts if other > 0)
            assert abs((rows["split"] == name).sum() - len(rows) * part) < 2 + given_up


@given(st.lists(st.integers(1, 3), min_size=1, max_size=200), fractions)
def test_many_small_strata_do_not_starve_a_small_part(sizes: list[int], parts: Any) -> None:
    """Rounding each stratum alone would give every group of a stratum of one to training."""
    wanted = np.array([part for part in parts if part > 0])
    counts = _counts(np.array(sizes), wanted, floor_one=np.zeros(len(sizes), dtype=bool))
    assert (counts.sum(axis=1) == sizes).all()
    assert (counts >= 0).all()
    assert (np.abs(counts.sum(axis=0) - sum(sizes) * wanted) <= len(wanted)).all()


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=30))
def test_joined_groups_are_the_connected_components(links: list[tuple[int, int]]) -> None:
    table = pd.DataFrame(links, columns=["patient", "site"]).astype(str)
    fast = _joined_groups(table, ["patient", "site"])
    slow = list(range(len(links)))
    for _ in links:  # the obvious way: rows that share a value take the smaller number, until nothing changes
        for i, one in enumerate(links):
            for j, other in enumerate(links):
                if one[0] == other[0] or one[1] == other[1]:
                    slow[i] = slow[j] = min(slow[i], slow[j])
    assert [[a == b for b in fast] for a in fast] == [[a == b for b in slow] for a in slow]
