"""The tab as people use it: TensorBoard on both back ends, in headless Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tab_browser import CHROMIUM, DRIVER, Board, start_browser, until
from tests.tab_runs import NOBODY, Run

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium with its driver: apt-get install chromium chromium-driver"
)

HOSTILE = NOBODY.replace("/", "")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver = start_browser()
    yield driver
    driver.quit()


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


on_one_back_end = pytest.mark.parametrize("board", ["--load_fast=true"], indirect=True)
"""What the page does by itself is the same on both."""


def test_the_tab_opens_on_what_is_wrong(board: Board) -> None:
    assert "broken" in board.text("run-picker")
    assert board.attribute("state-badge", "data-state") == "unhealthy"
    assert "bottom right collapsed" in board.text("summary")
    assert board.step == 600
    assert board.attribute("panel-CosineMeanSimilarity", "data-highlight") == "bottom right"
    for diagnostic in (
        "GenerationBalance",
        "ManifoldEntropy",
        "PosteriorKL",
        "CodebookUsage",
        "KStar",
        "LatentRegions",
        "Memorization",
        "TrainingData",
    ):
        assert board.all(f"panel-{diagnostic}")
    errors = [entry["message"] for entry in board.browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert [one for one in errors if "gendiag" in one or "static" in one] == []


def test_the_slider_moves_map_curves_and_samples_together(board: Board) -> None:
    board.choose("broken")
    board.move(600)
    board.click("map-distance")
    panel = "panel-CosineMeanSimilarity"
    broken = until(lambda: board.pixels("region-map"), "the map")
    samples = until(lambda: "step=600" in (board.one("samples").get_attribute("src") or ""), "samples of step 600")
    assert samples
    legend = board.text("legend", panel)
    board.move(200)
    until(lambda: "step=200" in (board.one("samples").get_attribute("src") or ""), "samples of step 200")
    until(lambda: board.pixels("region-map") != broken, "another map")
    assert board.text("legend", panel) != legend
    board.click("map-region")


@on_one_back_end
def test_a_region_highlights_its_curve_and_the_other_way_round(board: Board) -> None:
    board.choose("broken")
    panel = "panel-CosineMeanSimilarity"

    def highlighted(x: int) -> str | None:
        # found again each time, since a run that is chosen draws its panels anew
        canvas = board.one("region-map")
        size = canvas.size
        # the page may move below a pointer that stays, so each try goes to another place of the top left quarter
        actions = webdriver.ActionChains(board.browser)
        actions.move_to_element_with_offset(canvas, -size["width"] // 4 + x, -size["height"] // 4).perform()
        return board.attribute(panel, "data-highlight")

    until(lambda: "top left" in (highlighted(0), highlighted(3)), "the region below the pointer")
    before = board.pixels("region-map")

    def highlighted_by_the_legend() -> str | None:
        entry = board.browser.find_element(By.CSS_SELECTOR, f"[data-testid='{panel}'] [data-name='top right']")
        webdriver.ActionChains(board.browser).move_to_element(entry).perform()
        return board.attribute(panel, "data-highlight")

    until(lambda: highlighted_by_the_legend() == "top right", "the region of the curve")
    until(lambda: board.pixels("region-map") != before, "the region in the map")


@on_one_back_end
def test_an_alarm_jumps_to_its_step_and_region(board: Board) -> None:
    board.choose("broken")
    board.move(100)
    assert "bottom right" in board.text("alarm")
    board.click("alarm")
    until(lambda: board.step == 410, "the step of the alarm")
    assert board.attribute("panel-CosineMeanSimilarity", "data-highlight") == "bottom right"


def shown(board: Board, panel: str) -> None:
    board.browser.execute_script("arguments[0].scrollIntoView()", board.one(panel))


@on_one_back_end
def test_a_unit_is_named_once(board: Board) -> None:
    board.choose("broken")
    board.move(600)
    shown(board, "panel-ManifoldEntropy")
    assert board.text("spectrum-title", "panel-ManifoldEntropy") == "Entropy in nats of each dimension, step 600"


@on_one_back_end
def test_the_codes_that_died_are_named_at_the_step_and_not_before(board: Board) -> None:
    board.choose("broken")
    board.move(600)
    shown(board, "panel-CodebookUsage")
    named = "30 codes never chosen; died: 30, 31, 32, 33, 34, 35 and 24 more"
    until(lambda: board.text("codes-died") == named, "the codes that died")
    assert board.text("codes-title") == "Codes used at step 600: 30 of 60"
    heat = board.all("heat", "panel-CodebookUsage")[0]
    # the row of a code that died is as dark as "never" from step 400 on, the one of a code in use is not
    colours = board.browser.execute_script(
        """
        const canvas = arguments[0].querySelector("canvas");
        const at = (row, share) => [...canvas.getContext("2d").getImageData(share * canvas.width, row, 1, 1).data].join();
        return [at(50, 0.3), at(50, 0.8), at(50, 0.95), at(10, 0.8), canvas.height];
        """,
        heat,
    )
    assert colours[1] == colours[2] == "166,66,0,255"
    assert "166,66,0,255" not in (colours[0], colours[3])
    assert colours[4] == 60
    board.move(200)
    until(lambda: board.text("codes-died") == "All codes are chosen", "the codes of another step")
    assert board.text("codes-title") == "Codes used at step 200: 60 of 60"


@on_one_back_end
def test_copies_are_shown_beside_their_training_images_with_the_share(board: Board) -> None:
    board.choose("broken")
    board.move(600)
    shown(board, "panel-Memorization")
    until(lambda: "step=600" in (board.one("copies").get_attribute("src") or ""), "the pairs of step 600")
    assert board.text("copies-verdict") == (
        "36.7 % of the samples copy 33 of the 50 training images held; of fresh real images 1 % would count as copies."
    )
    captions = board.browser.find_elements(By.CSS_SELECTOR, ".captions li")
    assert [one.text for one in captions] == [f"no. {i}, {0.05 * (1 + i):.3g}" for i in range(8)]
    assert all("in-alarm" in (one.get_attribute("class") or "") for one in captions)
    board.move(200)
    until(lambda: "step=200" in (board.one("copies").get_attribute("src") or ""), "the pairs of step 200")
    assert board.text("copies-verdict").startswith("No sign of copies: 0 % of the samples")
    assert board.browser.find_elements(By.CSS_SELECTOR, ".captions .in-alarm") == []


@on_one_back_end
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


@on_one_back_end
def test_a_hostile_name_stays_text(board: Board) -> None:
    board.choose(HOSTILE)
    assert HOSTILE in board.text("run-picker")
    assert board.attribute("state-badge", "data-state") == "not judged"
    board.choose("broken")
    assert NOBODY in board.text("summary")
    assert board.browser.find_elements(By.CSS_SELECTOR, "img[src='x']") == []


@on_one_back_end
def test_two_runs_are_compared(board: Board) -> None:
    board.choose("broken")
    board.choose("healthy", "compare")
    board.one("panel-wipe")
    board.browser.execute_script("arguments[0].scrollIntoView()", board.one("panel-wipe"))
    board.click("wipe-runs")
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
