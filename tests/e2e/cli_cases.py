"""What the tests of the command line share: calling it, and slides of a few pixels."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image

from wholeslide.cli import main

ERROR_LINE = re.compile(r"error: .+ \(.+\): .+")
TINY_MODEL = ["--backbone", "resnet_micro", "--weights", "random", "--stages", "2"]
TINY_MODEL += ["--precision", "fp32", "--tile", "256", "--accelerator", "cpu"]
TINY_TRAINING = [*TINY_MODEL, "--reconstruction-region-px", "96", "--accumulate", "4", "--lr", "1e-3"]
TINY_TRAINING += ["--loggers", "csv", "--quiet"]

CHILD = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
if sys.argv[2] != "split":
    import train_tiny
from wholeslide.cli import main
limit_bytes = int(sys.argv[1])
if limit_bytes:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
sys.exit(main(sys.argv[2:]))
"""


@dataclass(frozen=True)
class Outcome:
    """What a command line left: exit status, stdout, and stderr by line."""

    status: int
    out: str
    err: list[str]

    @property
    def errors(self) -> list[str]:
        return [line.removeprefix("error: ") for line in self.err if line.startswith("error: ")]

    @property
    def warnings(self) -> list[str]:
        return [line.removeprefix("warning: ") for line in self.err if line.startswith("warning: ")]


def call(*words: object) -> Outcome:
    """Run a command line in this process. Whatever is wrong is said in the form of errors, without a traceback."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(word) for word in words])
    lines = err.getvalue().splitlines()
    assert "Traceback" not in err.getvalue()
    for line in lines:
        assert not line.startswith("error:") or ERROR_LINE.fullmatch(line), line
    return Outcome(status, out.getvalue(), lines)


def child_words(*words: object, largest_file_bytes: int = 0) -> list[str]:
    """The same in a process of its own, which can be killed, or given a limit that works like a full disk."""
    return [sys.executable, "-c", CHILD, str(largest_file_bytes), *map(str, words)]


def refused(*words: object) -> list[str]:
    """The errors of a command line that the user can mend."""
    outcome = call(*words)
    assert outcome.status == 2, outcome
    assert outcome.errors
    return outcome.errors


def predicted(path: Path) -> pd.DataFrame:
    """A table that `predict` wrote, for the classes a and b."""
    table = pd.read_csv(path, keep_default_na=False)
    assert list(table.columns) == ["file", "slide", "patient", "prediction", "prob_a", "prob_b", "error"]
    return table


def picture(path: Path, width: int = 260, height: int = 250, *, green: float = 1.0, seed: int | None = None) -> Path:
    """A noisy image; no two are equal."""
    rng = np.random.default_rng(zlib.crc32(f"{path.name} {width} {height}".encode()) if seed is None else seed)
    pixels = rng.integers(120, 255, size=(height, width, 3), dtype=np.uint8)
    pixels[:, :, 1] = (pixels[:, :, 1] * green).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def tiff(path: Path, *, mpp: float | None, width: int = 512, height: int = 512, tissue: bool = True) -> Path:
    """A plain TIFF with a scale: a disc of tissue on glass, or glass alone."""
    rows, columns = np.mgrid[:height, :width]
    inside = (rows - height / 2) ** 2 + (columns - width / 2) ** 2 < (min(width, height) / 3) ** 2
    noise = np.random.default_rng(len(path.name)).integers(-15, 15, size=(height, width, 1))
    pixels = np.where(inside[..., None] & tissue, np.array([180, 90, 160]) + noise, 240).astype(np.uint8)
    scale = {} if mpp is None else {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, pixels, tile=(256, 256), photometric="rgb", **scale)
    return path


def manifest(folder: Path, rows: list[str], header: str = "file,label") -> Path:
    path = folder / "labels.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def cohort(folder: Path, count: int = 12) -> Path:
    """Pictures of two classes, alternately, each of its own patient. Returns the manifest."""
    rows = []
    for index in range(count):
        label = "ab"[index % 2]
        picture(folder / f"s{index}.png", 250 + index, green=1.0 if label == "a" else 0.5)
        rows.append(f"s{index}.png,{label}")
    return manifest(folder, rows)


def real_data() -> Path:
    """The folder of real slides; skips where it is absent."""
    default = Path(__file__).parents[3] / "shared" / "data"
    folder = Path(os.environ.get("WHOLESLIDE_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"the test data are not in {folder}; set WHOLESLIDE_TEST_DATA")
    return folder
