"""Files of features: ours, TRIDENT's, CLAM's and STAMP's, and those that nobody can use."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from wholeslide.baselines import feature_files
from wholeslide.baselines.bag import Bag
from wholeslide.baselines.feature_files import read_bag, read_made_with, write_bag, write_tensor
from wholeslide.errors import FeatureError, RunError

FEATURES = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
L0_COORDS = np.arange(14).reshape(7, 2) * 1000


def write_h5(path: Path, datasets: dict[str, Any], **attributes: Any) -> Path:
    """Attributes are the file's, or, with a name such as ``coords__unit``, a dataset's."""
    with h5py.File(path, "w") as file:
        for name, value in datasets.items():
            file.create_dataset(name, data=value)
        for name, value in attributes.items():
            holder, _, attribute = name.rpartition("__")
            (file[holder] if holder else file).attrs[attribute] = value
    return path


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(FeatureError) as caught:
        read_bag(path, **options)
    assert all(str(path) in problem.where for problem in caught.value.problems)
    return str(caught.value)


def our_bag() -> Bag:
    made_with = {"key": "abc", "backbone": "resnet34", "mpp": 2.022, "patch_px": 256, "l0_patch_px": 2047.6}
    return Bag(FEATURES, L0_COORDS, l0_patch_px=2047.6, patch_px=256, mpp=2.022, made_with=made_with)


class TestOurs:
    def test_comes_back_as_it_was(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "slide ß.h5"
        write_bag(our_bag(), path)
        bag = read_bag(path)
        assert bag.features_nd.tobytes() == FEATURES.tobytes()
        assert bag.l0_coords_n2 is not None
        np.testing.assert_array_equal(bag.l0_coords_n2, L0_COORDS)
        assert (bag.l0_patch_px, bag.patch_px, bag.mpp, bag.source) == (2047.6, 256, 2.022, path)
        assert bag.made_with.items() >= our_bag().made_with.items()
        assert (len(bag), bag.width) == (7, 5)
        assert read_made_with(path) == (dict(bag.made_with), 7)
        assert [file.name for file in path.parent.iterdir()] == [path.name]

    def test_is_as_trident_writes_it(self, tmp_path: Path) -> None:
        write_bag(our_bag(), tmp_path / "a.h5")
        with h5py.File(tmp_path / "a.h5", "r") as file:
            assert set(file) == {"features", "coords"}
            assert (file["features"].dtype, file["features"].shape) == (np.float32, (7, 5))
            assert np.issubdtype(file["coords"].dtype, np.integer)
            attributes = dict(file["coords"].attrs)
            assert (file.attrs["key"], file.attrs["backbone"]) == ("abc", "resnet34")
        assert attributes == {
            **{"name": "a", "overlap": 0, "patch_size": 256, "patch_size_level0": 2048},
            **{"target_magnification": 4.95, "level0_magnification": 39.56},
        }

    def test_a_tensor_for_clam(self, tmp_path: Path) -> None:
        write_tensor(our_bag(), tmp_path / "pt_files" / "a.pt")
        loaded = torch.load(tmp_path / "pt_files" / "a.pt", weights_only=True)
        np.testing.assert_array_equal(loaded.numpy(), FEATURES)

    @pytest.mark.parametrize("write", [write_bag, write_tensor])
    def test_a_full_disk(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Bag, Path], None]
    ) -> None:
        def full(self: Path, content: bytes) -> int:
            with self.open("wb") as stream:
                stream.write(content[:100])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(RunError, match="the disk is full"):
            write(our_bag(), tmp_path / "a")
        assert list(tmp_path.iterdir()) == []


class TestTrident:
    ATTRIBUTES = {  # noqa: RUF012
        **{"coords__patch_size": 256, "coords__patch_size_level0": np.int64(512), "coords__overlap": 0},
        **{"coords__level0_magnification": 40, "coords__target_magnification": 20, "coords__name": "a"},
        **{"features__name": b"a", "features__savetodir": "somewhere"},
    }

    def test_as_it_is(self, tmp_path: Path) -> None:
        bag = read_bag(
            write_h5(tmp_path / "a.h5", {"features": FEATURES, "coords": L0_COORDS.astype(np.int32)}, **self.ATTRIBUTES)
        )
        np.testing.assert_array_equal(bag.features_nd, FEATURES)
        np.testing.assert_array_equal(bag.l0_coords_n2, L0_COORDS)  # type: ignore[arg-type]
        assert (bag.l0_patch_px, bag.patch_px, bag.mpp) == (512, 256, 0.5)
        assert (bag.made_with["savetodir"], bag.made_with["name"]) == ("somewhere", "a")

    def test_batches_of_one_and_half_precision(self, tmp_path: Path) -> None:
        datasets = {"features": FEATURES[None].astype(np.float16), "coords": L0_COORDS[None]}
        bag = read_bag(write_h5(tmp_path / "a.h5", datasets))
        np.testing.assert_array_equal(bag.features_nd, FEATURES.astype(np.float16))
        assert bag.features_nd.dtype == np.float32
        assert bag.l0_coords_n2 is not None
        assert bag.l0_coords_n2.shape == (7, 2)

    def test_magnifications_that_are_not_known(self, tmp_path: Path) -> None:
        datasets = {"features": FEATURES, "coords": L0_COORDS}
        bag = read_bag(write_h5(tmp_path / "a.h5", datasets, coords__target_magnification=-1))
        assert (bag.l0_patch_px, bag.patch_px, bag.mpp) == (None, None, None)


class TestClam:
    def test_hdf5(self, tmp_path: Path) -> None:
        bag = read_bag(write_h5(tmp_path / "a.h5", {"features": FEATURES, "coords": L0_COORDS}))
        np.testing.assert_array_equal(bag.l0_coords_n2, L0_COORDS)  # type: ignore[arg-type]
        assert bag.mpp is None

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_tensor(self, tmp_path: Path, dtype: torch.dtype) -> None:
        torch.save(torch.from_numpy(FEATURES).to(dtype), tmp_path / "a.pt")
        bag = read_bag(tmp_path / "a.pt")
        np.testing.assert_array_equal(bag.features_nd, torch.from_numpy(FEATURES).to(dtype).float().numpy())
        assert bag.l0_coords_n2 is None

    def test_nothing_but_a_tensor(self, tmp_path: Path) -> None:
        torch.save({"features": torch.zeros(3, 2)}, tmp_path / "a.pt")
        assert "a dict, not a tensor" in refusal(tmp_path / "a.pt")
        torch.save(torch.zeros(3, 2, dtype=torch.int64), tmp_path / "b.pt")
        assert "features of type int64" in refusal(tmp_path / "b.pt")

    def test_no_code_is_run(self, tmp_path: Path) -> None:
        torch.save(Path, tmp_path / "a.pt")
        assert "not a tensor that PyTorch saved, or damaged (UnpicklingError)" in refusal(tmp_path / "a.pt")

    def test_cut_short(self, tmp_path: Path) -> None:
        torch.save(torch.zeros(300, 2), tmp_path / "a.pt")
        content = (tmp_path / "a.pt").read_bytes()
        for length in (0, 10, len(content) // 2, len(content) - 10):
            (tmp_path / "a.pt").write_bytes(content[:length])
            assert "not a tensor that PyTorch saved, or damaged" in refusal(tmp_path / "a.pt")


class TestStamp:
    UM_COORDS = np.array([[0, 0], [256, 0], [512, 256], [0, 512], [256, 512], [512, 512], [768, 512]], np.float32)

    def file(self, tmp_path: Path, **attributes: Any) -> Path:
        return write_h5(
            tmp_path / "a.h5", {"feats": FEATURES.astype(np.float16), "coords": self.UM_COORDS}, **attributes
        )

    @pytest.mark.parametrize("size", ["tile_size_um", "tile_size"])
    def test_microns_become_level_0_pixels(self, tmp_path: Path, size: str) -> None:
        path = self.file(tmp_path, unit="um", extractor="uni", tile_size_px=224, **{size: 256.0})
        bag = read_bag(path, l0_mpp=0.2528)
        assert bag.l0_coords_n2 is not None
        assert bag.l0_coords_n2[:3].tolist() == [[0, 0], [1013, 0], [2025, 1013]]
        assert bag.l0_patch_px == pytest.approx(256 / 0.2528)
        assert (bag.patch_px, bag.mpp) == (224, pytest.approx(256 / 224))
        assert bag.made_with["extractor"] == "uni"

    def test_without_a_scale_there_are_no_coordinates(self, tmp_path: Path) -> None:
        bag = read_bag(self.file(tmp_path, unit="um", tile_size_um=256.0, tile_size_px=224))
        assert (bag.l0_coords_n2, bag.l0_patch_px) == (None, None)
        np.testing.assert_array_equal(bag.features_nd, FEATURES.astype(np.float16))

    def test_the_first_version_does_not_say_what_its_coordinates_are(self, tmp_path: Path) -> None:
        bag = read_bag(self.file(tmp_path, extractor="ctranspath"), l0_mpp=0.25)
        assert (bag.l0_coords_n2, bag.l0_patch_px, bag.mpp) == (None, None, None)

    def test_another_unit(self, tmp_path: Path) -> None:
        assert "coordinates in px, not in um" in refusal(self.file(tmp_path, unit="px"))


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ({"features": np.zeros((0, 5), np.float32)}, "no features, an array of shape (0, 5)"),
        ({"features": np.zeros((5, 0), np.float32)}, "no features, an array of shape (5, 0)"),
        ({"features": np.zeros(5, np.float32)}, "one vector a slide, where each of its patches needs a row"),
        ({"features": np.zeros((2, 7, 5), np.float32)}, "features of shape (2, 7, 5), where each of its patches needs a row"),
        ({"features": np.zeros((7, 5), np.int32)}, "features of type int32, not numbers with a fraction"),
        ({"features": FEATURES * np.array([[1], [np.nan], *[[1]] * 5])}, "1 of 7 patches have features that are not finite"),
        ({"features": np.full((7, 5), 1e300)}, "7 of 7 patches have features that are not finite"),
        ({"features": FEATURES, "coords": L0_COORDS[:5]}, "7 patches with features and 5 with coordinates"),
        ({"features": FEATURES, "coords": L0_COORDS.ravel()}, "coordinates of shape (14,), where each patch needs x and y"),
        ({"features": FEATURES, "coords": np.zeros((7, 4))}, "coordinates of shape (7, 4)"),
        ({"features": FEATURES, "coords": np.full((7, 2), np.nan)}, "coordinates that are not finite numbers"),
        ({"imgs": np.zeros((7, 4, 4, 3)), "coords": L0_COORDS}, "no dataset named features or feats, but coords, imgs"),
        ({}, "no dataset named features or feats, but nothing"),
    ],
)  # fmt: skip
def test_arrays_that_are_no_bag(tmp_path: Path, datasets: dict[str, Any], message: str) -> None:
    assert message in refusal(write_h5(tmp_path / "a.h5", datasets))


def test_all_that_is_wrong_is_told_together(tmp_path: Path) -> None:
    bad = FEATURES.copy()
    bad[3, 2] = np.inf
    told = refusal(write_h5(tmp_path / "a.h5", {"features": bad, "coords": L0_COORDS[:5]}))
    assert len(told.splitlines()) == 2


def test_a_bag_in_memory_is_checked_too() -> None:
    with pytest.raises(FeatureError, match=r"no features.*\(features in memory\)"):
        Bag(np.zeros((0, 5), np.float32))


def test_files_that_are_not_there_or_of_another_kind(tmp_path: Path) -> None:
    assert "no such file of features" in refusal(tmp_path / "nowhere.h5")
    assert "no such file of features" in refusal(tmp_path)
    (tmp_path / "a.h5").write_text("file,label\n")
    assert "not an HDF5 file" in refusal(tmp_path / "a.h5")
    (tmp_path / "empty.h5").touch()
    assert "not an HDF5 file" in refusal(tmp_path / "empty.h5")
    with pytest.raises(FeatureError, match="not an HDF5 file"):
        read_made_with(tmp_path / "nowhere.h5")


def test_a_file_that_was_cut_short(tmp_path: Path) -> None:
    write_bag(our_bag(), tmp_path / "a.h5")
    content = (tmp_path / "a.h5").read_bytes()
    for length in (64, 600, len(content) // 2, len(content) - 1):
        (tmp_path / "b.h5").write_bytes(content[:length])
        assert "damaged or cut short (" in refusal(tmp_path / "b.h5")
        with pytest.raises(FeatureError, match="damaged or cut short"):
            read_made_with(tmp_path / "b.h5")


def test_a_damaged_file_is_an_error_or_a_bag(tmp_path: Path) -> None:
    """Whatever bytes are overwritten: never another exception."""
    write_bag(our_bag(), tmp_path / "a.h5")
    content = (tmp_path / "a.h5").read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(content)
        start = int(rng.integers(len(content) - 16))
        damaged[start : start + 16] = rng.bytes(16)
        (tmp_path / "b.h5").write_bytes(bytes(damaged))
        try:
            read_bag(tmp_path / "b.h5")
        except FeatureError:
            refused += 1
    assert 5 < refused < 60


def test_what_is_locked_is_read(tmp_path: Path) -> None:
    """HDF5's locks fail on some network drives; reading needs none."""
    path = write_h5(tmp_path / "a.h5", {"features": FEATURES})
    with path.open("rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="unable to lock file"):
            h5py.File(path, "r")
        assert len(read_bag(path)) == 7


def test_only_the_head_of_a_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bag(our_bag(), tmp_path / "a.h5")
    monkeypatch.setattr(feature_files.h5py.Dataset, "__getitem__", lambda *args: pytest.fail("read"))
    assert read_made_with(tmp_path / "a.h5")[1] == 7
