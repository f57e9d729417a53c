"""From an archive's tables to a run: `cohort gdc`, `cohort lks`, `split --sizes`, and slides that tell no magnification."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
import train_tiny  # noqa: F401  registers the backbone resnet_micro
from cli_cases import TINY_TRAINING, call, refused, tiff

UNSCALED = "TCGA-05-4403-01Z-00-DX1.0f0c2f6c-0001-4f3e-9a4d-1b0c3d4e5f60.svs"


def gdc_tables(folder: Path, slides: list[str]) -> list[Path]:
    """A download manifest with CRLF, and the clinical table of the newer portal."""
    files = [f"id-{n}\t{name}\t{n:032x}\t{1000 + n}\treleased" for n, name in enumerate(slides)]
    patients = sorted({name[:12] for name in slides})
    cases = [f"{'TCGA-LUAD' if n % 2 else 'TCGA-LUSC'}\tcase-{n}\t{name}\t'--\t'--" for n, name in enumerate(patients)]
    manifest, clinical = folder / "gdc_manifest.txt", folder / "clinical.tsv"
    manifest.write_bytes("\r\n".join(["id\tfilename\tmd5\tsize\tstate", *files, ""]).encode())
    header = "project.project_id\tcases.case_id\tcases.submitter_id\tdemographic.gender\tdiagnoses.primary_diagnosis"
    clinical.write_bytes("\r\n".join([header, *cases, ""]).encode())
    return [manifest, clinical]


def slide_name(patient: int, slide: int) -> str:
    return f"TCGA-05-44{patient:02d}-01Z-00-DX{slide}.0f0c2f6c-{slide:04d}-4f3e-9a4d-1b0c3d4e5f60.svs"


@pytest.fixture(scope="module")
def tcga(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """18 slides of 12 patients, one of them without microns per pixel, as GDC's client leaves them; and their tables."""
    folder = tmp_path_factory.mktemp("tcga")
    names = [slide_name(patient, 1) for patient in range(12)] + [slide_name(patient, 2) for patient in range(6)]
    assert UNSCALED in names
    for number, name in enumerate(names):
        written = tiff(folder / f"{number}.tiff", mpp=None if name == UNSCALED else 2.0, width=400 + number)
        target = folder / "slides" / f"id-{number}" / name
        target.parent.mkdir(parents=True)
        written.rename(target)
    return folder, gdc_tables(folder, [*names, "TCGA-05-4400-01A-01-TS1.0f0c2f6c.svs"])


class TestGdc:
    def test_to_a_split(self, tcga: tuple[Path, list[Path]], tmp_path: Path) -> None:
        folder, tables = tcga
        out = tmp_path / "nsclc.csv"
        outcome = call("cohort", "gdc", *tables, "--out", out, "--slides", folder / "slides")
        assert outcome.status == 0, outcome
        assert f"17 files in {out}" in outcome.out
        assert f"2 files left out, in {tmp_path / 'nsclc-excluded.csv'}" in outcome.out
        excluded = pd.read_csv(tmp_path / "nsclc-excluded.csv").set_index("reason")
        assert excluded.loc["no magnification", "file"] == UNSCALED
        assert excluded.loc["frozen section", "file"].endswith("TS1.0f0c2f6c.svs")
        split = call("split", out, "--out", tmp_path / "split.csv", "--sizes", "663,166,214")
        assert split.status == 0, split
        assert "Asked for 663/166/214 files (1043): 11/3/3 of the 17 there are." in split.out
        assert pd.read_csv(tmp_path / "split.csv").groupby("patient")["split"].nunique().max() == 1

    def test_training_leaves_out_the_same_slide(self, tcga: tuple[Path, list[Path]], tmp_path: Path) -> None:
        """Without --slides the slide stays in the manifest; training stops at it, or lists it."""
        folder, tables = tcga
        assert call("cohort", "gdc", *tables, "--out", tmp_path / "all.csv").status == 0
        words = [
            "train",
            tmp_path / "all.csv",
            "--slides",
            folder / "slides",
            "--out",
            tmp_path / "run",
            *TINY_TRAINING,
        ]
        (error,) = refused(*words, "--dry-run")
        assert error.startswith("no usable scale (microns per pixel) in the file (")
        assert UNSCALED in error
        assert error.endswith("--on-unreadable exclude goes on without it")
        outcome = call(*words, "--dry-run", "--on-unreadable", "exclude")
        assert outcome.status == 0, outcome
        assert outcome.out.startswith("17 files of 17 slides of 12 patients\n")
        assert f"  left out, unreadable: {UNSCALED}\n" in outcome.out

    def test_patients_without_a_slide_are_counted(self, tcga: tuple[Path, list[Path]], tmp_path: Path) -> None:
        _, tables = tcga
        with tables[1].open() as text:
            more = tmp_path / "clinical.tsv"
            more.write_text(text.read() + "TCGA-LUSC\tcase-x\tTCGA-99-9999\t'--\t'--\n")
        outcome = call("cohort", "gdc", tables[0], more, "--out", tmp_path / "x.csv")
        assert "1 patients of the tables have no slide in the manifest" in outcome.err
        only = call("cohort", "gdc", tables[0], more, "--out", tmp_path / "x.csv", "--projects", "TCGA-LUAD")
        assert "another project" in only.out
        assert pd.read_csv(tmp_path / "x.csv")["label"].unique().tolist() == ["LUAD"]

    def test_a_table_is_not_overwritten(self, tcga: tuple[Path, list[Path]]) -> None:
        _, tables = tcga
        before = tables[1].read_bytes()
        assert refused("cohort", "gdc", *tables, "--out", tables[1]) == [
            f"this would overwrite a table that is read (--out {tables[1]}): give another file"
        ]
        assert tables[1].read_bytes() == before

    def test_nothing_is_written_where_something_is_wrong(self, tcga: tuple[Path, list[Path]], tmp_path: Path) -> None:
        _, tables = tcga
        errors = refused(
            "cohort", "gdc", tables[0], tmp_path / "gone.tsv", tmp_path / "x.tar.gz", "--out", tmp_path / "x.csv"
        )
        assert len(errors) == 2
        assert not (tmp_path / "x.csv").exists()
        assert refused("cohort", "gdc", "--out", "x.csv")[0].startswith("not given (TABLE): ")


