"""Everything that a user can get wrong, from the command line to the text of the error."""

from __future__ import annotations

import errno
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import train_tiny  # noqa: F401  registers the backbone resnet_micro
from cli_cases import TINY_TRAINING, call, child_words, cohort, manifest, picture, refused, tiff

from wholeslide.streaming.engine import StreamingEngine


def train(folder: Path, *options: object) -> list[str]:
    """The errors of a training that must not begin, and leaves nothing behind."""
    out = folder / "run"
    errors = refused("train", folder / "labels.csv", "--slides", folder, "--out", out, *TINY_TRAINING, *options)
    assert not out.exists()
    return errors


NATIVE = ("--mpp", "native")


def test_missing_slides_are_all_named(tmp_path: Path) -> None:
    cohort(tmp_path)
    lines = (tmp_path / "labels.csv").read_text()
    (tmp_path / "labels.csv").write_text(lines + "s1x.png,a\nother.svs,b\n")
    assert train(tmp_path, *NATIVE) == [
        f"no such slide among the 12 in {tmp_path} (labels.csv line 14: s1x.png): did you mean "
        + train(tmp_path, *NATIVE)[0].partition("did you mean ")[2],
        f"no such slide among the 12 in {tmp_path} (labels.csv line 15: other.svs): correct the name or remove the row",
    ]


def test_missing_folder_of_slides(tmp_path: Path) -> None:
    path = cohort(tmp_path)
    errors = refused(
        "train", path, "--slides", tmp_path / "nowhere", "--out", tmp_path / "run", *TINY_TRAINING, *NATIVE
    )
    assert f"no such folder ({tmp_path / 'nowhere'}): give the folder of the slides with --slides" in errors


def test_unreadable_slides(tmp_path: Path) -> None:
    cohort(tmp_path)
    (tmp_path / "s3.png").write_bytes((tmp_path / "s3.png").read_bytes()[:2000])
    (tmp_path / "s4.png").write_text("this is no picture")
    errors = train(tmp_path, *NATIVE)
    assert len(errors) == 2
    for name, error in zip(("s3.png", "s4.png"), errors, strict=True):
        assert name in error
        assert "copy the file again" in error


def test_unreadable_slides_are_excluded_on_request(tmp_path: Path) -> None:
    cohort(tmp_path)
    splits = ("train", "train", "train", "train", "valid", "valid", "test", "test")
    rows = [f"s{index}.png,{'ab'[index % 2]},{splits[index % 8]}" for index in range(12)]
    path = manifest(tmp_path, rows, "file,label,split")
    (tmp_path / "s0.png").write_text("this is no picture")
    words = ["train", path, "--slides", tmp_path, "--out", tmp_path / "run", *TINY_TRAINING, *NATIVE, "--dry-run"]
    outcome = call(*words, "--on-unreadable", "exclude")
    assert outcome.status == 0, outcome
    assert any(line.startswith("s0.png is left out: ") for line in outcome.warnings)


def test_ambiguous_name(tmp_path: Path) -> None:
    cohort(tmp_path)
    picture(tmp_path / "x" / "twin.png")
    picture(tmp_path / "y" / "twin.png", 300)
    (tmp_path / "labels.csv").write_text((tmp_path / "labels.csv").read_text() + "twin,a\n")
    assert train(tmp_path, *NATIVE) == [
        "'twin' may be any of x/twin.png, y/twin.png (labels.csv line 14: twin): "
        "write the path below the folder of the slides"
    ]


