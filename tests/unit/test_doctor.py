from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from wholeslide import doctor
from wholeslide.cli import main


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "reachable", lambda host, port: False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def found(name: str, folder: Path) -> doctor.Check:
    return next(check for check in doctor.examine(folder) if check.name == name)


def test_this_installation_is_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--folder", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("ok ", "warn ")) for line in lines)
    for word in ("torch ", "openslide library", "cores", "memory", "allocator", "GPU", "disk"):
        assert any(word in line for line in lines), word


def test_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--folder", str(tmp_path), "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)
    assert {"name", "status", "found", "remedy"} == set(checks[0])
    assert all(check["remedy"] for check in checks if check["status"] != "ok")


def test_a_broken_import_exits_2_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = doctor.importlib.import_module

    def broken(name: str) -> object:
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")
        return real(name)

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    check = doctor._import("torchvision")
    assert check.status == "broken"
    assert check.found == "operator torchvision::nms does not exist"
    assert "torchvision that belongs to this torch" in check.remedy
    monkeypatch.setattr(doctor, "IMPORTS", ("torchvision",))
    monkeypatch.setattr("wholeslide.cli.load", lambda name: __import__("wholeslide.cli.doctor", fromlist=["x"]).COMMAND)
    assert main(["doctor", "--folder", str(tmp_path)]) == 2
    assert any(line.startswith("broken import torchvision") for line in capsys.readouterr().out.splitlines())


def test_without_the_hub(tmp_path: Path) -> None:
    check = found("weights", tmp_path)
    assert check.status == "warn"
    assert "cannot be reached" in check.found
    assert check.remedy.startswith("give --weights FILE")


def test_with_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "reachable", lambda host, port: True)
    assert found("weights", tmp_path).status == "ok"


def test_told_to_stay_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert found("weights", tmp_path).status == "ok"


def test_nothing_answers_is_not_reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise ConnectionRefusedError

    monkeypatch.undo()
    monkeypatch.setattr(doctor.socket, "create_connection", refuse)
    assert not doctor.reachable("localhost", 1)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: SimpleNamespace(free=1 << 30))
    check = found("disk", tmp_path / "not" / "there")
    assert (check.status, check.found) == ("warn", f"1.0 GiB free in {tmp_path}")


def test_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    assert found("disk", tmp_path).remedy == "write runs to a folder of yours with --out"


def test_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 << 30, total=8 << 30))
    assert found("memory", tmp_path).remedy == "end other programs, or give --memory smallest"


def test_threads_held_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_usable_cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    check = found("cores", tmp_path)
    assert check.status == "warn"
    assert "OMP_NUM_THREADS=1" in check.found


def test_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = ["numpy>=1", "no-such-package-at-all<2", 'not-asked-for; extra == "more"']
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: requirements)
    check = found("packages", tmp_path)
    assert (check.status, check.remedy) == ("broken", "pip install no-such-package-at-all")
