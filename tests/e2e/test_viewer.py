"""`wholeslide view` as a program sees it: what it serves, what it refuses."""

from __future__ import annotations

import io
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from starlette.testclient import TestClient
from train_tiny import make_cohort, tiny_config

from wholeslide.baselines.bag import Bag
from wholeslide.baselines.feature_files import write_bag
from wholeslide.cli import main
from wholeslide.explain import explain_cohort
from wholeslide.train.loop import train
from wholeslide.viewer.app import make_app
from wholeslide.viewer.gallery import Gallery
from wholeslide.viewer.guard import ASKED_BY_PAGE

OURS = {ASKED_BY_PAGE: "1"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("view")
    manifest = make_cohort(folder / "slides")
    run = train(tiny_config(manifest, folder / "run", epochs=1)).path
    assert main(["evaluate", str(run), "--quiet"]) == 0
    explain_cohort(run, {"slide7.png"})
    return run


@pytest.fixture(scope="module")
def client(run: Path) -> Iterator[TestClient]:
    with TestClient(make_app(Gallery(run), hosts={"testserver"})) as client:
        yield client


def numbered(client: TestClient) -> dict[str, dict[str, Any]]:
    return {slide["file"]: slide for slide in client.get("/api/run").json()["slides"]}


def test_the_list_has_every_slide_with_what_is_known(run: Path, client: TestClient) -> None:
    slides = numbered(client)
    cohort = pd.read_csv(run / "cohort.csv", dtype=str)
    assert [(s["file"], s["label"], s["split"]) for s in slides.values()] == list(
        cohort[["file", "label", "split"]].itertuples(index=False, name=None)
    )
    scored = pd.read_csv(run / "predictions" / "test.csv").set_index("file")
    for file, slide in slides.items():
        if slide["split"] == "test":
            assert slide["prediction"] == scored.loc[file, "prediction"]
            assert slide["probabilities"]["a"] == pytest.approx(scored.loc[file, "prob_a"])
        else:
            assert slide["prediction"] is None
    assert [file for file, slide in slides.items() if slide["explained"]] == ["slide7.png"]


def test_tiles_are_the_slide_and_the_map_lies_on_it(run: Path, client: TestClient) -> None:
    slide = numbered(client)["slide7.png"]
    facts = client.get(f"/api/slides/{slide['number']}").json()
    with Image.open(run.parent / "slides" / "slide7.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert (facts["height"], facts["width"]) == pixels.shape[:2]
    base = f"/api/slides/{slide['number']}"
    answer = client.get(f"{base}/tiles/{facts['finest']}/0/0.jpg")
    assert answer.headers["content-type"] == "image/jpeg"
    tile = np.asarray(Image.open(io.BytesIO(answer.content)))
    assert np.abs(tile.astype(int) - pixels[:256, :256]).mean() < 25  # random colours are hard on JPEG
    explanation = facts["explanation"]
    assert explanation["state"] == "there"
    assert {(m["kind"], m["stage"]) for m in explanation["maps"]} == {
        (kind, stage) for kind in ("attention", "evidence") for stage in (1, 2)
    }
    for number in range(len(explanation["maps"])):
        answer = client.get(f"{base}/maps/{number}/{facts['finest']}/0/0.png")
        overlay = Image.open(io.BytesIO(answer.content))
        assert (overlay.mode, overlay.size) == ("RGBA", (tile.shape[1], tile.shape[0]))
    assert client.get(f"{base}/thumbnail.jpg").status_code == 200
    assert client.get(f"{base}/maps/{len(explanation['maps'])}/{facts['finest']}/0/0.png").status_code == 404


def test_a_slide_is_explained_when_asked_and_only_then(run: Path, tmp_path: Path) -> None:
    with TestClient(make_app(Gallery(run), hosts={"testserver"})) as client:
        number = numbered(client)["slide8.png"]["number"]
        address = f"/api/slides/{number}/explanation"
        assert client.get(address).json()["state"] == "none"
        assert client.get(f"/api/slides/{number}/maps/0/8/0/0.png").status_code == 404
        assert client.post(address, headers=OURS).json()["state"] in ("waiting", "working")
        for _ in range(600):
            found = client.get(address).json()
            if found["state"] not in ("waiting", "working"):
                break
            time.sleep(0.1)
        assert found["state"] == "there"
        assert client.get(f"/api/slides/{number}/maps/0/8/0/0.png").status_code == 200
        assert numbered(client)["slide8.png"]["explained"]


@pytest.mark.parametrize(
    "path",
    [
        "/api/slides/99999",
        "/api/slides/-1",
        "/api/slides/1e3",
        "/api/slides/" + "9" * 5000,
        "/api/slides/0x0",
        "/api/slides/../../../etc/passwd",
        "/api/slides/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/api/slides/slide0.png",
        "/api/slides/0/tiles/8/0/0.tif",
        "/api/slides/0/tiles/8/99999/99999.jpg",
        "/api/slides/0/tiles/999999999/0/0.jpg",
        "/api/slides/0/tiles/0/0/0.jpg",
        "/api/slides/0/tiles/8/-1/0.jpg",
        "/api/slides/0/tiles/8/0/0.jpg/../../../../config.yaml",
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/static/..%2fapp.py",
        "/static//etc/passwd",
        "/config.yaml",
        "/checkpoints/best.json",
    ],
)
def test_nothing_but_the_run_is_served(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "[::1", "testserver@evil"]
)
def test_a_foreign_host_is_refused(client: TestClient, host: str) -> None:
    assert client.get("/api/run", headers={"host": host}).status_code == 400


def test_another_site_can_start_nothing(client: TestClient) -> None:
    assert client.post("/api/slides/0/explanation").status_code == 403
    assert client.get("/api/slides/0/explanation").json()["state"] == "none"
    assert client.put("/api/slides/0/explanation", headers=OURS).status_code == 405
    headers = client.get("/").headers
    assert "default-src 'self'" in headers["content-security-policy"]
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert "access-control-allow-origin" not in headers


def test_a_token_is_wanted_where_others_can_reach_it(run: Path) -> None:
    app = make_app(Gallery(run), hosts=None, token="secret")
    with TestClient(app, follow_redirects=False) as client:
        for path in ("/", "/api/run", "/static/viewer.js", "/api/slides/0/thumbnail.jpg", "/?token=guess", "/?token="):
            assert client.get(path).status_code == 401
        assert client.get("/api/run", headers={"cookie": "wholeslide_token=guess"}).status_code == 401
        entered = client.get("/?token=secret")
        assert (entered.status_code, entered.headers["location"]) == (303, "/")
        assert "httponly" in entered.headers["set-cookie"].lower()
        assert client.get("/api/run", headers={"host": "any.name"}).status_code == 200


def test_many_clients_at_once(client: TestClient) -> None:
    slides = [slide["number"] for slide in numbered(client).values()]
    addresses = [
        f"/api/slides/{number}/{what}" for number in slides for what in ("thumbnail.jpg", "tiles/8/0/0.jpg")
    ] * 6
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(client.get, addresses))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == len(slides)


