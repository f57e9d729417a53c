"""What the README and the documents say is so: their commands run, their links lead somewhere."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pandas as pd
import pytest

import wholeslide
from wholeslide.cli import COMMANDS, main

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")])
SMALL = [
    "--backbone",
    "test_resnet",
    "--first-stride",
    "2",
    "--weights",
    "random",
    "--stages",
    "2",
    "--epochs",
    "1",
    "--precision",
    "fp32",
    "--quiet",
]


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language, ``""`` for those that name none."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    return [text for named, text in fenced if named == language]


def readme_commands() -> list[list[str]]:
    """Every command line of the README's shell blocks, in order, without its comment."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.fixture
def workplace(tiny_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the README supposes: ``labels.csv`` begins with the README's own rows, and their slides exist."""
    given = next(block for block in blocks("") if block.startswith("file,patient,label"))
    (tmp_path / "given.csv").write_text(given, encoding="utf-8")
    rows = pd.read_csv(tmp_path / "given.csv")
    names = {"ring": rows["label"][0], "disc": rows["label"][1]}
    slides = pd.read_csv(tiny_cohort / "manifest.csv")
    slides["label"] = slides["label"].map(names)
    for _, row in rows.iterrows():
        at = slides.index[(slides["label"] == row["label"]) & ~slides["file"].str.startswith("TCGA")][0]
        slides.loc[at, ["was", "file", "patient"]] = [slides.loc[at, "file"], row["file"], row["patient"]]
    (tmp_path / "slides").mkdir()
    for _, row in slides.iterrows():
        source = row["was"] if isinstance(row["was"], str) else row["file"]
        shutil.copy(tiny_cohort / "slides" / source, tmp_path / "slides" / row["file"])
    slides[["file", "patient", "label"]].to_csv(tmp_path / "labels.csv", index=False)
    shutil.copytree(tiny_cohort / "slides", tmp_path / "new-slides")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_quick_start_runs(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each `wholeslide` line as it stands there, with a small network in place of the default one."""
    lines = [words for words in readme_commands() if words[0] == "wholeslide" and words[1] != "doctor"]
    assert [words[1] for words in lines] == ["inspect", "train", "train", "evaluate", "predict"]
    for words in lines:
        status = main(words[1:] + (SMALL if words[1] == "train" else []))
        assert status == 0, (words, capsys.readouterr())
    assert (workplace / "runs" / "first" / "metrics" / "test.json").is_file()
    assert len(pd.read_csv(workplace / "predictions.csv")) == 14
    assert list((workplace / "overlays").iterdir())


def test_the_two_commands_stand_at_the_top() -> None:
    assert [words[:2] for words in readme_commands()[:2]] == [["make", "demo"], ["make", "test"]]
    assert README.index("make test") < 600


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_every_make_target_that_is_named_exists() -> None:
    named = {target for path in DOCUMENTS for target in re.findall(r"\bmake ([a-z-]+)", path.read_text("utf-8"))}
    named &= set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text("utf-8"), flags=re.MULTILINE)) | {
        "demo",
        "test",
        "test-all",
        "lint",
        "venv",
    }
    assert {"demo", "test", "lint", "venv"} <= named
    for target in sorted(named):
        subprocess.run(["make", "--dry-run", target], cwd=REPOSITORY, check=True, capture_output=True)


def test_the_extras_that_are_installed_exist() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = {
        extra for words in readme_commands() if words[0] == "pip" for extra in re.findall(r"\[(\w+)\]", words[-1])
    }
    assert wanted
    assert wanted <= set(project["optional-dependencies"])


def test_the_table_lists_every_command() -> None:
    assert re.findall(r"^\| `wholeslide ([a-z ]+)` \|", README, flags=re.MULTILINE) == list(COMMANDS)


def test_the_python_example_uses_what_exists() -> None:
    for node in ast.walk(ast.parse(blocks("python")[0])):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "wholeslide":
            assert hasattr(wholeslide, node.attr), node.attr
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "wholeslide.TrainConfig":
            fields = {field.name for field in dataclasses.fields(wholeslide.TrainConfig)}
            assert {keyword.arg for keyword in node.keywords} <= fields


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_named_files_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    assert [link for link in links if not (path.parent / link).exists()] == []
    named = re.findall(r"`([a-z_]+/[a-z_/]*(?:\.py)?)`", text) + re.findall(r"`(tests/[a-z_/]+\.py)`", text)
    roots = (REPOSITORY, REPOSITORY / "src" / "wholeslide")
    missing = [name for name in named if not any((root / name).exists() for root in roots)]
    assert [name for name in missing if name not in MADE_BY_COMMANDS] == []


MADE_BY_COMMANDS = ("log/", "slides/", "run/", "pt_files/")
"""Folders that a document names and a command makes."""


OPTIONS_OF_LAUNCHERS = {"--array", "--wrap", "--nproc-per-node", "--nodes", "--ntasks", "--ntasks-per-node"}
"""What torchrun, srun and sbatch take."""


def test_options_that_the_documents_name_exist(capsys: pytest.CaptureFixture[str]) -> None:
    helps = ""
    for command in COMMANDS:
        assert main([*command.split(), "--help"]) == 0
        helps += capsys.readouterr().out
    known = set(re.findall(r"--[a-z][a-z-]+", helps)) | {"--help", "--strict", "--debug"} | OPTIONS_OF_LAUNCHERS
    named = {
        option for path in DOCUMENTS for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", path.read_text("utf-8"))
    }
    assert named - known == set()
