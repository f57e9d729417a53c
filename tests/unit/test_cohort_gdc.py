"""From GDC's tables to a manifest: what is taken, what is left out and why, on tables of both generations of the portal."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from wholeslide.cohort.assembly import Assembly, excluded_path, leave_out_unscaled, write_assembly
from wholeslide.cohort.gdc import assemble_gdc, patients_without_slide
from wholeslide.cohort.gdc_tables import read_gdc_tables
from wholeslide.cohort.manifest import read_cohort
from wholeslide.errors import CohortError

OLD_CLINICAL = ["case_id", "case_submitter_id", "project_id", "age_at_index", "ethnicity", "gender", "vital_status"]
OLD_CLINICAL += ["primary_diagnosis", "tissue_or_organ_of_origin", "treatment_or_therapy", "treatment_type"]
NEW_CLINICAL = ["project.project_id", "cases.case_id", "cases.consent_type", "cases.submitter_id"]
NEW_CLINICAL += [
    "demographic.gender",
    "demographic.vital_status",
    "diagnoses.primary_diagnosis",
    "diagnoses.diagnosis_id",
]
OLD_SHEET = ["File ID", "File Name", "Data Category", "Data Type", "Project ID", "Case ID", "Sample ID", "Sample Type"]
NEW_SHEET = [*OLD_SHEET[:-1], "Tissue Type", "Tumor Descriptor", "Specimen Type", "Preservation Method"]
ADENO, SQUAMOUS = "Adenocarcinoma, NOS", "Squamous cell carcinoma, NOS"
PATIENTS = {"TCGA-05-4244": "TCGA-LUAD", "TCGA-05-4245": "TCGA-LUAD", "TCGA-18-3406": "TCGA-LUSC"}


def diagnosis_of(project: str) -> str:
    return ADENO if project.endswith("LUAD") else SQUAMOUS


def uuid(number: int) -> str:
    return f"{number:08d}-40ea-4213-8c00-ac01d4ff32cd"


def slide(barcode: str, number: int) -> str:
    return f"{barcode}.{uuid(1000 + number).upper()}.svs"


def write(path: Path, header: list[str], rows: list[list[str]], *, newline: str = "\n", start: str = "") -> Path:
    text = newline.join("\t".join(cells) for cells in [header, *rows]) + newline
    path.write_bytes((start + text).encode("utf-8"))
    return path


def manifest_of(path: Path, names: list[str], **form: str) -> Path:
    """A download manifest: the n-th file has the id n, n bytes more than 1000, and an MD5 sum of its own."""
    rows = [[uuid(n), name, f"{n:032x}", str(1000 + n), "released"] for n, name in enumerate(names)]
    return write(path / "gdc_manifest.2024-05-01.txt", ["id", "filename", "md5", "size", "state"], rows, **form)


def old_clinical(path: Path, patients: dict[str, str] = PATIENTS, **form: str) -> Path:
    """Two lines a patient, one a treatment; what is not known is written as GDC does."""
    rows = [
        [
            uuid(n),
            patient,
            project,
            "65",
            "not reported",
            "male",
            "Alive",
            diagnosis_of(project),
            "Lung, NOS",
            "'--",
            treatment,
        ]
        for n, (patient, project) in enumerate(patients.items())
        for treatment in ("Radiation Therapy, NOS", "Pharmaceutical Therapy, NOS")
    ]
    return write(path / "clinical.tsv", OLD_CLINICAL, rows, **form)


def new_clinical(path: Path, patients: dict[str, str] = PATIENTS, **form: str) -> Path:
    rows = [
        [project, uuid(n), "Informed Consent", patient, "'--", '"\'--"', diagnosis, uuid(500 + n)]
        for n, (patient, project) in enumerate(patients.items())
        for diagnosis in (diagnosis_of(project), "'--")
    ]
    return write(path / "clinical.tsv", NEW_CLINICAL, rows, **form)


def old_sheet(path: Path, files: list[tuple[str, str, str, str]]) -> Path:
    """Name, project, case and sample type of each file."""
    rows = [
        [uuid(n), name, "Biospecimen", "Slide Image", project, case, name[:16], sample]
        for n, (name, project, case, sample) in enumerate(files)
    ]
    return write(path / "gdc_sample_sheet.2023-05-01.tsv", OLD_SHEET, rows)


def assembled(*paths: Path, projects: tuple[str, ...] = ()) -> Assembly:
    return assemble_gdc(read_gdc_tables(paths), projects=projects)


def reasons(assembly: Assembly) -> dict[str, str]:
    """By the excluded file's own name why it is left out."""
    names = assembly.excluded["file"].str.split("/").str[-1]
    assert names.is_unique
    return dict(zip(names, assembly.excluded["reason"], strict=True))


