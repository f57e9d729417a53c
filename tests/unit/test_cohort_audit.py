"""What must not be trained on, and how it is said."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from wholeslide.cohort.audit import audit, leave_out_unreadable
from wholeslide.cohort.duplicates import same_content
from wholeslide.cohort.manifest import Cohort, read_cohort
from wholeslide.cohort.splits import split_cohort
from wholeslide.errors import CohortError, SlideError

DATA = Path(os.environ.get("WHOLESLIDE_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


def write(folder: Path, rows: str) -> Cohort:
    """Rows of ``file patient label split``; each file holds its own name unless it is there already."""
    table = pd.DataFrame(
        [row.split() for row in rows.strip().splitlines()], columns=["file", "patient", "label", "split"]
    )
    table = table.replace("-", "")
    for name in table["file"]:
        if not (folder / name).exists():
            (folder / name).write_bytes(name.encode())
    table = table.assign(slide=table["file"], path=[str(folder / name) for name in table["file"]], mpp=np.nan)
    return Cohort(table=table, classes=tuple(sorted(set(table["label"]) - {""})), slides_dir=folder)


SOUND = """\
a1 p1 a train
a2 p2 a valid
a3 p3 a test
b1 q1 b train
b2 q2 b valid
b3 q3 b test
"""


def problems(cohort: Cohort, **options: object) -> list[str]:
    with pytest.raises(CohortError) as caught:
        audit(cohort, **options)  # type: ignore[arg-type]
    return str(caught.value).splitlines()


def refuse(*names: str) -> Callable[[Path], None]:
    def open_check(path: Path) -> None:
        if path.name in names:
            raise SlideError.single("cannot decode the slide", where=path.name, remedy="copy it again")

    return open_check


def test_a_sound_cohort_passes(tmp_path: Path) -> None:
    cohort = write(tmp_path, SOUND)
    assert audit(cohort, open_check=refuse()) == ()
    kept, excluded = leave_out_unreadable(cohort, refuse())
    pd.testing.assert_frame_equal(kept.table, cohort.table)
    assert kept.classes == ("a", "b")
    assert list(excluded) == ["file", "error"]
    assert excluded.empty


def test_everything_is_reported_at_once(tmp_path: Path) -> None:
    (tmp_path / "copy").write_bytes(b"a1")
    cohort = write(
        tmp_path,
        """
        a1   p1 a train
        copy p9 a test
        a2   p2 a valid
        a3   p2 a test
        b1   q1 b train
        b2   q2 b valid
        b2   q2 b valid
        c1   r1 c train
        u1   s1 - train
        """,
    )
    keep = "put files of the class into"
    assert problems(cohort, open_check=refuse("b1", "a2")) == [
        "cannot decode the slide (a2): copy it again",
        "cannot decode the slide (b1): copy it again",
        f"the same file in 2 rows in valid (b2: {tmp_path / 'b2'}): keep one row",
        "patient 'p2' is in split valid and test (a2, a3): put all files of the patient in one split",
        "no label (u1): give the label or remove the row",
        f"class 'c' has no validation file (column 'split'): {keep} 'valid', or remove the class",
        f"class 'b' has no test file (column 'split'): {keep} 'test', or remove the class",
        f"class 'c' has no test file (column 'split'): {keep} 'test', or remove the class",
        "files with the same content in train and test (a1, copy): keep one, or put them in one split",
    ]


def test_one_class_only(tmp_path: Path) -> None:
    assert problems(write(tmp_path, "x p a -\ny q a -")) == [
        "one class only, 'a' (column 'label'): give files of at least two classes"
    ]
    assert "no class at all" in problems(write(tmp_path, "x p - -"))[1]


def test_labels_that_differ_in_case_are_one_class_misspelt(tmp_path: Path) -> None:
    assert problems(write(tmp_path, "x p tumor -\ny q Tumor -\nz r normal -")) == [
        "labels differ only in case (Tumor, tumor): write them alike"
    ]


def test_labels_unknown_to_a_run(tmp_path: Path) -> None:
    cohort = write(tmp_path, "x p tumour test\ny q normal test")
    assert problems(cohort, classes=("normal", "tumor")) == ["unknown label 'tumour' (x): use one of normal, tumor"]
    assert audit(write(tmp_path, "y q normal test"), classes=("normal", "tumor")) == ()


def test_splits_without_training_or_validation(tmp_path: Path) -> None:
    assert problems(write(tmp_path, "x p a train\ny q b train")) == [
        "no validation file (column 'split'): put files of every class into 'valid'"
    ]


def test_a_split_without_test_files_may_be_trained(tmp_path: Path) -> None:
    cohort = write(tmp_path, "\n".join(row for row in SOUND.splitlines() if "test" not in row))
    assert audit(cohort) == ()


def test_a_group_in_two_splits(tmp_path: Path) -> None:
    cohort = write(tmp_path, SOUND)
    cohort.table["site"] = ["x", "y", "x", "z", "u", "v"]
    assert audit(cohort) == ()
    assert problems(cohort, group="site") == [
        "site 'x' is in split train and test (a1, a3): put all files of the site in one split"
    ]
    assert problems(cohort, group="hospital")[0] == "no column 'hospital' (--group): use one of patient, slide, site"


def test_a_patient_in_two_folds(tmp_path: Path) -> None:
    cohort = write(tmp_path, "x p a -\ny p b -")
    cohort.table["fold"] = ["0", "1"]
    assert problems(cohort) == ["patient 'p' is in fold 0 and 1 (x, y): put all files of the patient in one fold"]


def test_a_slide_of_two_patients(tmp_path: Path) -> None:
    cohort = write(tmp_path, SOUND)
    cohort.table["slide"] = ["s", "t", "u", "s", "v", "w"]
    assert problems(cohort) == ["slide 's' has patients p1, q1 (a1, b1): give each slide one patient"]


def test_content_twice_in_one_split_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "again").write_bytes(b"a1")
    cohort = write(tmp_path, SOUND + "again p1 a train")
    (warning,) = audit(cohort)
    assert str(warning) == "files with the same content (a1, again): keep one of them"


def test_a_link_to_another_row_is_the_same_file(tmp_path: Path) -> None:
    cohort = write(tmp_path, SOUND + "link z1 a test")
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "a1")
    assert f"the same file in 2 rows in train and test (a1, link: {tmp_path / 'a1'}): keep one row" in problems(cohort)


def test_content_with_two_labels_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "again").write_bytes(b"a1")
    cohort = write(tmp_path, SOUND + "again p1 b train")
    assert problems(cohort) == ["files with the same content are labelled a and b (a1, again): keep the right one"]


def test_a_unit_with_two_labels(tmp_path: Path) -> None:
    cohort = write(tmp_path, SOUND + "b9 p1 b train")
    assert audit(cohort, unit="slide") == audit(cohort) == ()
    assert problems(cohort, unit="patient") == [
        "files labelled a and b (patient p1): score each file by itself: --unit file"
    ]


def test_unreadable_slides_are_left_out_and_listed(tmp_path: Path) -> None:
    cohort = write(tmp_path, SOUND + "a9 p9 a train\nb9 q9 b train")

    def open_check(path: Path) -> None:
        if path.name == "b9":
            raise PermissionError(13, "Permission denied")
        refuse("a9")(path)

    kept, excluded = leave_out_unreadable(cohort, open_check)
    assert kept.table["file"].tolist() == ["a1", "a2", "a3", "b1", "b2", "b3"]
    assert excluded["file"].tolist() == ["a9", "b9"]
    assert excluded["error"].tolist() == [
        "cannot decode the slide (a9): copy it again",
        "cannot read the slide, [Errno 13] Permission denied (b9): mend or remove it",
    ]


def test_a_class_that_cannot_be_read_is_not_dropped_quietly(tmp_path: Path) -> None:
    with pytest.raises(CohortError) as caught:
        leave_out_unreadable(write(tmp_path, SOUND), refuse("a1", "b1", "b2", "b3"))
    assert str(caught.value).splitlines() == [
        "no slide of the class can be read (class 'b'): mend some of them",
        "cannot decode the slide (b1): copy it again",
        "cannot decode the slide (b2): copy it again",
        "cannot decode the slide (b3): copy it again",
    ]


def test_where_no_slide_can_be_read_each_is_named_once(tmp_path: Path) -> None:
    cohort = write(tmp_path, SOUND)
    expected = [f"cannot decode the slide ({file}): copy it again" for file in cohort.table["file"]]
    assert problems(cohort, open_check=refuse(*cohort.table["file"])) == expected


def test_other_exceptions_of_the_check_are_not_swallowed(tmp_path: Path) -> None:
    def broken(path: Path) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        audit(write(tmp_path, SOUND), open_check=broken)


def test_same_content_is_found_by_bytes_alone(tmp_path: Path) -> None:
    size = 1 << 20
    content = np.random.default_rng(0).bytes(size)
    for name in ("a", "z/b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    changed = bytearray(content)
    changed[size // 3] ^= 1  # between the samples
    (tmp_path / "changed").write_bytes(changed)
    (tmp_path / "short").write_bytes(content[:-1])
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for folder in ("d1", "d2", "d3"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.dcm").write_bytes(b"x" if folder != "d3" else b"y")
    names = ["a", "z/b", "changed", "short", "d1", "d2", "d3", "gone"]
    same = same_content([tmp_path / name for name in names])
    assert sorted(same) == [[tmp_path / "a", tmp_path / "z/b"], [tmp_path / "d1", tmp_path / "d2"]]
    assert len(same_content([tmp_path / "a", tmp_path / "link"])) == 0


def test_slides_of_different_sizes_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        (tmp_path / str(number)).write_bytes(b"x" * number)
    monkeypatch.setattr(Path, "open", None)
    assert same_content(tmp_path.iterdir()) == []


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no test data in {DATA}")
@pytest.mark.parametrize(("name", "group"), [("glas", "patient"), ("lymphoma", "slide"), ("crchisto", "patient")])
def test_real_cohorts_pass(name: str, group: str) -> None:
    cohort = read_cohort(DATA / name / "labels.csv", DATA / name)
    assert audit(split_cohort(cohort, group=group), group=group) == ()


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no test data in {DATA}")
def test_the_challenges_own_split_of_the_glands_leaks(tmp_path: Path) -> None:
    manifest = tmp_path / "labels.csv"
    text = (DATA / "glas/labels.csv").read_text()
    text = text.replace("challenge_split", "split").replace("testA", "valid").replace("testB", "test")
    manifest.write_text(text.replace("images/valid", "images/testA").replace("images/test_", "images/testB_"))
    leaks = problems(read_cohort(manifest, DATA / "glas"))
    assert len(leaks) == 11
    assert all("put all files of the patient in one split" in leak for leak in leaks)
