"""From a name in a manifest to exactly one slide below a folder.

The folder is walked once. Where it holds files of patch features in place of slides, those are found. Hidden files, and the
label, macro and thumbnail images that scanners write beside a slide, are passed over.
"""

from __future__ import annotations

import difflib
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePath

COMPOUND_SUFFIXES = (".ome.tiff", ".ome.tif", ".ome.btf")
DICOM_SUFFIX = ".dcm"
SLIDE_SUFFIXES = (
    *COMPOUND_SUFFIXES,
    *(".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".svslide", ".vms", ".vmu", ".czi", ".tif", ".tiff", ".btf"),
    *(DICOM_SUFFIX, ".png", ".jpg", ".jpeg"),
)
"""What a recursive search takes for a slide. A file that is named in full may have any suffix."""

FEATURE_SUFFIXES = (".h5", ".hdf5", ".pt", ".pth")
"""Files of patch features. In a folder without slides, a search finds those of the first of these suffixes that it has."""

SLIDES_WITH_PARTS = (".vms", ".vmu")
"""Slides whose parts lie beside them, as files of other suffixes."""

_ASSOCIATED_IMAGE = re.compile(r"(^|[-_. ])(label|macro|thumb|thumbnail)$", re.IGNORECASE)
_TCGA_BARCODE = re.compile(r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}", re.IGNORECASE)
_SERIES_TAG = b"\x20\x00\x0e\x00UI"
_DICOM_HEADER_BYTES = 1 << 16


def slide_stem(name: str) -> str:
    """A file's name without its folder and its suffix of slides or features: ``"a/b.ome.tiff"`` is ``"b"``.

    Only known suffixes are cut, since what follows a dot in ``TCGA-…-DX1.d4ff32cd`` belongs to the name.
    """
    tail = name.replace("\\", "/").rstrip("/").rpartition("/")[2]
    suffix = _suffix(tail, (*SLIDE_SUFFIXES, *FEATURE_SUFFIXES))
    return tail[: len(tail) - len(suffix)] if len(suffix) < len(tail) else tail


def tcga_patient(name: str) -> str | None:
    """The participant of a TCGA barcode (``TCGA-XX-YYYY``), None for any other name."""
    match = _TCGA_BARCODE.match(name)
    return match[0].upper() if match else None


def is_dicom_folder(folder: Path) -> bool:
    """Whether DICOM files lie directly in this folder."""
    return folder.is_dir() and any(child.suffix.lower() == DICOM_SUFFIX for child in folder.iterdir())


def find_slides(folder: Path) -> list[Path]:
    """Every slide below a folder, sorted, each once; the files of one DICOM series are one slide."""
    return list(_distinct([entry.path for entry in _found_below(folder)]))


def is_feature_file(path: Path) -> bool:
    """Whether a file's name says that it holds patch features."""
    return path.suffix.lower() in FEATURE_SUFFIXES


def other_suffixes(folder: Path) -> Counter[str]:
    """How many files below a folder are passed over because of their suffixes, by suffix (``""`` for none).

    Hidden files and the parts that belong to an MRXS, VMS or VMU slide are not counted.
    """
    counts: Counter[str] = Counter()
    parts: set[Path] = set()
    for base, names in _folders(folder):
        parts.update(base / name[: -len(".mrxs")] for name in names if name.lower().endswith(".mrxs"))
        of_a_slide = base in parts or any(name.lower().endswith(SLIDES_WITH_PARTS) for name in names)
        if not of_a_slide:
            known = (*SLIDE_SUFFIXES, *FEATURE_SUFFIXES)
            others = [name for name in names if not name.startswith(".") and not _suffix(name, known)]
            counts.update(PurePath(name).suffix.lower() for name in others)
    return counts


@dataclass(frozen=True)
class _Entry:
    """One name under which a slide may be asked for."""

    relative: str
    path: Path

    @property
    def folder(self) -> str:
        return self.relative.rpartition("/")[0]

    @property
    def name(self) -> str:
        return self.relative.rpartition("/")[2]


@dataclass(frozen=True)
class SlideFolder:
    """The slides below a folder, found by path, name, stem or TCGA barcode."""

    root: Path
    _found: dict[str, tuple[Path, ...]] = field(default_factory=dict, repr=False)

    def find(self, name: str) -> tuple[Path, ...]:
        """The slides that a name may mean: one where it is sound, none, or the candidates it cannot decide between.

        A path that exists is taken first, then names, stems and barcodes below the folder, each only where the one
        before finds nothing; in place of a slide, the file of its features may be there. Letters' case counts only where it
        decides; composed and decomposed accents are the same name. ``sub/a.svs`` is found in ``anything/sub/a.svs`` but never
        in ``other/a.svs``.
        """
        if name not in self._found:
            self._found[name] = self._search(name)
        return self._found[name]

    def similar(self, name: str, *, count: int = 3) -> list[str]:
        """Slides whose names look like this one, for an error message."""
        names = sorted({entry.name for entry in self._entries})
        tail = _normal(name).rpartition("/")[2]
        same_stem = [candidate for candidate in names if slide_stem(candidate) == slide_stem(tail)]
        close = difflib.get_close_matches(tail, names, n=count, cutoff=0.7) if len(names) <= 2000 else []
        return list(dict.fromkeys([*same_stem, *close]))[:count]

    def __len__(self) -> int:
        return len({entry.path for entry in self._entries})

    @cached_property
    def _entries(self) -> list[_Entry]:
        return _found_below(self.root)

    @cached_property
    def _by_key(self) -> tuple[dict[str, list[tuple[str, _Entry]]], ...]:
        """One index a way of naming: case-folded key → (exact key, entry)."""
        names, stems, barcodes = (defaultdict[str, list[tuple[str, _Entry]]](list) for _ in range(3))
        for entry in self._entries:
            stem = slide_stem(entry.name)
            names[entry.name.casefold()].append((entry.name, entry))
            stems[stem.casefold()].append((stem, entry))
            for barcode in _barcode_prefixes(stem):
                barcodes[barcode.casefold()].append((barcode, entry))
        return names, stems, barcodes

    def _search(self, name: str) -> tuple[Path, ...]:
        direct = self.root / name
        if _is_slide(direct):
            return (direct,)
        folder, _, tail = _normal(name).strip("/").removeprefix("./").rpartition("/")
        for index in self._by_key:
            named = [item for item in index.get(tail.casefold(), ()) if _ends_with_folder(item[1].folder, folder)]
            exact = [item for item in named if item[0] == tail]
            paths = _distinct([entry.path for _, entry in exact or named])
            if paths:
                return paths
        stem = slide_stem(name)
        of_features = bool(self._entries) and is_feature_file(self._entries[0].path)
        return self._search(stem) if of_features and stem != name else ()


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name.replace("\\", "/"))


