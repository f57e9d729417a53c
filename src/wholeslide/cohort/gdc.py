"""The tables of the Genomic Data Commons (GDC) → a manifest of TCGA's diagnostic slides.

Taken are download manifests (``id, filename, md5, size, state``), sample sheets (``File ID, File Name, …``) and clinical
tables (``clinical.tsv``), each recognised by its columns. The portal's clinical tables of before 2024 name the case
``case_submitter_id`` and the project ``project_id``; later ones ``cases.submitter_id`` and ``project.project_id``.

A slide's file is named by its barcode, as in ``TCGA-05-4244-01Z-00-DX1.<uuid>.svs``: project, tissue source site, participant,
sample (01–09 tumour, 10–19 normal tissue, 20–29 control) and vial, portion, and slide: DX for a diagnostic section
(formalin-fixed), TS, MS and BS for frozen sections at the top, in the middle and at the bottom of what was sequenced
(https://docs.gdc.cancer.gov/Encyclopedia/pages/TCGA_Barcode/).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from wholeslide.cohort.assembly import Assembly, excluded_table
from wholeslide.cohort.gdc_tables import GdcFile, GdcTables
from wholeslide.errors import CohortError, Problem

_NOT_A_SLIDE = "no slide"
_NO_BARCODE = "no slide barcode of TCGA in its name"
_FROZEN = "frozen section"
_NOT_DIAGNOSTIC = "no diagnostic slide"
_NORMAL = "normal tissue"
_CONTROL = "control sample"
_OTHER_CASE = "the sample sheet names another patient"
_UNKNOWN_PATIENT = "unknown patient"
_OTHER_PROJECT = "another project"
_SAME_BARCODE = "the same slide again"
_SAME_CONTENT = "the same content as another slide"

_BARCODE = re.compile(
    r"(?P<patient>TCGA-(?P<site>[A-Z0-9]{2})-[A-Z0-9]{4})-(?P<sample>[0-9]{2})[A-Z]-[A-Z0-9]{2}-(?P<kind>[A-Z]{2})[A-Z0-9]+"
    r"(?=[.]|$)",
    re.IGNORECASE,
)
_SLIDE_SUFFIX = ".svs"
_FROZEN_KINDS = ("TS", "MS", "BS")
_DIAGNOSTIC_KIND = "DX"
_FIRST_NORMAL, _FIRST_CONTROL = 10, 20


@dataclass(frozen=True)
class _Slide:
    """A diagnostic slide, with what its barcode says and its patient's project."""

    file: GdcFile
    barcode: str
    patient: str
    site: str
    project: str

    @property
    def label(self) -> str:
        """``LUAD`` for ``TCGA-LUAD``."""
        return self.project.partition("-")[2]


def assemble_gdc(tables: GdcTables, *, projects: Sequence[str] = ()) -> Assembly:
    """The manifest of the diagnostic slides that GDC's tables list; all other files are its excluded ones.

    The manifest has the columns ``file, slide, patient, label, site, project, file_id`` and, where a clinical table tells it,
    ``diagnosis``. ``label`` is the project without its program (``TCGA-LUAD`` → ``LUAD``), ``site`` the code of the tissue
    source site. Of slides with one barcode the largest file is taken, of equal ones that whose id comes first; the same
    of files with one MD5 sum.

    Args:
        tables: what `read_gdc_tables` read.
        projects: the projects that are taken; all, if empty.

    Raises:
        CohortError: a project that no patient has, or no slide is left.
    """
    known = sorted(set(tables.projects.values()))
    problems = [
        Problem("no patient of this project", f"--projects {name}", f"the tables have {', '.join(known)}")
        for name in projects
        if name not in known
    ]
    if problems:
        raise CohortError(problems)
    slides: list[_Slide] = []
    excluded: list[tuple[str, str, str]] = []
    for file in sorted(tables.files, key=lambda file: (file.name, file.id)):
        found = _diagnostic_slide(file, tables, projects)
        if isinstance(found, _Slide):
            slides.append(found)
        else:
            excluded.append((file.path, *found))
    for reason, key in ((_SAME_BARCODE, _barcode), (_SAME_CONTENT, _content)):
        slides, again = _without_repeats(slides, key)
        excluded += [(slide.file.path, reason, f"kept: {kept.file.path}") for slide, kept in again]
    assembly = Assembly(_manifest(slides, tables), excluded_table(excluded))
    assembly.check(tables.source)
    return assembly


