"""What identifies a slide's content: its bytes, not its name or date."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from wholeslide.slides.config import SlideConfig
from wholeslide.slides.readers import unreadable

END_BYTES = 2**20
SAMPLE_BYTES = 2**16
SAMPLES = 16
FORMAT_VERSION = 2


def content_hash(path: Path) -> str:
    """A hash of the file's size, first and last megabyte and 16 chunks between them; of every file of a folder.

    A gigapixel file is not read whole: a copy that was cut short or changed at its head (where formats keep their
    tables) or its tail differs, a single flipped byte in the middle may not.
    MRXS slides count with their data folder, a DICOM file without its siblings.

    Raises:
        SlideError: a file cannot be read.
    """
    try:
        stats = [(file, file.stat()) for file in _files_of(path)]
        return _hash_of(tuple((file, stat.st_size, stat.st_mtime_ns, stat.st_ino) for file, stat in stats))
    except OSError as error:
        raise unreadable(path, error) from error


def slide_key(path: Path, config: SlideConfig, mpp: float | None = None) -> str:
    """A hash of a slide's content and of every parameter that its working pixels depend on.

    Args:
        path: the slide.
        config: the resolution and what becomes of the background; of a mask in ``mask_dir`` the content counts.
        mpp: microns per stored pixel, where the manifest gives it.

    Raises:
        SlideError: a file cannot be read.
    """
    mask = find_mask_file(path, config)
    parameters = (
        FORMAT_VERSION,
        content_hash(path),
        config.target_mpp,
        config.target_downsample,
        config.background,
        config.mpp_override,
        config.icc,
        mpp,
        content_hash(mask) if mask else None,
    )
    return hashlib.blake2b(repr(parameters).encode(), digest_size=16).hexdigest()


def find_mask_file(path: Path, config: SlideConfig) -> Path | None:
    """The GeoJSON mask of a slide in ``mask_dir``; ``None`` where there is none."""
    if config.mask_dir is None:
        return None
    file = config.mask_dir / f"{path.stem}.geojson"
    return file if file.exists() else None


def _files_of(path: Path) -> list[Path]:
    folder = path if path.is_dir() else path.with_suffix("")
    companions = sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []
    if path.is_dir():
        return companions
    return [path, *companions] if path.suffix.lower() == ".mrxs" else [path]


@functools.lru_cache(maxsize=16384)
def _hash_of(stamped_files: tuple[tuple[Path, int, int, int], ...]) -> str:
    """Kept for as long as size, time and inode are the same: a slide is looked up in the cache in every epoch."""
    digest = hashlib.blake2b(digest_size=16)
    for file, size, _, _ in stamped_files:
        _add_file(digest, file, size)
    return digest.hexdigest()


def _add_file(digest: hashlib.blake2b, file: Path, size: int) -> None:
    digest.update(size.to_bytes(8, "little"))
    with file.open("rb") as stream:
        if size <= 2 * END_BYTES + SAMPLES * SAMPLE_BYTES:
            digest.update(stream.read())
            return
        digest.update(stream.read(END_BYTES))
        for sample in range(SAMPLES):
            stream.seek(END_BYTES + (size - 2 * END_BYTES) * sample // SAMPLES)
            digest.update(stream.read(SAMPLE_BYTES))
        stream.seek(size - END_BYTES)
        digest.update(stream.read(END_BYTES))
