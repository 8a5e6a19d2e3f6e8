"""Pages in real browsers without a screen: Chromium through chromedriver, Firefox through geckodriver, and WebKitGTK
(Safari's engine) through WebKitWebDriver."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FIREFOX = shutil.which("firefox") or shutil.which("firefox-esr")
WEBKIT = next(Path("/usr").glob("lib*/**/webkit2gtk-4*/MiniBrowser"), None)


@contextmanager
def browser(profile: Path, size: tuple[int, int] = (1200, 900), dark: bool = False, webgpu: bool = False) -> Iterator:
    """A Selenium driver of Chromium with a window of ``size``; ``profile`` is an empty folder. With
    ``webgpu`` it has that by a software adapter. Skips the test without Chromium."""
    driver_path = shutil.which("chromedriver")
    if not CHROMIUM or not driver_path:
        pytest.skip("Chromium and chromedriver are not installed")
    webdriver = pytest.importorskip("selenium.webdriver", reason="Selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    flags = ["headless", "no-first-run", "disable-background-networking", "disable-component-update"]
    flags += ["disable-sync", "disable-dev-shm-usage", "hide-scrollbars", f"user-data-dir={profile}"]
    if webgpu:
        flags += ["enable-unsafe-webgpu", "enable-features=Vulkan", "use-webgpu-adapter=swiftshader"]
    else:
        flags.append("disable-gpu")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        flags.append("no-sandbox")  # Chromium refuses to start as root with it
    for flag in flags:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_path))
    try:
        # a window does not get narrower than 500
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size[0] < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        yield driver
    finally:
        driver.quit()


@contextmanager
def firefox(_: Path) -> Iterator:
    """A Selenium driver of Firefox. Skips the test without Firefox or geckodriver."""
    driver_path = shutil.which("geckodriver")
    if not FIREFOX or not driver_path:
        pytest.skip("Firefox and geckodriver are not installed")
    webdriver = pytest.importorskip("selenium.webdriver", reason="Selenium is not installed")
    options = webdriver.FirefoxOptions()
    options.binary_location = FIREFOX
    options.add_argument("-headless")
    driver = webdriver.Firefox(options=options, service=webdriver.FirefoxService(driver_path))
    try:
        yield driver
    finally:
        driver.quit()


@contextmanager
def webkit(_: Path) -> Iterator:
    """A Selenium driver of WebKitGTK's MiniBrowser. Skips the test without it, its driver or Xvfb."""
    driver_path, screen = shutil.which("WebKitWebDriver"), shutil.which("Xvfb")
    if not WEBKIT or not driver_path or not screen:
        pytest.skip("WebKitGTK's MiniBrowser and driver, and Xvfb, are not installed")
    webdriver = pytest.importorskip("selenium.webdriver", reason="Selenium is not installed")
    options = webdriver.WebKitGTKOptions()
    options.binary_location = str(WEBKIT)
    options.add_argument("--automation")
    with subprocess.Popen([screen, "-displayfd", "1"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as display:
        try:
            assert display.stdout
            environment = {**os.environ, "DISPLAY": f":{int(display.stdout.readline())}"}
            service = webdriver.WebKitGTKService(driver_path, env=environment)
            driver = webdriver.WebKitGTK(options=options, service=service)
            try:
                yield driver
            finally:
                driver.quit()
        finally:
            display.terminate()


ENGINES = {"chromium": browser, "firefox": firefox, "webkit": webkit}


def loaded(driver) -> list[int]:
    """The natural width of every picture of the page once all have arrived, 0 for one that has not."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 60).until(lambda d: d.execute_script("return [...document.images].every(i => i.complete)"))
    return driver.execute_script("return [...document.images].map(i => i.naturalWidth)")


def complaints(driver) -> list[str]:
    """What the page wrote to the console in Chromium: errors, blocked loads."""
    return [entry["message"] for entry in driver.get_log("browser")]
