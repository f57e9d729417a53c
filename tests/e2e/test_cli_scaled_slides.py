"""Slides with a scale, real ones among them: trained on, prepared and predicted by the command line."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import train_tiny  # noqa: F401  registers the backbone resnet_micro
from cli_cases import (
    TINY_TRAINING,
    call,
    manifest,
    predicted,
    real_data,
    refused,
    tiff,
)
from PIL import Image

from wholeslide.slides.lock import alone_in


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on slides with a scale, at 2 µm/px."""
    folder = tmp_path_factory.mktemp("scaled")
    rows = []
    for index in range(20):
        tiff(folder / f"s{index}.tiff", mpp=2.0, width=400 + index)
        rows.append(f"s{index}.tiff,{'ab'[index % 2]}")
    words = ["--slides", folder, "--out", folder / "run", *TINY_TRAINING, "--epochs", 1]
    outcome = call("train", manifest(folder, rows), *words)
    assert outcome.status == 0, outcome
    return folder


def test_mpp_override(scaled: Path, tmp_path: Path) -> None:
    image = Image.open(tiff(tmp_path / "a.tiff", mpp=2.0))
    image.save(tmp_path / "a.png")
    outcome = call("predict", scaled / "run", tmp_path / "a.png", "--quiet")
    assert outcome.status == 2
    assert "no usable scale" in outcome.errors[0]
    outcome = call("predict", scaled / "run", tmp_path / "a.png", "--mpp-override", "2", "--quiet")
    assert outcome.status == 0, outcome
    assert refused("predict", scaled / "run", tmp_path / "a.png", "--mpp-override", "500")[0].startswith("not a scale")


def test_real_slides_and_the_unreadable_ones(scaled: Path, tmp_path: Path) -> None:
    slides = real_data() / "slides"
    good = [slides / name for name in ("cmu_small_region.svs", "fluorescence-dapi.ndpi", "dicom-wsi.dcm")]
    bad = [slides / "openslide-fixtures" / name for name in ("unopenable.tiff", "unreadable.svs")]
    outcome = call("predict", scaled / "run", bad[0], *good, bad[1], "--out", tmp_path / "new.csv", "--quiet")
    assert outcome.status == 2
    assert len(outcome.errors) == 2
    table = predicted(tmp_path / "new.csv").set_index("file")
    assert len(table) == 5
    for path in good:
        assert table.loc[str(path), "prediction"] in ("a", "b")
        assert table.loc[str(path), "error"] == ""
    for path in bad:
        assert table.loc[str(path), "prediction"] == ""
        assert str(path) in table.loc[str(path), "error"]
        assert any(str(path) in line for line in outcome.errors)


class TestPrepare:
    def test_a_second_call_finds_what_is_there(self, scaled: Path, tmp_path: Path) -> None:
        words = ["--slides", scaled, "--out", tmp_path / "cache", "--lossless", "--quiet"]
        outcome = call("prepare", scaled / "labels.csv", *words)
        assert outcome.status == 0, outcome
        assert outcome.out.startswith("20 slides to prepare: about ")
        assert "\n20 slides prepared (" in outcome.out
        assert len(list((tmp_path / "cache").iterdir())) == 20
        again = call("prepare", scaled / "labels.csv", *words)
        assert again.out.startswith("0 slides prepared (0 bytes), 20 were there before: ")

    @pytest.fixture(scope="class")
    @classmethod
    def finer(cls, scaled: Path) -> Path:
        """Slides at twice the run's resolution, no two alike in colour."""
        rows = []
        for index in range(4):
            picture = tiff(scaled / "finer" / f"f{index}.tiff", mpp=1.0, width=700 + 20 * index, height=640)
            pixels = tifffile.imread(picture)
            pixels[..., 1] = pixels[..., 1] // (1 + index)
            tifffile.imwrite(
                picture, pixels, tile=(256, 256), photometric="rgb", resolution=(1e4, 1e4), resolutionunit=3
            )
            rows.append(picture.name)
        return manifest(scaled / "finer", rows, "file")

    @pytest.mark.parametrize(("words", "tolerance"), [(["--lossless"], 0.0), ([], 1.5e-3)])
    def test_predictions_from_prepared_slides(
        self, scaled: Path, finer: Path, tmp_path: Path, words: list[str], tolerance: float
    ) -> None:
        """Bit by bit the same from a lossless file; from JPEG within 0.0015, far less than slides differ by."""
        cache = tmp_path / "cache"
        assert call("prepare", finer, "--slides", finer.parent, "--out", cache, *words, "--quiet").status == 0
        tables = []
        for slides in (sorted(finer.parent.glob("*.tiff")), sorted(cache.iterdir())):
            out = tmp_path / f"{slides[0].parent.name}.csv"
            assert call("predict", scaled / "run", *slides, "--out", out, "--quiet").status == 0
            tables.append(predicted(out)["prob_a"].to_numpy())
        originals, prepared = tables
        assert len(originals) == 4
        assert np.ptp(originals) > 4 * tolerance
        assert np.abs(originals - prepared).max() <= tolerance

    def test_the_others_are_prepared_where_one_cannot_be_read(self, tmp_path: Path) -> None:
        tiff(tmp_path / "a.tiff", mpp=2.0)
        (tmp_path / "b.tiff").write_bytes(b"no slide")
        path = manifest(tmp_path, ["b.tiff", "a.tiff"], "file")
        errors = refused("prepare", path, "--slides", tmp_path, "--out", tmp_path / "cache", "--quiet")
        assert len(errors) == 1
        assert str(tmp_path / "b.tiff") in errors[0]
        assert len(list((tmp_path / "cache").iterdir())) == 1

    def test_two_at_once_on_one_cache(self, scaled: Path, tmp_path: Path) -> None:
        words = ["prepare", scaled / "labels.csv", "--slides", scaled, "--out", tmp_path / "cache", "--quiet"]
        with alone_in(tmp_path / "cache"):
            errors = refused(*words)
        assert errors == [
            f"another process is writing into this folder ({tmp_path / 'cache'}): "
            "wait until it has ended, or give another --out"
        ]

    def test_not_enough_space(self, scaled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
        errors = refused("prepare", scaled / "labels.csv", "--slides", scaled, "--out", tmp_path / "cache", "--quiet")
        assert errors[0].startswith("the disk is too full: about ")
        assert "1000 bytes are free" in errors[0]
        assert not (tmp_path / "cache").exists()
