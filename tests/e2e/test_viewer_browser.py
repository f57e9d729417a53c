"""The viewer in a real browser: Debian's Chromium, without any network but loopback."""

from __future__ import annotations

import io
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import pytest
import uvicorn
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select
from train_tiny import tiny_config

from wholeslide.cli import main
from wholeslide.explain import StoredExplanation, explain_cohort
from wholeslide.train.loop import train
from wholeslide.viewer.app import make_app
from wholeslide.viewer.gallery import Gallery

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
REQUIRED = os.environ.get("WHOLESLIDE_REQUIRE_CHROMIUM") == "1"
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER) and not REQUIRED, reason="chromium and chromedriver are not there"
)
PATIENCE_SECONDS = 60


@pytest.fixture(scope="module")
def run(tiny_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    config = tiny_config(
        tiny_cohort / "manifest.csv", folder / "run", slides=tiny_cohort / "slides", mpp=2.0, epochs=1, group="pair"
    )
    run = train(config).path
    assert main(["evaluate", str(run), "--quiet"]) == 0
    test = [shown.entry.file for shown in Gallery(run).shown if shown.split == "test"]
    explain_cohort(run, {test[0]})
    return run


@pytest.fixture(scope="module")
def address(run: Path) -> Iterator[str]:
    app = make_app(Gallery(run), hosts={"127.0.0.1"})
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    profile = tmp_path_factory.mktemp("profile")
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
        *("--window-size=1300,900", "--force-device-scale-factor=1", f"--user-data-dir={profile}"),
        "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",  # offline: no name is found
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


def until(happens: Callable[[], Any]) -> Any:
    """What a question gives once it gives something."""
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        if found := happens():
            return found
        time.sleep(0.05)
    raise AssertionError("it did not happen in time")


def facts(browser: webdriver.Chrome) -> dict[str, str]:
    """What the address says."""
    return {key: values[0] for key, values in parse_qs(browser.current_url.partition("#")[2]).items()}


def seen(browser: webdriver.Chrome) -> np.ndarray:
    """The pixels of the deep zoom when they no longer change, with no notes over them."""
    before = None
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        picture = Image.open(io.BytesIO(browser.find_element(By.ID, "viewer").screenshot_as_png)).convert("RGB")
        now = np.asarray(picture)[20:-90, 20:-230].astype(int)  # between the colour bar, the scale and the navigator
        if before is not None and np.array_equal(before, now):
            return now
        before = now
        time.sleep(0.4)
    raise AssertionError("the picture does not rest")


def press(browser: webdriver.Chrome, *keys: str) -> None:
    browser.find_element(By.TAG_NAME, "body").send_keys(*keys)


def choose(browser: webdriver.Chrome, name: str, value: str) -> None:
    Select(browser.find_element(By.ID, name)).select_by_visible_text(value)


def opened(browser: webdriver.Chrome, address: str) -> None:
    browser.get("about:blank")
    browser.get(address)
    until(lambda: browser.execute_script("return document.documentElement.dataset.ready"))
    until(lambda: "slide" in facts(browser) or browser.find_element(By.ID, "scale").is_displayed())


def no_complaints(browser: webdriver.Chrome) -> bool:
    return [entry for entry in browser.get_log("browser") if entry["level"] not in ("INFO", "DEBUG")] == []


def explained_file(run: Path) -> str:
    return next(iter(Gallery(run).explained()))


def test_a_slide_its_stages_and_its_opacity(browser: webdriver.Chrome, address: str, run: Path) -> None:
    file = explained_file(run)
    opened(browser, f"{address}#slide={file}")
    until(lambda: browser.find_element(By.ID, "slide-name").text == file)
    stored = StoredExplanation.read(Gallery(run).explained()[file])
    stages = sorted({shown.heat.stage for shown in stored.maps})
    until(lambda: browser.find_element(By.ID, "stage").is_enabled())
    assert [option.text for option in Select(browser.find_element(By.ID, "stage")).options] == [str(n) for n in stages]
    pictures = {}
    for stage in stages:
        choose(browser, "stage", str(stage))
        choose(browser, "kind", "attention")
        pictures[stage] = seen(browser)
        assert facts(browser)["stage"] == str(stage)
    assert not np.array_equal(pictures[stages[0]], pictures[stages[-1]])
    overlaid = seen(browser)
    press(browser, "o")
    plain = seen(browser)
    assert facts(browser)["overlay"] == "0"
    assert np.abs(overlaid - plain).max() > 30
    press(browser, "o")
    browser.execute_script(
        "const s = document.getElementById('opacity'); s.value = 0.5; s.dispatchEvent(new Event('input'))"
    )
    half = seen(browser)
    changed = np.abs(overlaid - plain).sum(axis=-1) > 60
    part = np.abs(half - plain)[changed].sum() / np.abs(overlaid - plain)[changed].sum()
    assert 0.4 < part < 0.6
    assert no_complaints(browser)


def test_what_is_seen_is_the_slide(browser: webdriver.Chrome, address: str, run: Path, tiny_cohort: Path) -> None:
    """At one pixel of level 0 a pixel of the screen, both are the same."""
    import openslide

    file = explained_file(run)
    with openslide.OpenSlide(tiny_cohort / "slides" / file) as slide:
        width, height = slide.dimensions
        truth = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB")).astype(int)
    opened(browser, f"{address}#slide={file}&overlay=0&px=1&x={width // 2}&y={height // 2}")
    picture = seen(browser)
    box = browser.execute_script(
        "const r = document.getElementById('viewer').getBoundingClientRect(); return [r.width, r.height]"
    )
    left, top = (round(box[0] / 2 - width // 2) - 20, round(box[1] / 2 - height // 2) - 20)
    rows = slice(max(0, top), min(picture.shape[0], top + height))
    columns = slice(max(0, left), min(picture.shape[1], left + width))
    shown = picture[rows, columns]
    errors = {}
    for down in (-2, -1, 0, 1, 2):
        for right in (-2, -1, 0, 1, 2):
            part = np.roll(truth, (down, right), (0, 1))[rows.start - top :, columns.start - left :]
            errors[down, right] = np.abs(part[: shown.shape[0], : shown.shape[1]] - shown)[4:-4, 4:-4].mean()
    best = min(errors, key=lambda shift: errors[shift])
    assert max(map(abs, best)) <= 1
    assert errors[best] < 4


def test_zoom_scale_and_a_link_that_reopens_the_same_view(browser: webdriver.Chrome, address: str, run: Path) -> None:
    file = explained_file(run)
    opened(browser, f"{address}#slide={file}")
    seen(browser)
    before = browser.find_element(By.ID, "scale-text").text
    assert before.endswith(("µm", "mm"))
    press(browser, "+", "+", "+", Keys.ARROW_RIGHT)
    picture = seen(browser)
    until(lambda: float(facts(browser).get("px", 9)) < 0.9)
    assert browser.find_element(By.ID, "scale-text").text != before
    length = float(browser.find_element(By.ID, "scale-text").text.split()[0])
    line_px = browser.execute_script("return document.getElementById('scale-line').getBoundingClientRect().width")
    assert length / line_px == pytest.approx(2.0 * float(facts(browser)["px"]), rel=0.02)  # 2 microns a pixel
    link = browser.current_url
    opened(browser, link)
    again = seen(browser)
    assert np.abs(again - picture).mean() < 2
    assert {**facts(browser), "px": ""} == {**parse_link(link), "px": ""}
    assert no_complaints(browser)


def parse_link(link: str) -> dict[str, str]:
    return {key: values[0] for key, values in parse_qs(link.partition("#")[2]).items()}


def names(browser: webdriver.Chrome) -> list[str]:
    return browser.execute_script(
        "return [...document.querySelectorAll('#slides tbody tr')].map(r => r.cells[1].textContent)"
    )


def test_the_list_is_filtered_sorted_and_walked_through(browser: webdriver.Chrome, address: str, run: Path) -> None:
    opened(browser, address)
    everything = names(browser)
    assert everything == [shown.entry.file for shown in Gallery(run).shown]
    choose(browser, "split", "test")
    test = [shown.entry.file for shown in Gallery(run).shown if shown.split == "test"]
    until(lambda: names(browser) == test)
    browser.find_element(By.CSS_SELECTOR, "th[data-key=probability] button").click()
    scored = {shown.entry.file: max((shown.probabilities or {"": 0.0}).values()) for shown in Gallery(run).shown}
    until(lambda: names(browser) == sorted(test, key=lambda file: scored[file]))
    search = browser.find_element(By.ID, "search")
    search.send_keys(test[-1][:9])
    until(lambda: set(names(browser)) == {file for file in test if file.startswith(test[-1][:9])})
    search.clear()
    search.send_keys(Keys.BACKSPACE, Keys.ESCAPE)
    choose(browser, "split", "all splits")
    until(lambda: set(names(browser)) == set(everything))
    browser.find_element(By.CSS_SELECTOR, "th[data-key=file] button").click()
    order = until(lambda: (found := names(browser)) == sorted(everything) and found)
    start = order.index(until(lambda: facts(browser).get("slide")))
    for key, place in (("j", start + 1), ("j", start + 2), ("k", start + 1)):
        press(browser, key)
        until(lambda place=place: facts(browser)["slide"] == order[place])
    assert no_complaints(browser)


def test_a_slide_is_explained_at_the_press_of_a_key(browser: webdriver.Chrome, address: str, run: Path) -> None:
    file = next(shown.entry.file for shown in Gallery(run).shown if shown.entry.file not in Gallery(run).explained())
    opened(browser, f"{address}#slide={file}")
    until(lambda: browser.find_element(By.ID, "explain").is_displayed())
    assert not browser.find_element(By.ID, "stage").is_enabled()
    plain = seen(browser)
    press(browser, "e")
    until(lambda: browser.find_element(By.ID, "stage").is_enabled())
    assert not browser.find_element(By.ID, "explain").is_displayed()
    assert np.abs(seen(browser) - plain).max() > 30
    assert no_complaints(browser)


def test_a_link_to_no_slide_is_told(browser: webdriver.Chrome, address: str) -> None:
    opened(browser, f"{address}#slide=another.svs")
    until(lambda: "another.svs" in browser.find_element(By.ID, "message").text)
    assert names(browser)
