"""Bags on disk: our own files, and those of TRIDENT, CLAM and STAMP.

========  =======================================  ==============================================================
made by   datasets                                 coordinates, and the attributes that say more
========  =======================================  ==============================================================
TRIDENT   ``features`` (N, D) or (1, N, D),        level-0 pixels; of ``coords``: ``patch_size``, ``patch_size_level0``,
          ``coords`` (N, 2)                        ``level0_magnification``, ``target_magnification``
CLAM      the same in ``h5_files/``; a plain       level-0 pixels
          tensor (N, D) in ``pt_files/``
STAMP     ``feats`` (N, D), ``coords`` (N, 2)      microns; of the file: ``unit``, ``tile_size_um`` (``tile_size`` before
                                                   2.1), ``tile_size_px``
========  =======================================  ==============================================================

Ours are TRIDENT's with more attributes of the file: how they were made, and a key that tells whether they would be made alike.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import torch

from wholeslide.baselines.bag import AGAIN, Bag, Fact
from wholeslide.errors import FeatureError
from wholeslide.model.weights import UNREADABLE
from wholeslide.slides.files import write_atomically

TENSOR_SUFFIXES = (".pt", ".pth")
FEATURE_NAMES = ("features", "feats")
MPP_AT_1X = 10.0
"""Microns per pixel times magnification, by convention."""


def read_bag(path: Path, *, l0_mpp: float | None = None) -> Bag:
    """A bag from a file of ours, TRIDENT's, CLAM's or STAMP's.

    Args:
        path: HDF5, or a tensor that PyTorch saved (``.pt``).
        l0_mpp: microns per level-0 pixel of the slide. STAMP's coordinates need it, and are left out without; those of its first
            version are always left out, as it does not say what they are.

    Raises:
        FeatureError: the file is missing, damaged or of another kind; everything that is wrong with its arrays.
    """
    if not path.is_file():
        raise _error("no such file of features", path, "check the path, or extract the features")
    if path.suffix.lower() in TENSOR_SUFFIXES:
        return Bag(_float32(_load_tensor(path), path), source=path)
    arrays, made_with = _read_hdf5(path)
    if "feats" in arrays:
        return _stamp_bag(path, arrays, made_with, l0_mpp)
    coords = arrays.get("coords")
    return Bag(
        _float32(arrays["features"], path),
        None if coords is None else _whole_numbers(coords, path),
        l0_patch_px=_positive(made_with.get("l0_patch_px", made_with.get("patch_size_level0"))),
        patch_px=_whole(made_with.get("patch_size")),
        mpp=_positive(made_with.get("mpp")) or _nominal_mpp(made_with),
        made_with=made_with,
        source=path,
    )


def check_width(bag: Bag, width: int | None, path: Path) -> None:
    """See that a bag's features are as wide as those before.

    Raises:
        FeatureError: they are not.
    """
    if width is not None and bag.width != width:
        what = f"{bag.width} features a patch, where the others have {width}"
        raise _error(what, path, "give features that one network made, all alike")


def write_bag(bag: Bag, path: Path) -> None:
    """Write an HDF5 file that TRIDENT's and CLAM's readers take; it is either complete or not there.

    Raises:
        RunError: the disk is full, or the folder cannot be written.
    """
    # In memory first: HDF5's own errors do not say that a disk is full, and some network drives refuse its locks.
    with h5py.File(path.name, "w", driver="core", backing_store=False) as file:
        file.attrs.update(bag.made_with)
        file.create_dataset("features", data=bag.features_nd).attrs["name"] = path.stem
        if bag.l0_coords_n2 is not None:
            file.create_dataset("coords", data=bag.l0_coords_n2).attrs.update(_trident_attributes(bag, path.stem))
        file.flush()
        content = file.id.get_file_image()
    with write_atomically(path) as beside:
        beside.write_bytes(content)


def write_tensor(bag: Bag, path: Path) -> None:
    """Write the features alone, as CLAM's training reads them from ``pt_files/``.

    Raises:
        RunError: the disk is full, or the folder cannot be written.
    """
    content = io.BytesIO()
    torch.save(torch.from_numpy(bag.features_nd), content)
    with write_atomically(path) as beside:
        beside.write_bytes(content.getvalue())


def read_made_with(path: Path) -> tuple[dict[str, Fact], int]:
    """What an HDF5 file of features says of itself, and its number of patches; the features themselves are not read.

    Raises:
        FeatureError: the file is missing, damaged or of another kind.
    """
    with _opened(path) as file:
        features = _features_of(file, path)
        return _attributes(file, features, file.get("coords")), int(features.shape[-2]) if features.ndim > 1 else 1


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An HDF5 file, open to be read; whatever HDF5 meets in it becomes a FeatureError."""
    try:
        if not h5py.is_hdf5(path):
            raise _error("not an HDF5 file", path, "give .h5 files of features, or .pt files of tensors")
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except FeatureError:
        raise
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise _error(f"damaged or cut short ({error})", path, AGAIN) from error