class TestScale:
    def slides(self, folder: Path, mpp: float | None, column: str = "") -> None:
        rows = []
        for index in range(12):  # the last one is sound
            tiff(folder / f"s{index}.tiff", mpp=mpp if index < 11 else 0.5, width=512 + index)
            rows.append(f"s{index}.tiff,{'ab'[index % 2]},{column if index < 11 else ''}")
        manifest(folder, rows, "file,label,mpp")

    def test_missing(self, tmp_path: Path) -> None:
        self.slides(tmp_path, None)
        errors = train(tmp_path)
        assert len(errors) == 11
        assert errors[0] == (
            f"no usable scale (microns per pixel) in the file ({tmp_path / 's0.tiff'}): give it by --mpp-override or in "
            "a manifest's column mpp; or train on the pixels as stored (--mpp native, or --downsample N)"
            "; --on-unreadable exclude goes on without it"
        )

    def test_implausible_in_the_file_counts_as_missing(self, tmp_path: Path) -> None:
        self.slides(tmp_path, 264.6)
        assert "no usable scale" in train(tmp_path)[0]

    def test_implausible_in_the_manifest(self, tmp_path: Path) -> None:
        self.slides(tmp_path, 0.5, "500")
        errors = train(tmp_path)
        assert len(errors) == 11
        assert errors[0] == (
            "the mpp '500' is no number from 0.05 to 20 (labels.csv line 2: s0.tiff): "
            "give µm per pixel of the stored image, or leave the cell empty to use the file's own"
        )

    def test_finer_than_stored(self, tmp_path: Path) -> None:
        self.slides(tmp_path, 2.0)
        errors = train(tmp_path, "--mpp", "0.5")
        assert len(errors) == 11
        assert errors[0] == (
            f"0.5 microns per pixel asked for, but only 2 stored ({tmp_path / 's0.tiff'}): "
            "leave the slide out, or train at --mpp 2 or coarser; --on-unreadable exclude goes on without it"
        )

    def test_options_that_make_no_sense(self, tmp_path: Path) -> None:
        self.slides(tmp_path, 0.5)
        assert "not a resolution (--mpp 0.001): give a value between 0.05 and 20 microns per pixel, or native" in train(
            tmp_path, "--mpp", "0.001"
        )


def test_one_class_only(tmp_path: Path) -> None:
    rows = [f"{picture(tmp_path / f's{index}.png', 250 + index).name},a" for index in range(12)]
    manifest(tmp_path, rows)
    errors = train(tmp_path, *NATIVE)
    assert any("class" in error and "'a'" in error for error in errors), errors


def test_patient_in_two_splits(tmp_path: Path) -> None:
    cohort(tmp_path)
    rows = []
    for index in range(12):
        split = ("train", "train", "train", "train", "valid", "valid", "test", "test")[index % 8]
        rows.append(f"s{index}.png,{'ab'[index % 2]},p{index},{split}")
    rows[4] = "s4.png,a,p0,valid"
    manifest(tmp_path, rows, "file,label,patient,split")
    errors = train(tmp_path, *NATIVE)
    assert errors == [
        "patient 'p0' is in split train and valid (s0.png, s4.png): put all files of the patient in one split"
    ]


def test_missing_labels(tmp_path: Path) -> None:
    cohort(tmp_path)
    text = (tmp_path / "labels.csv").read_text().replace("s2.png,a", "s2.png,").replace("s5.png,b", "s5.png,NaN")
    (tmp_path / "labels.csv").write_text(text)
    assert train(tmp_path, *NATIVE) == [
        "no label (labels.csv line 4: s2.png): give the label or remove the row",
        "the label 'NaN' reads as missing (labels.csv line 7: s5.png): give the label or remove the row",
    ]


def test_a_manifest_without_labels(tmp_path: Path) -> None:
    picture(tmp_path / "s0.png")
    manifest(tmp_path, ["s0.png"], "file")
    assert "no column 'label' (labels.csv): add one with each file's class" in train(tmp_path, *NATIVE)


def test_slide_under_32_px(tmp_path: Path) -> None:
    cohort(tmp_path)
    picture(tmp_path / "s3.png", 31, 200)
    assert train(tmp_path, *NATIVE) == [
        f"only 31x200 pixels at the working resolution; 32 a side are needed ({tmp_path / 's3.png'}): "
        "leave the slide out, or train at a finer resolution (a smaller --mpp or --downsample)"
        "; --on-unreadable exclude goes on without it"
    ]


