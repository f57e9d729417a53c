"""What the survey of a cohort's slides finds odd."""

from __future__ import annotations

from wholeslide.geometry import Size
from wholeslide.train.survey import SlideFacts, oddities


def facts(mpp: float | None, *, one_colour: bool = False) -> SlideFacts:
    return SlideFacts(Size(100, 100), 0.5, mpp, one_colour)


def test_equal_scales_and_no_scales_are_usual() -> None:
    assert oddities({"a.svs": facts(0.5), "b.svs": facts(0.55)}) == []
    assert oddities({"a.png": facts(None), "b.png": facts(None)}) == []


def test_scales_that_differ_are_told() -> None:
    assert oddities({"a.svs": facts(0.5), "b.ndpi": facts(0.228), "c.dcm": facts(2.004)}) == [
        "slides differ 8.8-fold in scale, from 0.228 µm per pixel (b.ndpi) to 2 (c.dcm): give one for all with --mpp"
    ]


def test_a_scale_that_only_some_have_is_told() -> None:
    assert oddities({"a.svs": facts(0.5), "b.png": facts(None)}) == ["1 of 2 slides have no scale, and the others have"]


def test_a_slide_of_one_colour_is_told() -> None:
    assert oddities({"white.png": facts(None, one_colour=True)}) == [
        "white.png has one colour wherever it was looked at"
    ]
