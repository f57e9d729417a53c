"""From LKS's folder to a manifest: its authors' layout, folders that are classes, and tables of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from wholeslide.cohort.assembly import Assembly, write_assembly
from wholeslide.cohort.lks import assemble_lks
from wholeslide.cohort.manifest import read_cohort
from wholeslide.errors import CohortError


def images(folder: Path, *names: str) -> Path:
    """Empty files: nothing is opened."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def labels(path: Path, *rows: str, header: str = "Image,Class") -> Path:
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def said(assembly: Assembly) -> list[tuple[str, ...]]:
    return [tuple(row) for row in assembly.table[["file", "label", "split"]].to_numpy()]


def reasons(assembly: Assembly) -> dict[str, str]:
    return dict(zip(assembly.excluded["file"], assembly.excluded["reason"], strict=True))


class TestItsOwnTables:
    def folder(self, tmp_path: Path) -> Path:
        images(tmp_path, "Train/001.tif", "Train/002.tif", "Train/003.tif", "Test/001.tif", "Test/004.tif")
        labels(
            tmp_path / "Train_Labels.csv",
            "001.tif,Neg",
            "002.tif,AMA",
            "003.tif,SMA_V",
            header="Slide Name,Ground Truth",
        )
        labels(tmp_path / "Test_Labels.csv", "001.tif,SMA-T", "004,negative")
        return tmp_path

    def test_train_and_test(self, tmp_path: Path) -> None:
        assembly = assemble_lks(self.folder(tmp_path))
        assert said(assembly) == [
            ("Test/001.tif", "SMA-T", "test"),
            ("Test/004.tif", "Negative", "test"),
            ("Train/001.tif", "Negative", "train"),
            ("Train/002.tif", "AMA", "train"),
            ("Train/003.tif", "SMA-V", "train"),
        ]
        assert assembly.table["slide"].tolist() == ["Test/001.tif", "004", "Train/001.tif", "002", "003"]
        assert assembly.table["patient"].tolist() == assembly.table["slide"].tolist()
        assert assembly.excluded.empty

    def test_what_is_written_is_a_manifest(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path)
        write_assembly(assemble_lks(folder), tmp_path / "lks.csv")
        cohort = read_cohort(tmp_path / "lks.csv", folder)
        assert cohort.classes == ("AMA", "Negative", "SMA-T", "SMA-V")
        assert Path(cohort.table["path"][0]) == folder / "Test/001.tif"

    def test_what_is_left_out_and_why(self, tmp_path: Path) -> None:
        folder = images(self.folder(tmp_path), "Train/005.tif", "Train/006.tif", "Train/007.tif", "Train/a/008.tif")
        images(folder, "Train/b/008.tif", "Train/009.tif")
        with (folder / "Train_Labels.csv").open("a") as table:
            table.write("gone.tif,AMA\n002.tif,ama\n006.tif,AMA\n006.tif,SMA-V\n007.tif,ANA\n008.tif,AMA\n")
        assembly = assemble_lks(folder)
        assert reasons(assembly) == {
            "gone.tif": "not in the folder of the slides",
            "002.tif": "twice in the tables",
            "Train/006.tif": "labelled with two classes",
            "Train/007.tif": "unknown class",
            "008.tif": "several slides of this name",
            "Train/005.tif": "no label",
            "Train/009.tif": "no label",
        }
        assert len(assembly.table) == 5
        details = dict(zip(assembly.excluded["file"], assembly.excluded["detail"], strict=True))
        assert details["Train/006.tif"] == "AMA and SMA-V"
        assert details["Train/007.tif"] == "'ANA' is none of Negative, AMA, SMA-V, SMA-T"
        assert details["008.tif"] == "Train/a/008.tif, Train/b/008.tif"


def test_folders_that_are_classes(tmp_path: Path) -> None:
    images(tmp_path, "train/Neg/a.tif", "train/AMA/b.png", "test/SMA-V/more/c.tif", "test/d.tif", "test/AMA/notes.txt")
    assembly = assemble_lks(tmp_path)
    assert said(assembly) == [
        ("test/SMA-V/more/c.tif", "SMA-V", "test"),
        ("train/AMA/b.png", "AMA", "train"),
        ("train/Neg/a.tif", "Negative", "train"),
    ]
    assert reasons(assembly) == {"test/d.tif": "no label"}


def test_folders_without_a_split(tmp_path: Path) -> None:
    table = assemble_lks(images(tmp_path, "Neg/a.tif", "AMA/b.tif")).table
    assert list(table.columns) == ["file", "slide", "patient", "label"]


class TestATableOfOnesOwn:
    def test_with_patients_and_split(self, tmp_path: Path) -> None:
        images(tmp_path, "x/a.tif", "x/b.tif", "y/c.tif")
        rows = ["AMA,p1,a.tif,Train", "neg,p1,x/b.tif,Validation", "SMA-T,,c,test"]
        table = assemble_lks(tmp_path, labels(tmp_path / "my.csv", *rows, header="label,patient,image,split")).table
        assert table["file"].tolist() == ["x/a.tif", "x/b.tif", "y/c.tif"]
        assert table["patient"].tolist() == ["p1", "p1", "c"]
        assert table["split"].tolist() == ["train", "valid", "test"]

    def test_it_stands_in_place_of_those_in_the_folder(self, tmp_path: Path) -> None:
        images(tmp_path, "Train/a.tif", "Train/b.tif")
        labels(tmp_path / "Train_Labels.csv", "a.tif,AMA", "b.tif,AMA")
        assembly = assemble_lks(tmp_path, labels(tmp_path / "my.csv", "a.tif,Neg"))
        assert assembly.table["label"].tolist() == ["Negative"]
        assert reasons(assembly) == {"Train/b.tif": "no label"}

    def test_a_path_outside_of_the_folder(self, tmp_path: Path) -> None:
        images(tmp_path, "inside/a.tif", "b.tif")
        assembly = assemble_lks(tmp_path / "inside", labels(tmp_path / "my.csv", "a,AMA", f"{tmp_path / 'b.tif'},Neg"))
        assert assembly.table["file"].tolist() == [str(tmp_path / "b.tif"), "a.tif"]
        write_assembly(assembly, tmp_path / "lks.csv")
        assert read_cohort(tmp_path / "lks.csv", tmp_path / "inside").table["path"].tolist() == [
            str(tmp_path / "b.tif"),
            str(tmp_path / "inside/a.tif"),
        ]

    def test_all_errors_together(self, tmp_path: Path) -> None:
        labels(images(tmp_path, "a.tif") / "Train_Labels.csv", "a.tif", header="image")
        labels(tmp_path / "Test_Labels.csv", ",AMA,test", "a.tif,AMA,later", header="image,label,split")
        with pytest.raises(CohortError) as caught:
            assemble_lks(tmp_path)
        assert [problem.what for problem in caught.value.problems] == [
            "no file",
            "unknown split 'later'",
            "one column only",
        ]


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(CohortError, match="no such folder"):
        assemble_lks(tmp_path / "gone")


def test_no_slide_is_left(tmp_path: Path) -> None:
    with pytest.raises(CohortError, match=r"no slide is left of 2 files \(no label 2\)"):
        assemble_lks(images(tmp_path, "a.tif", "b.tif"))
