"""``wholeslide features``: estimate, files, what a second call finds, and what it says of slides it cannot read."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_cases import call, manifest, refused, tiff

import wholeslide
from wholeslide.slides.lock import alone_in

TINY = ("--backbone", "test_resnet", "--weights", "random", "--patch", 64, "--precision", "fp32", "--quiet")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three slides of 512 pixels with a disc of tissue, one of them listed twice."""
    for index in range(3):
        tiff(tmp_path / "slides" / f"s{index}.tiff", mpp=2.0, width=512 + index)
    manifest(tmp_path, ["s0.tiff,a", "s1.tiff,b", "s2.tiff,a", "s0.tiff,a"])
    return tmp_path


def words(folder: Path, *others: object) -> list[object]:
    return ["features", folder / "labels.csv", "--slides", folder / "slides", "--out", folder / "out", *TINY, *others]


def test_a_second_call_finds_what_is_there(folder: Path) -> None:
    outcome = call(*words(folder, "--background", "constant"))
    assert outcome.status == 0, outcome
    bags = [wholeslide.read_bag(folder / "out" / f"s{index}.h5") for index in range(3)]
    count = sum(map(len, bags))
    assert 3 < count < 3 * 81
    first, second = outcome.out.splitlines()
    assert first.startswith(f"3 slides to encode: about {count} patches, ")
    assert first.endswith(" of computing (test_resnet in fp32), reading not counted")
    assert second == f"3 slides encoded ({count} patches): {folder / 'out'}"
    assert {path.name for path in (folder / "out").iterdir()} == {"s0.h5", "s1.h5", "s2.h5"}
    tiff(folder / "slides" / "s3.tiff", mpp=2.0)
    manifest(folder, ["s0.tiff,a", "s3.tiff,b", "s2.tiff,a"])
    again = call(*words(folder, "--background", "constant"))
    assert again.status == 0
    assert ", 2 were there before: " in again.out
    assert again.out.startswith("1 slides to encode: ")


def test_other_options_are_refused(folder: Path) -> None:
    assert call(*words(folder)).status == 0
    errors = refused(*words(folder, "--first-stride", 1, "--least-tissue", 0.25))
    assert errors[0] == (
        f"features made with first_stride own, not 1; least_tissue 0.5, not 0.25 ({folder / 'out' / 's0.h5'}): "
        "give another --out, or remove it"
    )
    assert len(errors) == 3


def test_clam_s_layout(folder: Path) -> None:
    assert call(*words(folder, "--layout", "clam")).status == 0
    found = sorted(path.relative_to(folder / "out").as_posix() for path in (folder / "out").rglob("*.*"))
    assert found == [f"{kind}_files/s{index}.{kind}" for kind in ("h5", "pt") for index in range(3)]


def test_unreadable_slides_are_told_together_when_the_others_are_done(folder: Path) -> None:
    for name in ("s0", "s2"):
        (folder / "slides" / f"{name}.tiff").write_bytes(b"no slide")
    errors = refused(*words(folder))
    assert len(errors) == 2
    assert all(
        str(folder / "slides" / f"{name}.tiff") in error for name, error in zip(("s0", "s2"), errors, strict=True)
    )
    assert [path.name for path in (folder / "out").iterdir()] == ["s1.h5"]
    (folder / "slides" / "s2.tiff").unlink()
    outcome = call(*words(folder, "--on-unreadable", "exclude"))
    assert outcome.status == 0
    assert [warning.split(":")[0] for warning in outcome.warnings] == ["left out", "left out"]
    assert ", 1 were there before: " in outcome.out


def test_no_slide_at_all_can_be_read(folder: Path) -> None:
    for path in (folder / "slides").iterdir():
        path.write_bytes(b"no slide")
    assert len(refused(*words(folder, "--on-unreadable", "exclude"))) == 3


def test_two_at_once_on_one_folder(folder: Path) -> None:
    with alone_in(folder / "out"):
        errors = refused(*words(folder))
    assert errors[0].startswith(f"another process is writing into this folder ({folder / 'out'}): ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--patch", 8), "8 is too small (--patch): give 32 or more"),
        (("--layout", "stamp"), "stamp is not a value it takes (--layout): give one of trident, clam"),
        (("--backbone", "resnet10"), "timm knows no such backbone (resnet10): "),
        (("--mpp", 1.0), "1 microns per pixel asked for, but only 2 stored ("),
    ],
)
def test_what_is_refused(folder: Path, options: tuple[object, ...], message: str) -> None:
    assert refused(*words(folder, *options))[0].startswith(message)
