"""Pages in a real browser: headless Chromium, driven through chromedriver."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


@contextmanager
def browser(profile: Path, size: tuple[int, int] = (1200, 900), dark: bool = False) -> Iterator:
    """A Selenium driver with a window of ``size``; ``profile`` is an empty folder. Skips the test without Chromium."""
    if not CHROMIUM or not DRIVER:
        pytest.skip("Chromium and chromedriver are not installed")
    webdriver = pytest.importorskip("selenium.webdriver", reason="Selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    flags = ["headless", "disable-gpu", "no-first-run", "disable-background-networking", "disable-component-update"]
    flags += ["disable-sync", "disable-dev-shm-usage", "hide-scrollbars", f"user-data-dir={profile}"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        flags.append("no-sandbox")  # Chromium refuses to start as root with it
    for flag in flags:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        # a window does not get narrower than 500
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size[0] < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        yield driver
    finally:
        driver.quit()


def loaded(driver) -> list[int]:
    """The natural width of every picture of the page once all have arrived, 0 for one that has not."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 60).until(lambda d: d.execute_script("return [...document.images].every(i => i.complete)"))
    return driver.execute_script("return [...document.images].map(i => i.naturalWidth)")


def complaints(driver) -> list[str]:
    """What the page wrote to the console: errors, blocked loads."""
    return [entry["message"] for entry in driver.get_log("browser")]
