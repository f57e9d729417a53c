"""The shape of the code: imports go downward, help is quick, files and functions stay small."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import wholeslide

SOURCE = Path(wholeslide.__file__).parent
REPOSITORY = SOURCE.parents[1]
LAYERS = (
    ("errors",),
    ("geometry",),
    ("draws", "metrics", "allocator"),
    ("slides",),
    ("cohort",),
    ("model",),
    ("streaming",),
    ("baselines",),
    ("train",),
    ("predict",),
    ("explain",),
    ("verify_config",),
    ("demo", "verify", "doctor"),
    ("bench",),
    ("compare",),
    ("viewer", "report"),
    ("cli",),
    ("__main__",),
)
"""From the bottom to the top; what stands in one line does not import each other."""
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}
TORCH_FREE = ("errors", "geometry", "draws", "metrics", "slides", "cohort")
MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 60
DISTRIBUTIONS = {
    "PIL": "pillow",
    "openslide": "openslide_python",
    "skimage": "scikit_image",
    "sklearn": "scikit_learn",
    "yaml": "pyyaml",
}
"""Packages whose distribution has another name."""
COMMANDS = (
    "demo",
    "inspect",
    "cohort gdc",
    "cohort lks",
    "split",
    "prepare",
    "features",
    "train",
    "evaluate",
    "predict",
    "explain",
    "view",
    "report",
    "compare",
)
COMMANDS += ("verify", "doctor")


@dataclass(frozen=True)
class Import:
    """``module`` is imported at ``line``; ``lazy``: inside a function; ``typing``: for type checkers only."""

    module: str
    line: int
    lazy: bool
    typing: bool


def imports_of(source: str) -> list[Import]:
    found: list[Import] = []

    def visit(node: ast.AST, *, lazy: bool, typing: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend(Import(alias.name, child.lineno, lazy, typing) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"line {child.lineno}: imports are absolute"
                module = child.module or ""
                names = [f"{module}.{alias.name}" for alias in child.names] if module == "wholeslide" else [module]
                found.extend(Import(name, child.lineno, lazy, typing) for name in names)
            else:
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                checking = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
                visit(child, lazy=lazy or function, typing=typing or checking)

    visit(ast.parse(source), lazy=False, typing=False)
    return found


def room_of(module: str) -> str | None:
    """``slides`` for ``wholeslide.slides.view``; None for what is not ours, or the package itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == "wholeslide" and len(parts) > 1 and parts[1] in RANK else None


def layer_faults(room: str, name: str, source: str) -> Iterator[str]:
    for found in imports_of(source):
        other = room_of(found.module)
        if other is None or other == room:
            continue
        if RANK[other] >= RANK[room]:
            yield f"{name}:{found.line}: {room} imports {other}, which does not lie below it"
        elif found.lazy and room != "cli":
            yield f"{name}:{found.line}: only commands import inside functions, this imports {found.module}"


def torch_faults(name: str, source: str) -> Iterator[str]:
    for found in imports_of(source):
        if found.module.split(".")[0] in ("torch", "timm", "torchvision", "lightning", "torchmetrics"):
            yield f"{name}:{found.line}: imports {found.module}"


def size_faults(name: str, source: str) -> Iterator[str]:
    lines = len(source.splitlines())
    if lines > MOST_LINES_OF_A_FILE:
        yield f"{name}: {lines} lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            if length > MOST_LINES_OF_A_FUNCTION:
                yield f"{name}:{node.lineno}: {node.name} has {length} lines"


def modules() -> Iterator[tuple[str, str, str]]:
    """Room, name and source of every module but the package's own ``__init__``."""
    for path in sorted(SOURCE.rglob("*.py")):
        relative = path.relative_to(SOURCE)
        if relative.as_posix() != "__init__.py":
            yield relative.parts[0].removesuffix(".py"), relative.as_posix(), path.read_text(encoding="utf-8")


def test_every_module_has_a_layer() -> None:
    assert sorted({room for room, _, _ in modules()} - set(RANK)) == []


def test_imports_go_downward() -> None:
    assert [fault for room, name, source in modules() for fault in layer_faults(room, name, source)] == []


def test_slides_and_cohorts_do_not_know_torch() -> None:
    faults = [fault for room, name, source in modules() if room in TORCH_FREE for fault in torch_faults(name, source)]
    assert faults == []


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[><=\[]", line)[0].lower().replace("-", "_") for line in project["dependencies"]}
    imported = {
        found.module.split(".")[0] for _, _, source in modules() for found in imports_of(source) if not found.typing
    }
    third_party = imported - set(sys.stdlib_module_names) - {"wholeslide"}
    assert {DISTRIBUTIONS.get(name, name) for name in third_party} <= declared


def test_files_and_functions_stay_small() -> None:
    assert [fault for _, name, source in modules() for fault in size_faults(name, source)] == []


@pytest.mark.parametrize(
    ("room", "source", "fault"),
    [
        ("slides", "from wholeslide.model.network import LocalNetwork", "slides imports model"),
        ("slides", "def f():\n    import wholeslide.train.loop", "slides imports train"),
        ("slides", "from wholeslide import train", "slides imports train"),
        ("demo", "from wholeslide.bench import memory", "demo imports bench"),
        ("train", "def f():\n    from wholeslide.slides.view import SlideView", "only commands import inside"),
    ],
)
def test_the_layer_check_can_fail(room: str, source: str, fault: str) -> None:
    assert any(fault in found for found in layer_faults(room, "x.py", source))


def test_the_layer_check_allows_commands_to_import_late() -> None:
    assert list(layer_faults("cli", "x.py", "def run():\n    from wholeslide.train.loop import train")) == []


def test_the_size_check_can_fail() -> None:
    body = "\n".join(["    x = 0"] * 60)
    assert list(size_faults("x.py", f"def f():\n{body}\n")) == ["x.py:1: f has 61 lines"]
    assert list(size_faults("x.py", "\n" * 401)) == ["x.py: 401 lines"]


def test_the_torch_check_can_fail() -> None:
    assert list(torch_faults("x.py", "def f():\n    from torch.nn import Module")) == ["x.py:2: imports torch.nn"]


@pytest.mark.parametrize("words", [["--help"], *([*command.split(), "--help"] for command in COMMANDS)])
def test_help_does_not_import_torch(words: list[str]) -> None:
    program = (
        "import sys\nfrom wholeslide.cli import main\n"
        f"status = main({words!r})\n"
        "heavy = sorted({'torch', 'timm', 'lightning', 'sklearn'} & set(sys.modules))\n"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "wholeslide" in done.stdout
