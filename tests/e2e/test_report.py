"""`wholeslide report` on runs of every kind, and on what is odd about them."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from train_tiny import make_cohort, tiny_config

from wholeslide.cli import main
from wholeslide.train.loop import train

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Tags that are balanced, what would be loaded, and the texts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.ids: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.titles: list[str] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.loaded += [str(given[name]) for name in ("src", "href", "xlink:href", "data") if name in given]
        if "id" in given:
            self.ids.append(str(given["id"]))
        if tag == "img":
            self.images.append(given)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h3":
            self.titles.append(data)
        if "style" not in self.open:
            self.text += data + " "


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    manifest = make_cohort(folder / "slides", test=6)
    return train(tiny_config(manifest, folder / "run")).path


@pytest.fixture(scope="module")
def evaluated(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(run, copy)
    assert main(["evaluate", str(copy), "--quiet"]) == 0
    return copy


@pytest.fixture
def scored(evaluated: Path, tmp_path: Path) -> Path:
    return shutil.copytree(evaluated, tmp_path / "run")


def test_the_page_is_whole_and_loads_nothing(scored: Path) -> None:
    assert (scored / "report.html").is_file()  # evaluate has drawn it
    assert main(["report", str(scored), "--pictures", "2", "--quiet"]) == 0
    page = Page(scored / "report.html")
    assert all(
        address.startswith(("#", "data:image/jpeg;base64,", "data:image/png;base64,")) for address in page.loaded
    )
    assert not re.search(r"url\((?!#)|@import|<script", page.source)
    assert len(page.ids) == len(set(page.ids))
    inner = [address[1:] for address in page.loaded if address.startswith("#")]
    assert set(inner) <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", page.source)) <= set(page.ids)
    assert 'name="viewport"' in page.source
    assert "@media print" in page.source
    for title in ("ROC", "Calibration", "Confusion", "By depth", "Classification loss", "Reconstruction loss"):
        assert title in page.titles
    assert "MICCAI 2022" in page.text
    assert str(scored.parent) not in page.source  # no paths of this machine


def test_slides_stand_by_their_error(scored: Path) -> None:
    assert main(["report", str(scored), "--pictures", "2", "--quiet"]) == 0
    page = Page(scored / "report.html")
    table = pd.read_csv(scored / "predictions" / "test.csv")
    of_label = np.where(table["label"] == "a", table["prob_a"], table["prob_b"])
    order = table["file"].iloc[np.argsort(of_label, kind="stable")].tolist()
    assert [title for title in page.titles if title.endswith(".png")] == order[:2]
    assert len(page.images) == 4
    assert all(image["alt"] for image in page.images)
    listed = [page.source.index(f"<td>{file}</td>") for file in order[2:]]
    assert listed == sorted(listed)
    for metric in ("auroc", "accuracy"):
        value = json.loads((scored / "metrics" / "test.json").read_text())[metric]["value"]
        assert f"{value:.3f}" in page.text


def test_names_are_no_markup(scored: Path) -> None:
    for path in (scored / "predictions" / "test.csv", scored / "cohort.csv"):
        path.write_text(path.read_text().replace("slide7.png", "<script>alert(1)</script>&.png"))
    assert main(["report", str(scored), "--pictures", "0"]) == 0
    page = Page(scored / "report.html")
    assert "<script" not in page.source
    assert "<script>alert(1)</script>&.png" in page.text


def test_what_has_no_label_or_no_answer_is_listed(scored: Path) -> None:
    table = pd.read_csv(scored / "predictions" / "test.csv", dtype=str)
    table.loc[0, "label"] = ""
    table.loc[1, ["prediction", "prob_a", "prob_b"]] = ""
    table.to_csv(scored / "predictions" / "test.csv", index=False)
    assert main(["report", str(scored), "--pictures", "0"]) == 0
    text = Page(scored / "report.html").text
    assert "not labelled" in text
    assert "could not be read" in text
    assert all(file in text for file in table["file"])


def test_before_there_are_scores(run: Path, tmp_path: Path) -> None:
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    page = Page(tmp_path / "page.html")
    assert "wholeslide evaluate RUN" in page.text
    assert "Validation loss" in page.titles


def test_slides_that_have_moved(scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["report", str(scored), "--slides", str(tmp_path / "empty"), "--pictures", "2", "--quiet"]) == 2
    assert "--slides" in capsys.readouterr().err
    page = Page(scored / "report.html")
    assert page.images == []
    assert "--slides" in page.text


def test_what_is_damaged_is_told(scored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (scored / "metrics" / "test.json").write_text("{")
    assert main(["report", str(scored)]) == 2
    assert "test.json is damaged" in capsys.readouterr().err
    assert main(["report", str(scored.parent)]) == 2
    assert "config.yaml" in capsys.readouterr().err
    assert main(["report", str(scored), "--pictures", "-1"]) == 2
    assert "--pictures" in capsys.readouterr().err


def test_three_classes_and_one_stage(tmp_path: Path) -> None:
    manifest = make_cohort(tmp_path / "slides", train=6, valid=3, test=6)
    rows = pd.read_csv(manifest)
    rows["label"] = ["abc"[index % 3] for index in range(len(rows))]
    rows.to_csv(manifest, index=False)
    run = train(tiny_config(manifest, tmp_path / "run", method="max", patch=96, epochs=1)).path
    assert main(["evaluate", str(run), "--quiet"]) == 0
    page = Page(run / "report.html")
    assert "ROC" in page.titles
    assert "By depth" not in page.titles
    assert all(f">{name}<" in page.source.replace("\n", "") for name in "abc")
