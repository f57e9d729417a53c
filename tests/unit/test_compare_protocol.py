"""What a later call of a comparison may change, and what it may not."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from compare_cases import Fake, config, write_cohort

from wholeslide.compare.harness import compare
from wholeslide.compare.protocol import TEST
from wholeslide.errors import RunError


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("cohort"), count=12)


@pytest.fixture(scope="module")
def done(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods on three folds, to be refused something."""
    out = tmp_path_factory.mktemp("done") / "out"
    begun(manifest, out)
    return out


@pytest.fixture
def out(done: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(done, tmp_path / "out"))


def protocol_of(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "protocol.json").read_text()))


def begun(manifest: Path, out: Path, methods: tuple[str, ...] = ("max", "abmil")) -> dict[str, Any]:
    compare(config(manifest, out, *methods), worker=Fake().work)
    return protocol_of(out)


def test_a_call_that_asks_for_the_same_changes_nothing(manifest: Path, done: Path, out: Path) -> None:
    before = protocol_of(done)
    assert before["amendments"] == []
    assert begun(manifest, out) == before


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"reference": "abmil"}, 'reference was "max", and is now "abmil"'),
        ({"seeds": 2}, "seeds was [0], and is now [0, 1]"),
        ({"resamples": 200}, "primary.resamples was 100, and is now 200"),
        ({"nested": True}, 'design was "Each fold is tested by a network'),
        ({"train": {"unit": "file"}}, 'cohort.unit was "patient", and is now "file"'),
        ({"train": {"monitor": "accuracy"}}, 'selection.metric was "auroc", and is now "accuracy"'),
        ({"overrides": {"max": {"lr": 0.5}}}, "max.options.lr was"),
    ],
)
def test_other_rules_are_refused(options: dict[str, Any], told: str, manifest: Path, done: Path) -> None:
    before = protocol_of(done)
    with pytest.raises(RunError, match=re.escape(told)):
        compare(config(manifest, done, **options), worker=Fake().work)
    assert protocol_of(done) == before


def test_no_method_is_left_out_for_its_scores(manifest: Path, done: Path) -> None:
    with pytest.raises(RunError, match="abmil is compared here, too"):
        compare(config(manifest, done, "max", "clam-sb"), worker=Fake().work)


def test_another_manifest_is_refused(manifest: Path, done: Path) -> None:
    other = manifest.with_name("other.csv")
    other.write_text(manifest.read_text().replace("p0,", "p00,"))
    with pytest.raises(RunError, match="the manifest is not the one that this comparison began with"):
        compare(config(other, done), worker=Fake().work)


def test_a_method_that_is_added_is_an_amendment(manifest: Path, done: Path, out: Path) -> None:
    before = protocol_of(done)
    after = begun(manifest, out, ("max", "abmil", "clam-sb"))
    (amendment,) = after["amendments"]
    assert (amendment["methods"], amendment["trainings_scored"]) == (["clam-sb"], 6)
    assert list(after["methods"]) == ["max", "abmil", "clam-sb"]
    assert after["facts"] == before["facts"]
    assert "when 6 trainings had been scored: methods clam-sb." in (out / "table.md").read_text()


def test_a_test_and_versions_that_changed_are_told_once(manifest: Path, out: Path) -> None:
    old = protocol_of(out)
    old["facts"]["primary"]["test"] = "Another test."
    old["versions"]["torch"] = "0.1"
    (out / "protocol.json").write_text(json.dumps(old))
    for _ in range(2):
        after = begun(manifest, out)
        (amendment,) = after["amendments"]
        assert set(amendment) == {"time", "trainings_scored", "versions", "test"}
        assert amendment["test"] == TEST
        assert after["facts"] == old["facts"]
    told = "trainings had been scored: other versions of the software; the test is now: Two-sided paired bootstrap"
    assert told in (out / "table.md").read_text()


def test_a_folder_that_holds_something_else_is_left_alone(manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="the folder holds something else than a comparison"):
        compare(config(manifest, tmp_path), worker=Fake().work)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format_version": 1, "facts": {}}'])
def test_a_damaged_protocol_is_told(text: str, manifest: Path, out: Path) -> None:
    (out / "protocol.json").write_text(text)
    with pytest.raises(RunError, match="the protocol is missing or damaged"):
        compare(config(manifest, out), worker=Fake().work)