class TestLks:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """Grey images without scale, dark but for an ellipse: 8 for training and 4 for testing of each class."""
        rows, columns = np.mgrid[:600, :640]
        for part, count in (("Train", 16), ("Test", 8)):
            lines = ["Image,Label"]
            for number in range(count):
                disc = (rows - 300) ** 2 + (columns - 320) ** 2 < (100 + count + 4 * number) ** 2
                path = tmp_path / part / f"{part[0]}{number}.tif"
                path.parent.mkdir(exist_ok=True)
                tifffile.imwrite(path, np.where(disc, 120 + number, 2).astype(np.uint8))
                lines.append(f"{path.name},{('Neg', 'AMA')[number % 2]}")
            (tmp_path / f"{part}_Labels.csv").write_text("\n".join(lines) + "\n")
        return tmp_path

    def test_to_a_run(self, folder: Path, tmp_path: Path) -> None:
        outcome = call("cohort", "lks", folder, "--out", tmp_path / "lks.csv")
        assert outcome.status == 0, outcome
        assert f"24 files in {tmp_path / 'lks.csv'}" in outcome.out
        assert "No file is left out" in outcome.out
        assert outcome.out.endswith("--out SPLIT.csv --keep-test\n")
        words = ["--out", tmp_path / "split.csv", "--sizes", "383,96,205", "--keep-test"]
        split = call("split", tmp_path / "lks.csv", *words)
        assert split.status == 0, split
        assert f"the column split of {tmp_path / 'lks.csv'} is drawn anew, but for what is tested" in split.err
        assert "Asked for 383/96/205 files (684): 13/3/8 of the 24 there are." in split.out
        table = pd.read_csv(tmp_path / "split.csv")
        assert set(table.loc[table["split"] == "test", "file"]) == {f"Test/T{number}.tif" for number in range(8)}
        reading = ["--downsample", 4, "--background", "keep"]
        training = ["--slides", folder, "--out", tmp_path / "run", *TINY_TRAINING, *reading]
        dry = call("train", tmp_path / "split.csv", *training, "--dry-run")
        assert dry.status == 0, dry
        assert "working sizes 160x150 to 160x150 px, 100% of it tissue" in dry.out

    def test_its_label_tables_are_not_overwritten(self, folder: Path) -> None:
        table = folder / "Test_Labels.csv"
        assert refused("cohort", "lks", folder, "--out", table) == [
            f"this would overwrite a table that is read (--out {table}): give another file"
        ]


def test_sizes_with_a_test_split_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("file,label\na.svs,x\nb.svs,y\n")
    (error,) = refused("split", tmp_path / "labels.csv", "--out", tmp_path / "s.csv", "--keep-test")
    assert error.startswith("no file is in the test split (--keep-test): ")


def test_the_help_of_sizes_is_not_that_of_images() -> None:
    """`bench` has an option of the same name that takes WIDTHxHEIGHT."""
    assert "--sizes N,N,N" in call("split", "--help").out
    assert "--sizes WxH,..." in call("bench", "io", "--help").out
    assert refused("split", "x.csv", "--out", "y.csv", "--sizes", "1,2") == [
        "1,2 is not a value it takes (--sizes): give 3 times a whole number, separated by commas"
    ]
