from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from wholeslide.predict.engine import prefetch_bytes
from wholeslide.train.config import GIB, TrainConfig


@pytest.mark.parametrize(
    ("trained_with", "given", "device", "expected"),
    [
        (None, None, "cpu", GIB),
        (None, "2GiB", "cpu", 0),
        ("2GiB", None, "cpu", 0),  # the run's own plan is bounded too
        (None, "2GiB", "cuda", GIB),  # host memory is not what is bounded
    ],
)
def test_reading_ahead_keeps_to_the_memory(
    trained_with: str | None, given: str | None, device: str, expected: int
) -> None:
    config = TrainConfig(manifest=Path("m.csv"), slides=Path("s"), out=Path("run"), memory=trained_with)
    run, engine = SimpleNamespace(config=config), SimpleNamespace(device=torch.device(device))
    assert prefetch_bytes(run, engine, given) == expected  # type: ignore[arg-type]
