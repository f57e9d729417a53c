"""A benchmark that was cut off is gone on with, by the same command in the same environment."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from wholeslide.bench import result as module
from wholeslide.bench import speed
from wholeslide.bench.config import SpeedBenchConfig
from wholeslide.bench.environment import commit_of
from wholeslide.bench.result import Result
from wholeslide.bench.speed import bench_speed, combinations

FACTS = {"commit": "0123", "cores": 2, "gemm_gflops": {"fp32": 100.0}}
CONFIG = SpeedBenchConfig(sizes="300x200", pipelines="local,gabmil-tuned", dtype="fp32", first_stride="2", stages=2)


@pytest.fixture(autouse=True)
def facts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The environment, which a test may change."""
    found = dict(FACTS)
    monkeypatch.setattr(module, "environment", lambda: dict(found))
    return found


def begun(out: Path, command: str = "wholeslide bench speed") -> Result:
    result = Result(out, command)
    result.begin()
    return result


def test_rows_are_on_disk_one_by_one_and_gone_on_with(tmp_path: Path, facts: dict[str, Any]) -> None:
    out = tmp_path / "new" / "speed.json"
    begun(out).add({"pipeline": "local"})
    assert json.loads(out.read_text()) == {
        "environment": FACTS,
        "command": "wholeslide bench speed",
        "complete": False,
        "rows": [{"pipeline": "local"}],
    }
    facts["gemm_gflops"] = {"fp32": 90.0}
    again = begun(out)
    assert (again.rows, again.environment) == ([{"pipeline": "local"}], FACTS)
    again.add({"pipeline": "gabmil"})
    again.finish()
    content = json.loads(out.read_text())
    assert (content["complete"], len(content["rows"])) == (True, 2)
    assert begun(out).rows == [], "what is complete is measured anew"
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("change", [{"commit": "4567"}, {"cores": 4}, {"commit": "0123+"}])
def test_another_environment_begins_anew(tmp_path: Path, facts: dict[str, Any], change: dict[str, Any]) -> None:
    begun(tmp_path / "speed.json").add({})
    facts |= change
    assert begun(tmp_path / "speed.json").rows == []


def test_another_command_and_what_is_no_result_begin_anew(tmp_path: Path, facts: dict[str, Any]) -> None:
    out = tmp_path / "speed.json"
    begun(out).add({})
    assert begun(out, "wholeslide bench speed --seed 1").rows == []
    facts["commit"] = "0123+"
    begun(out).add({})
    assert begun(out).rows == [], "nobody knows what has changed meanwhile"
    for other in ("", "[]", '{"rows": [{}]}'):
        out.write_text(other)
        assert begun(out).rows == []


def test_a_benchmark_measures_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is cut off in its second row; the slide is the same for both."""
    asked: list[str] = []

    def measure(case: Any) -> dict[str, Any]:
        asked.append(case.pipeline)
        if asked == ["local", "gabmil-tuned"]:
            raise KeyboardInterrupt
        return {"pipeline": case.pipeline}

    monkeypatch.setattr(speed, "_measured", measure)
    out = tmp_path / "speed.json"
    with pytest.raises(KeyboardInterrupt):
        bench_speed(CONFIG, Result(out))
    assert [row["pipeline"] for row in json.loads(out.read_text())["rows"]] == ["local"]
    assert bench_speed(CONFIG, Result(out)).rows == [{"pipeline": "local"}, {"pipeline": "gabmil-tuned"}]
    assert asked == ["local", "gabmil-tuned", "gabmil-tuned"]
    assert len(list(combinations(CONFIG))) == 2


def test_a_result_beside_the_package_does_not_change_the_commit(tmp_path: Path) -> None:
    package, result = tmp_path / "src" / "package", tmp_path / "results" / "speed.json"
    for file in (package / "code.py", result):
        file.parent.mkdir(parents=True)
        file.write_text("1")
    assert commit_of(package) is None
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    commit = commit_of(package)
    assert commit is not None
    assert len(commit) == 12
    result.write_text("2")
    assert commit_of(package) == commit
    (package / "code.py").write_text("2")
    assert commit_of(package) == commit + "+"
