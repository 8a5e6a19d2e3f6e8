"""The page that compares the layers of a file, also in a real browser."""

import base64
import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
from browser import browser, complaints, loaded
from conftest import compass, crop
from PIL import Image

from compass_codec import container, metrics, page, pictures, remote
from compass_codec.jobs import paths


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_file) -> Path:
    folder = tmp_path_factory.mktemp("view")
    (folder / "photo.cmps").write_bytes(small_file)
    crop(80, 60).save(folder / "source.png")
    result = compass("view", folder / "photo.cmps", "--source", folder / "source.png", "--device", "cpu")
    assert result.code == 0, result.err
    assert result.out == f"{folder / 'photo.html'}: 3 layers\n"
    return folder


def embedded(html: str) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"base64,([^\"]+)", html)]


def test_the_pictures_are_the_layers(folder, codec, small_file):
    *layers, source = embedded((folder / "photo.html").read_text())
    assert len(layers) == 3
    for k, image in enumerate(layers):
        assert (np.asarray(image) == np.asarray(codec.decode(small_file, k))).all()
    assert (np.asarray(source) == np.asarray(crop(80, 60))).all()


def test_the_table(folder, codec, small_file):
    html = (folder / "photo.html").read_text()
    header = container.read_header(small_file)
    reduced = pictures.pyramid(crop(80, 60), [(20, 15), (40, 30), (80, 60)])
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", html)][1:]
    assert len(rows) == 3
    before = 0
    for k, (row, entry) in enumerate(zip(rows, header.layers, strict=True)):
        pixels = entry.width * entry.height
        assert row[:4] == [str(k), f"{entry.width} x {entry.height}", f"{2**k}", "50"]
        assert row[4:6] == [str(entry.end - before), f"{8 * (entry.end - before) / pixels:.3f}"]
        assert row[6:8] == [str(entry.end), f"{8 * entry.end / pixels:.3f}"]
        assert row[8] == f"{metrics.psnr(reduced[k], np.asarray(codec.decode(small_file, k))):.2f}"
        before = entry.end


def test_it_needs_no_network(folder):
    html = (folder / "photo.html").read_text()
    assert "default-src 'none'" in html
    assert not re.search(r"(?:src|href)=\"(?!data:)", html) and "http://" not in html and "https://" not in html


@pytest.mark.parametrize(("size", "dark"), [((1200, 900), False), ((390, 844), True)])
def test_in_a_browser(folder, tmp_path, size, dark):
    with browser(tmp_path / "profile", size, dark) as driver:
        driver.get((folder / "photo.html").as_uri())
        assert loaded(driver) == [20, 40, 80, 80] and complaints(driver) == []
        inside = "return document.documentElement.scrollWidth <= innerWidth"
        assert driver.execute_script(inside), "nothing sticks out on the right"
        background = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")
        panes = "return [...document.querySelectorAll('.pane')].map(p => p.getBoundingClientRect().toJSON())"
        assert len({round(p["width"]) for p in driver.execute_script(panes)}) == 1

        images = "return [...document.images].map(i => i.getBoundingClientRect().toJSON())"
        plain = driver.execute_script(images)
        driver.execute_script(
            "const zoom = document.getElementById('zoom'); zoom.value = 4; zoom.dispatchEvent(new Event('input'))"
        )
        for before, after in zip(plain, driver.execute_script(images), strict=True):
            assert after["width"] == pytest.approx(4 * before["width"], rel=0.01)
        assert driver.execute_script("return document.getElementById('shown').value") == "4.0 x"


@pytest.mark.parametrize("size", [(100, 400), (400, 100)])
def test_tall_and_wide_pictures_keep_their_shape(tmp_path, size):
    (tmp_path / "x.html").write_text(
        page.view("x", "", [page.Pane("Layer 0", "", Image.new("RGB", size, "red"))], [["a"]])
    )
    with browser(tmp_path / "profile") as driver:
        driver.get((tmp_path / "x.html").as_uri())
        loaded(driver)
        box = driver.execute_script("return document.images[0].getBoundingClientRect().toJSON()")
        assert box["width"] / box["height"] == pytest.approx(size[0] / size[1], rel=0.02)
        assert box["width"] > 150 and box["height"] < 800, "large, and seen at once"


def offsets(driver) -> list[tuple[float, float]]:
    """Where the corner of each picture is, in widths and heights of its pane."""
    return driver.execute_script(
        "return [...document.querySelectorAll('.pane')].map(p => {"
        "const a = p.getBoundingClientRect(), b = p.firstElementChild.getBoundingClientRect();"
        "return [(b.x - a.x) / a.width, (b.y - a.y) / a.height]})"
    )