def patients_without_slide(assembly: Assembly, tables: GdcTables, *, projects: Sequence[str] = ()) -> int:
    """How many patients of the projects that are taken have no slide in the manifest."""
    patients = {patient for patient, project in tables.projects.items() if not projects or project in projects}
    return len(patients - set(assembly.table["patient"]))


def _diagnostic_slide(file: GdcFile, tables: GdcTables, projects: Sequence[str]) -> _Slide | tuple[str, str]:
    """The slide; or why it is none that is taken: the reason and a detail."""
    match = _BARCODE.match(file.name)
    if not file.name.lower().endswith(_SLIDE_SUFFIX):
        return _NOT_A_SLIDE, f"the name does not end in {_SLIDE_SUFFIX}"
    if match is None:
        return _NO_BARCODE, "expected TCGA-XX-XXXX-01Z-00-DX1, a dot, and more"
    barcode, patient, kind = match[0].upper(), match["patient"].upper(), match["kind"].upper()
    sample = int(match["sample"])
    if kind in _FROZEN_KINDS:
        return _FROZEN, f"{kind} in {barcode}"
    if kind != _DIAGNOSTIC_KIND:
        return _NOT_DIAGNOSTIC, f"{kind} in {barcode}"
    if sample >= _FIRST_CONTROL:
        return _CONTROL, f"sample type {sample} in {barcode}"
    if sample >= _FIRST_NORMAL:
        return _NORMAL, f"sample type {sample} in {barcode}"
    if "normal" in file.sample_type.lower():
        return _NORMAL, f"the sample sheet calls it {file.sample_type}"
    if file.cases and patient not in file.cases:
        return _OTHER_CASE, ", ".join(file.cases)
    project = tables.projects.get(patient, "")
    if not project:
        return _UNKNOWN_PATIENT, f"no table tells the project of {patient}"
    if projects and project not in projects:
        return _OTHER_PROJECT, project
    return _Slide(file, barcode, patient, match["site"].upper(), project)


def _barcode(slide: _Slide) -> str:
    return slide.barcode


def _content(slide: _Slide) -> str:
    return slide.file.md5


def _without_repeats(
    slides: Sequence[_Slide], key: Callable[[_Slide], str]
) -> tuple[list[_Slide], list[tuple[_Slide, _Slide]]]:
    """One slide of each key, in the order given, and the others, each with the one that is kept; "" is no key."""
    kept: dict[str, _Slide] = {}
    for slide in sorted(slides, key=lambda slide: (-slide.file.size_bytes, slide.file.id)):
        if key(slide):
            kept.setdefault(key(slide), slide)
    again = [(slide, kept[key(slide)]) for slide in slides if key(slide) and kept[key(slide)] is not slide]
    return [slide for slide in slides if not key(slide) or kept[key(slide)] is slide], again


def _manifest(slides: Sequence[_Slide], tables: GdcTables) -> pd.DataFrame:
    """One row a slide. A name that GDC gives to several files is written with the folder that its client makes."""
    names = pd.Series([file.name for file in tables.files], dtype=object).value_counts()
    table = pd.DataFrame(
        {
            "file": [slide.file.name if names[slide.file.name] == 1 else slide.file.path for slide in slides],
            "slide": [slide.barcode for slide in slides],
            "patient": [slide.patient for slide in slides],
            "label": [slide.label for slide in slides],
            "site": [slide.site for slide in slides],
            "project": [slide.project for slide in slides],
            "file_id": [slide.file.id for slide in slides],
        },
        dtype=object,
    )
    if tables.diagnoses:
        table["diagnosis"] = [tables.diagnoses.get(slide.patient, "") for slide in slides]
    return table
