"""The registry of methods, and the page that lists them."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from wholeslide.baselines.registry import MethodInfo, method_info, method_names, register
from wholeslide.errors import ConfigError

PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()


def test_the_page_lists_every_method_with_its_citation_and_settings() -> None:
    listed = re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE)
    assert listed == method_names()
    for name in listed:
        info, recipe = method_info(name), method_info(name).recipes[0]
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |"))
        assert info.citation in row
        settings = f"{recipe.optimizer}, {recipe.lr:g}, {recipe.weight_decay:g}, {recipe.epochs}, {recipe.lr_schedule}"
        assert settings in row


def test_every_method_can_be_made() -> None:
    for info in map(method_info, method_names()):
        assert (info.home == "") == (info.kind == "stages")
        if info.home:
            info.load()(8, 3, **info.options)


def test_a_name_belongs_to_one_method() -> None:
    known = method_info("abmil")
    assert register(known) == known
    with pytest.raises(ConfigError, match="there is a method of this name already"):
        register(replace(known, summary="another"))
    with pytest.raises(ConfigError, match="there is a method of this name already"):
        register(MethodInfo(name="local-k4", summary="", citation="", kind="stages"))


def test_an_unknown_method_is_answered_with_the_known() -> None:
    with pytest.raises(ConfigError, match=r"unknown method 'clam'.*local-kN.*clam-sb, clam-mb, dsmil"):
        method_info("clam")


def test_the_pages_example_is_a_method_in_one_file_and_names_are_told_without_torch(tmp_path: Path) -> None:
    example = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
    (tmp_path / "my_median.py").write_text(example)
    script = (
        "import sys; from wholeslide.baselines.registry import method_info, method_names; assert method_names();"
        "assert 'torch' not in sys.modules; import my_median; import torch;"
        "model = method_info('median').load()(4, 2); assert model(torch.ones(3, 4)).logits.shape == (2,)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