def problems(*paths: Path, projects: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(CohortError) as caught:
        assembled(*paths, projects=projects)
    return [str(problem) for problem in caught.value.problems]


GOOD = [slide("TCGA-05-4244-01Z-00-DX1", 0), slide("TCGA-05-4244-01Z-00-DX2", 1), slide("TCGA-18-3406-01Z-00-DX1", 2)]


@pytest.mark.parametrize("clinical", [old_clinical, new_clinical])
@pytest.mark.parametrize(
    "form", [{}, {"newline": "\r\n"}, {"start": "\ufeff"}, {"newline": "\r\n", "start": "\ufeff"}], ids=str
)
def test_slides_with_patient_site_label_and_diagnosis(tmp_path: Path, clinical, form: dict[str, str]) -> None:
    tables = [manifest_of(tmp_path, GOOD, **form), clinical(tmp_path, **form)]
    table = assembled(*tables).table
    assert table["file"].tolist() == GOOD
    assert table["slide"].tolist() == [name.split(".")[0] for name in GOOD]
    assert table["patient"].tolist() == ["TCGA-05-4244", "TCGA-05-4244", "TCGA-18-3406"]
    assert table["site"].tolist() == ["05", "05", "18"]
    assert table["label"].tolist() == ["LUAD", "LUAD", "LUSC"]
    assert table["project"].tolist() == ["TCGA-LUAD", "TCGA-LUAD", "TCGA-LUSC"]
    assert table["file_id"].tolist() == [uuid(0), uuid(1), uuid(2)]
    assert table["diagnosis"].tolist() == [ADENO, ADENO, SQUAMOUS]


def test_what_is_left_out_and_why(tmp_path: Path) -> None:
    """Every file of the tables is in the manifest or among the excluded, and none in both."""
    left_out = {
        slide("TCGA-05-4244-01A-01-TS1", 3): "frozen section",
        slide("TCGA-05-4244-01A-01-BS1", 4): "frozen section",
        slide("TCGA-05-4244-01A-01-MSA", 5): "frozen section",
        slide("TCGA-05-4244-11A-01-TS1", 6): "frozen section",
        slide("TCGA-05-4245-11Z-00-DX1", 7): "normal tissue",
        slide("TCGA-05-4245-20Z-00-DX1", 8): "control sample",
        slide("TCGA-05-4245-01Z-00-XX1", 9): "no diagnostic slide",
        slide("TCGA-99-9999-01Z-00-DX1", 10): "unknown patient",
        slide("TCGA-39-5016-01Z-00-DX1", 11): "unknown patient",
        slide("C3L-00001-21", 12): "no slide barcode of TCGA in its name",
        "nationwidechildrens.org_clinical.TCGA-05-4244.xml": "no slide",
    }
    tables = [manifest_of(tmp_path, [*GOOD, *left_out]), old_clinical(tmp_path, PATIENTS | {"TCGA-39-5016": "'--"})]
    assembly = assembled(*tables)
    assert reasons(assembly) == left_out
    assert assembly.table["file"].tolist() == GOOD
    assert assembly.excluded["file"].str.fullmatch(r"[0-9a-f-]{36}/.+").all()
    details = set(assembly.excluded["detail"])
    assert {f"no table tells the project of {name}" for name in ("TCGA-99-9999", "TCGA-39-5016")} <= details
    assert "sample type 11 in TCGA-05-4245-11Z-00-DX1" in details
    assert patients_without_slide(assembly, read_gdc_tables(tables)) == 1


@pytest.mark.parametrize("sample", ["01", "02", "06"])
def test_tumours_of_every_kind_are_taken(tmp_path: Path, sample: str) -> None:
    name = slide(f"TCGA-05-4244-{sample}Z-00-DX1", 0)
    assert assembled(manifest_of(tmp_path, [name]), old_clinical(tmp_path)).table["file"].tolist() == [name]


class TestDuplicates:
    def tables(self, folder: Path, sizes: list[str], md5: list[str]) -> list[Path]:
        names = [slide("TCGA-05-4244-01Z-00-DX1", 9), slide("TCGA-05-4244-01Z-00-DX1", 1), GOOD[2]]
        rows = [[uuid(n), name, md5[n], sizes[n], "released"] for n, name in enumerate(names)]
        for order, path in ((rows, "a.txt"), (rows[::-1], "b.txt")):
            write(folder / path, ["id", "filename", "md5", "size", "state"], order)
        return [folder / "a.txt", folder / "b.txt"]

    @pytest.mark.parametrize(("sizes", "kept"), [(["10", "20", "5"], 1), (["20", "10", "5"], 0), (["9", "9", "5"], 0)])
    def test_the_largest_of_one_barcode_is_kept(self, tmp_path: Path, sizes: list[str], kept: int) -> None:
        clinical = old_clinical(tmp_path)
        for table in self.tables(tmp_path, sizes, ["1" * 32, "2" * 32, "3" * 32]):
            assembly = assembled(table, clinical)
            assert sorted(assembly.table["file_id"]) == [uuid(kept), uuid(2)]
            (row,) = assembly.excluded.to_dict("records")
            assert row["file"].startswith(uuid(1 - kept))
            assert row["reason"] == "the same slide again"
            assert row["detail"].startswith(f"kept: {uuid(kept)}/TCGA-05-4244-01Z-00-DX1.")

    def test_the_same_content_under_two_barcodes(self, tmp_path: Path) -> None:
        names = [GOOD[0], GOOD[2]]
        rows = [[uuid(n), name, "AbC" + "0" * 29 if n else "aBc" + "0" * 29, "7", "x"] for n, name in enumerate(names)]
        table = write(tmp_path / "m.txt", ["id", "filename", "md5", "size", "state"], rows)
        assembly = assembled(table, old_clinical(tmp_path))
        assert assembly.table["file"].tolist() == [GOOD[0]]
        assert reasons(assembly) == {GOOD[2]: "the same content as another slide"}

    def test_the_same_line_twice_is_one_file(self, tmp_path: Path) -> None:
        first = manifest_of(tmp_path, GOOD)
        again = first.rename(tmp_path / "again.txt")
        assembly = assembled(again, manifest_of(tmp_path, GOOD[:2]), old_clinical(tmp_path))
        assert assembly.table["file"].tolist() == GOOD
        assert assembly.excluded.empty

    def test_a_name_under_two_ids_is_written_with_its_folder(self, tmp_path: Path) -> None:
        assembly = assembled(manifest_of(tmp_path, [GOOD[0], GOOD[0]]), old_clinical(tmp_path))
        assert assembly.table["file"].tolist() == [f"{uuid(1)}/{GOOD[0]}"]
        assert assembly.excluded["file"].tolist() == [f"{uuid(0)}/{GOOD[0]}"]


class TestSampleSheets:
    def test_alone_it_tells_files_and_projects(self, tmp_path: Path) -> None:
        sheet = old_sheet(tmp_path, [(name, PATIENTS[name[:12]], name[:12], "Primary Tumor") for name in GOOD])
        table = assembled(sheet).table
        assert table["label"].tolist() == ["LUAD", "LUAD", "LUSC"]
        assert "diagnosis" not in table

    def test_what_it_calls_normal_is_left_out(self, tmp_path: Path) -> None:
        files = [(GOOD[0], "TCGA-LUAD", "TCGA-05-4244", "Primary Tumor")]
        files += [(GOOD[2], "TCGA-LUSC", "TCGA-18-3406", "Solid Tissue Normal")]
        assembly = assembled(old_sheet(tmp_path, files))
        assert reasons(assembly) == {GOOD[2]: "normal tissue"}
        assert assembly.excluded["detail"].tolist() == ["the sample sheet calls it Solid Tissue Normal"]

    def test_the_newer_form(self, tmp_path: Path) -> None:
        tumour, normal = (
            ["Tumor", "Primary", "Solid Tissue", "FFPE"],
            ["Normal", "Not Applicable", "Solid Tissue", "FFPE"],
        )
        rows = [
            [uuid(n), name, "Biospecimen", "Slide Image", PATIENTS[name[:12]], name[:12], name[:16], *tissue]
            for n, (name, tissue) in enumerate([(GOOD[0], tumour), (GOOD[2], normal)])
        ]
        assembly = assembled(write(tmp_path / "gdc_sample_sheet.2025-01-01.tsv", NEW_SHEET, rows))
        assert assembly.table["file"].tolist() == [GOOD[0]]
        assert reasons(assembly) == {GOOD[2]: "normal tissue"}

    def test_a_case_that_the_name_contradicts(self, tmp_path: Path) -> None:
        files = [(GOOD[0], "TCGA-LUAD", "TCGA-05-4244, TCGA-05-4244", "Primary Tumor, Primary Tumor")]
        files += [(GOOD[2], "TCGA-LUAD", "TCGA-05-4245", "Primary Tumor")]
        assembly = assembled(old_sheet(tmp_path, files))
        assert assembly.table["file"].tolist() == [GOOD[0]]
        assert reasons(assembly) == {GOOD[2]: "the sample sheet names another patient"}

    def test_it_joins_the_manifest_by_id(self, tmp_path: Path) -> None:
        """The sheet knows sample types, the manifest sizes; a file that one of them lists is a file."""
        files = [(GOOD[0], "TCGA-LUAD", "TCGA-05-4244", "Primary Tumor")]
        assembly = assembled(old_sheet(tmp_path, files), manifest_of(tmp_path, GOOD))
        assert assembly.table["file"].tolist() == GOOD[:2]
        assert reasons(assembly) == {GOOD[2]: "unknown patient"}

    def test_sizes_come_from_the_manifest_whichever_is_read_first(self, tmp_path: Path) -> None:
        names = [slide("TCGA-05-4244-01Z-00-DX1", n) for n in range(2)]
        sheet = old_sheet(tmp_path, [(name, "TCGA-LUAD", "TCGA-05-4244", "Primary Tumor") for name in names])
        manifest = manifest_of(tmp_path, names)
        for tables in ((sheet, manifest), (manifest, sheet)):
            assert assembled(*tables).table["file_id"].tolist() == [uuid(1)]


class TestProjects:
    def test_others_are_left_out(self, tmp_path: Path) -> None:
        assembly = assembled(manifest_of(tmp_path, GOOD), old_clinical(tmp_path), projects=("TCGA-LUSC",))
        assert assembly.table["file"].tolist() == [GOOD[2]]
        assert reasons(assembly) == dict.fromkeys(GOOD[:2], "another project")
        assert assembly.excluded["detail"].unique().tolist() == ["TCGA-LUAD"]

    def test_one_that_no_patient_has(self, tmp_path: Path) -> None:
        tables = [manifest_of(tmp_path, GOOD), old_clinical(tmp_path)]
        assert problems(*tables, projects=("TCGA-LUDA", "TCGA-LUSC", "LUAD")) == [
            f"no patient of this project (--projects {name}): the tables have TCGA-LUAD, TCGA-LUSC"
            for name in ("TCGA-LUDA", "LUAD")
        ]


class TestErrors:
    def test_all_of_them_together(self, tmp_path: Path) -> None:
        other = tmp_path / "other"
        other.mkdir()
        (tmp_path / "clinical.cart.2024-05-01.tar.gz").write_bytes(b"\x1f\x8b")
        (tmp_path / "metadata.cart.2024-05-01.json").write_text("[]")
        foreign = write(tmp_path / "exposure.tsv", ["case", "alcohol_history"], [["x", "y"]])
        clinical = old_clinical(tmp_path)
        contrary = new_clinical(other, {"TCGA-05-4244": "TCGA-LUSC"})
        manifest = write(
            tmp_path / "m.txt", ["id", "filename", "size"], [["", GOOD[0], "1"], [uuid(1), GOOD[1], "1 kB"]]
        )
        renamed = write(other / "m.txt", ["id", "filename"], [[uuid(1), GOOD[2]]])
        found = problems(
            tmp_path / "clinical.cart.2024-05-01.tar.gz",
            tmp_path / "metadata.cart.2024-05-01.json",
            foreign,
            tmp_path / "gone.tsv",
            clinical,
            contrary,
            manifest,
            renamed,
        )
        assert [text.partition(" (")[0] for text in found] == [
            "a packed file",
            "a JSON file",
            "no table of GDC that is known, with the columns case, alcohol_history",
            "cannot read the table, No such file or directory",
            "patient TCGA-05-4244 has the projects TCGA-LUAD and TCGA-LUSC",
            "a file without id or name",
            "the size '1 kB' is no number",
            f"the file {uuid(1)} is named {GOOD[1]} and {GOOD[2]}",
        ]

    def test_a_column_that_is_lacking(self, tmp_path: Path) -> None:
        table = write(tmp_path / "clinical.tsv", ["case_submitter_id", "gender"], [["TCGA-05-4244", "male"]])
        (text,) = problems(table)
        assert text.startswith("no column project_id or project.project_id or cases.project.project_id (")

    def test_no_list_of_files(self, tmp_path: Path) -> None:
        (text,) = problems(old_clinical(tmp_path))
        assert text.startswith("no list of files (clinical.tsv): give a download manifest")

    def test_no_projects(self, tmp_path: Path) -> None:
        (text,) = problems(manifest_of(tmp_path, GOOD))
        assert text.startswith("no table tells the patients' projects (gdc_manifest.2024-05-01.txt): ")

    def test_no_slide_is_left(self, tmp_path: Path) -> None:
        names = [slide("TCGA-05-4244-01A-01-TS1", 0), slide("TCGA-05-4244-01A-01-BS1", 1), "a.xml"]
        (text,) = problems(manifest_of(tmp_path, names), old_clinical(tmp_path))
        assert text.startswith("no slide is left of 3 files (frozen section 2, no slide 1) (gdc_manifest")


def test_what_is_written_is_a_manifest(tmp_path: Path) -> None:
    frozen = slide("TCGA-05-4244-01A-01-TS1", 3)
    assembly = assembled(manifest_of(tmp_path, [*GOOD, frozen]), new_clinical(tmp_path))
    out = tmp_path / "out" / "nsclc.csv"
    write_assembly(assembly, out)
    cohort = read_cohort(out)
    assert cohort.classes == ("LUAD", "LUSC")
    assert cohort.table["site"].tolist() == ["05", "05", "18"]
    excluded = pd.read_csv(excluded_path(out))
    assert excluded_path(out).name == "nsclc-excluded.csv"
    assert excluded[["file", "reason"]].to_numpy().tolist() == [[f"{uuid(3)}/{frozen}", "frozen section"]]


def test_a_folder_that_lacks_all_slides(tmp_path: Path) -> None:
    assembly = assembled(manifest_of(tmp_path, GOOD), new_clinical(tmp_path))
    with pytest.raises(CohortError, match="none of the 3 slides is there"):
        leave_out_unscaled(assembly, tmp_path)
    with pytest.raises(CohortError, match="no such folder"):
        leave_out_unscaled(assembly, tmp_path / "gone")
