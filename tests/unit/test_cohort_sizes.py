"""Splits of so many files: as near as whole patients allow, stratified, and around a test split that stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from wholeslide.cohort.config import SplitConfig
from wholeslide.cohort.manifest import Cohort
from wholeslide.cohort.sizes import apportioned
from wholeslide.cohort.splits import divide_around_test, split_cohort
from wholeslide.errors import CohortError, ConfigError

NSCLC, RCC, LKS = (663, 166, 214), (603, 150, 186), (383, 96, 205)


def cohort_of(labels: list[str], patients: list[str] | None = None, **columns: list[str]) -> Cohort:
    files = [f"f{number:04d}" for number in range(len(labels))]
    table = pd.DataFrame(
        {"file": files, "path": "", "slide": files, "patient": patients or files, "label": labels, "split": ""}
    ).assign(mpp=np.nan, **columns)
    return Cohort(table=table, classes=tuple(sorted(set(labels))), slides_dir=Path())


def like_tcga(classes: dict[str, int], *, seed: int) -> Cohort:
    """So many slides of each class, a patient having one to six of them, as in TCGA."""
    rng = np.random.default_rng(seed)
    labels: list[str] = []
    patients: list[str] = []
    for label, count in classes.items():
        while (left := count - labels.count(label)) > 0:
            several = min(left, int(rng.choice([1, 1, 1, 1, 1, 1, 1, 2, 3, 6])))
            patients += [f"{label}-{len(patients)}"] * several
            labels += [label] * several
    return cohort_of(labels, patients)


def sizes_of(cohort: Cohort) -> tuple[int, int, int]:
    counts = cohort.table["split"].value_counts()
    return counts.get("train", 0), counts.get("valid", 0), counts.get("test", 0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("classes", "sizes"),
    [({"LUAD": 531, "LUSC": 512}, NSCLC), ({"KIRC": 519, "KIRP": 299, "KICH": 121}, RCC)],
    ids=["nsclc", "rcc"],
)
def test_the_sizes_of_the_paper_are_met_and_no_patient_is_cut(
    classes: dict[str, int], sizes: tuple[int, int, int], seed: int
) -> None:
    cohort = like_tcga(classes, seed=seed)
    split = split_cohort(cohort, sizes=sizes, seed=seed)
    assert sizes_of(split) == sizes
    assert split.table.groupby("patient")["split"].nunique().max() == 1
    share = pd.crosstab(split.table["label"], split.table["split"], normalize="index")
    wanted = np.array(sizes) / sum(sizes)
    assert np.abs(share[["train", "valid", "test"]].to_numpy() - wanted).max() < 0.01


def test_fractions_alone_miss_the_sizes() -> None:
    """What the sizes are for: proportions of groups leave the numbers of files where they fall."""
    cohort = like_tcga({"LUAD": 531, "LUSC": 512}, seed=0)
    fractions = (663 / 1043, 166 / 1043, 214 / 1043)
    assert all(sizes_of(split_cohort(cohort, fractions=fractions, seed=seed)) != NSCLC for seed in range(3))


def test_sizes_are_scaled_to_the_files_that_there_are() -> None:
    split = split_cohort(like_tcga({"a": 300, "b": 221}, seed=1), sizes=NSCLC)
    assert sizes_of(split) == (331, 83, 107)
    assert apportioned(np.array(NSCLC), 521).tolist() == [331, 83, 107]


@pytest.mark.parametrize("total", [0, 1, 2, 3, 7, 1043, 2086])
def test_apportioned_numbers_add_up_and_are_within_one(total: int) -> None:
    found = apportioned(np.array(NSCLC), total)
    assert found.sum() == total
    assert np.abs(found - np.array(NSCLC) * total / 1043).max() < 1


def test_whole_patients_come_as_near_as_they_can() -> None:
    """Patients of four slides each cannot give nine files; eight and twelve are as near as it goes."""
    labels = ["a"] * 20 + ["b"] * 20
    split = split_cohort(cohort_of(labels, [f"p{number // 4}" for number in range(40)]), sizes=(20, 10, 10))
    assert sorted(sizes_of(split)) == [8, 12, 20]


def test_a_class_stays_in_every_part() -> None:
    """The only patients of b have nine files each: sizes would be met best by taking b away from two parts."""
    labels = ["a"] * 30 + ["b"] * 27
    patients = [f"a{number}" for number in range(30)] + [f"b{number // 9}" for number in range(27)]
    table = split_cohort(cohort_of(labels, patients), sizes=(51, 3, 3)).table
    assert (table.groupby("split")["label"].nunique() == 2).all()


def test_the_same_seed_draws_the_same_whatever_the_order() -> None:
    cohort = like_tcga({"a": 100, "b": 80}, seed=2)
    shuffled = Cohort(table=cohort.table.sample(frac=1, random_state=3), classes=cohort.classes, slides_dir=Path())
    first, second = (split_cohort(one, sizes=(100, 40, 40), seed=5).table for one in (cohort, shuffled))
    assert dict(zip(first["file"], first["split"], strict=True)) == dict(
        zip(second["file"], second["split"], strict=True)
    )


class TestKeptTest:
    def lks(self) -> Cohort:
        labels = (["Negative"] * 200 + ["AMA"] * 120 + ["SMA-V"] * 100 + ["SMA-T"] * 59) + ["Negative", "AMA"] * 100
        cohort = cohort_of([*labels, "SMA-V", "SMA-T", "SMA-V", "SMA-T", "SMA-V"])
        cohort.table["split"] = ["train"] * 479 + ["test"] * 205
        return cohort

    def test_the_test_split_stays_and_the_others_are_divided(self) -> None:
        before = self.lks()
        after = divide_around_test(before, sizes=LKS)
        assert sizes_of(after) == LKS
        assert set(after.split("test")["file"]) == set(before.split("test")["file"])
        assert (after.table.groupby("split")["label"].nunique() == 4).all()
        assert before.table["file"].tolist() == after.table["file"].tolist()

    def test_fractions_divide_what_is_left_in_their_proportion(self) -> None:
        assert sizes_of(divide_around_test(self.lks(), fractions=(0.6, 0.2, 0.2))) == (359, 120, 205)

    def test_a_patient_on_both_sides(self) -> None:
        cohort = self.lks()
        cohort.table.loc[[0, 500], "patient"] = "p"
        with pytest.raises(CohortError, match="patient p is in the test split and outside of it") as caught:
            divide_around_test(cohort)
        assert len(caught.value.problems) == 1

    def test_a_group_on_both_sides(self) -> None:
        cohort = self.lks()
        cohort.table["site"] = [str(number // 100) for number in range(684)]
        with pytest.raises(CohortError, match="in the test split and outside of it"):
            divide_around_test(cohort, group="site")

    @pytest.mark.parametrize(("split", "what"), [("train", "no file"), ("test", "every file")])
    def test_nothing_to_keep_or_to_divide(self, split: str, what: str) -> None:
        cohort = self.lks()
        cohort.table["split"] = split
        with pytest.raises(CohortError, match=f"{what} is in the test split"):
            divide_around_test(cohort)


@pytest.mark.parametrize(
    ("options", "wheres"),
    [
        ({"sizes": (0, 1, 1)}, ["--sizes 0,1,1"]),
        ({"sizes": (5, -1, 1)}, ["--sizes 5,-1,1"]),
        ({"sizes": (5, 1, 1), "fractions": (0.5, 0.25, 0.25)}, ["--fractions and --sizes"]),
        ({"sizes": (5, 1, 1), "folds": 3, "keep_test": True}, ["--folds 3 and --sizes", "--folds 3 and --keep-test"]),
        ({"sizes": (5, 0, 1), "keep_test": True}, ["--keep-test"]),
        ({"fractions": (0.8, 0.0, 0.2), "keep_test": True}, ["--keep-test"]),
    ],
)
def test_splits_that_make_no_sense(options: dict[str, object], wheres: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        SplitConfig(**options)  # type: ignore[arg-type]
    assert [problem.where for problem in caught.value.problems] == wheres