def _suffix(name: str, known: Sequence[str]) -> str:
    lower = name.lower()
    return next((suffix for suffix in known if lower.endswith(suffix)), "")


def _is_slide(path: Path) -> bool:
    try:
        return path.is_file() or is_dicom_folder(path)
    except OSError:  # a name too long for the file system, or a folder that may not be listed
        return False


def _ends_with_folder(folder: str, wanted: str) -> bool:
    return not wanted or f"/{folder}".casefold().endswith(f"/{wanted}".casefold())


def _distinct(paths: Sequence[Path]) -> tuple[Path, ...]:
    """Without the links to a file that is already there."""
    by_target = {path.resolve(): path for path in sorted(set(paths), reverse=True)}
    return tuple(sorted(by_target.values()))


def _barcode_prefixes(stem: str) -> Iterator[str]:
    """``TCGA-AA-1111-01Z-00-DX1.uuid``: each part from the participant on that ends at a separator."""
    match = _TCGA_BARCODE.match(stem)
    if match is None:
        return
    ends = [found.start() for found in re.finditer(r"[-._ ]", stem) if found.start() >= match.end()]
    yield from (stem[:end] for end in [*ends, len(stem)])


def _folders(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """A folder and every one below it that is not hidden, with the names of their files: links followed, none twice."""
    seen: set[Path] = set()
    for base, folders, names in os.walk(root, followlinks=True):
        folder = Path(base)
        target = folder.resolve()
        if target in seen:
            folders.clear()
            continue
        seen.add(target)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield folder, names


def _found_below(root: Path) -> list[_Entry]:
    """Every slide below a folder; where there is none, the files of features."""
    return list(_walk(root)) or _features_below(root)


def _features_below(root: Path) -> list[_Entry]:
    files = [folder / name for folder, names in _folders(root) for name in names if not name.startswith(".")]
    for suffix in FEATURE_SUFFIXES:
        found = sorted(file for file in files if file.suffix.lower() == suffix)
        if found:
            return [_entry(root, file, file) for file in found]
    return []


def _walk(root: Path) -> Iterator[_Entry]:
    """Every slide below a folder."""
    for folder, names in _folders(root):
        slides = sorted(name for name in names if _is_candidate(name))
        if any(name.lower().endswith(SLIDES_WITH_PARTS) for name in slides):  # its JPEG parts are no slides
            slides = [name for name in slides if not name.lower().endswith((".jpg", ".jpeg"))]
        dicom = [name for name in slides if name.lower().endswith(DICOM_SUFFIX)]
        for name in slides:
            if name not in dicom:
                yield _entry(root, folder / name, folder / name)
        yield from _dicom_entries(root, folder, dicom, alone=len(dicom) == len(slides))


def _is_candidate(name: str) -> bool:
    hidden = name.startswith(".")
    return not hidden and bool(_suffix(name, SLIDE_SUFFIXES)) and not _ASSOCIATED_IMAGE.search(slide_stem(name))


def _dicom_entries(root: Path, folder: Path, names: list[str], *, alone: bool) -> Iterator[_Entry]:
    """One slide a series: the folder where it holds nothing else, otherwise the series' first file."""
    series: dict[str, list[str]] = defaultdict(list)
    for name in names:
        series[_series_uid(folder / name) or name].append(name)
    whole_folder = alone and len(series) == 1 and len(names) > 1
    if whole_folder and folder != root:
        yield _entry(root, folder, folder)
    for members in series.values():
        slide = folder if whole_folder else folder / members[0]
        for name in members:
            yield _entry(root, folder / name, slide)


def _series_uid(path: Path) -> str | None:
    """SeriesInstanceUID (0020,000E) of a DICOM file with explicit value representations; None if not seen."""
    try:
        with path.open("rb") as file:
            head = file.read(_DICOM_HEADER_BYTES)
    except OSError:
        return None  # whoever opens the slide says what is wrong with it
    at = head.find(_SERIES_TAG)
    if at < 0:
        return None
    start = at + len(_SERIES_TAG) + 2
    length = int.from_bytes(head[start - 2 : start], "little")
    return head[start : start + length].decode("ascii", errors="replace").rstrip("\0 ")


def _entry(root: Path, named: Path, slide: Path) -> _Entry:
    return _Entry(relative=_normal(named.relative_to(root).as_posix()), path=slide)
