from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import wholeslide


@pytest.mark.parametrize("name", [name for name in wholeslide.__all__ if name != "__version__"])
def test_every_public_name_is_there_and_documented(name: str) -> None:
    thing = getattr(wholeslide, name)
    assert (thing.__doc__ or "").strip()
    assert name in dir(wholeslide)


def test_type_checkers_are_told_the_same() -> None:
    """The imports under TYPE_CHECKING name the same things as the table that is used when running."""
    source = ast.parse(Path(wholeslide.__file__).read_text(encoding="utf-8"))
    block = next(node for node in source.body if isinstance(node, ast.If))
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            thing = getattr(importlib.import_module(node.module or ""), alias.name)
            assert getattr(wholeslide, alias.asname or alias.name) is thing
    told = {alias.asname or alias.name for node in block.body for alias in node.names}  # type: ignore[attr-defined]
    assert told | {"__version__"} == set(wholeslide.__all__)


def test_every_name_has_a_home() -> None:
    assert set(wholeslide.__all__) == {*wholeslide._HOMES, "__version__"}


def test_no_name_is_hidden_by_a_module_of_ours() -> None:
    """`import wholeslide.train.loop` sets `wholeslide.train`, so no function may have that name."""
    folder = Path(wholeslide.__file__).parent
    modules = {path.stem for path in folder.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert not modules & set(wholeslide.__all__)


def test_importing_is_light() -> None:
    code = "import sys, wholeslide; wholeslide.SlideConfig; assert not {'torch', 'pandas', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        wholeslide.trian  # noqa: B018
