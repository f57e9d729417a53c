from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from wholeslide.errors import CohortError
from wholeslide.predict.inputs import file_bytes, find_inputs, shares


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    for name in ("a.png", "deep/b.png", "deep/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    return tmp_path


def test_files_folders_and_what_is_not_there(slides: Path) -> None:
    found = find_inputs([slides / "a.png", slides / "nowhere.svs", slides / "deep"])
    assert list(found.table["file"]) == [str(slides / name) for name in ("a.png", "deep/a.png", "deep/b.png")]
    assert [(name, str(error)) for name, error in found.missing] == [
        (str(slides / "nowhere.svs"), f"no such slide or folder ({slides / 'nowhere.svs'}): check the path")
    ]


def test_each_slide_once(slides: Path) -> None:
    found = find_inputs([slides / "a.png", slides, slides / "deep" / ".." / "a.png"])
    assert len(found.table) == 3


def test_equal_stems_are_different_slides(slides: Path) -> None:
    assert find_inputs([slides]).table["slide"].is_unique


def test_equal_names_in_two_manifests_are_different_slides(slides: Path) -> None:
    for folder in (slides, slides / "deep"):
        (folder / "names.csv").write_text("file\na.png\n")
    table = find_inputs([slides / "names.csv", slides / "deep" / "names.csv"]).table
    assert list(table["file"]) == [str(slides / name) for name in ("a.png", "deep/a.png")]


def test_manifests_with_and_without_labels(slides: Path) -> None:
    (slides / "one.csv").write_text("file,patient,label,mpp\na.png,p1,benign,0.5\n")
    other = slides / "elsewhere"
    other.mkdir()
    (other / "two.csv").write_text("file\nb.png\n")
    table = find_inputs([slides / "one.csv"]).table
    assert (table["patient"][0], table["mpp"][0]) == ("p1", 0.5)
    table = find_inputs([other / "two.csv"], slides=slides).table
    assert table["path"][0].endswith("b.png")
    assert math.isnan(table["mpp"][0])


def test_what_is_wrong_with_manifests_is_told_together(slides: Path) -> None:
    (slides / "one.csv").write_text("file\nc.png\n")
    (slides / "two.csv").write_text("file\nd.png\n")
    with pytest.raises(CohortError) as caught:
        find_inputs([slides / "one.csv", slides / "two.csv"])
    assert [problem.where for problem in caught.value.problems] == ["one.csv line 2: c.png", "two.csv line 2: d.png"]


def test_a_folder_without_slides(tmp_path: Path) -> None:
    with pytest.raises(CohortError, match=r"no slides found \(.*\): give a folder with slides"):
        find_inputs([tmp_path])


def test_nothing_that_exists(tmp_path: Path) -> None:
    found = find_inputs([tmp_path / "a.svs"])
    assert found.table.empty
    assert len(found.missing) == 1


def test_what_is_not_there_comes_first_and_once(slides: Path) -> None:
    found = find_inputs([slides / "a.png", slides / "x.svs", slides / "y.svs", slides / "x.svs"])
    assert list(found.all["file"]) == [str(slides / name) for name in ("x.svs", "y.svs", "a.png")]
    assert list(found.all["slide"])[:2] == ["", ""]


@given(st.lists(st.integers(0, 10**6)), st.integers(1, 9))
def test_each_slide_is_in_one_share_and_no_share_is_much_larger(sizes: list[int], count: int) -> None:
    """The best dealing takes at least the mean and the largest slide; Graham's bound is on it, this one is weaker."""
    dealt = shares(sizes, count)
    assert sorted(position for share in dealt for position in share) == list(range(len(sizes)))
    assert all(share == sorted(share) for share in dealt)
    loads = [sum(sizes[position] for position in share) for share in dealt]
    assert max(loads) <= sum(sizes) / count + max(sizes, default=0)


def test_slides_of_unknown_size_are_dealt_in_turn(slides: Path) -> None:
    assert file_bytes(slides / "nowhere.svs") == 0 < file_bytes(slides / "a.png")
    assert shares([0] * 5, 2) == [[0, 2, 4], [1, 3]]
    assert shares([1, 1, 8], 2) == [[2], [0, 1]]
    assert shares([], 2) == [[], []]
