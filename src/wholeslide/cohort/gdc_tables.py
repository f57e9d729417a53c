"""Reading the tables that the Genomic Data Commons gives: which files there are, and which project a patient belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd

from wholeslide.cohort.tables import read_text_table
from wholeslide.errors import CohortError, Problem, WholeslideError

_MISSING = frozenset({"", "'--", "--", "not reported", "not applicable", "unknown"})
"""How GDC writes that a value is missing, in lower case."""

_MANIFEST = {"id": ("id",), "name": ("filename",), "md5": ("md5",), "size": ("size",)}
_SAMPLE_SHEET = {
    "id": ("file id",),
    "name": ("file name",),
    "project": ("project id",),
    "cases": ("case id",),
    "sample_type": ("sample type", "tissue type"),
}
_CLINICAL = {
    "patient": ("case_submitter_id", "cases.submitter_id", "submitter_id"),
    "project": ("project_id", "project.project_id", "cases.project.project_id"),
    "diagnosis": ("primary_diagnosis", "diagnoses.primary_diagnosis"),
}
_OPTIONAL = frozenset({"md5", "size", "cases", "sample_type", "diagnosis"})
_PACKED = (".gz", ".tgz", ".zip", ".tar")


@dataclass(frozen=True)
class GdcFile:
    """A file of GDC.

    ``size_bytes`` is 0 and ``md5``, ``sample_type`` are "" where no table tells them; ``cases`` are the barcodes of the
    patients that the sample sheet names.
    """

    id: str
    name: str
    md5: str = ""
    size_bytes: int = 0
    cases: tuple[str, ...] = ()
    sample_type: str = ""

    @property
    def path(self) -> str:
        """Where GDC's client puts it, below its folder."""
        return f"{self.id}/{self.name}"


@dataclass(frozen=True)
class GdcTables:
    """What the tables tell together.

    ``projects`` and ``diagnoses`` are by patient (``TCGA-XX-XXXX``); ``source`` names the tables.
    """

    files: tuple[GdcFile, ...]
    projects: Mapping[str, str]
    diagnoses: Mapping[str, str]
    source: str


def read_gdc_tables(paths: Sequence[Path]) -> GdcTables:
    """Read download manifests, sample sheets and clinical tables, each recognised by its columns.

    Raises:
        CohortError: everything that is wrong with them, together: a file that is no such table, no list of files or of
            projects, an id that names two files, a patient with two projects.
    """
    found = _Found()
    for path in paths:
        try:
            found.take(path)
        except WholeslideError as error:
            found.problems.extend(error.problems)
    return found.tables(", ".join(path.name for path in paths))


