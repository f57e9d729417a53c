"""Manifests as people write them."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pandas as pd
import pytest

from wholeslide.cohort.manifest import cohort_from_files, read_cohort
from wholeslide.cohort.splits import write_split
from wholeslide.errors import CohortError


def make(root: Path, csv: str | bytes, *files: str) -> tuple[Path, Path]:
    slides = root / "slides"
    slides.mkdir(exist_ok=True)
    for name in files:
        path = slides / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    manifest = root / "manifest.csv"
    manifest.write_bytes(csv if isinstance(csv, bytes) else csv.encode())
    return manifest, slides


def problems(manifest: Path, slides: Path | None, **options: object) -> list[str]:
    with pytest.raises(CohortError) as caught:
        read_cohort(manifest, slides, **options)  # type: ignore[arg-type]
    return str(caught.value).splitlines()


def test_our_own_form(tmp_path: Path) -> None:
    csv = """\
file,slide,patient,label,site,split,mpp,age
a.svs,S1,007,tumor,Rome,training,0.25,61
sub/b.svs,S1,007,normal,Rome,Train,,
c,S2,08,tumor,,VAL,0.5,NA
"""
    manifest, slides = make(tmp_path, csv, "a.svs", "sub/b.svs", "x/c.tiff")
    cohort = read_cohort(manifest, slides)
    assert cohort.classes == ("normal", "tumor")
    assert list(cohort.table) == ["file", "path", "slide", "patient", "label", "split", "mpp", "site", "age"]
    assert cohort.table["patient"].tolist() == ["007", "007", "08"]
    assert cohort.table["split"].tolist() == ["train", "train", "valid"]
    assert cohort.table["path"].tolist() == [str(slides / name) for name in ("a.svs", "sub/b.svs", "x/c.tiff")]
    assert cohort.table["mpp"].iloc[0] == 0.25
    assert math.isnan(cohort.table["mpp"].iloc[1])
    assert cohort.table["age"].tolist() == ["61", "", "NA"]
    assert cohort.split("valid")["file"].tolist() == ["c"]


def test_defaults(tmp_path: Path) -> None:
    manifest, slides = make(tmp_path, "Image , LABEL\n sub/a.ome.tiff , 1\nb.svs,0\n", "sub/a.ome.tiff", "b.svs")
    table = read_cohort(manifest, slides).table
    assert table["slide"].tolist() == ["a", "b"]
    assert table["patient"].tolist() == ["a", "b"]
    assert table["split"].tolist() == ["", ""]
    assert table["mpp"].isna().all()


def test_slide_without_file_is_the_file(tmp_path: Path) -> None:
    manifest, slides = make(tmp_path, "slide,label\nS1,a\nS2,b\n", "S1.svs", "S2.ndpi")
    table = read_cohort(manifest, slides).table
    assert table["file"].tolist() == table["slide"].tolist() == ["S1", "S2"]
    assert [Path(path).name for path in table["path"]] == ["S1.svs", "S2.ndpi"]


def test_file_and_slide_may_repeat_the_slide(tmp_path: Path) -> None:
    manifest, slides = make(tmp_path, "file,slide,label\na/1.png,S,x\nb/1.png,S,y\n", "a/1.png", "b/1.png")
    table = read_cohort(manifest, slides).table
    assert table["slide"].tolist() == ["S", "S"]
    assert table["path"].nunique() == 2


def test_the_papers_form(tmp_path: Path) -> None:
    csv = "slide_id,label,type\nS1,0,train\nS2,1,train\nS3,0,valid\nS4,1,valid\nS5,1,test\n"
    manifest, slides = make(tmp_path, csv, *(f"u{n}/S{n}.svs" for n in range(1, 6)))
    cohort = read_cohort(manifest, slides)
    assert cohort.table["split"].tolist() == ["train", "train", "valid", "valid", "test"]
    assert cohort.classes == ("0", "1")
    assert "type" not in cohort.table


def test_a_type_that_is_no_split_stays_a_column(tmp_path: Path) -> None:
    manifest, _ = make(tmp_path, "slide_id,label,type\nS1,0,primary\nS2,1,test\n")
    table = read_cohort(manifest).table
    assert table["type"].tolist() == ["primary", "test"]
    assert table["split"].tolist() == ["", ""]


CLAM = "case_id,slide_id,label\np1,10,tumor\np2,20,normal\np3,30,tumor\np4,40,normal\n"


@pytest.mark.parametrize("ids", ["10,20.0,30.0\n1,40,,\n", "10,20,30\n1,40,,\n"])
def test_clams_form_with_its_splits(tmp_path: Path, ids: str) -> None:
    manifest, slides = make(tmp_path, CLAM, *(f"{n}0.svs" for n in range(1, 5)))
    splits = tmp_path / "splits_0.csv"
    splits.write_text(f",train,val,test\n0,{ids}")
    cohort = read_cohort(manifest, slides, splits_csv=splits)
    assert cohort.table["split"].tolist() == ["train", "valid", "test", "train"]
    assert cohort.table["patient"].tolist() == ["p1", "p2", "p3", "p4"]
    assert cohort.table["slide_id"].tolist() == cohort.table["slide"].tolist()


def test_clams_splits_must_fit_the_manifest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest, _ = make(tmp_path, CLAM)
    splits = tmp_path / "splits_0.csv"
    splits.write_text(",train,val,test\n0,10,20,50\n1,30,10,\n")
    assert problems(manifest, None, splits_csv=splits) == [
        "slide in train and valid (splits_0.csv line 3: 10): keep one",
        "no such slide in the manifest (splits_0.csv line 2: 50): add it or take it out",
    ]
    splits.write_text("slide,bool\n10,True\n")
    assert problems(manifest, None, splits_csv=splits) == [
        f"no columns train, val, test ({splits}): give CLAM's splits_k.csv"
    ]
    splits.write_text(",train,val,test\n0,10,20,30\n")
    with caplog.at_level(logging.WARNING):
        assert len(read_cohort(manifest, splits_csv=splits).table) == 3
    assert "1 of 4 rows are in no split of splits_0.csv and are left out" in caplog.text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_what_spreadsheets_write(tmp_path: Path, encoding: str, separator: str, newline: str) -> None:
    rows = [
        ["file", "label", "mpp"],
        ["größe 1", "A", "0,5" if separator == ";" else "0.5"],
        ["b", "B", ""],
        ["", "", ""],
    ]
    text = newline.join(separator.join(row) for row in rows)
    manifest, _ = make(tmp_path, text.encode(encoding))
    table = read_cohort(manifest).table
    assert table["file"].tolist() == ["größe 1", "b"]
    assert table["mpp"].iloc[0] == 0.5


def test_quoted_cells_and_an_index_column(tmp_path: Path) -> None:
    csv = 'Unnamed: 0,file,label,,note\n0,"a, b.svs","x;y",,"two\nlines"\n1,c.svs,z,,\n'
    manifest, _ = make(tmp_path, csv)
    table = read_cohort(manifest).table
    assert table["file"].tolist() == ["a, b.svs", "c.svs"]
    assert list(table)[-1] == "note"
    assert not any("nnamed" in str(name) for name in table)


@pytest.mark.parametrize(
    ("csv", "error"),
    [
        (b"", "the table is empty ({}): give a header line and a line for each file"),
        (b"file,label\n", "no rows ({}): give a header line and a line for each file"),
        (b"file,label,Label\na,b,c\n", "column 'label' stands twice in the header ({}): rename or remove one"),
        (b"PK\x03\x04\xff\xfe\x00", 'not a text file in UTF-8 ({}): save it as "CSV UTF-8"'),
        ("file,label\ngröße,a\n".encode("cp1252"), 'not a text file in UTF-8 ({}): save it as "CSV UTF-8"'),
        (b"file,label\na\x00,b\n", 'not a text file ({}): save it as "CSV UTF-8"'),
        (
            b"name,label\na,b\n",
            "no column names the slides, only name, label ({}): "
            "give a column 'file' (or 'image', 'slide', 'slide_id') with the name of each slide",
        ),
    ],
)
def test_tables_that_are_none(tmp_path: Path, csv: bytes, error: str) -> None:
    manifest, _ = make(tmp_path, csv)
    assert problems(manifest, None) == [error.format(manifest)]


def test_a_manifest_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "none.csv"
    assert problems(path, None) == [f"cannot read the table, No such file or directory ({path}): check the path"]
    assert "cannot read the table, Is a directory" in problems(tmp_path, None)[0]


def test_rows_of_the_wrong_length(tmp_path: Path) -> None:
    manifest, _ = make(tmp_path, "file,label\na\nb,x,y\nc,x,,\nd,x\n")
    remedy = "give each column a cell, and quote cells that hold the separator"
    assert problems(manifest, None) == [
        f"1 cells under 2 columns (manifest.csv line 2): {remedy}",
        f"3 cells under 2 columns (manifest.csv line 3): {remedy}",
    ]


def test_all_problems_of_a_manifest_come_together(tmp_path: Path) -> None:
    csv = """\