def test_a_slide_that_is_gone_is_listed_and_told(run: Path, tmp_path: Path) -> None:
    slides = tmp_path / "slides"
    slides.mkdir()
    for file in (run.parent / "slides").iterdir():
        if file.name != "slide3.png":
            (slides / file.name).symlink_to(file)
    with TestClient(make_app(Gallery(run, slides=slides), hosts={"testserver"})) as client:
        found = numbered(client)
        assert len(found) == 9
        answer = client.get(f"/api/slides/{found['slide3.png']['number']}")
        assert (answer.status_code, "no such file" in answer.json()["problem"]) == (422, True)
        assert client.get(f"/api/slides/{found['slide4.png']['number']}").status_code == 200
        post = client.post(f"/api/slides/{found['slide3.png']['number']}/explanation", headers=OURS)
        assert post.status_code == 200
        for _ in range(600):
            state = client.get(f"/api/slides/{found['slide3.png']['number']}/explanation").json()
            if state["state"] not in ("waiting", "working"):
                break
            time.sleep(0.1)
        assert state["state"] == "failed"
        assert "slide3.png" in state["problem"]


def test_features_are_shown_on_the_slides_that_they_were_made_of(tmp_path: Path) -> None:
    manifest = make_cohort(tmp_path / "slides")
    features = tmp_path / "features"
    features.mkdir()
    corners = np.array([[0, 0], [96, 0], [0, 96], [96, 96]])
    for index in range(9):
        values = np.random.default_rng(index).normal(size=(4, 8)).astype(np.float32)
        write_bag(Bag(values, corners, 96.0, 96, 1.0), features / f"slide{index}.h5")
    (features / "labels.csv").write_text(manifest.read_text().replace(".png", ".h5"))
    run = train(tiny_config(features / "labels.csv", tmp_path / "run", method="abmil", epochs=1)).path
    with TestClient(make_app(Gallery(run), hosts={"testserver"})) as client:
        assert "--pixels" in client.get("/api/slides/0").json()["problem"]
    with TestClient(make_app(Gallery(run, pixels=manifest.parent), hosts={"testserver"})) as client:
        assert client.get("/api/slides/0").json()["width"] > 200


def started(run: Path, *options: str) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "wholeslide", "view", str(run), "--port", "0", *options]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"http://\S+", line)
    assert found, line + (process.stderr.read() if process.stderr and process.poll() is not None else "")
    return process, found[0]


def test_the_command_listens_on_loopback_and_ends_on_ctrl_c(run: Path) -> None:
    process, address = started(run)
    try:
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(address + "api/run", timeout=30) as answer:
            assert answer.status == 200
    finally:
        process.send_signal(signal.SIGINT)
        _, complaints = process.communicate(timeout=30)
    assert (process.returncode, complaints) == (130, "interrupted\n")


def test_what_cannot_be_listened_on_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["view", str(run), "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot be listened on" in capsys.readouterr().err
    assert main(["view", str(run), "--host", "no.such.host.invalid"]) == 2
    assert "--host" in capsys.readouterr().err
    assert main(["view", str(run), "--port", "70000"]) == 2
    assert "--port" in capsys.readouterr().err
    assert main(["view", str(run.parent)]) == 2
    assert "config.yaml" in capsys.readouterr().err
