"""From slides to features: what is seen, where it lies in the slide, and what a second call finds."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import openslide
import pytest
import timm
import torch
from feature_cases import pixel_encoder, pyramid_40x
from PIL import Image

from wholeslide.baselines import extraction
from wholeslide.baselines.config import EncoderConfig
from wholeslide.baselines.encoder import PatchEncoder, build_encoder
from wholeslide.baselines.extraction import FeatureFolder, bag_of, extract_features
from wholeslide.baselines.feature_files import read_bag
from wholeslide.baselines.patches import patch_boxes
from wholeslide.errors import CohortError, FeatureError, RunError
from wholeslide.geometry import Box, Size
from wholeslide.slides import working as working_module
from wholeslide.slides.config import SlideConfig
from wholeslide.slides.opening import open_slide
from wholeslide.slides.working import open_working_slide

KEEP = SlideConfig(mpp=2.0, background="keep")


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    return pyramid_40x(tmp_path / "slide.tif")


@pytest.fixture(scope="module")
def encoder() -> PatchEncoder:
    return build_encoder(EncoderConfig(backbone="test_resnet", weights="random", patch=64, precision="fp32"))


def seen(features_nd: np.ndarray, patch_px: int) -> np.ndarray:
    """Pixels as :func:`pixel_encoder` hands them out, (N, s, s, 3)."""
    return (255 * features_nd).reshape(-1, 3, patch_px, patch_px).transpose(0, 2, 3, 1)


@pytest.mark.parametrize("bounds", [None, Box(136, 248, 1201, 803), Box(104, 64, 1301, 1001)])
@pytest.mark.parametrize(("mpp", "reduction"), [(2.0, 1), (1.0, 1), (1.7, 1), (2.0, 4)])
def test_coordinates_are_where_openslide_finds_the_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mpp: float, reduction: int, bounds: Box | None
) -> None:
    """Whole and odd ratios, decoded at full size and at a quarter, a part of level 0 that was scanned, and sides that patches
    do not divide.
    """
    slide = pyramid_40x(tmp_path / "slide.tif", jpeg=reduction > 1)

    def bounded(path: Path, **options: Any) -> Any:
        reader = open_slide(path, **options)
        reader.l0_bounds = bounds or reader.l0_bounds
        return reader

    monkeypatch.setattr(working_module, "open_slide", bounded)
    with closing(open_working_slide(slide, SlideConfig(mpp=mpp, background="keep"))) as working:
        assert working.sampling.reduction == reduction
        bag = bag_of(working, pixel_encoder(64))
        assert len(bag) == len(patch_boxes(working.whole_size, 64))
    assert (bag.mpp, bag.patch_px) == (pytest.approx(mpp), 64)
    assert bag.l0_patch_px == pytest.approx(64 * mpp / 0.25)
    assert bag.l0_coords_n2 is not None
    whole = bounds or Box(0, 0, 1501, 1131)
    assert (np.abs(bag.l0_coords_n2[0] - (whole.left, whole.top)) <= 8).all()  # a pixel of the coarsest level
    assert (bag.l0_coords_n2.max(axis=0) + bag.l0_patch_px <= (whole.right + 4, whole.bottom + 4)).all()
    side = round(bag.l0_patch_px)
    with openslide.OpenSlide(slide) as reference:
        for (left, top), pixels in zip(bag.l0_coords_n2.tolist(), seen(bag.features_nd, 64), strict=True):
            errors = [
                np.abs(_region(reference, left + shift, top + shift, side) - pixels)[4:-4, 4:-4].mean()
                for shift in (-3, 0, 3)
            ]
            assert errors[1] < min(errors[0], errors[2])
            assert errors[1] < 1.0


def _region(reference: openslide.OpenSlide, left: int, top: int, side: int) -> np.ndarray:
    region = reference.read_region((left, top), 0, (side, side)).convert("RGB")
    return np.asarray(region.resize((64, 64), Image.Resampling.BOX), np.float32)


@pytest.mark.parametrize("batch", [64, 3, 1])
def test_features_equal_those_of_all_crops_at_once(slide: Path, encoder: PatchEncoder, batch: int) -> None:
    oracle = timm.create_model("test_resnet", num_classes=0).eval()
    oracle.load_state_dict(encoder.backbone.state_dict())
    with closing(open_working_slide(slide, KEEP)) as working:
        bag = bag_of(working, encoder, batch=batch)
        crops = np.stack([working.read_whole(box) for box in patch_boxes(working.whole_size, 64)])
    with torch.no_grad():
        expected = oracle((torch.from_numpy(crops).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5).numpy()
    assert np.ptp(expected, axis=0).max() > 0.01
    np.testing.assert_allclose(bag.features_nd, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_features_in_memory_equal_those_of_the_file(slide: Path, tmp_path: Path, precision: Any) -> None:
    encoder = build_encoder(EncoderConfig(backbone="test_resnet", weights="random", patch=64, precision=precision))
    (extracted,) = extract_features([(slide, None)], tmp_path / "out", encoder, KEEP).done
    from_file = read_bag(extracted.file)
    with closing(open_working_slide(slide, KEEP)) as working:
        in_memory = bag_of(working, encoder)
    assert from_file.features_nd.tobytes() == in_memory.features_nd.tobytes()
    np.testing.assert_array_equal(from_file.l0_coords_n2, in_memory.l0_coords_n2)  # type: ignore[arg-type]
    for name in ("l0_patch_px", "patch_px", "mpp"):
        assert getattr(from_file, name) == getattr(in_memory, name)
    assert from_file.made_with.items() >= in_memory.made_with.items()
    assert from_file.made_with["precision"] == precision


def test_what_a_file_says_of_itself(slide: Path, tmp_path: Path, encoder: PatchEncoder) -> None:
    extract_features([(slide, None)], tmp_path / "out", encoder, KEEP)
    with h5py.File(tmp_path / "out" / "slide.h5", "r") as file:
        found = dict(file.attrs)
        coords = dict(file["coords"].attrs)
    assert found.keys() >= {"key", "slide_key", "weights_hash", "wholeslide_version", "pixel_mean", "least_tissue"}
    assert (found["backbone"], found["patch_px"], found["mpp"], found["slide"]) == ("test_resnet", 64, 2.0, "slide.tif")
    assert (coords["patch_size"], coords["patch_size_level0"]) == (64, 512)
    assert (coords["target_magnification"], coords["level0_magnification"]) == (5.0, 40.0)


@pytest.mark.parametrize("layout", ["trident", "clam"])
def test_what_is_there_is_not_made_again(
    tmp_path: Path, encoder: PatchEncoder, monkeypatch: pytest.MonkeyPatch, layout: Any
) -> None:
    rows = [(pyramid_40x(tmp_path / f"s{seed}.tif", seed=seed), None) for seed in range(3)]
    out, made = tmp_path / "out", []
    monkeypatch.setattr(extraction, "open_working_slide", _noting(made))
    first = extract_features(rows[:2], out, encoder, KEEP, layout=layout)
    again = extract_features(rows, out, encoder, KEEP, layout=layout)
    assert made == ["s0.tif", "s1.tif", "s2.tif"]
    assert [each.was_there for each in first.done + again.done] == [False, False, True, True, False]
    assert len({each.patches for each in again.done}) == 1
    names = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.*"))
    if layout == "trident":
        assert names == ["s0.h5", "s1.h5", "s2.h5"]
        return
    assert names == [f"{kind}_files/s{seed}.{kind}" for kind in ("h5", "pt") for seed in range(3)]
    tensor, bag = read_bag(out / "pt_files" / "s1.pt"), read_bag(out / "h5_files" / "s1.h5")
    np.testing.assert_array_equal(tensor.features_nd, bag.features_nd)
    (out / "pt_files" / "s1.pt").unlink()
    assert [each.was_there for each in extract_features(rows, out, encoder, KEEP, layout="clam").done] == [
        True,
        False,
        True,
    ]


def _noting(opened: list[str]) -> Any:
    def noting(path: Path, *args: Any, **options: Any) -> Any:
        opened.append(path.name)
        return open_working_slide(path, *args, **options)

    return noting


def test_a_slide_that_changed_and_a_file_that_is_damaged_are_made_again(
    slide: Path, tmp_path: Path, encoder: PatchEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    (first,) = extract_features([(slide, None)], out, encoder, KEEP).done
    before = read_bag(first.file)
    pyramid_40x(slide, seed=1)
    (changed,) = extract_features([(slide, None)], out, encoder, KEEP).done
    assert not changed.was_there
    assert not np.array_equal(read_bag(changed.file).features_nd, before.features_nd)
    changed.file.write_bytes(changed.file.read_bytes()[:3000])
    with caplog.at_level(logging.WARNING):
        (mended,) = extract_features([(slide, None)], out, encoder, KEEP).done
    assert not mended.was_there
    assert [message for message in caplog.messages if "damaged or cut short" in message and "made again" in message]
    assert extract_features([(slide, None)], out, encoder, KEEP).done[0].was_there


def test_features_made_otherwise_are_not_overwritten(tmp_path: Path, encoder: PatchEncoder) -> None:
    rows = [(pyramid_40x(tmp_path / f"s{seed}.tif", seed=seed), None) for seed in range(2)]
    out = tmp_path / "out"
    extract_features(rows, out, encoder, KEEP)
    before = {path: path.read_bytes() for path in out.iterdir()}
    reseeded = build_encoder(
        EncoderConfig(backbone="test_resnet", weights="random", patch=64, precision="bf16", first_stride=1), seed=1
    )
    with pytest.raises(RunError) as caught:
        extract_features(rows, out, reseeded, SlideConfig(mpp=1.0, background="keep"), least_tissue=0.3)
    assert [problem.where for problem in caught.value.problems] == [str(out / "s0.h5"), str(out / "s1.h5")]
    assert caught.value.problems[0].what == (
        "features made with first_stride own, not 1; other weights; precision fp32, not bf16; least_tissue 0.5, not 0.3; "
        "target_mpp 2.0, not 1.0"
    )
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_features_of_others_are_not_overwritten(slide: Path, tmp_path: Path, encoder: PatchEncoder) -> None:
    (tmp_path / "out").mkdir()
    with h5py.File(tmp_path / "out" / "slide.h5", "w") as file:
        file["features"] = np.zeros((3, 4), np.float32)
    with pytest.raises(RunError, match="features that this program did not write"):
        extract_features([(slide, None)], tmp_path / "out", encoder, KEEP)


def test_slides_that_cannot_be_read_are_told_when_the_others_are_done(tmp_path: Path, encoder: PatchEncoder) -> None:
    good, bad = pyramid_40x(tmp_path / "good.tif"), tmp_path / "bad.tif"
    bad.write_bytes(good.read_bytes()[:5000])
    told: list[Path] = []
    rows = [(bad, None), (tmp_path / "nowhere.tif", None), (good, None), (good, None)]
    found = extract_features(rows, tmp_path / "out", encoder, KEEP, on_slide=told.append)
    assert [each.slide for each in found.done] == [good]
    assert list(found.failed) == [bad, tmp_path / "nowhere.tif"]
    assert all(str(path) in problem.where for path, problems in found.failed.items() for problem in problems)
    assert told == [bad, tmp_path / "nowhere.tif", good]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good.h5"]


def test_features_that_are_not_finite_cost_their_slide(slide: Path, tmp_path: Path, encoder: PatchEncoder) -> None:
    broken = pixel_encoder(64)
    broken.pixel_std.zero_()
    with closing(open_working_slide(slide, KEEP)) as working, pytest.raises(FeatureError, match=r"finite.*slide\.tif"):
        bag_of(working, broken)
    assert list(extract_features([(slide, None)], tmp_path / "out", broken, KEEP).failed) == [slide]


def test_two_slides_of_one_name(tmp_path: Path, encoder: PatchEncoder) -> None:
    rows = [(pyramid_40x(tmp_path / name), None) for name in ("a.tif", "a.tiff")]
    with pytest.raises(CohortError, match=r"2 slides whose features would be one file, a\.h5 "):
        extract_features(rows, tmp_path / "out", encoder, KEEP)


def test_the_estimate_is_near(tmp_path: Path, encoder: PatchEncoder) -> None:
    rows = [(pyramid_40x(tmp_path / f"s{seed}.tif", seed=seed), None) for seed in range(3)]
    rows.insert(1, (tmp_path / "nowhere.tif", None))
    folder = FeatureFolder(tmp_path / "out", encoder, KEEP)
    estimate = folder.estimate(rows)
    assert estimate.patches == 4 * len(patch_boxes(Size(187, 141), 64))
    assert estimate.seconds > 0
    done = folder.extract(rows).done
    written = sum(each.file.stat().st_size for each in done)
    assert written == pytest.approx(estimate.size_bytes * 3 / 4, rel=0.35)


KILLED = """
import os, sys
from pathlib import Path
from wholeslide.baselines import feature_files
from wholeslide.baselines.config import EncoderConfig
from wholeslide.baselines.encoder import build_encoder
from wholeslide.baselines.extraction import extract_features
from wholeslide.slides.config import SlideConfig
def killed(self, content):
    with self.open("wb") as stream:
        stream.write(content[:1000])
    os.kill(os.getpid(), 9)
Path.write_bytes = killed
encoder = build_encoder(EncoderConfig(backbone="test_resnet", weights="random", patch=64, precision="fp32"))
extract_features([(Path(sys.argv[1]), None)], Path(sys.argv[2]), encoder, SlideConfig(mpp=2.0, background="keep"))
"""


def test_a_killed_run_leaves_no_half_file_and_is_gone_on_with(
    slide: Path, tmp_path: Path, encoder: PatchEncoder
) -> None:
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(slide), str(out)], env=os.environ, check=False)
    assert killed.returncode == -9
    assert not list(out.glob("*.h5"))
    assert len(list(out.glob(".*.part"))) == 1
    (out / ".another.h5.part").touch()  # of a slide that is no longer asked for
    assert not extract_features([(slide, None)], out, encoder, KEEP).done[0].was_there
    assert [path.name for path in out.iterdir()] == ["slide.h5"]