@dataclass
class _Found:
    """The tables' content while they are read; what is wrong collects in ``problems``."""

    files: dict[str, GdcFile] = field(default_factory=dict)
    projects: dict[str, str] = field(default_factory=dict)
    diagnoses: dict[str, list[str]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    contradicted: set[str] = field(default_factory=set)
    lists_files: bool = False
    tells_projects: bool = False

    def take(self, path: Path) -> None:
        """Read one table.

        Raises:
            CohortError: it cannot be read, or is none of GDC's.
        """
        if path.suffix.lower() in _PACKED:
            raise CohortError([Problem("a packed file", str(path), "unpack it, and give the table that is in it")])
        if path.suffix.lower() == ".json":
            remedy = "download the clinical table as TSV, and the cart's sample sheet in place of its metadata"
            raise CohortError([Problem("a JSON file", str(path), remedy)])
        raw = read_text_table(path)
        columns = {name.casefold() for name in raw.columns}
        if "file id" in columns:
            self._take_sample_sheet(_chosen(raw, _SAMPLE_SHEET, path), path)
        elif {"id", "filename"} <= columns:
            self._take_manifest(_chosen(raw, _MANIFEST, path), path)
        elif columns & set(_CLINICAL["patient"]):
            self._take_clinical(_chosen(raw, _CLINICAL, path), path)
        else:
            shown = ", ".join(raw.columns[:5]) + (", …" if len(raw.columns) > 5 else "")
            remedy = "give a download manifest (id, filename), a sample sheet (File ID), or clinical.tsv (submitter_id)"
            raise CohortError([Problem(f"no table of GDC that is known, with the columns {shown}", str(path), remedy)])

    def _take_manifest(self, table: pd.DataFrame, path: Path) -> None:
        self.lists_files = True
        for line, row in _rows(table):
            size = row["size"]
            if size and not size.isdecimal():
                remedy = "give the number of bytes, as GDC writes it"
                self.problems.append(Problem(f"the size {size!r} is no number", f"{path.name} line {line}", remedy))
                size = ""
            self._add_file(
                GdcFile(row["id"], row["name"], row["md5"].lower(), int(size or 0)), f"{path.name} line {line}"
            )

    def _take_sample_sheet(self, table: pd.DataFrame, path: Path) -> None:
        self.lists_files = self.tells_projects = True
        for line, row in _rows(table):
            where = f"{path.name} line {line}"
            cases = _listed(row["cases"].upper())
            self._add_file(
                GdcFile(row["id"], row["name"], cases=cases, sample_type=", ".join(_listed(row["sample_type"]))), where
            )
            for case in cases:
                for project in _listed(row["project"]):
                    self._add_project(case, project, where)

    def _take_clinical(self, table: pd.DataFrame, path: Path) -> None:
        """A patient has a line for each diagnosis and treatment."""
        self.tells_projects = True
        for line, row in _rows(table):
            patient = row["patient"].upper()
            if patient and row["project"]:
                self._add_project(patient, row["project"], f"{path.name} line {line}")
            if patient and row["diagnosis"]:
                self.diagnoses.setdefault(patient, []).append(row["diagnosis"])

    def _add_file(self, file: GdcFile, where: str) -> None:
        """Add a file, or what this table tells about it more than those before."""
        if not file.id or not file.name:
            self.problems.append(Problem("a file without id or name", where, "download the table anew"))
            return
        before = self.files.setdefault(file.id, file)
        if before.name != file.name:
            what = f"the file {file.id} is named {before.name} and {file.name}"
            self.problems.append(Problem(what, where, "give tables of one release"))
        self.files[file.id] = replace(
            before,
            md5=before.md5 or file.md5,
            size_bytes=max(before.size_bytes, file.size_bytes),
            cases=before.cases or file.cases,
            sample_type=before.sample_type or file.sample_type,
        )

    def _add_project(self, patient: str, project: str, where: str) -> None:
        before = self.projects.setdefault(patient, project)
        if before != project and patient not in self.contradicted:
            self.contradicted.add(patient)
            what = f"patient {patient} has the projects {before} and {project}"
            self.problems.append(Problem(what, where, "keep the line that is right"))

    def tables(self, source: str) -> GdcTables:
        """All of it.

        Raises:
            CohortError: what was found wrong, or what is lacking.
        """
        problems = list(self.problems)
        if not self.lists_files and not problems:
            problems.append(Problem("no list of files", source, "give a download manifest or a sample sheet, too"))
        if not self.tells_projects and not problems:
            remedy = "give the sample sheet or clinical.tsv of the same cart, too"
            problems.append(Problem("no table tells the patients' projects", source, remedy))
        if problems:
            raise CohortError(dict.fromkeys(problems))
        diagnoses = {patient: "; ".join(dict.fromkeys(names)) for patient, names in self.diagnoses.items()}
        return GdcTables(tuple(self.files.values()), self.projects, diagnoses, source)


def _chosen(raw: pd.DataFrame, wanted: Mapping[str, Sequence[str]], path: Path) -> pd.DataFrame:
    """The columns that are wanted under our names, missing values as ""; what is optional and not there is "".

    Raises:
        CohortError: columns that are not optional are not there.
    """
    by_lower = {name.casefold(): name for name in raw.columns}
    chosen: dict[str, pd.Series] = {}
    problems = []
    for ours, names in wanted.items():
        theirs = next((by_lower[name] for name in names if name in by_lower), None)
        if theirs is not None:
            values = raw[theirs]
            chosen[ours] = values.where(~values.str.lower().isin(_MISSING), "")
        elif ours in _OPTIONAL:
            chosen[ours] = pd.Series("", index=raw.index, dtype=object)
        else:
            problems.append(Problem(f"no column {' or '.join(names)}", str(path), "download the table anew from GDC"))
    if problems:
        raise CohortError(problems)
    return pd.DataFrame(chosen)


def _rows(table: pd.DataFrame) -> Iterable[tuple[int, dict[str, str]]]:
    """Each row with its line in the file."""
    lines = [int(line) for line in table.index]
    return zip(lines, ({str(k): str(v) for k, v in row.items()} for row in table.to_dict("records")), strict=True)


def _listed(cell: str) -> tuple[str, ...]:
    """A cell of the sample sheet, which joins by commas what belongs to several samples; each value once."""
    return tuple(dict.fromkeys(part.strip() for part in cell.split(",") if part.strip()))
