"""What the tests of training share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from train_tiny import make_cohort, same_arithmetic


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine images of two classes, of which a network of a few thousand weights can learn."""
    return make_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def arithmetic() -> Iterator[None]:
    """See :func:`train_tiny.same_arithmetic`; a file's tests ask for it with ``usefixtures``."""
    with same_arithmetic():
        yield
