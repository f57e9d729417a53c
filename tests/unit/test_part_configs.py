"""The parts' own options are checked where they are defined, whoever builds them."""

from __future__ import annotations

from typing import Any

import pytest

from wholeslide.errors import ConfigError
from wholeslide.model.config import ModelConfig
from wholeslide.streaming.config import StreamingConfig


@pytest.mark.parametrize(
    ("part", "options", "text"),
    [
        (ModelConfig, {"stages": 0}, "0 is too small (--stages): give 1 or more"),
        (ModelConfig, {"reconstruction_regions": 0}, "0 is too small (--reconstruction-regions): give 1 or more"),
        (ModelConfig, {"reconstruction_region_px": 0}, "0 is too small (--reconstruction-region-px): give 1 or more"),
        (ModelConfig, {"reconstruction_weight": -1}, "-1 is too small (--reconstruction-weight): give 0 or more"),
        (ModelConfig, {"attention_dropout": 1}, "1 is no dropout (--attention-dropout): give 0 or more, below 1"),
        (StreamingConfig, {"tile": 0}, "0 is too small (--tile): give 1 or more"),
    ],
)
def test_out_of_range(part: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        part(**options)
    assert str(caught.value) == text


def test_all_problems_are_told_together() -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig(stages=0, attention_dropout=2.0)
    assert len(caught.value.problems) == 2
