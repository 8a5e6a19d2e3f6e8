"""The decoder for browsers, in those that are installed, against golden files and the decoder in Python."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import ENGINES, browser
from conftest import GOLDEN, compass, crop
from PIL import Image
from selenium.webdriver.support.ui import WebDriverWait

from compass_codec import container, web, weights
from compass_codec.errors import WeightsError
from compass_codec.web.routes import WORKER

LEAN = GOLDEN.parent / "lean"
FILES = json.loads((LEAN / "golden.json").read_text())["symbols"]

# Decodes a golden file in the page, by window.gpu where that is. Of each layer: the SHA-256 of its symbols, as
# golden.json has it; its pixels; how often work was submitted to the GPU; whether the decoder keeps it. `lose` loses
# the device meanwhile.
DECODE = """
const done = arguments[arguments.length - 1], [name, weights, lose] = arguments;
(async () => {
  const { readHeader, payload } = await import("./container.js"), { Decoder } = await import("./lean.js");
  const bytes = async (address) => (await fetch(address)).arrayBuffer();
  const decoder = await Decoder.load(await bytes("kernels.wasm"), await bytes(weights));
  const data = new Uint8Array(await bytes(name)), header = readHeader(data), found = [];
  const { gpu } = window;
  let submitted = 0, below = null;
  if (gpu) {
    decoder.gpu = gpu;
    gpu.device.queue.submit = (work) => (submitted++, GPUQueue.prototype.submit.call(gpu.device.queue, work));
  }
  const run = async (steps) => {
    for (let sent; ; ) {
      const { done, value } = steps.next(sent);
      if (done) return value;
      if (value && lose) gpu.device.destroy();
      sent = value && (await value);
    }
  };
  for (const [k, entry] of header.layers.entries()) {
    const symbols = {}, places = Math.ceil(entry.height / 16) * Math.ceil(entry.width / 16);
    const part = payload(entry, data, `layer ${k}`);
    submitted = 0;
    below = await run(decoder.layer(part, entry, below, (what, v) => (symbols[what] = v)));
    let all = part; // what stands for the symbols of a layer of one colour
    if (symbols.y) {
      const m = symbols.y.length / places;
      all = new Int32Array(symbols.z.length + symbols.y.length);
      all.set(symbols.z);
      symbols.y.forEach((v, i) => (all[symbols.z.length + (i % m) * places + Math.floor(i / m)] = 64 * v));
    }
    const hash = [...new Uint8Array(await crypto.subtle.digest("SHA-256", all))];
    const pixels = Array.from(below.rgb, (v) => String.fromCharCode(v)).join("");
    const hex = hash.map((b) => b.toString(16).padStart(2, "0")).join("");
    found.push({ hash: hex, pixels: btoa(pixels), submitted, kept: Boolean(decoder.gpu) });
  }
  done(found);
})().catch((error) => done(String(error.stack)));
"""


class Handler(SimpleHTTPRequestHandler):
    """Files with ranges; remembers what was sent of each."""

    sent: list[tuple[str, int, int]]

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not path.is_file() or not wanted:
            if path.is_file():
                self.sent.append((path.name, 0, path.stat().st_size))
            super().do_GET()
            return
        data, first = path.read_bytes(), int(wanted[1])
        part = data[first : int(wanted[2]) + 1]
        self.sent.append((path.name, first, len(part)))
        self.send_response(206 if part else 416)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", '"1"')
        self.end_headers()
        self.wfile.write(part)

    def end_headers(self) -> None:
        if self.path.endswith(".js"):
            self.send_header("Content-Security-Policy", WORKER)
        super().end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[tuple[Path, str, list[tuple[str, int, int]]]]:
    """A folder with the assets and an empty page, its address, and what was sent."""
    folder = tmp_path_factory.mktemp("site")
    result = compass("web-assets", folder, "--model", "lean")
    assert result.code == 0, result.err
    (folder / "empty.html").write_text("<!doctype html><title>empty</title>")
    handler = type("Counting", (Handler,), {"sent": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}", handler.sent
    server.shutdown()


@pytest.fixture(params=ENGINES)
def engine(request, site):
    site[2].clear()
    return ENGINES[request.param]


def weights_address() -> str:
    return web.weights_name(weights.choose(None, "lean").identity)


def test_golden_files_in_a_browser(site, engine, tmp_path):
    folder, address, _ = site
    with engine(tmp_path / "profile") as driver:
        driver.set_script_timeout(300)
        driver.get(f"{address}/empty.html")
        for name in FILES:
            decoded_in_page(driver, folder, name)


def decoded_in_page(driver, folder: Path, name: str, lose: bool = False) -> list[dict[str, Any]]:
    """Layers of a golden file as the page decodes them, checked against those of Python."""
    shutil.copy(LEAN / f"{name}.cmps", folder)
    found = driver.execute_async_script(DECODE, f"{name}.cmps", weights_address(), lose)
    assert isinstance(found, list), found
    assert [layer["hash"] for layer in found] == FILES[name], name
    for k, layer in enumerate(found):
        golden = np.asarray(Image.open(LEAN / f"{name}.layer{k}.png").convert("RGB")).astype(int)
        pixels = np.frombuffer(base64.b64decode(layer["pixels"]), np.uint8).reshape(golden.shape)
        difference = np.abs(pixels - golden)
        assert difference.max() <= 1 and (difference == 0).mean() >= 0.995, (name, k)
    return found


PAGE = """<!doctype html><title>pictures</title><body>
<img id="grown" data-cmps="photo.cmps" style="display: block; width: 100px">
<img id="damaged" data-cmps="damaged.cmps" style="display: block; width: 100px">
<script type="module" src="compass.js"></script>"""


def shown(driver, condition: str) -> None:
    WebDriverWait(driver, 200).until(lambda d: d.execute_script(f"return {condition}"))


def answer(driver, name: str) -> tuple[int, bytes]:
    """Status and body of what the page gets at an address."""
    driver.set_script_timeout(60)
    status, body = driver.execute_async_script(
        "const done = arguments[1]; fetch(arguments[0]).then(async (r) => [r.status, await r.arrayBuffer()])"
        ".then(([s, b]) => done([s, btoa(String.fromCharCode(...new Uint8Array(b)))]), e => done([0, btoa(e)]))",
        name,
    )
    return status, base64.b64decode(body)


def pixels_of(driver, name: str) -> np.ndarray:
    """The pixels of a picture in the browser."""
    status, body = answer(driver, name)
    assert status == 200, body
    return np.asarray(Image.open(io.BytesIO(body)))


def test_pictures_of_a_page(site, engine, tmp_path, codec):
    folder, address, sent = site
    image = crop(160, 120)
    alpha = Image.linear_gradient("L").resize(image.size)
    image.putalpha(alpha)
    data = codec.encode(image, [1, 2, 4], 60).data
    (folder / "photo.cmps").write_bytes(data)
    header = container.read_header(data)
    broken = bytearray(data)
    broken[header.layers[1].start + 20] ^= 1
    (folder / "damaged.cmps").write_bytes(broken)
    (folder / "page.html").write_text(PAGE)
    with engine(tmp_path / "profile") as driver:
        driver.get(f"{address}/page.html")
        # two layers of three are wide enough for 100 pixels: 40, 80, 160
        shown(driver, "document.getElementById('grown').naturalWidth == 160")
        shown(driver, "document.getElementById('damaged').naturalWidth == 40")
        total = sum(length for name, _, length in sent if name == "photo.cmps")
        assert total == max(container.MAX_HEADER, header.layers[2].end)
        spans = sorted((first, length) for name, first, length in sent if name == "photo.cmps")
        assert all(a[0] + a[1] == b[0] for a, b in pairwise(spans)), spans  # nothing twice
        for k in range(3):
            mine = pixels_of(driver, f"photo.cmps?layer={k}").astype(int)
            difference = np.abs(mine - np.asarray(codec.decode(data, k)))
            assert mine.shape[2] == 4 and difference.max() <= 1 and (difference == 0).mean() > 0.995
        assert pixels_of(driver, "photo.cmps?w=41").shape == (60, 80, 4)
        assert pixels_of(driver, "photo.cmps?w=9999").shape == (120, 160, 4)
        said = answer(driver, "damaged.cmps?layer=1")
        assert said[0] == 422 and b"layer 1 is damaged" in said[1]
        before = len(sent)
        driver.get(f"{address}/page.html")
        shown(driver, "document.getElementById('grown').naturalWidth == 160")
        assert not [name for name, *_ in sent[before:] if name.endswith(".safetensors")], "weights are kept"


def test_a_small_layer_takes_its_own_bytes_alone(site, engine, tmp_path, codec):
    folder, address, sent = site
    data = codec.encode(crop(320, 240), [1, 4], 80).data
    (folder / "two.cmps").write_bytes(data)
    (folder / "page.html").write_text(PAGE)
    with engine(tmp_path / "profile") as driver:
        driver.get(f"{address}/page.html")
        shown(driver, "!!navigator.serviceWorker.controller")
        assert pixels_of(driver, "two.cmps?w=80").shape == (60, 80, 3)
        end = container.read_header(data).layers[0].end
        assert (
            sum(length for name, _, length in sent if name == "two.cmps") == max(container.MAX_HEADER, end) < len(data)
        )


def test_without_a_worker_pictures_have_an_error_event(site, engine, tmp_path):
    folder, address, _ = site
    (folder / "lone").mkdir(exist_ok=True)
    shutil.copy(folder / "compass.js", folder / "lone")  # without sw.js
    page = PAGE.replace('data-cmps="photo.cmps"', 'data-cmps="photo.cmps" onerror="this.title = \'failed\'"')
    (folder / "lone" / "page.html").write_text(page)
    with engine(tmp_path / "profile") as driver:
        driver.get(f"{address}/lone/page.html")
        shown(driver, "document.getElementById('grown').title == 'failed'")


# Fetches a picture, and another file again and again meanwhile: milliseconds of the one, and the longest of the others.
MEANWHILE = """
const done = arguments[1], begun = performance.now();
let over = false, longest = 0;
const picture = fetch(arguments[0]).then((r) => r.ok && r.blob()).finally(() => (over = true));
(async () => {
  while (!over) {
    const asked = performance.now();
    await (await fetch("empty.html")).text();
    longest = Math.max(longest, performance.now() - asked);
  }
  done([Boolean(await picture), performance.now() - begun, longest]);
})();
"""


def test_other_requests_do_not_wait_for_a_picture(site, engine, tmp_path, codec):
    folder, address, _ = site
    (folder / "small.cmps").write_bytes(codec.encode(crop(32, 32), [1], 60).data)
    (folder / "large.cmps").write_bytes(codec.encode(crop(512, 600), [1], 60).data)
    (folder / "page.html").write_text(PAGE)
    with engine(tmp_path / "profile") as driver:
        driver.get(f"{address}/page.html")
        shown(driver, "!!navigator.serviceWorker.controller")
        assert pixels_of(driver, "small.cmps?layer=0").shape == (32, 32, 3)  # weights are there
        driver.set_script_timeout(200)
        arrived, total, longest = driver.execute_async_script(MEANWHILE, "large.cmps?layer=0")
        assert arrived and longest < total / 2, (longest, total)


@pytest.fixture
def webgpu(tmp_path, site) -> Iterator[Any]:
    """A driver of Chromium at the empty page, with a software adapter for WebGPU."""
    with browser(tmp_path / "profile", webgpu=True) as driver:
        driver.set_script_timeout(300)
        driver.get(f"{site[1]}/empty.html")
        ask = "const done = arguments[0]; (async () => Boolean(await navigator.gpu?.requestAdapter()))().then(done)"
        if not driver.execute_async_script(ask):
            pytest.skip("Chromium has no software adapter for WebGPU")
        yield driver


# Whether Gpu.load gives a device: as it is, and after `before`. It stays as window.gpu, for layers of all sizes.
LOAD = """
const done = arguments[1];
(async () => {
  const { Gpu } = await import("./gpu.js");
  eval?.(arguments[0]);
  window.gpu = await Gpu.load();
  if (gpu) gpu.least = 0;
  done(Boolean(gpu));
})().catch((error) => done(String(error.stack)));
"""
# The decoder refuses software adapters, and it is to take this one.
PRETEND = 'Object.defineProperty(GPUAdapterInfo.prototype, "isFallbackAdapter", { get: () => false });'


def test_golden_files_by_webgpu(site, webgpu):
    folder, _, _ = site
    assert webgpu.execute_async_script(LOAD, PRETEND) is True
    for name in ("coarse", "dot", "portrait"):
        for layer in decoded_in_page(webgpu, folder, name):
            assert layer["kept"] and (layer["submitted"] > 0) == (name != "dot"), name  # dot's layers are of one colour
    webgpu.execute_script("window.most = gpu.most; gpu.most = 100000")  # bytes
    for layer in decoded_in_page(webgpu, folder, "fine"):
        assert layer["kept"] and not layer["submitted"], "too large a layer is WebAssembly's, and the GPU is kept"
    webgpu.execute_script("gpu.most = most")
    lost = decoded_in_page(webgpu, folder, "portrait", lose=True)
    assert [(layer["submitted"] > 0, layer["kept"]) for layer in lost] == [
        (True, False),
        (False, False),
        (False, False),
    ]


# Whether the decoder takes window.gpu, as it is and with one of its shaders in the place of another.
ACCEPT = """
const done = arguments[1];
(async () => {
  const { Decoder } = await import("./lean.js"), bytes = async (name) => (await fetch(name)).arrayBuffer(), found = [];
  const decoder = await Decoder.load(await bytes("kernels.wasm"), await bytes(arguments[0])), { pipelines } = gpu;
  for (const wrong of [{}, { gated: pipelines.rectified }, { added: pipelines.multiply }]) {
    [gpu.pipelines, decoder.gpu] = [{ ...pipelines, ...wrong }, null];
    const steps = decoder.accept(gpu);
    for (let sent; ; ) {
      const { done, value } = steps.next(sent);
      if (done) break;
      sent = await value;
    }
    found.push(Boolean(decoder.gpu));
  }
  done(found);
})().catch((error) => done(String(error.stack)));
"""


def test_a_device_that_computes_other_pixels_is_not_taken(webgpu):
    assert webgpu.execute_async_script(LOAD, PRETEND) is True
    assert webgpu.execute_async_script(ACCEPT, weights_address()) == [True, False, False]


def test_without_a_device_there_is_no_webgpu(site, webgpu):
    reasons = (
        "",  # a software adapter
        "navigator.gpu.requestAdapter = async () => null",
        "GPUAdapter.prototype.requestDevice = async () => { throw new Error('no device') }",
        "const make = GPUDevice.prototype.createShaderModule; GPUDevice.prototype.createShaderModule ="
        " function ({ code }) { return make.call(this, { code: `${code} fn` }); }",
    )
    for reason in reasons:
        webgpu.get(f"{site[1]}/empty.html")
        assert webgpu.execute_async_script(LOAD, (PRETEND if reason else "") + reason) is False, reason


# Before sw.js in a worker: counts what is submitted, and loses devices when asked.
COUNTED = """
let count = 0, devices = [];
const { submit } = GPUQueue.prototype, { requestDevice } = GPUAdapter.prototype;
GPUQueue.prototype.submit = function (work) { count++; return submit.call(this, work); };
GPUAdapter.prototype.requestDevice = async function (wanted) {
  const device = await requestDevice.call(this, wanted);
  devices.push(device);
  return device;
};
self.addEventListener("fetch", (event) => {
  if (event.request.url.endsWith("/lose")) for (const device of devices) device.destroy();
  if (/\\/(lose|count)$/.test(event.request.url)) event.respondWith(new Response(`${count}`));
});
"""


def test_webgpu_in_the_worker(site, webgpu, codec):
    folder, address, _ = site
    inner = folder / "webgpu"
    shutil.copytree(folder, inner, ignore=shutil.ignore_patterns("*.cmps", inner.name))
    (inner / "sw.js").rename(inner / "worker.js")
    (inner / "counted.js").write_text(PRETEND + COUNTED)
    (inner / "sw.js").write_text('import "./counted.js"; import "./worker.js";')
    script = (inner / "gpu.js").read_text()
    (inner / "gpu.js").write_text(re.sub(r"(const LEAST =) 2 \*\* 16;", r"\1 1000;", script))
    (inner / "page.html").write_text(PAGE)
    data = codec.encode(crop(48, 40), [1, 2], 60).data
    webgpu.get(f"{address}/webgpu/page.html")
    shown(webgpu, "!!navigator.serviceWorker.controller")

    def submitted(layer: int, name: str) -> int:
        """How often the GPU was given work for a layer, whose pixels are checked."""
        (inner / name).write_bytes(data)
        before = int(answer(webgpu, "count")[1])
        mine = pixels_of(webgpu, f"{name}?layer={layer}").astype(int)
        difference = np.abs(mine - np.asarray(codec.decode(data, layer)))
        assert difference.max() <= 1 and (difference == 0).mean() >= 0.995
        return int(answer(webgpu, "count")[1]) - before

    names = (f"{k}.cmps" for k in range(100))
    WebDriverWait(webgpu, 100, 1).until(
        lambda _: submitted(1, next(names))
    )  # WebAssembly serves until the device is ready
    submitted(1, "again.cmps")  # behind which all of the trial is done
    assert submitted(0, "small.cmps") == 0
    assert submitted(1, "large.cmps") > 0
    answer(webgpu, "lose")
    assert submitted(1, "lost.cmps") > 0  # the attempt
    assert submitted(1, "later.cmps") == 0


def test_the_first_request_holds_any_header():
    assert f"HEADER_READ = {container.MAX_HEADER};" in web.script("container.js").decode()


def test_only_lean_has_weights_for_browsers(tmp_path):
    with pytest.raises(WeightsError, match="mean_scale"):
        web.weights_of(weights.choose(None, "paper"))
    result = compass("web-assets", tmp_path / "out", "--model", "paper")
    assert result.code == 1 and len(result.err.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_weights_for_browsers_are_small():
    assert len(web.weights_of(weights.choose(None, "lean"))) < 8 * 2**20


def test_the_module_is_made_of_its_source(tmp_path):
    npx = shutil.which("npx")
    if npx is None:
        pytest.skip("npx is not installed")
    source = Path(web.__file__).parent
    recipe = (Path(__file__).parents[1] / "Makefile").read_text().partition("\nwasm:")[2].partition("\n\n")[0]
    command = recipe.partition("&& ")[2].replace("\\\n", " ").split()
    made = tmp_path / "kernels.wasm"
    command = [
        str(source / word) if word == "kernels.ts" else str(made) if word == "kernels.wasm" else word
        for word in command
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    if result.returncode:
        pytest.skip(f"AssemblyScript cannot be had: {result.stderr.splitlines()[-1:]}")
    assert made.read_bytes() == web.script("kernels.wasm")
