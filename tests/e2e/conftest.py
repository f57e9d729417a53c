"""What the tests of training share."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
from train_tiny import Whole, make_cohort, same_arithmetic, tiny_config

from wholeslide.train.loop import train


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine images of two classes, of which a network of a few thousand weights can learn."""
    return make_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def arithmetic() -> Iterator[None]:
    """See :func:`train_tiny.same_arithmetic`; a file's tests ask for it with ``usefixtures``."""
    with same_arithmetic():
        yield


@pytest.fixture(scope="module")
def whole_run(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A run of two epochs that is never interrupted, for each schedule."""

    @functools.cache
    def trained(schedule: str) -> Path:
        out = tmp_path_factory.mktemp("whole") / schedule
        train(tiny_config(manifest, out, schedule=schedule))
        return out

    return trained
