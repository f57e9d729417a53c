"""Splits and folds on real manifests and at the borders."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from wholeslide.cohort.audit import audit
from wholeslide.cohort.config import SplitConfig
from wholeslide.cohort.manifest import Cohort, read_cohort
from wholeslide.cohort.splits import fold_cohort, split_by_fold, split_cohort, write_split
from wholeslide.errors import CohortError, ConfigError, RunError

DATA = Path(os.environ.get("WHOLESLIDE_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
real_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no test data in {DATA}")


def cohort_of(labels: list[str], patients: list[str] | None = None, **columns: list[str]) -> Cohort:
    files = [f"f{n}" for n in range(len(labels))]
    table = pd.DataFrame(
        {"file": files, "path": "", "slide": files, "patient": patients or files, "label": labels, "split": ""}
    ).assign(mpp=np.nan, **columns)
    return Cohort(table=table, classes=tuple(sorted(set(labels) - {""})), slides_dir=Path())


def parts_of(table: pd.DataFrame, column: str) -> int:
    return int(table.groupby(column)["split"].nunique().max())


@real_data
@pytest.mark.parametrize("seed", range(10))
def test_glands_are_never_cut_and_leave_both_classes_everywhere(seed: int) -> None:
    cohort = read_cohort(DATA / "glas/labels.csv", DATA / "glas")
    split = split_cohort(cohort, seed=seed)
    assert len(split.table) == 165
    assert parts_of(split.table, "patient") == 1
    assert split.table.groupby("split")["patient"].nunique().to_dict() == {"train": 10, "valid": 3, "test": 3}
    assert (split.table.groupby("split")["label"].nunique() == 2).all()
    assert audit(split) == ()
    folds = fold_cohort(cohort, folds=5, seed=seed)
    assert folds.table.groupby("patient")["fold"].nunique().max() == 1
    assert (folds.table.groupby("fold")["label"].nunique() == 2).all()


@real_data
def test_glands_differ_by_seed() -> None:
    cohort = read_cohort(DATA / "glas/labels.csv", DATA / "glas")
    tests = {frozenset(split_cohort(cohort, seed=seed).split("test")["patient"]) for seed in range(5)}
    assert len(tests) >= 4


@real_data
def test_lymphoma_splits_by_slide() -> None:
    cohort = read_cohort(DATA / "lymphoma/labels.csv", DATA / "lymphoma")
    table = split_cohort(cohort, group="slide").table
    assert parts_of(table, "slide") == 1
    once = table.drop_duplicates("slide")
    slides = pd.crosstab(once["split"], once["label"])
    assert slides.loc["train"].tolist() == [7, 7, 7]
    assert set(slides.loc[["valid", "test"]].to_numpy().ravel()) == {1, 2}
    folds = fold_cohort(cohort, folds=5).table.drop_duplicates("slide")
    assert set(folds.groupby(["fold", "label"]).size()) == {2}


def test_a_small_class_is_in_every_part() -> None:
    table = split_cohort(cohort_of(["a"] * 40 + ["b"] * 3)).table
    assert table.loc[table["label"] == "b", "split"].nunique() == 3
    assert table[table["label"] == "a"]["split"].value_counts().to_dict() == {"train": 28, "valid": 6, "test": 6}


def test_classes_that_only_mixed_patients_bring_are_placed() -> None:
    labels = ["a"] * 12 + ["a", "b"] * 3
    patients = [f"p{n}" for n in range(12)] + [f"q{n // 2}" for n in range(6)]
    for seed in range(20):
        table = split_cohort(cohort_of(labels, patients), seed=seed).table
        assert (table.groupby("split")["label"].nunique() == 2).all()


def test_a_part_that_would_lack_a_class_is_given_a_patient_of_another() -> None:
    labels = ["a", "b", "a", "c", "b", "c", "a", "b", "c"]
    patients = ["ab", "ab", "ac", "ac", "bc", "bc", "a", "b", "c"]
    for seed in range(20):
        table = split_cohort(cohort_of(labels, patients), seed=seed).table
        assert (table.groupby("split")["label"].nunique() == 3).all()


def test_a_zero_fraction_leaves_a_split_out() -> None:
    table = split_cohort(cohort_of(["a"] * 10 + ["b"] * 10), fractions=(0.8, 0.2, 0.0)).table
    assert table["split"].value_counts().to_dict() == {"train": 16, "valid": 4}


def test_another_group_never_cuts_a_patient_either() -> None:
    patients = [f"p{n // 2}" for n in range(40)]
    pairs = [f"pair{n // 4}" if n % 2 else f"solo{n}" for n in range(40)]
    labels = ["a" if n % 8 < 4 else "b" for n in range(40)]
    table = split_cohort(cohort_of(labels, patients, pair=pairs), group="pair", seed=3).table
    assert parts_of(table, "patient") == parts_of(table, "pair") == 1


def test_too_few_patients_for_the_parts() -> None:
    cohort = cohort_of(["a"] * 9 + ["b"] * 5 + ["c"], [f"p{n}" for n in range(9)] + ["q"] * 4 + ["r"] + ["c"])
    with pytest.raises(CohortError) as caught:
        split_cohort(cohort)
    assert str(caught.value).splitlines() == [
        "2 patients cannot be in 3 splits (class 'b'): ask for fewer parts, or add slides of the class",
        "1 patient cannot be in 3 splits (class 'c'): ask for fewer parts, or add slides of the class",
    ]
    with pytest.raises(CohortError, match=r"2 patients cannot be in 5 folds \(class 'b'\)"):
        fold_cohort(cohort, folds=5)


def test_parts_that_cannot_be_had_are_refused() -> None:
    labels = ["a", "b", "a", "c", "b", "c"]
    with pytest.raises(CohortError, match=r"no way found to have it in all of 2 splits \(class '.'\)"):
        split_cohort(cohort_of(labels, ["1", "1", "2", "2", "3", "3"]), fractions=(0.5, 0.5, 0.0))


def test_group_columns_must_be_there_and_filled() -> None:
    cohort = cohort_of(["a", "b"] * 4, site=["x", "y", "", "z"] * 2)
    with pytest.raises(CohortError, match=r"no column 'hospital' \(--group\): use one of slide, patient, site"):
        split_cohort(cohort, group="hospital")
    with pytest.raises(CohortError, match=r"no site \(f2\): fill the column 'site' in each row"):
        split_cohort(cohort, group="site")


NO_FRACTIONS = [(0.7, 0.3), (0.7, 0.2, 0.2), (1.2, -0.1, -0.1), (0, 0.5, 0.5), (float("nan"), 0.5, 0.5)]


@pytest.mark.parametrize("fractions", NO_FRACTIONS)
def test_fractions_that_are_none(fractions: tuple[float, float, float]) -> None:
    with pytest.raises(ConfigError, match="give training, validation and test as three parts that add up to 1"):
        SplitConfig(fractions=fractions)


def test_folds_are_checked_in_the_configuration() -> None:
    assert SplitConfig(fractions=(0.6, 0.2, 0.2)).fractions == (0.6, 0.2, 0.2)
    with pytest.raises(ConfigError, match=r"too few folds \(--folds 1\)"):
        SplitConfig(folds=1)


def test_each_fold_is_tested_once_and_validated_once() -> None:
    folds = fold_cohort(cohort_of(["a", "b"] * 12), folds=4)
    tested, validated = [], []
    for fold in range(4):
        split = split_by_fold(folds, fold)
        tested += split.split("test")["file"].tolist()
        validated += split.split("valid")["file"].tolist()
        assert set(split.split("test")["fold"]) == {str(fold)}
        assert set(split.split("valid")["fold"]) == {str((fold + 1) % 4)}
        assert len(split.split("train")) == 12
    assert sorted(tested) == sorted(validated) == sorted(folds.table["file"])


def test_another_fold_than_the_next_validates_if_asked() -> None:
    folds = fold_cohort(cohort_of(["a", "b"] * 12), folds=4)
    split = split_by_fold(folds, 1, 0)
    assert [set(split.split(name)["fold"]) for name in ("test", "valid", "train")] == [{"1"}, {"0"}, {"2", "3"}]
    for valid in (1, 4):
        with pytest.raises(CohortError, match=rf"no fold {valid} to validate on \(folds 0, 1, 2, 3\)"):
            split_by_fold(folds, 1, valid)


def test_folds_that_cannot_be_tested() -> None:
    cohort = cohort_of(["a", "b"] * 6)
    with pytest.raises(CohortError, match=r"no column 'fold' \(manifest\)"):
        split_by_fold(cohort, 0)
    with pytest.raises(CohortError, match=r"no fold 0 to test on \(folds 0, 1\)"):
        split_by_fold(fold_cohort(cohort, folds=2), 0)
    with pytest.raises(CohortError, match=r"no fold 3 to test on \(folds 0, 1, 2\)"):
        split_by_fold(fold_cohort(cohort, folds=3), 3)
    folds = fold_cohort(cohort, folds=3)
    folds.table.loc[4, "fold"] = ""
    with pytest.raises(CohortError, match=r"no fold \(f4\): fill the column 'fold' in each row"):
        split_by_fold(folds, 0)


def test_a_written_split_is_a_manifest_again(tmp_path: Path) -> None:
    manifest = tmp_path / "labels.csv"
    manifest.write_text(
        "image,Patient_ID,label,mpp,note\n"
        + "".join(f"{n:03}.png,{n // 2:02},{n // 2 % 2},0.25,é;\n" for n in range(24))
    )
    for name in range(24):
        (tmp_path / f"{name:03}.png").write_bytes(bytes([name]))
    cohort = split_cohort(read_cohort(manifest, tmp_path))
    out = tmp_path / "deep/split.csv"
    write_split(cohort, out)
    pd.testing.assert_frame_equal(read_cohort(out, tmp_path).table, cohort.table, check_dtype=False)
    header = out.read_text(encoding="utf-8").splitlines()[0].split(",")
    assert set(header) == {"file", "image", "slide", "Patient_ID", "patient", "label", "mpp", "note", "split"}

    write_split(fold_cohort(cohort, folds=3), out)
    again = read_cohort(out, tmp_path)
    assert set(again.table["fold"]) == {"0", "1", "2"}
    assert not again.has_splits
    assert list(out.parent.iterdir()) == [out]


def test_a_split_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot be written: .*check the folder and its permissions"):
        write_split(cohort_of(["a", "b"]), tmp_path / "file" / "split.csv")
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunError, match="cannot be written: Is a directory"):
        write_split(cohort_of(["a", "b"]), tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_thousands_of_patients_are_split_quickly() -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice(["a", "b", "c"], 5000, p=[0.9, 0.08, 0.02]).tolist()
    table = split_cohort(cohort_of(labels, [f"p{n}" for n in rng.integers(0, 3000, 5000)])).table
    shares = pd.crosstab(table["label"], table["split"], normalize="index")
    np.testing.assert_allclose(shares, np.broadcast_to([0.15, 0.7, 0.15], (3, 3)), atol=0.05)