file,patient,label,split,mpp
a.svs,p1,x,train,0.5
b.svs,p1,,valid,0.5
,p3,x,train,0.5
c.svs,p4,NA,train,0.5
d.svs,,y,later,fine
gone.svs,p6,y,,-1
twice,p7,y,train,0.01
"""
    manifest, slides = make(tmp_path, csv, "a.svs", "b.svs", "c.svs", "d.svs", "u/twice.svs", "v/twice.svs")
    label = "give the label or remove the row"
    mpp = "give µm per pixel of the stored image, or leave the cell empty to use the file's own"
    assert problems(manifest, slides) == [
        "no file (manifest.csv line 4): name the slide's file, or remove the row",
        "no patient (manifest.csv line 6: d.svs): name the patient in each row, or remove the column",
        f"no label (manifest.csv line 3: b.svs): {label}",
        f"the label 'NA' reads as missing (manifest.csv line 5: c.svs): {label}",
        "unknown split 'later' (manifest.csv line 6: d.svs): write train, valid or test",
        "no split (manifest.csv line 7: gone.svs): write train, valid or test in each row, or in none",
        f"the mpp 'fine' is no number from 0.05 to 20 (manifest.csv line 6: d.svs): {mpp}",
        f"the mpp '-1' is no number from 0.05 to 20 (manifest.csv line 7: gone.svs): {mpp}",
        f"the mpp '0.01' is no number from 0.05 to 20 (manifest.csv line 8: twice): {mpp}",
        f"no such slide among the 6 in {slides} (manifest.csv line 7: gone.svs): correct the name or remove the row",
        "'twice' may be any of u/twice.svs, v/twice.svs (manifest.csv line 8: twice): "
        "write the path below the folder of the slides",
        "patient 'p1' is in split train and valid (a.svs, b.svs): put all files of the patient in one split",
    ]


def test_a_wrong_folder_is_said_once(tmp_path: Path) -> None:
    csv = "file,label\n" + "".join(f"s{n}.svs,{n % 2}\n" for n in range(30))
    manifest, slides = make(tmp_path, csv)
    assert problems(manifest, slides) == [
        f"none of the 30 files of manifest.csv is there, s0.svs for one ({slides}): "
        "give the folder of the slides with --slides"
    ]
    missing = tmp_path / "elsewhere"
    assert problems(manifest, missing) == [f"no such folder ({missing}): give the folder of the slides with --slides"]


def test_a_typing_error_gets_a_hint(tmp_path: Path) -> None:
    manifest, slides = make(tmp_path, "file,label\nslide-1.svs,a\nb.svs,b\n", "slide_1.svs", "b.svs")
    assert problems(manifest, slides)[0].endswith("(manifest.csv line 2: slide-1.svs): did you mean slide_1.svs?")


def test_one_stem_in_two_folders_would_merge_two_slides(tmp_path: Path) -> None:
    manifest, slides = make(tmp_path, "file,label\nx/1.png,a\ny/1.png,b\n", "x/1.png", "y/1.png")
    assert problems(manifest, slides)[0] == (
        "several files have the stem '1', so they would count as one slide (manifest.csv line 2: x/1.png): "
        "add a column 'slide' that tells them apart"
    )


def test_labels_are_needed_for_training_only(tmp_path: Path) -> None:
    manifest, slides = make(tmp_path, "file,note\na.svs,\n", "a.svs")
    assert problems(manifest, slides) == ["no column 'label' (manifest.csv): add one with each file's class"]
    cohort = read_cohort(manifest, slides, labelled=False)
    assert cohort.classes == ()
    assert cohort.table["label"].tolist() == [""]
    manifest, slides = make(tmp_path, "file,label,split\na.svs,unknown,\nb.svs,x,test\n", "a.svs", "b.svs")
    table = read_cohort(manifest, slides, labelled=False).table
    assert table["label"].tolist() == ["", "x"]
    assert table["split"].tolist() == ["", "test"]


def test_none_is_a_class(tmp_path: Path) -> None:
    manifest, _ = make(tmp_path, "file,label\na,none\nb,None \nc,epithelial\n")
    assert read_cohort(manifest).classes == ("None", "epithelial", "none")


def test_whole_numbers_sort_by_value(tmp_path: Path) -> None:
    manifest, _ = make(tmp_path, "file,label\n" + "".join(f"f{n},{n}\n" for n in (10, 9, 2, 0)))
    assert read_cohort(manifest).classes == ("0", "2", "9", "10")


def test_one_number_written_in_several_ways_is_not_several_classes(tmp_path: Path) -> None:
    manifest, _ = make(tmp_path, "file,label\na,1\nb,01\nc,0\nd,1.0\ne,-0.\nf,1.5\ng,1\n")
    assert problems(manifest, None) == [
        "the labels '1', '01', '1.0' are one number (manifest.csv): write them alike",
        "the labels '0', '-0.' are one number (manifest.csv): write them alike",
    ]
    read_cohort(manifest, labelled=False)
    manifest, _ = make(tmp_path, "file,label\na,1\nb,1a\nc,I\nd,1.5\ne,v1.0\n")
    assert len(read_cohort(manifest).classes) == 5


def test_line_breaks_in_names(tmp_path: Path) -> None:
    csv = 'file,label\n"two\nlines",a\n"two\r\nreturns",a\n"odd\rone",b\n'
    manifest, _ = make(tmp_path, csv)
    with pytest.raises(CohortError) as caught:
        read_cohort(manifest)
    assert [(problem.what, problem.where) for problem in caught.value.problems] == [
        ("a carriage return in the name, which CSV files do not keep", "manifest.csv line 7: odd\rone")
    ]
    manifest, _ = make(tmp_path, csv.partition('"odd')[0])
    cohort = read_cohort(manifest)
    write_split(cohort, tmp_path / "split.csv")
    again = read_cohort(tmp_path / "split.csv")
    assert again.table["file"].tolist() == cohort.table["file"].tolist() == ["two\nlines", "two\r\nreturns"]


def test_tcga_slides_without_patients_are_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest, _ = make(tmp_path, "slide_id,label\nTCGA-AA-0001-01Z-00-DX1,a\nTCGA-AA-0001-01Z-00-DX2,b\n")
    with caplog.at_level(logging.WARNING):
        read_cohort(manifest)
    assert "2 slides come from 1 TCGA patients" in caplog.text


def test_files_for_prediction(tmp_path: Path) -> None:
    _, slides = make(tmp_path, "", "a.svs", "x/1.png", "y/1.png", "odd.bin", ".hidden.svs")
    cohort = cohort_from_files([slides, slides / "a.svs", slides / "odd.bin"])
    table = cohort.table.set_index("file")
    assert table.index.tolist() == [str(slides / name) for name in ("a.svs", "x/1.png", "y/1.png", "odd.bin")]
    assert table["slide"].tolist() == ["a", str(slides / "x/1.png"), str(slides / "y/1.png"), "odd.bin"]
    assert (table["label"] == "").all()
    assert table["mpp"].isna().all()
    assert cohort.classes == ()


def test_nothing_to_predict(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CohortError) as caught:
        cohort_from_files([tmp_path / "empty", tmp_path / "gone.svs"])
    assert str(caught.value).splitlines() == [
        f"no slides found ({tmp_path / 'empty'}): give a folder with slides, or the files",
        f"no such slide or folder ({tmp_path / 'gone.svs'}): check the path",
    ]
    with pytest.raises(CohortError, match="nothing to predict"):
        cohort_from_files([])


def test_table_columns_are_text(tmp_path: Path) -> None:
    manifest, _ = make(tmp_path, "file,patient,label\n001,002,1\n1,2,0\n")
    table = read_cohort(manifest).table
    assert all(isinstance(value, str) for value in table.drop(columns="mpp").to_numpy().ravel())
    assert table["mpp"].dtype == float
    assert pd.RangeIndex(2).equals(table.index)
