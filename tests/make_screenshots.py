"""Writes docs/serve.jpg, docs/app.jpg and docs/view.jpg: the pages of ``compass serve`` and ``compass view``.

The picture is the one that Matplotlib ships: Grace Hopper, by James S. Davis of the United States Navy, public domain.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib
from browser import browser
from PIL import Image
from selenium.webdriver.support.ui import WebDriverWait

DOCS = Path(__file__).parents[1] / "docs"
PICTURE = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
COMPASS = [sys.executable, "-m", "compass_codec"]
ARRIVED = "return [...document.images].length && [...document.images].every(i => i.complete && i.naturalWidth >= {})"


def shoot(driver, address: str, name: str, width: int) -> None:
    """A screenshot of a page, once every picture has arrived and is at least so wide."""
    driver.get(address)
    WebDriverWait(driver, 120).until(lambda d: d.execute_script(ARRIVED.format(width)))
    shot = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
    shot.save(DOCS / f"{name}.jpg", quality=85, subsampling=0, optimize=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        file, page = folder / "grace_hopper.cmps", folder / "grace_hopper.html"
        subprocess.run([*COMPASS, "encode", PICTURE, "-s", "1,2,4", "-o", file], check=True)
        serve = [*COMPASS, "serve", folder, "--port", "0"]
        with subprocess.Popen(serve, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
            try:
                assert server.stdout
                address = re.search(r"http://\S+", server.stdout.readline())
                assert address
                source = f"{address[0]}{file.name}"  # fetched in ranges
                subprocess.run([*COMPASS, "view", source, "--source", PICTURE, "-o", page], check=True)
                with browser(folder / "profile", (900, 700)) as driver:
                    shoot(driver, address[0], "serve", 1)
                    shoot(driver, f"{address[0]}app/", "app", 512)
                    shoot(driver, page.as_uri(), "view", 1)
            finally:
                server.terminate()


if __name__ == "__main__":
    main()
