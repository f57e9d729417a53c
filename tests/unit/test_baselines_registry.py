"""The registry of methods, and the page that lists them."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from wholeslide.baselines import registry
from wholeslide.baselines.registry import MethodInfo, Recipe, method_info, method_names, register
from wholeslide.errors import ConfigError

PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
MINE = MethodInfo(name="mine", summary="Mine.", citation="none", kind="bags", home="mine_module:Mine")
PUBLISHED = {
    "abmil": Recipe(optimizer="adam", lr=5e-4, weight_decay=1e-4),
    "gabmil": Recipe(optimizer="adam", lr=5e-4, weight_decay=1e-4),
    "clam-sb": Recipe(optimizer="adam", lr=2e-4, weight_decay=1e-5, epochs=200),
    "clam-mb": Recipe(optimizer="adam", lr=2e-4, weight_decay=1e-5, epochs=200),
    "dsmil": Recipe(optimizer="adam", lr=1e-4, weight_decay=1e-3, betas=(0.5, 0.9), epochs=50, lr_schedule="cosine"),
    "transmil": Recipe(optimizer="radam-lookahead", lr=2e-4, weight_decay=1e-5, epochs=200),
    "mil-rnn": Recipe(
        optimizer="sgd-nesterov", lr=0.1, weight_decay=1e-4, betas=(0.9, 0.999), epochs=100, accumulate=128
    ),
}


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    method_names()
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    monkeypatch.setattr(registry, "_loaded", set(registry._loaded))


def install(folder: Path, package: str, points: dict[str, str]) -> None:
    """What pip leaves of a package: its metadata beside its modules."""
    info = folder / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = "".join(f"{name} = {value}\n" for name, value in points.items())
    (info / "entry_points.txt").write_text(f"[wholeslide.methods]\n{lines}")


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_are_the_published_ones(name: str) -> None:
    assert method_info(name).recipes[-1] == PUBLISHED[name]


def test_the_page_lists_every_method_with_its_citation_and_settings() -> None:
    listed = re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE)
    assert listed == method_names()
    for name in listed:
        info = method_info(name)
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |"))
        assert info.citation in row
        settings = [
            f"{part.optimizer}, {part.lr:g}, {part.weight_decay:g}, {part.epochs}, {part.lr_schedule}, {part.accumulate}"
            for part in info.recipes
        ]
        assert f"| {'; then '.join(settings)} |" in row


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


@pytest.mark.parametrize("kind", ["bags", "patches"])
def test_each_part_needs_its_recipe(kind: Literal["bags", "patches"]) -> None:
    recipes = (Recipe(),) if kind == "patches" else (Recipe(), Recipe())
    with pytest.raises(ConfigError, match=rf"{len(recipes)} recipes, where its kind '{kind}' is trained in"):
        register(replace(MINE, kind=kind, recipes=recipes))


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


@pytest.mark.parametrize("home", ["no_such_module:Mine", "wholeslide.baselines.clam:NoSuchClass", ""])
def test_a_home_that_is_not_there(home: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be imported: .*\(method 'mine'\): give it as module:Class"):
        replace(MINE, home=home).load()


def test_a_file_of_ones_own_that_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "installed_methods.py").write_text(
        "from wholeslide.baselines.registry import MethodInfo, register\n"
        "register(MethodInfo(name='installed', summary='X.', citation='X', kind='bags',\n"
        "                    home='wholeslide.baselines.pooling:Pooling'))\n"
    )
    install(tmp_path, "wholeslide-installed", {"installed": "installed_methods"})
    monkeypatch.syspath_prepend(str(tmp_path))
    assert method_names()[-1] == "installed"
    assert type(method_info("installed").load()(4, 2)).__name__ == "Pooling"


def test_packages_that_cannot_be_used_are_named_together_and_at_every_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken_methods.py").write_text(
        "from wholeslide.baselines.registry import MethodInfo, register\n"
        "register(MethodInfo(name='abmil', summary='X.', citation='X', kind='bags', home='a:B'))\n"
    )
    install(tmp_path, "wholeslide-taken", {"taken": "taken_methods"})
    install(tmp_path, "wholeslide-broken", {"broken": "no_such_module"})
    install(tmp_path, "wholeslide-renamed", {"renamed": "wholeslide.baselines.clam:NoSuchClass"})
    monkeypatch.syspath_prepend(str(tmp_path))
    for _ in range(2):
        with pytest.raises(ConfigError) as caught:
            method_info("local")
        told = {problem.where.split("package ")[1].split(",")[0]: str(problem) for problem in caught.value.problems}
        assert set(told) == {"'wholeslide-taken'", "'wholeslide-broken'", "'wholeslide-renamed'"}
        assert "there is a method of this name already (method 'abmil' of package" in told["'wholeslide-taken'"]
        assert "No module named 'no_such_module'" in told["'wholeslide-broken'"]
        assert "mend the package or uninstall it" in told["'wholeslide-renamed'"]