def test_slide_smaller_than_a_head_cell_is_padded_with_a_warning(tmp_path: Path) -> None:
    path = cohort(tmp_path)
    for index in range(12):
        picture(tmp_path / f"s{index}.png", 60 + index, 50)
    words = ["train", path, "--slides", tmp_path, "--out", tmp_path / "run", *TINY_TRAINING, *NATIVE, "--epochs", 1]
    outcome = call(*words)
    assert outcome.status == 0, outcome
    assert any(re.search(r"s0\.png: the view of .* is padded with background to ", line) for line in outcome.warnings)


def test_slide_without_tissue(tmp_path: Path) -> None:
    rows = []
    for index in range(12):
        tiff(tmp_path / f"s{index}.tiff", mpp=2.0, width=512 + index, tissue=index != 7)
        rows.append(f"s{index}.tiff,{'ab'[index % 2]}")
    manifest(tmp_path, rows)
    errors = train(tmp_path, "--background", "constant")
    assert len(errors) == 1
    assert re.match(rf"no tissue.* \({re.escape(str(tmp_path / 's7.tiff'))}\): ", errors[0]), errors


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    cohort(folder)
    return folder


def test_more_stages_than_blocks(sound: Path) -> None:
    errors = train(sound, *NATIVE, "--stages", 5)
    assert len(errors) == 1
    assert re.search(r"5 stages.*\(.*resnet_micro.*\): .*4", errors[0]), errors


@pytest.mark.parametrize("backbone", ["convnextv2_atto", "efficientnet_b0"])
def test_non_local_backbone(sound: Path, backbone: str) -> None:
    errors = train(sound, *NATIVE, "--backbone", backbone)
    assert len(errors) == 1
    assert re.search(rf"\(.*{backbone}.*\): .*(resnet|convnext_|efficientnet_lite0)", errors[0]), errors


def test_unknown_backbone(sound: Path) -> None:
    errors = train(sound, *NATIVE, "--backbone", "resnet43")
    assert len(errors) == 1
    assert "resnet43" in errors[0]


def test_weights_not_found(sound: Path) -> None:
    errors = train(sound, *NATIVE, "--weights", "nowhere.safetensors")
    assert len(errors) == 1
    assert "nowhere.safetensors" in errors[0]


def test_the_hub_cannot_be_reached(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(sound / "no-cache"))
    words = [word for word in TINY_TRAINING if word not in ("--weights", "random", "resnet_micro", "--backbone")]
    out = sound / "run"
    errors = refused(
        "train", sound / "labels.csv", "--slides", sound, "--out", out, *words, *NATIVE, "--backbone", "resnet18"
    )
    assert len(errors) == 1
    assert "--weights" in errors[0]


def test_several_things_are_told_together(sound: Path) -> None:
    manifest_text = (sound / "labels.csv").read_text()
    (sound / "wrong.csv").write_text(manifest_text.replace("s2.png,a", "s2.png,"))
    errors = refused(
        *("train", sound / "wrong.csv", "--slides", sound, "--out", sound / "run", *TINY_TRAINING, *NATIVE),
        *("--stages", 5, "--devices", 2),
    )
    text = "\n".join(errors)
    assert "no label (wrong.csv line 4: s2.png)" in text
    assert "--devices" in text
    assert "5 stages" in text


def test_a_run_directory_that_exists(sound: Path) -> None:
    out = sound / "taken"
    out.mkdir(exist_ok=True)
    (out / "config.yaml").write_text("x: 1\n")
    assert refused("train", sound / "labels.csv", "--slides", sound, "--out", out, *TINY_TRAINING, *NATIVE) == [
        f"the run directory exists ({out}): add --resume to go on with it, or give another --out"
    ]


def test_no_run_directory(sound: Path) -> None:
    expected = [
        f"not a run directory, it has no config.yaml ({sound}): give the folder that `wholeslide train --out` made"
    ]
    assert refused("evaluate", sound) == expected
    assert refused("predict", sound, sound / "s0.png") == expected


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    words = ["--slides", folder, "--out", folder / "run", *TINY_TRAINING, *NATIVE, "--epochs", 1]
    assert call("train", cohort(folder), *words).status == 0
    return folder / "run"


