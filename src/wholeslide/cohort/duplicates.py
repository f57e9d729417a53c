"""Files with the same content, found without reading every slide in full."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path

_SAMPLE_BYTES = 1 << 16
_CHUNK_BYTES = 1 << 22


def same_content(paths: Iterable[Path]) -> list[list[Path]]:
    """Sets of different files whose bytes are equal, each sorted.

    Sizes are compared first, then three samples, then a hash of everything, each only among files that are equal so
    far: slides of different sizes, nearly all of them, are never opened. A DICOM folder is its files. Files that cannot
    be read are left out.
    """
    groups = [sorted({path.resolve(): path for path in paths}.values())]
    for fingerprint in (_sizes, _samples, _hashes):
        groups = [finer for group in groups for finer in _refine(group, fingerprint)]
    return groups


def _refine(group: list[Path], fingerprint: Callable[[Path], Hashable]) -> list[list[Path]]:
    by_print: dict[Hashable, list[Path]] = defaultdict(list)
    for path in group:
        try:
            by_print[fingerprint(path)].append(path)
        except OSError:
            continue  # the audit's opening of each slide reports it
    return [paths for paths in by_print.values() if len(paths) > 1]


def _files(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_file()) if path.is_dir() else [path]


def _sizes(path: Path) -> Hashable:
    return tuple(file.stat().st_size for file in _files(path))


def _samples(path: Path) -> Hashable:
    return tuple(_sample(file) for file in _files(path))


def _sample(path: Path) -> bytes:
    digest = hashlib.blake2b()
    size = path.stat().st_size
    with path.open("rb") as file:
        for start in (0, size // 2, max(0, size - _SAMPLE_BYTES)):
            file.seek(start)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.digest()


def _hashes(path: Path) -> Hashable:
    return tuple(_hash(file) for file in _files(path))


def _hash(path: Path) -> bytes:
    digest = hashlib.blake2b()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.digest()