def test_zoom_and_move_in_all_panes_together(folder, tmp_path):
    with browser(tmp_path / "profile") as driver:
        from selenium.webdriver import ActionChains
        from selenium.webdriver.common.by import By

        driver.get((folder / "photo.html").as_uri())
        loaded(driver)
        pane = driver.find_elements(By.CSS_SELECTOR, ".pane")[1]
        width, height = pane.size["width"], pane.size["height"]
        quarter = (round(-width / 4), round(-height / 4))  # from the middle
        ActionChains(driver).move_to_element_with_offset(pane, *quarter).double_click().perform()
        for x, y in offsets(driver):
            assert (x, y) == pytest.approx((-0.25, -0.25), abs=0.02), "what was under the pointer stays there"
        ActionChains(driver).move_to_element(pane).click_and_hold().move_by_offset(
            -round(width / 5), -round(height / 10)
        ).release().perform()
        for x, y in offsets(driver):
            assert (x, y) == pytest.approx((-0.45, -0.35), abs=0.02), "it follows the pointer"
        ActionChains(driver).drag_and_drop_by_offset(pane, width // 3, height // 3).drag_and_drop_by_offset(
            pane, width // 3, height // 3
        ).perform()
        for x, y in offsets(driver):
            assert (x, y) == pytest.approx((0, 0), abs=0.02), "not beyond the edge"
        driver.find_element(By.ID, "pixels").click()
        assert driver.execute_script("return getComputedStyle(document.images[0]).imageRendering") == "pixelated"


def test_a_file_that_was_cut_off(tmp_path, small_file):
    end = container.read_header(small_file).layers[1].end
    (tmp_path / "cut.cmps").write_bytes(small_file[: end + 3])
    assert compass("view", tmp_path / "cut.cmps").code == 0
    html = (tmp_path / "cut.html").read_text()
    assert len(embedded(html)) == 2 and "cut off" in html and "PSNR" not in html


def test_names_are_text(tmp_path, small_file):
    path = tmp_path / "<b>&'$title.cmps"
    path.write_bytes(small_file)
    assert compass("view", path, "-o", tmp_path / "x.html").code == 0
    html = (tmp_path / "x.html").read_text()
    assert "<b>" not in html and "&lt;b&gt;&amp;&#x27;$title.cmps" in html


def test_names_that_are_not_utf8(tmp_path, small_file):
    path, source = (tmp_path / os.fsdecode(name) for name in (b"bad\xff.cmps", b"\xfe.png"))
    path.write_bytes(small_file)
    crop(80, 60).save(source)
    assert compass("view", path, "--source", source, "--quiet").code == 0
    html = path.with_suffix(".html").read_text()
    assert "bad\ufffd.cmps" in html and "\ufffd.png" in html


def test_streams_and_addresses(tmp_path, small_file, monkeypatch):
    (tmp_path / "photo.cmps").write_bytes(small_file)
    crop(80, 60).save(tmp_path / "source.png")
    streams = {"input": io.BytesIO(small_file), "output": io.BytesIO()}
    monkeypatch.setattr(paths, "standard", lambda name: streams[name])
    assert compass("view", "-").code == 0 and len(embedded(streams["output"].getvalue().decode())) == 3
    streams["input"] = io.BytesIO((tmp_path / "source.png").read_bytes())
    assert compass("view", tmp_path / "photo.cmps", "--source", "-", "-o", "/dev/stdout", "--quiet").code == 0
    assert len(embedded(streams["output"].getvalue().decode())) == 3 + 4
    result = compass("view", "-", "--source", "/dev/stdin")
    assert result.code == 2 and "standard input is for one" in result.err

    monkeypatch.chdir(tmp_path)
    header = container.read_header(small_file)
    found = remote.Prefix(small_file, header, 2, b"", len(small_file), len(small_file))
    monkeypatch.setattr(remote, "read_prefix", lambda *args: found)
    result = compass("view", "https://example.org/pictures/far.cmps")
    assert (result.code, result.out) == (0, "far.html: 3 layers\n") and (tmp_path / "far.html").exists()
    result = compass("view", tmp_path / "photo.cmps", "--source", "https://example.org/a.png")
    assert result.code == 2 and "is an address on the web" in result.err


def test_what_is_refused(folder, tmp_path, small_file):
    path = tmp_path / "photo.cmps"
    path.write_bytes(small_file)
    crop(9, 9).save(tmp_path / "other.png")
    (tmp_path / "text.cmps").write_text("no such file")
    for args in (
        [tmp_path / "none.cmps"],
        [tmp_path],
        [Path()],
        [tmp_path / "text.cmps"],
        [path, "--source", tmp_path / "other.png"],
        [path, "--source", tmp_path / "none.png"],
        [path, "-o", path, "--force"],
        [path, "-o", tmp_path / "no" / "such.html"],
        [path, "--max-pixels", 100],
        [folder / "photo.cmps"],  # photo.html exists
    ):
        before = sorted(tmp_path.iterdir())
        result = compass("view", *args)
        assert result.code == 1 and len(result.err.splitlines()) == 1 and result.out == "", args
        assert sorted(tmp_path.iterdir()) == before
    assert path.read_bytes() == small_file
    assert compass("view", folder / "photo.cmps", "--force", "--quiet").out == ""


def test_pictures_too_large_for_webp():
    assert page.data_uri(Image.new("RGB", (16383, 1))).startswith("data:image/webp;")
    assert page.data_uri(Image.new("RGB", (16384, 1))).startswith("data:image/png;")