@pytest.fixture
def checkpoint(run: Path) -> Iterator[Path]:
    path = next((run / "checkpoints").glob("*.safetensors"))
    whole = path.read_bytes()
    yield path
    path.write_bytes(whole)


class TestTrainedRun:
    @pytest.mark.parametrize("damage", ["truncated", "changed"])
    def test_damaged_checkpoint(self, run: Path, checkpoint: Path, damage: str) -> None:
        whole = checkpoint.read_bytes()
        checkpoint.write_bytes(whole[:-1000] if damage == "truncated" else whole[:-1] + bytes([whole[-1] ^ 1]))
        for words in (("evaluate", run), ("predict", run, run.parent / "s0.png")):
            errors = refused(*words, "--quiet")
            assert len(errors) == 1
            assert errors[0].startswith(f"the checkpoint is truncated or changed ({checkpoint}): ")
        assert not (run / "metrics" / "test.json").exists()

    def test_missing_checkpoint(self, run: Path, checkpoint: Path) -> None:
        checkpoint.unlink()
        assert refused("evaluate", run, "--quiet")[0].startswith(f"the checkpoint is missing ({checkpoint}): ")

    def test_slides_that_can_no_longer_be_read(self, run: Path) -> None:
        names = [line.split(",")[0] for line in (run / "cohort.csv").read_text().splitlines() if line.endswith(",test")]
        slide = run.parent / names[0]
        whole = slide.read_bytes()
        slide.write_bytes(whole[:100])
        try:
            errors = refused("evaluate", run, "--quiet")
        finally:
            slide.write_bytes(whole)
        assert len(errors) == 1
        assert str(slide) in errors[0]
        assert not (run / "metrics" / "test.json").exists()

    def test_results_that_cannot_be_kept(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Root may write everywhere, so a file in the folder's place stands for the folder that may not be written."""
        monkeypatch.setattr(StreamingEngine, "predict", lambda *args: pytest.fail("computed in vain"))
        (run / "metrics").rmdir()
        (run / "metrics").write_text("")
        try:
            errors = refused("evaluate", run, "--quiet")
        finally:
            (run / "metrics").unlink()
            (run / "metrics").mkdir()
        assert errors == [
            f"the results cannot be written: File exists ({run / 'metrics'}): "
            "change its permissions, or evaluate a copy of the run that you may write"
        ]

    def test_a_run_on_a_read_only_disk(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def read_only(*args: object, **options: object) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(StreamingEngine, "predict", lambda *args: pytest.fail("computed in vain"))
        monkeypatch.setattr("tempfile.TemporaryFile", read_only)
        assert refused("evaluate", run, "--quiet")[0].startswith(
            "the results cannot be written: Read-only file system ("
        )

    def test_slides_that_were_moved(self, run: Path) -> None:
        errors = refused("evaluate", run, "--slides", run.parent / "elsewhere")
        assert errors == [f"no such folder ({run.parent / 'elsewhere'}): give the folder of the slides with --slides"]


def with_a_full_disk(limit_bytes: int, *words: object) -> list[str]:
    """The errors of a command that cannot write files beyond a size. (The limit and a full disk take the same way.)"""
    done = subprocess.run(
        child_words(*words, largest_file_bytes=limit_bytes), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done
    assert "Traceback" not in done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def test_full_disk_while_training(tmp_path: Path) -> None:
    path = cohort(tmp_path)
    words = ["--slides", tmp_path, "--out", tmp_path / "run", *TINY_TRAINING, *NATIVE, "--epochs", 1]
    assert with_a_full_disk(100_000, "train", path, *words) == [
        f"error: the disk is full ({tmp_path / 'run' / 'checkpoints'}): "
        "free some space and begin again, with --resume where there is a run to go on with"
    ]
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_full_disk_while_splitting(tmp_path: Path) -> None:
    path = cohort(tmp_path)
    errors = with_a_full_disk(20, "split", path, "--out", tmp_path / "split.csv")
    assert len(errors) == 1
    assert str(tmp_path / "split.csv") in errors[0]
    assert not (tmp_path / "split.csv").exists()
