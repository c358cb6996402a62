"""A headless Chromium for testing pages, if one is installed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--hide-scrollbars")  # fmt: skip
DESKTOP, PHONE = (1280, 900), (390, 844)  # px
LOOK = """return {
  wide: document.documentElement.scrollWidth, seen: innerWidth,
  broken: [...document.images].filter(i => i.src && (!i.complete || !i.naturalWidth)).length, pictures: document.images.length,
}"""


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A driver; the test is skipped without Chromium and its driver.

    Args:
        profile: an empty folder for the browser's own files.
    """
    webdriver = pytest.importorskip("selenium.webdriver")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()


def look(browser: Any, size: tuple[int, int], screenshot: Path) -> dict[str, int]:
    """Set the window size in px, save a screenshot of the whole page, and measure it."""
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    time.sleep(0.5)  # plots follow the new width a little later
    found = browser.execute_script(LOOK)
    whole = browser.execute_script("return document.documentElement.scrollHeight")
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics | {"height": min(int(whole), 12000)})
    browser.save_screenshot(str(screenshot))
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    return found


def complaints(browser: Any) -> list[str]:
    """Console messages since the last call."""
    return [entry["message"] for entry in browser.get_log("browser")]
