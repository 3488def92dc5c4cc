"""The tab as people use it: TensorBoard on both back ends, in headless Chromium."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tab_runs import NOBODY, Run

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium with its driver: apt-get install chromium chromium-driver"
)

WAIT = 60.0
"""Seconds that a busy machine may take."""

HOSTILE = NOBODY.replace("/", "")


def until(ready: Callable[[], Any], what: str) -> Any:
    """Waits for a condition, and returns its value."""
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        try:
            if value := ready():
                return value
        except Exception:
            # an element that is being replaced
            pass
        time.sleep(0.05)
    pytest.fail(f"not within {WAIT:.0f} s: {what}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    driver.set_script_timeout(WAIT)
    yield driver
    driver.quit()


class Board:
    """TensorBoard in a process of its own, and its tab in the browser."""

    def __init__(self, browser: Any, folder: Path, *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            "tensorboard.main",
            "--logdir",
            str(folder),
            "--port",
            str(self.port),
            "--reload_interval",
            "1",
        ]
        self.browser = browser
        self.process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def open(self) -> None:
        """Opens the tab, and waits until the run is shown."""
        address = f"http://localhost:{self.port}/"
        until(lambda: urllib.request.urlopen(f"{address}data/plugins_listing", timeout=5).status == 200, "a server")
        # TensorBoard enables the tab once it has read the first records
        until(lambda: b'"gendiag"' in urllib.request.urlopen(f"{address}data/plugins_listing").read(), "the plugin")
        self.browser.get(f"{address}#gendiag")
        frame = until(
            lambda: self.browser.find_elements(By.CSS_SELECTOR, "iframe[src*='name=gendiag']"), "the frame of the tab"
        )[0]
        self.browser.switch_to.frame(frame)
        until(lambda: "step" in self.text("step-label"), "the first run")

    def close(self) -> None:
        self.browser.get("about:blank")
        self.process.terminate()
        self.process.wait(timeout=20)

    def all(self, name: str, within: str = "") -> list[Any]:
        scope = f"[data-testid='{within}'] " if within else ""
        return list(self.browser.find_elements(By.CSS_SELECTOR, f"{scope}[data-testid='{name}']"))

    def one(self, name: str, within: str = "") -> Any:
        return until(lambda: self.all(name, within), name)[0]

    def text(self, name: str, within: str = "") -> str:
        return str(self.one(name, within).text)

    def attribute(self, name: str, attribute: str) -> str | None:
        value = self.one(name).get_attribute(attribute)
        return None if value is None else str(value)

    def choose(self, run: str) -> None:
        """Chooses a run in the picker."""
        self.one("run-picker").click()
        until(lambda: [one for one in self.all("run-option") if run in one.text], f"the run {run}")[0].click()
        until(lambda: run in self.text("run-picker"), f"the choice of {run}")

    def move(self, step: int) -> None:
        """Moves the slider to the evaluation at a step, as dragging does."""
        script = """
            const slider = arguments[0];
            slider.value = arguments[1];
            slider.dispatchEvent(new Event("input", {bubbles: true}));
        """
        slider = self.one("step-slider")
        positions = int(slider.get_attribute("max")) + 1
        for position in range(positions):
            self.browser.execute_script(script, slider, position)
            if self.step == step:
                return
        pytest.fail(f"no position of the slider is step {step}")

    @property
    def step(self) -> int:
        """The step that is shown."""
        return int(self.text("step-label").split()[1])

    def pixels(self, name: str) -> str:
        """The content of a canvas."""
        return str(self.browser.execute_script("return arguments[0].toDataURL()", self.one(name)))


@pytest.fixture(scope="module")
def logdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    Run(folder / "broken").writer.close()
    Run(folder / "healthy", broken_at=None).writer.close()
    Run(folder / HOSTILE, evaluations=8).writer.close()
    return folder


@pytest.fixture(scope="module", params=["--load_fast=true", "--load_fast=false"])
def board(request: pytest.FixtureRequest, browser: Any, logdir: Path) -> Iterator[Board]:
    own = Board(browser, logdir, request.param)
    try:
        own.open()
        yield own
    finally:
        own.close()


def test_the_tab_opens_on_what_is_wrong(board: Board) -> None:
    assert "broken" in board.text("run-picker")
    assert board.attribute("state-badge", "data-state") == "unhealthy"
    assert "bottom right collapsed" in board.text("summary")
    assert board.step == 600
    assert board.attribute("panel-CosineMeanSimilarity", "data-highlight") == "bottom right"
    for diagnostic in ("GenerationBalance", "ManifoldEntropy", "PosteriorKL", "KStar", "LatentRegions", "TrainingData"):
        assert board.all(f"panel-{diagnostic}")
    errors = [entry["message"] for entry in board.browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert [one for one in errors if "gendiag" in one or "static" in one] == []


def test_the_slider_moves_map_curves_and_samples_together(board: Board) -> None:
    board.choose("broken")
    board.move(600)
    board.one("map-distance").click()
    panel = "panel-CosineMeanSimilarity"
    broken = until(lambda: board.pixels("region-map"), "the map")
    samples = until(lambda: "step=600" in (board.one("samples").get_attribute("src") or ""), "samples of step 600")
    assert samples
    legend = board.text("legend", panel)
    board.move(200)
    until(lambda: "step=200" in (board.one("samples").get_attribute("src") or ""), "samples of step 200")
    until(lambda: board.pixels("region-map") != broken, "another map")
    assert board.text("legend", panel) != legend
    board.one("map-region").click()


def test_a_region_highlights_its_curve_and_the_other_way_round(board: Board) -> None:
    board.choose("broken")
    panel = "panel-CosineMeanSimilarity"
    canvas = board.one("region-map")
    size = canvas.size
    actions = webdriver.ActionChains(board.browser)
    # the top left quarter, without its border
    actions.move_to_element_with_offset(canvas, -size["width"] // 4, -size["height"] // 4).perform()
    until(lambda: board.attribute(panel, "data-highlight") == "top left", "the region below the pointer")
    entry = next(
        one for one in board.browser.find_elements(By.CSS_SELECTOR, f"[data-testid='{panel}'] [data-name='top right']")
    )
    before = board.pixels("region-map")
    webdriver.ActionChains(board.browser).move_to_element(entry).perform()
    until(lambda: board.attribute(panel, "data-highlight") == "top right", "the region of the curve")
    until(lambda: board.pixels("region-map") != before, "the region in the map")


def test_an_alarm_jumps_to_its_step_and_region(board: Board) -> None:
    board.choose("broken")
    board.move(100)
    alarm = board.one("alarm")
    assert "bottom right" in alarm.text
    alarm.click()
    until(lambda: board.step == 410, "the step of the alarm")
    assert board.attribute("panel-CosineMeanSimilarity", "data-highlight") == "bottom right"


def test_keys_move_by_evaluations_and_play(board: Board) -> None:
    board.choose("broken")
    board.move(300)
    body = board.browser.find_element(By.TAG_NAME, "body")
    body.send_keys(Keys.ARROW_RIGHT)
    until(lambda: board.step == 310, "the next evaluation")
    body.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    until(lambda: board.step == 290, "the evaluation before")
    body.send_keys(Keys.HOME)
    until(lambda: board.step == 10, "the first evaluation")
    body.send_keys(Keys.SPACE)
    until(lambda: board.step > 30, "a run that plays")
    body.send_keys(Keys.SPACE)


def test_a_hostile_name_stays_text(board: Board) -> None:
    board.choose(HOSTILE)
    assert HOSTILE in board.text("run-picker")
    assert board.attribute("state-badge", "data-state") == "not judged"
    board.choose("broken")
    assert NOBODY in board.text("summary")
    assert board.browser.find_elements(By.CSS_SELECTOR, "img[src='x']") == []


def test_two_runs_are_compared(board: Board) -> None:
    board.choose("broken")
    board.one("compare-picker").click()
    until(lambda: [one for one in board.all("compare-option") if "healthy" in one.text], "the other run")[0].click()
    until(lambda: "healthy" in board.text("compare-picker"), "the choice")
    board.one("panel-wipe")
    board.browser.execute_script("arguments[0].scrollIntoView()", board.one("panel-wipe"))
    board.one("wipe-runs").click()
    addresses = "return [...arguments[0].querySelectorAll('img')].map((one) => one.src).join(' ')"
    until(
        lambda: (
            "run=healthy" in board.browser.execute_script(addresses, board.one("panel-wipe"))
            and "run=broken" in board.browser.execute_script(addresses, board.one("panel-wipe"))
        ),
        "pictures of both runs",
    )


def test_a_live_run_grows_and_keeps_the_step(browser: Any, tmp_path: Path) -> None:
    run = Run(tmp_path / "live", evaluations=20, broken_at=None)
    board = Board(browser, tmp_path)
    try:
        board.open()
        assert board.step == 200
        board.move(150)
        for number in range(21, 26):
            run.evaluate(number)
        run.report(25)
        run.writer.flush()
        until(lambda: "of 250" in board.text("step-label"), "the new evaluations")
        assert board.step == 150
    finally:
        run.writer.close()
        board.close()


def test_without_plotly_the_page_still_shows_what_is_wrong(browser: Any, logdir: Path) -> None:
    board = Board(browser, logdir)
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*plotly*"]})
    try:
        board.open()
        assert "bottom right collapsed" in board.text("summary")
        until(lambda: board.pixels("region-map"), "the map")
        until(lambda: "lightning_gendiag[tab]" in browser.find_element(By.TAG_NAME, "body").text, "what to install")
    finally:
        browser.execute_cdp_cmd("Network.setBlockedURLs", {"urls": []})
        board.close()
