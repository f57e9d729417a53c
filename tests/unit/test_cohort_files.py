"""From a name to exactly one slide."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from wholeslide.cohort.files import SlideFolder, find_slides, other_suffixes, slide_stem, tcga_patient

UUID = "d4ff32cd-38cf-40ea-8213-45c2b100ac01"


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def dicom(path: Path, series: str) -> None:
    """The start of an explicit little endian DICOM file, enough to tell its series."""
    path.parent.mkdir(parents=True, exist_ok=True)
    uid = series.encode() + b"\0" * (len(series) % 2)
    head = b"\0" * 128 + b"DICM" + b"\x20\x00\x0d\x00UI\x04\x001.2\0"
    path.write_bytes(head + b"\x20\x00\x0e\x00UI" + len(uid).to_bytes(2, "little") + uid + path.name.encode())


def found(root: Path, name: str) -> list[str]:
    return [path.relative_to(root).as_posix() for path in SlideFolder(root).find(name)]


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("a/b.svs", "b"),
        ("b.OME.TIFF", "b"),
        ("b.ndpi", "b"),
        (f"TCGA-AA-0001-01Z-00-DX1.{UUID}", f"TCGA-AA-0001-01Z-00-DX1.{UUID}"),
        (f"TCGA-AA-0001-01Z-00-DX1.{UUID}.svs", f"TCGA-AA-0001-01Z-00-DX1.{UUID}"),
        ("C:\\slides\\b.mrxs", "b"),
        ("folder/", "folder"),
        (".svs", ".svs"),
    ],
)
def test_a_stem_loses_folder_and_slide_suffix_only(name: str, stem: str) -> None:
    assert slide_stem(name) == stem


def test_path_before_name_before_stem(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs", "deep/a.svs", "deep/b.svs", "c.tiff", "deep/c.svs")
    assert found(tmp_path, "a.svs") == ["a.svs"]
    assert found(tmp_path, str(tmp_path / "deep/a.svs")) == ["deep/a.svs"]
    assert found(tmp_path, "b.svs") == ["deep/b.svs"]
    assert found(tmp_path, "b") == ["deep/b.svs"]
    assert found(tmp_path, "c") == ["c.tiff", "deep/c.svs"]
    assert found(tmp_path, "d") == []
    assert found(tmp_path, "x" * 5000) == []


def test_a_folder_in_a_name_must_match(tmp_path: Path) -> None:
    touch(tmp_path, "set/malignant/1.png", "set/benign/2.png")
    assert found(tmp_path, "malignant/1.png") == ["set/malignant/1.png"]
    assert found(tmp_path, "malignant\\1.png") == ["set/malignant/1.png"]
    assert found(tmp_path, "malignant/1") == ["set/malignant/1.png"]
    assert found(tmp_path, "benign/1.png") == []
    assert found(tmp_path, "nant/1.png") == []


def test_another_suffix_is_another_file(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs")
    assert found(tmp_path, "a.png") == []
    assert found(tmp_path, "A.SVS") == ["a.svs"]


def test_case_decides_only_between_candidates(tmp_path: Path) -> None:
    touch(tmp_path, "x/s1.svs", "y/S1.svs")
    assert found(tmp_path, "s1") == ["x/s1.svs"]
    assert found(tmp_path, "S1") == ["y/S1.svs"]


def test_tcga_barcodes_match_at_their_parts(tmp_path: Path) -> None:
    touch(
        tmp_path,
        f"1/TCGA-AA-0001-01Z-00-DX1.{UUID}.svs",
        f"2/TCGA-AA-0001-01Z-00-DX10.{UUID}.svs",
        "3/TCGA-BB-0002-01Z-00-DX1.x.svs",
    )
    assert found(tmp_path, "TCGA-AA-0001-01Z-00-DX1") == [f"1/TCGA-AA-0001-01Z-00-DX1.{UUID}.svs"]
    assert found(tmp_path, "tcga-bb-0002") == ["3/TCGA-BB-0002-01Z-00-DX1.x.svs"]
    assert len(found(tmp_path, "TCGA-AA-0001")) == 2
    assert found(tmp_path, "TCGA-AA-000") == []
    assert found(tmp_path, "TCGA-BB") == []


def test_tcga_participant() -> None:
    assert tcga_patient(f"TCGA-AA-0001-01Z-00-DX1.{UUID}.svs") == "TCGA-AA-0001"
    assert tcga_patient("slide-1") is None


def test_composed_and_decomposed_accents_are_one_name(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "größe-é😐") for form in ("NFC", "NFD"))
    touch(tmp_path, f"{decomposed}/{decomposed}.svs")
    assert len(SlideFolder(tmp_path).find(composed)) == 1
    assert len(SlideFolder(tmp_path).find(f"{composed}/{composed}.svs")) == 1


def test_hidden_files_and_associated_images_are_passed_over(tmp_path: Path) -> None:
    touch(
        tmp_path, "a.svs", "._a.svs", ".trash/a.svs", "sub/a_label.png", "sub/a-macro.jpg", "sub/thumbnail.jpg", "a.csv"
    )
    assert find_slides(tmp_path) == [tmp_path / "a.svs"]


def test_the_jpeg_parts_of_a_vms_are_no_slides(tmp_path: Path) -> None:
    touch(tmp_path, "v/slide.vms", "v/slide_0.jpg", "plain/p.jpg")
    assert find_slides(tmp_path) == [tmp_path / "plain/p.jpg", tmp_path / "v/slide.vms"]


def test_files_of_other_kinds_are_counted(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs", "a.SVS.bak", "notes.txt", "deep/b.TXT", "deep/README", "deep/.hidden", ".trash/c.txt")
    assert other_suffixes(tmp_path) == {".bak": 1, ".txt": 2, "": 1}
    assert other_suffixes(tmp_path / "nowhere") == {}


def test_the_parts_of_a_slide_are_not_of_another_kind(tmp_path: Path) -> None:
    touch(tmp_path, "m/a.mrxs", "m/a/Slidedat.ini", "m/a/Data0000.dat", "m/b/Data0000.dat", "v/a.vms", "v/a.opt")
    touch(tmp_path, "m/a_label.png")
    assert other_suffixes(tmp_path) == {".dat": 1}


def test_a_dicom_folder_is_one_slide(tmp_path: Path) -> None:
    for level in range(3):
        dicom(tmp_path / f"case/level{level}.dcm", "1.2.3")
    dicom(tmp_path / "single/only.dcm", "1.2.4")
    assert find_slides(tmp_path) == [tmp_path / "case", tmp_path / "single/only.dcm"]
    assert find_slides(tmp_path / "case") == [tmp_path / "case"]
    assert found(tmp_path, "case") == ["case"]
    assert found(tmp_path, "level1") == ["case"]
    assert found(tmp_path, "only") == ["single/only.dcm"]


def test_series_that_share_a_folder_are_several_slides(tmp_path: Path) -> None:
    dicom(tmp_path / "all/a0.dcm", "1.2.3")
    dicom(tmp_path / "all/a1.dcm", "1.2.3")
    dicom(tmp_path / "all/b0.dcm", "1.2.33")
    assert find_slides(tmp_path) == [tmp_path / "all/a0.dcm", tmp_path / "all/b0.dcm"]
    assert found(tmp_path, "a1") == ["all/a0.dcm"]


def test_links_are_followed_once(tmp_path: Path) -> None:
    root = touch(tmp_path / "slides", "real/a.svs")
    (root / "real/loop").symlink_to(root)
    outside = touch(tmp_path / "nas", "b.svs")
    (root / "nas").symlink_to(outside)
    (root / "again.svs").symlink_to(root / "real/a.svs")
    assert found(root, "b") == ["nas/b.svs"]
    assert found(root, "a") == ["real/a.svs"]
    assert found(root, "a.svs") == ["real/a.svs"]
    assert find_slides(root) == [root / "again.svs", root / "nas/b.svs"]


def test_similar_names_are_offered(tmp_path: Path) -> None:
    touch(tmp_path, "slide_0001.svs", "slide_0002.svs", "other.svs", "sub/map.tiff")
    assert SlideFolder(tmp_path).similar("slide-0001.svs")[0] == "slide_0001.svs"
    assert SlideFolder(tmp_path).similar("map.svs") == ["map.tiff"]


def test_thousands_of_names_are_indexed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, *(f"{n % 50}/s{n}.svs" for n in range(500)))
    folder = SlideFolder(tmp_path)
    folder.find("s1")
    monkeypatch.setattr("wholeslide.cohort.files.os.walk", None)
    assert all(len(folder.find(f"s{n}")) == 1 for n in range(500))
