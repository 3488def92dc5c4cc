"""TensorBoard in a process of its own, and its tab in headless Chromium."""

from __future__ import annotations

import json
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

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

WAIT = 60.0
"""Seconds that a busy machine may take."""


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


def start_browser(width: int = 1400, height: int = 1000) -> Any:
    """Returns a browser without a window."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    driver.set_script_timeout(WAIT)
    return driver


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
        """Opens the tab once TensorBoard has read the first records, and waits until a run is shown."""
        self.wait_for_server()
        self.enter()

    def wait_for_server(self) -> None:
        """Waits until TensorBoard answers and enables the tab."""
        listing = f"http://localhost:{self.port}/data/plugins_listing"

        def enabled() -> bool:
            with urllib.request.urlopen(listing, timeout=5) as reply:
                return bool(json.load(reply)["gendiag"]["enabled"])

        until(enabled, "a server that enables the tab")

    def enter(self) -> None:
        """Opens the tab, and waits until a run is shown."""
        self.browser.get(f"http://localhost:{self.port}/#gendiag")
        frames = until(
            lambda: self.browser.find_elements("css selector", "iframe[src*='name=gendiag']"), "the frame of the tab"
        )
        self.browser.switch_to.frame(frames[0])
        until(lambda: "step" in self.text("step-label"), "the first run")

    def close(self) -> None:
        self.browser.get("about:blank")
        self.process.terminate()
        self.process.wait(timeout=20)

    def all(self, name: str, within: str = "") -> list[Any]:
        scope = f"[data-testid='{within}'] " if within else ""
        return list(self.browser.find_elements("css selector", f"{scope}[data-testid='{name}']"))

    def one(self, name: str, within: str = "") -> Any:
        return until(lambda: self.all(name, within), name)[0]

    def click(self, name: str) -> None:
        """Clicks what has a name; once more where it was drawn anew just then."""

        def clicked() -> bool:
            self.one(name).click()
            return True

        until(clicked, f"a click on {name}")

    def text(self, name: str, within: str = "") -> str:
        return str(self.one(name, within).text)

    def attribute(self, name: str, attribute: str) -> str | None:
        value = self.one(name).get_attribute(attribute)
        return None if value is None else str(value)

    def choose(self, run: str, picker: str = "run") -> None:
        """Chooses a run in the picker of runs, or in that of runs to compare with (``"compare"``)."""

        def chosen() -> bool:
            if run in self.text(f"{picker}-picker"):
                return True
            # the list is drawn anew while the page takes in what runs have written
            options = [one for one in self.all(f"{picker}-option") if run in one.text]
            (options[0] if options else self.one(f"{picker}-picker")).click()
            return False

        until(chosen, f"the choice of {run}")

    def move(self, step: int) -> None:
        """Moves the slider to the evaluation at a step, as dragging does."""
        if not any(self.step == step for _ in self.slide()):
            pytest.fail(f"no position of the slider is step {step}")

    def slide(self) -> Iterator[int]:
        """Moves the slider from its first position to its last, and yields each one."""
        script = """
            const slider = arguments[0];
            slider.value = arguments[1];
            slider.dispatchEvent(new Event("input", {bubbles: true}));
        """
        slider = self.one("step-slider")
        for position in range(int(slider.get_attribute("max")) + 1):
            self.browser.execute_script(script, slider, position)
            yield position

    @property
    def step(self) -> int:
        """The step that is shown."""
        return int(self.text("step-label").split()[1])

    def pixels(self, name: str) -> str:
        """The content of a canvas."""
        return str(self.browser.execute_script("return arguments[0].toDataURL()", self.one(name)))