def _read_hdf5(path: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Fact]]:
    """The features, under the name that they have, the coordinates if there are any, and all attributes."""
    with _opened(path) as file:
        features, coords = _features_of(file, path), file.get("coords")
        name = features.name.removeprefix("/")
        arrays = {name: features[()]} if coords is None else {name: features[()], "coords": coords[()]}
        return arrays, _attributes(file, features, coords)


def _features_of(file: Any, path: Path) -> Any:
    for name in FEATURE_NAMES:
        if isinstance(file.get(name), h5py.Dataset):
            return file[name]
    found = ", ".join(sorted(file)) or "nothing"
    raise _error(f"no dataset named {' or '.join(FEATURE_NAMES)}, but {found}", path, "give a file of patch features")


def _attributes(*holders: Any) -> dict[str, Fact]:
    """Texts and numbers among the attributes; of two of one name, the later holder's."""
    found: dict[str, Fact] = {}
    for holder in holders:
        for name, value in holder.attrs.items() if holder is not None else ():
            plain = value.item() if isinstance(value, np.generic) else value
            plain = plain.decode(errors="replace") if isinstance(plain, bytes) else plain
            if isinstance(plain, str | int | float):
                found[str(name)] = plain
    return found


def _stamp_bag(
    path: Path, arrays: Mapping[str, npt.NDArray[Any]], made_with: Mapping[str, Fact], l0_mpp: float | None
) -> Bag:
    unit = made_with.get("unit")
    if unit not in (None, "um"):
        raise _error(f"coordinates in {unit}, not in um", path, "extract the features with STAMP 2 or later")
    tile_um = None if unit is None else _positive(made_with.get("tile_size_um", made_with.get("tile_size")))
    tile_px, um_coords = _whole(made_with.get("tile_size_px")), arrays.get("coords")
    l0_coords = None
    if unit is not None and l0_mpp is not None and um_coords is not None:
        l0_coords = _whole_numbers(um_coords / l0_mpp, path)
    return Bag(
        _float32(arrays["feats"], path),
        l0_coords,
        l0_patch_px=tile_um / l0_mpp if tile_um is not None and l0_mpp is not None else None,
        patch_px=tile_px,
        mpp=tile_um / tile_px if tile_um is not None and tile_px is not None else None,
        made_with=made_with,
        source=path,
    )


def _load_tensor(path: Path) -> npt.NDArray[Any]:
    remedy = "give a .pt file that holds one tensor, a row a patch"
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise _error(f"not a tensor that PyTorch saved, or damaged ({type(error).__name__})", path, remedy) from error
    if not isinstance(loaded, torch.Tensor):
        raise _error(f"a {type(loaded).__name__}, not a tensor", path, remedy)
    numbers = loaded.detach().float() if loaded.is_floating_point() else loaded
    array: npt.NDArray[Any] = numbers.numpy()
    return array


def _float32(features: npt.NDArray[Any], path: Path) -> npt.NDArray[np.float32]:
    if features.dtype.kind != "f":
        raise _error(f"features of type {features.dtype}, not numbers with a fraction", path, AGAIN)
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused
        return np.ascontiguousarray(_without_batch(features), dtype=np.float32)


def _without_batch(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Without the leading axis of 1 that TRIDENT's batches of one slide leave."""
    return array[0] if array.ndim == 3 and len(array) == 1 else array


def _whole_numbers(coords: npt.NDArray[Any], path: Path) -> npt.NDArray[np.int64]:
    if coords.dtype.kind not in "iuf" or not np.isfinite(coords).all():
        raise _error("coordinates that are not finite numbers", path, AGAIN)
    whole: npt.NDArray[np.int64] = np.rint(_without_batch(coords)).astype(np.int64)
    return whole


def _trident_attributes(bag: Bag, name: str) -> dict[str, Fact]:
    """What TRIDENT writes beside coordinates, as far as it is known."""
    found: dict[str, Fact] = {"name": name, "overlap": 0}
    if bag.patch_px is not None:
        found["patch_size"] = bag.patch_px
    if bag.l0_patch_px is not None:
        found["patch_size_level0"] = round(bag.l0_patch_px)
    if bag.mpp is not None:
        found["target_magnification"] = round(MPP_AT_1X / bag.mpp, 2)
    if bag.mpp is not None and bag.patch_px is not None and bag.l0_patch_px is not None:
        found["level0_magnification"] = round(MPP_AT_1X * bag.l0_patch_px / (bag.mpp * bag.patch_px), 2)
    return found


def _nominal_mpp(made_with: Mapping[str, Fact]) -> float | None:
    magnification = _positive(made_with.get("target_magnification"))
    return None if magnification is None else MPP_AT_1X / magnification


def _positive(value: Fact | None) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) and value > 0 else None


def _whole(value: Fact | None) -> int | None:
    number = _positive(value)
    return None if number is None else round(number)


def _error(what: str, path: Path, remedy: str) -> FeatureError:
    return FeatureError.single(" ".join(what.split()), where=str(path), remedy=remedy)
