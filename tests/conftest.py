"""Fixtures that several rooms' tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from wholeslide.demo.cohort import DemoCohortConfig, write_cohort

# The same examples in every run: a change is judged by what it changes. Explore with --hypothesis-profile=explore.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", max_examples=5000, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def tiny_cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``manifest.csv`` and ``slides/``: fourteen pyramidal TIFF slides of about 600 pixels a side."""
    folder = tmp_path_factory.mktemp("tiny-cohort")
    config = DemoCohortConfig(train_pairs=3, valid_pairs=2, test_pairs=2, tissue_px=(560, 600), seed=7)
    write_cohort(folder, config)
    return folder


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Timings that are remembered go to a folder of the tests, and are those of this session, child processes included."""
    folder = tmp_path_factory.mktemp("cache-home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder
