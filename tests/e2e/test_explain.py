"""`wholeslide explain` for every kind of method, with what goes wrong on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from train_tiny import make_cohort, tiny_config

from wholeslide.baselines.bag import Bag
from wholeslide.baselines.feature_files import write_bag
from wholeslide.cli import main
from wholeslide.explain import explain_cohort, explanations_of
from wholeslide.predict import predict
from wholeslide.train.loop import train

METHODS: dict[str, dict[str, Any]] = {
    "local": {},
    "max": {"patch": 96},
    "clam-mb": {"patch": 96},
    "mil-rnn": {"patch": 96},
}


def size_of(picture: Path) -> tuple[int, int]:
    with Image.open(picture) as image:
        return image.size


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cohort(tmp_path_factory.mktemp("slides"))


@pytest.fixture(scope="module")
def local_run(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_config(manifest, tmp_path_factory.mktemp("run") / "local", epochs=1)).path


@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_method(method: str, manifest: Path, tmp_path: Path) -> None:
    run = train(tiny_config(manifest, tmp_path / "run", method=method, epochs=1, **METHODS[method]))
    slide = manifest.parent / "slide7.png"
    assert main(["explain", str(run.path), str(slide), "--out", str(tmp_path / "out"), "--quiet"]) == 0
    folder = tmp_path / "out" / "slide7"
    facts = json.loads((folder / "explanation.json").read_text())
    row = predict(run.path, [slide]).rows.iloc[0]
    assert facts["prediction"] == row["prediction"]
    np.testing.assert_allclose(facts["probabilities_by_stage"][-1], [row["prob_a"], row["prob_b"]], atol=1e-6)
    kinds = {(one["kind"], one["class"]) for one in facts["maps"]}
    assert {("evidence", "a"), ("evidence", "b")} <= kinds
    expected = {"local": {None}, "max": set(), "clam-mb": {"a", "b"}, "mil-rnn": set()}[method]
    assert {label for kind, label in kinds if kind == "attention"} == expected
    arrays = np.load(folder / "maps.npz")
    size = size_of(slide)
    for one in facts["maps"]:
        height, width = arrays[one["array"]].shape
        assert np.isfinite(arrays[one["array"]]).any()
        extent = [one["l0_cell"][0] * width, one["l0_cell"][1] * height]
        assert one["l0_origin"] == [0, 0]
        near = one["l0_cell"][0] / 2  # patches at the border lie on no cell's edge
        assert all(length - near <= reached <= length + 512 for length, reached in zip(size, extent, strict=True))
        assert size_of(folder / one["picture"]) == size
    assert {file.name for file in folder.iterdir()} == {
        "explanation.json",
        "maps.npz",
        "maps.ome.tif",
        "overlay.ome.tif",
        "pictures",
        "regions.geojson",
        "thumbnail.png",
    }


def test_what_cannot_be_read_is_told_and_the_rest_is_explained(
    local_run: Path, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes((manifest.parent / "slide0.png").read_bytes()[:2000])
    good, out = manifest.parent / "slide0.png", tmp_path / "out"
    words = [
        "explain",
        str(local_run),
        str(broken),
        str(tmp_path / "none.png"),
        str(good),
        "--out",
        str(out),
        "--quiet",
    ]
    assert main(words) == 2
    said = capsys.readouterr()
    assert "broken.png" in said.err
    assert "none.png" in said.err
    assert [folder.name for folder in out.iterdir() if folder.is_dir()] == ["slide0"]


def test_nothing_is_replaced_unless_asked(
    local_run: Path, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["explain", str(local_run), str(manifest.parent / "slide1.png"), "--out", str(tmp_path / "out"), "--quiet"]
    assert main(words) == 0
    description = tmp_path / "out" / "slide1" / "explanation.json"
    before = description.stat().st_mtime_ns
    assert main(words) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 0
    assert description.stat().st_mtime_ns == before
    facts = json.loads(description.read_text())
    description.write_text(json.dumps({**facts, "checkpoint": "another"}))
    assert main([*words, "--resume"]) == 0
    assert json.loads(description.read_text()) == facts
    for damaged in ("[]", "{}", '{"format_version": 1}', "{"):
        description.write_text(damaged)
        assert main([*words, "--resume"]) == 0
        assert json.loads(description.read_text()) == facts


def test_features_from_elsewhere_are_shown_on_their_slides(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features = tmp_path / "features"
    features.mkdir()
    corners = np.array([[0, 0], [96, 0], [0, 96], [96, 96]])
    for index in range(9):
        values = np.random.default_rng(index).normal(size=(4, 8)).astype(np.float32)
        write_bag(Bag(values, corners, 96.0, 96, 1.0), features / f"slide{index}.h5")
    rows = manifest.read_text().replace(".png", ".h5")
    (features / "labels.csv").write_text(rows)
    run = train(tiny_config(features / "labels.csv", tmp_path / "run", method="abmil", epochs=1)).path
    words = ["explain", str(run), str(features / "slide0.h5"), "--out", str(tmp_path / "out"), "--quiet"]
    assert main(words) == 2
    assert "--slides" in capsys.readouterr().err
    assert main([*words, "--slides", str(manifest.parent)]) == 0
    facts = json.loads((tmp_path / "out" / "slide0" / "explanation.json").read_text())
    assert facts["main"] == "attention, stage 1"
    shown = np.load(tmp_path / "out" / "slide0" / "maps.npz")[facts["maps"][0]["array"]]
    assert len(np.unique(shown[np.isfinite(shown)])) == 4


def test_a_run_keeps_what_is_said_of_its_own_cohort(manifest: Path, tmp_path: Path) -> None:
    run = train(tiny_config(manifest, tmp_path / "run", epochs=1)).path
    assert explanations_of(run) == {}
    first = explain_cohort(run, {"slide7.png"})
    assert [(one.file, one.was_there) for one in first.done] == [("slide7.png", False)]
    both = explain_cohort(run, {"slide7.png", "slide2.png"})
    assert {one.file: one.was_there for one in both.done} == {"slide7.png": True, "slide2.png": False}
    kept = explanations_of(run)
    assert kept == {one.file: one.folder for one in both.done}
    description = kept["slide2.png"] / "explanation.json"
    facts = json.loads(description.read_text())
    description.write_text(json.dumps({**facts, "checkpoint": "of other weights"}))
    assert explanations_of(run).keys() == {"slide7.png"}
    assert explain_cohort(run, ()).done == ()
