"""compass bench: its arithmetic on figures whose answer is known, the peers, and a whole run on a tiny picture."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from browser import browser, complaints, loaded
from conftest import KODAK, compass, crop
from PIL import Image

from compass_codec import container
from compass_codec.measure import bench, cost, methods, page, peers, report, runner
from compass_codec.measure.bd_rate import bd_psnr
from compass_codec.measure.page import _nearest
from compass_codec.measure.peers import PEERS, Gap
from compass_codec.measure.protocol import FULL, OURS, Curve, layers_of, other_set
from compass_codec.measure.runner import Cache, Runner
from compass_codec.measure.tables import (
    TESTED,
    Column,
    Points,
    Published,
    Results,
    compare,
    single_column,
)
from compass_codec.measure.task import Original, Settings, Task
from compass_codec.metrics import METRICS, Metric, psnr
from compass_codec.weights import CARD, PATH, choose

# peers, and the first file of their weights
COMPRESSAI = {
    "mbt2018-mean": "mbt2018-mean-1-e522738d.pth.tar",
    "cheng2020-anchor": "cheng2020-anchor-1-dad2ebff.pth.tar",
    "bmshj2018-factorized": "bmshj2018-factorized-prior-1-446d5c7f.pth.tar",
}
RATE = [0.12, 0.3, 0.66, 1.23]
PSNR = [27.7, 31.1, 34.9, 38.8]


def points(rate: np.ndarray, psnr: np.ndarray, scales=(4.0,), **more: np.ndarray) -> Points:
    """``rate`` in bpp, ``psnr`` and ``more`` metrics, [settings, pictures], of a single layer of 1000 pixels."""
    pixels = np.full((rate.shape[1], 1), 1000.0)
    values = {"psnr": psnr[:, :, None], **{name: value[:, :, None] for name, value in more.items()}}
    return Points(tuple(range(len(rate))), scales, rate[:, :, None] * pixels, values, pixels)


class TestFigures:
    def test_bd_psnr_of_a_shifted_curve(self):
        assert bd_psnr(RATE, PSNR, RATE, [p + 0.7 for p in PSNR]) == pytest.approx(0.7)
        assert bd_psnr(RATE, PSNR, RATE, PSNR) == pytest.approx(0)

    def test_bd_psnr_needs_more_bits_for_more_psnr(self):
        with pytest.raises(ValueError, match="more bits"):
            bd_psnr(RATE, PSNR, [0.3, 0.12, 0.66, 1.23], PSNR)

    def test_the_interval_holds_what_differs_between_pictures(self):
        """Pictures that need 10 % and 30 % fewer bits: the mean lies between, the interval reaches to both."""
        log_rate = np.log(RATE)[:, None] + np.zeros(2)
        anchor = points(np.exp(log_rate), np.array(PSNR)[:, None] + np.zeros(2))
        tested = points(np.exp(log_rate) * [0.9, 0.7], np.array(PSNR)[:, None] + np.zeros(2))
        found = compare(tested, anchor)
        assert found.bd_rate == pytest.approx(-20) and found.interval == pytest.approx((-30, -10))
        assert (found.low, found.high) == (PSNR[0], PSNR[-1]) and found.by == {}
        assert compare(tested, anchor.curve()).interval is None

    def test_what_has_no_psnr_in_common_is_a_gap(self):
        ours, far = np.array(PSNR)[:, None], np.array(PSNR)[:, None] + 30
        column = Column((4.0,))
        column.add(TESTED, partial(points, np.array(RATE)[:, None], ours))
        column.add("far", partial(points, np.array(RATE)[:, None], far))
        assert "no PSNR in common" in column.gaps["far"] and "far" not in column.against

    def test_simulcast_adds_up_and_keeps_each_layers_psnr(self, tmp_path):
        Image.new("RGB", (64, 32)).save(tmp_path / "a.png")
        source = Original.of(tmp_path / "a.png")
        records = {
            Task(source, OURS, (s,), q): {"layers": [{"bytes": int(10 * s), "psnr": 30 + s + q, "ms-ssim": None}]}
            for s in (1.0, 2.0, 4.0)
            for q in (1, 2)
        }
        found = Results([source], (1, 2), records).simulcast(OURS, (1.0, 2.0, 4.0))
        assert found.bits[0, 0].tolist() == [80, 240, 560] and found.values["psnr"][1, 0].tolist() == [33, 34, 36]
        assert found.own_bits()[0].tolist() == [80, 160, 320]
        assert found.curve().bpp == [560 / (64 * 32)] * 2

    def test_lower_is_better_of_butteraugli(self):
        """Twice the bits for the same distances is 100 %, whichever way the metric goes; and fewer bits for a shorter
        distance are fewer."""
        rate, psnr = np.array(RATE)[:, None], np.array(PSNR)[:, None]
        distance, similar = np.array([3.1, 1.6, 0.9, 0.4])[:, None], np.array([0.9, 0.95, 0.98, 0.993])[:, None]
        anchor = points(rate, psnr, **{"butteraugli": distance, "ms-ssim": similar})
        tested = points(2 * rate, psnr, **{"butteraugli": distance, "ms-ssim": similar})
        found = compare(tested, anchor).by
        assert [found[name].percent for name in ("butteraugli", "ms-ssim")] == pytest.approx([100, 100])
        assert (found["butteraugli"].low, found["butteraugli"].high) == pytest.approx((3.1, 0.4))
        assert (found["ms-ssim"].low, found["ms-ssim"].high) == pytest.approx((0.9, 0.993))
        better = points(rate, psnr, **{"butteraugli": 0.8 * distance, "ms-ssim": similar})
        found = compare(better, anchor).by
        assert found["butteraugli"].percent < -10 and found["ms-ssim"].percent == pytest.approx(0)
        assert found["butteraugli"].low == pytest.approx(0.8 * 3.1), "from worse to better"

    def test_a_metric_without_its_program_is_left_out_and_said(self, monkeypatch, tmp_path, capsys):
        monkeypatch.setenv("PATH", str(tmp_path))
        found, missing = bench._available(("psnr", "ssimulacra2"))
        assert found == ("psnr",) and "no ssimulacra2 on the PATH" in missing["SSIMULACRA 2"]
        assert "libjxl" in capsys.readouterr().err


def test_crops_are_where_they_are_asked_for(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (640, 480)).save(tmp_path / name)
    results = Results([Original.of(tmp_path / name) for name in ("a.png", "b.png")], (1, 2, 3, 4), {})
    names = [("b.png", (0.5, 0.5)), ("b.png", (1.0, 0.0)), ("a.png", None)]
    found = page.shown(results, (FULL,), names)
    assert [(source.path.name, *box) for source, box in found] == [
        ("b.png", 216, 136, 208, 208),
        ("b.png", 432, 0, 208, 208),
        ("a.png", 216, 136, 208, 208),
    ]
    assert [source.path.name for source, _ in page.shown(results, (FULL,))] == ["a.png", "b.png"]


class TestCurves:
    def test_both_formats(self, tmp_path):
        single, layered = tmp_path / "single.json", tmp_path / "shvc_kodak_rd.json"
        single.write_text(json.dumps({"curves": {"mine": {"bpp": RATE, "psnr_rgb": PSNR}}}))
        rows = [{"acc_bpp_final_layer": r, "psnr_rgb_per_layer": [20, p]} for r, p in zip(RATE, PSNR, strict=True)]
        layered.write_text(json.dumps({"1.0x2.0": rows}))
        found = Published()
        found.read(single)
        found.read(layered)
        assert found.single == {"mine": Curve(RATE, PSNR)}
        assert found.layered == {"SHVC": {(1.0, 2.0): Curve(RATE, PSNR)}}

    @pytest.mark.parametrize("text", ["", "[]", '{"source": "x"}', '{"curves": {"a": {}}}', '{"1x2": [{}]}'])
    def test_others_are_refused_by_name(self, tmp_path, text):
        (tmp_path / "odd.json").write_text(text)
        with pytest.raises(ValueError, match=r"odd\.json"):
            Published().read(tmp_path / "odd.json")


@pytest.fixture
def picture() -> np.ndarray:
    return np.asarray(crop(96, 64))


class TestPeers:
    @pytest.mark.parametrize("name", [name for name in PEERS if name not in COMPRESSAI])
    def test_more_bytes_look_better(self, name, picture):
        peer = PEERS[name]
        try:
            peer.load()
        except Gap as e:
            pytest.skip(str(e))
        few, many = (peer.encode(picture, peer.settings[i]) for i in (1, -1))
        assert len(few) < len(many)
        errors = [np.abs(peer.decode(data).astype(float) - picture).mean() for data in (few, many)]
        assert errors[1] < errors[0] and peer.decode(many).shape == picture.shape

    def test_a_missing_plugin_is_a_gap_that_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pillow_jxl", None)
        with pytest.raises(Gap, match="pillow-jxl-plugin"):
            PEERS["jxl"].load()

    def test_resolutions_of_jpeg_2000(self):
        layers = layers_of(crop(192, 128), (1.0, 2.0, 4.0))
        found = peers.resolutions(layers, 12)
        ends = [end for end, _ in found]
        assert ends == sorted(ends) and ends[0] < 0.5 * ends[2]
        assert [p.shape for _, p in found] == [layer.shape for layer in layers]
        assert ends[2] == pytest.approx(len(PEERS[peers.J2K].encode(layers[2], 12)), rel=0.02)

    def test_no_resolution_between_powers_of_two(self):
        with pytest.raises(Gap, match="halves"):
            peers.resolutions(layers_of(crop(192, 128), (1.0, 2.0, 3.2)), 12)

    def test_the_setting_nearest_to_so_many_bytes(self, picture, tmp_path):
        Image.fromarray(picture).save(tmp_path / "a.png")
        job = Task(Original.of(tmp_path / "a.png"), "jpeg", (FULL,), box=(0, 0, 8, 8), target=2000)
        total, _ = _nearest(job, [picture])
        sizes = [len(PEERS["jpeg"].encode(picture, q)) for q in PEERS["jpeg"].grid]
        assert abs(total - 2000) == min(abs(size - 2000) for size in sizes)

    @pytest.mark.parametrize("name", COMPRESSAI)
    def test_real_files_of_compressai(self, name, tmp_path, monkeypatch):
        """With the network as it starts, from torch.hub's folder: a file gives what the network itself gives."""
        image_models = pytest.importorskip("compressai.zoo").image_models
        peer, picture = PEERS[name], np.asarray(crop(70, 50))
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        monkeypatch.setattr(peers, "_network", peers._network.__wrapped__)
        torch.manual_seed(0)
        network = image_models[name](1).eval()
        network.update()
        file = Path(torch.hub.get_dir(), "checkpoints", COMPRESSAI[name])
        file.parent.mkdir(parents=True)
        torch.save(network.state_dict(), file)
        data = peer.encode(picture, 1)
        decoded = peer.decode(data)
        assert decoded.shape == picture.shape and peer.decode(data).tobytes() == decoded.tobytes()
        x = torch.from_numpy(np.pad(picture, ((0, 14), (0, 58), (0, 0)), "edge")).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            seen = (255 * network(x)["x_hat"][0, :, :50, :70].clamp(0, 1)).permute(1, 2, 0).numpy()
        # its forward pass rounds latents around zero where its context model is, its coder around their means
        assert np.abs(decoded - seen).max() <= (5 if name == "cheng2020-anchor" else 1)
        file.write_bytes(b"no weights")
        with pytest.raises(Gap, match=COMPRESSAI[name]):
            peer.encode(picture, 1)

    def test_without_weights_of_compressai_the_table_says_why(self, tmp_path, monkeypatch):
        def refused(*args, **kwargs):
            raise URLError("no network")

        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        monkeypatch.setattr(torch.hub, "urlopen", refused)
        ours = runner.Runner(Settings(tmp_path / "measured.jsonl"))
        assert ours.identities(COMPRESSAI) == {} and all("no network" in ours.gaps[name] for name in COMPRESSAI)
        monkeypatch.setitem(sys.modules, "compressai.zoo.image", None)
        assert ours.identities(COMPRESSAI) == {} and all("pip install" in ours.gaps[name] for name in COMPRESSAI)

    @pytest.mark.weights
    def test_the_pretrained_networks_of_compressai(self):
        """Where they can be fetched, better ones take more bytes; elsewhere the reason is one line."""
        for name in COMPRESSAI:
            try:
                PEERS[name].load()
            except Gap as e:
                assert "\n" not in str(e) and "to be fetched" in str(e) and str(Path.home()) not in str(e)
                continue
            picture = np.asarray(crop(128, 128))
            few, many = (PEERS[name].encode(picture, quality) for quality in (1, 6))
            assert len(few) < len(many)
            assert 25 < psnr(picture, PEERS[name].decode(few)) < psnr(picture, PEERS[name].decode(many))

    @pytest.mark.skipif(not KODAK.is_dir(), reason="the Kodak pictures are not here")
    def test_webp_gives_what_was_published(self):
        """CompressAI's curve of WebP has this point at quality 10, over the 24 Kodak pictures."""
        found = []
        for file in sorted(KODAK.glob("*.png")):
            (layer,) = layers_of(Image.open(file), (FULL,))
            data = PEERS["webp"].encode(layer, 10)
            found.append((8 * len(data) / layer[:, :, 0].size, psnr(layer, PEERS["webp"].decode(data))))
        bpp, decibels = np.mean(found, axis=0)
        assert bpp == pytest.approx(0.29634, rel=0.02) and decibels == pytest.approx(29.1512, abs=0.1)


SCALES = (1.0, 2.0, 3.2)


@pytest.fixture(scope="module")
def layers() -> list[np.ndarray]:
    return layers_of(crop(90, 62), SCALES)


@pytest.fixture(scope="module")
def whole(layers):
    return methods.code(OURS, layers, SCALES, 60, None, "cpu")


class TestOurs:
    def test_the_codec_itself(self, codec, layers, whole):
        encoded = codec.encode_layers(layers, SCALES, 60)
        assert [end for end, _ in whole] == [e.end for e in container.read_header(encoded.data).layers]
        assert all(np.array_equal(a, b) for (_, a), b in zip(whole, encoded.layers, strict=True))

    def test_a_prediction_is_made_once(self, layers, whole, monkeypatch):
        from compass_codec.codec import Codec

        predict, made = Codec.predict, []

        def counted(self, below, size):
            made.append(size)
            return predict(self, below, size)

        monkeypatch.setattr(Codec, "predict", counted)
        again = methods.code(OURS, layers, SCALES, 60, None, "cpu")
        assert all(a == b and np.array_equal(p, q) for (a, p), (b, q) in zip(again, whole, strict=True))
        assert set(made) == {layers[0].shape[:2]}  # the base layer's grey alone

    def test_upper_layers_by_another_set(self, codec, layers, whole, monkeypatch):
        """With the same set twice it is the codec itself; with another, the first two layers stay."""
        settings = ((1.0, 1.5, 2.0), 60, None, "cpu")
        twice = methods.code(other_set("lean+lean"), layers, *settings)
        assert [end for end, _ in twice] == [end for end, _ in whole]
        assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(twice, whole, strict=True))
        mixed = methods.code(other_set("lean+visual"), layers, *settings)
        assert [end for end, _ in mixed[:2]] == [end for end, _ in whole[:2]] and mixed[2][0] != whole[2][0]
        data, reconstruct = methods.codec(other_set("visual"), None, "cpu").encode_layer(layers[2], whole[1][1], 60)
        assert len(data) == mixed[2][0] - mixed[1][0] and np.array_equal(reconstruct(), mixed[2][1])


def die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class TestRunner:
    @pytest.fixture
    def source(self, tmp_path) -> Original:
        crop(64, 48).save(tmp_path / "a.png")
        return Original.of(tmp_path / "a.png")

    def test_what_was_measured_is_not_measured_again(self, source, tmp_path, monkeypatch):
        cache = tmp_path / "measured.jsonl"
        job = Task(source, "webp", (FULL,), 50)
        first = Runner(Settings(cache))
        first.run([job], lambda seconds: None)
        assert len(cache.read_text().splitlines()) == 1
        cache.write_text(cache.read_text() + '{"key": "cut off in the mid')
        (source.path.parent / "b.png").write_bytes(source.path.read_bytes())  # the same samples under another name
        again = Task(Original.of(source.path.parent / "b.png"), "webp", (FULL,), 50)
        second = Runner(Settings(cache))
        monkeypatch.setattr(runner, "ProcessPoolExecutor", None)
        second.run([again], lambda seconds: None)
        assert second.records[again] == first.records[job]

    def test_the_key_holds_what_decides_the_result(self, source):
        job = Task(source, OURS, (1.0, 2.0), 60)
        others = [
            Task(source, OURS, (1.0, 2.4), 60),
            Task(source, OURS, (1.0, 2.0), 61),
            Task(source, other_set("visual"), (1.0, 2.0), 60),
        ]
        assert len({j.key("x") for j in [job, *others]} | {job.key("y")}) == 5

    def test_a_failing_codec_is_a_record_that_says_why_and_is_tried_again(self, source, tmp_path, monkeypatch):
        def fail(*_):
            raise OSError("no more bits")

        monkeypatch.setattr(methods, "code", fail)
        settings = Settings(tmp_path / "measured.jsonl")
        done = runner.work([("k", Task(source, "webp", (FULL,), 50))], settings)
        assert done == [("k", {"gap": "OSError: no more bits"})]
        assert not Cache(settings.cache).records

    def test_a_codec_that_kills_its_process_is_a_gap(self, source, tmp_path, monkeypatch):
        monkeypatch.setattr(runner, "work", die)
        jobs = [Task(source, "webp", (FULL,), 50)]
        found = Runner(Settings(tmp_path / "measured.jsonl"))
        found.run(jobs, lambda seconds: None)
        assert "killed" in found.records[jobs[0]]["gap"]

    def test_a_run_measures_what_it_is_asked_for(self, source, tmp_path, monkeypatch):
        monkeypatch.setitem(METRICS, "butteraugli", Metric("B", lambda a, b: float(a.size), lambda value: -value))
        settings = Settings(tmp_path / "measured.jsonl", metrics=("psnr", "butteraugli"))
        job = Task(source, "webp", (FULL,), 50)
        (layer,) = runner.measure(job, settings)["layers"]
        assert layer.keys() == {"bytes", "psnr", "butteraugli"} and layer["butteraugli"] == 64 * 48 * 3
        assert runner.identity("webp", settings) != runner.identity("webp", Settings(settings.cache))

    def test_another_set_of_weights_is_a_row_of_its_own(self, source, tmp_path):
        """Its crops on the page are at the bytes asked for."""
        method, settings = other_set("lean"), Settings(tmp_path / "measured.jsonl")
        assert runner.identity(method, settings) == runner.identity(OURS, settings), "what it would be by default"
        job = Task(source, method, (FULL,), box=(0, 0, 8, 8), target=400)
        found = runner.measure(job, settings)
        assert 0.9 * 400 < found["bytes"] <= 400 and found["crop"].startswith("data:image/webp")
        record = {"layers": [{"bytes": 9, "psnr": 30.0}]}
        results = Results([source], (1, 2, 3, 4), {})
        every = [*results.jobs(OURS, (FULL,)), *results.jobs(method, (FULL,))]
        results.records = {each: {"layers": [record["layers"][0] | {"psnr": 30 + each.setting}]} for each in every}
        column = single_column(results, [], Published(), ["lean"])
        assert list(column.rows) == [TESTED, "COMPASS with lean"] and column.against["COMPASS with lean"].bd_rate == 0

    def test_the_modules_that_decide_the_bytes(self):
        """A new module of the codec must be named in runner.CODEC, or old measurements would stay valid."""
        code = "import sys; from compass_codec import codec, weights\n"
        code += "for found in weights.sets(): codec.shared('cpu', model=found.profile)\nprint(*sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        found = {name.split(".")[1] for name in done.stdout.split() if name.startswith("compass_codec.")}
        assert found - {"errors", "files", "models"} == {pattern.split("/")[0] for pattern in runner.CODEC}


def test_cost_of_a_peer(tmp_path):
    crop(96, 64).save(tmp_path / "a.png")
    found = cost.cost("webp", tmp_path / "a.png", (1.0, 2.0), 50, None, "cpu")
    assert 0 < found.encode_seconds < 5 and 0 < found.decode_seconds < 5
    assert 10 < found.decode_mb < 500 and 10 < found.encode_mb < 500
    with pytest.raises(Gap, match="encode: "):
        cost.cost("webp", tmp_path / "none.png", (1.0, 2.0), 50, None, "cpu")


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    (folder / "in").mkdir()
    crop(96, 64).save(folder / "in" / "a.png")
    curves = folder / "shvc_kodak_rd.json"
    rows = [{"acc_bpp_final_layer": r, "psnr_rgb_per_layer": [p]} for r, p in zip(RATE, PSNR, strict=True)]
    curves.write_text(json.dumps({"1.0x2.0": rows}))
    arguments = ["--images", folder / "in", "--out", folder / "out", "--tables", "two", "--two", "2", "--jobs", 1]
    result = compass("bench", *arguments, "--peers", "webp,jpeg2000", "--curves", curves, "--device", "cpu")
    assert result.code == 0, result.err
    assert result.out.startswith("# Results")
    return folder / "out"


class TestCommand:
    def test_json(self, out):
        found = json.loads((out / "results.json").read_text())
        (column,) = found["two"]
        rows = column["rows"]
        assert {TESTED, "simulcast, own base codec", "single layer, own base codec", "simulcast WebP"} <= rows.keys()
        assert [len(v) for v in rows[TESTED]["psnr"]] == [4, 4]
        assert rows[TESTED]["accumulated_bpp"][1] == sorted(rows[TESTED]["accumulated_bpp"][1])
        assert "24 Kodak pictures" in column["gaps"]["SHVC"]
        against = column["compass_against"]["simulcast, own base codec"]
        assert against["low"] < against["high"] and -60 < against["bd_rate"] < 30
        assert found["cost"][TESTED]["decode_mb"] > found["cost"]["simulcast WebP"]["decode_mb"]

    def test_markdown(self, out):
        text = (out / "results.md").read_text()
        assert "| *the paper: Simulcast (Mean-scale)* | -16.3 % |" in text
        assert "## Where COMPASS loses" in text and "Not the 24 Kodak pictures" in text
        single = json.loads((out / "results.json").read_text())["two"][0]["compass_against"][
            "single layer, own base codec"
        ]
        lost = f"- 1x, 2x: single layer, own base codec, {single['bd_rate']:+.1f} %"
        assert (lost in text) == (single["bd_rate"] > 0)

    def test_a_set_without_a_base_codec_of_its_own_has_no_rows_for_it(self, out, tmp_path, monkeypatch):
        folder = tmp_path / "twin"
        shutil.copytree(choose(model="lean").folder, folder)
        card = json.loads((folder / CARD).read_text())
        (folder / CARD).write_text(json.dumps(card | {"profile": "twin"}))
        monkeypatch.setenv(PATH, str(tmp_path))
        arguments = ["--images", out.parent / "in", "--out", tmp_path / "out", "--tables", "two,single", "--two", "2"]
        arguments += ["--jobs", 1, "--peers", "", "--metrics", "psnr", "--device", "cpu", "--no-page"]
        result = compass("bench", *arguments, "--model", "lean", "--model", "twin")
        assert result.code == 0, result.err
        found = json.loads((tmp_path / "out" / "results.json").read_text())
        assert list(found["two"][0]["rows"])[3:] == ["COMPASS with twin"]
        assert list(found["single"]["rows"]) == [TESTED]
        assert bench._base_codecs(None, ["twin", "visual", "visual+twin", "paper"]) == ["visual", "paper"]
        assert found["two"][0]["compass_against"]["COMPASS with twin"]["bd_rate"] == 0
        assert found["cost"]["COMPASS with twin"]["decode_seconds"] > 0
        assert not (tmp_path / "out" / "compare.html").exists() and "compare.html" not in result.err

    def test_plots(self, out):
        for name in ("rd.png", "bits.png"):
            with Image.open(out / name) as image:
                assert image.width > 400 and len(image.convert("RGB").resize((64, 64)).getcolors(4096) or []) > 20

    def test_page(self, out, tmp_path):
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys

        with browser(tmp_path) as driver:
            driver.get((out / "compare.html").as_uri() + "#rate=1")
            widths = loaded(driver)
            assert len(widths) == 2 + 4 and set(widths) == {48}  # the stage; original, ours, WebP and JPEG 2000
            first = driver.find_element(By.ID, "ours").get_attribute("src")
            driver.find_element(By.ID, "rate").send_keys(Keys.ARROW_RIGHT)
            assert driver.find_element(By.ID, "ours").get_attribute("src") != first
            driver.find_element(By.ID, "wipe").send_keys(Keys.HOME)
            assert "100%" in driver.find_element(By.ID, "ours").get_attribute("style")
            driver.find_elements(By.CSS_SELECTOR, "figure button")[0].click()
            assert driver.find_element(By.ID, "name").text == "original"
            assert not complaints(driver)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--tables", "four"], "'four' is none of two, three, single"),
            (["--qualities", "1,50,100"], "at least 4 qualities"),
            (["--peers", "gif"], "'gif'"),
            (["--crop", "a.png:1.5,0"], "X and Y go from 0 to 1"),
            (["--crop", "a.png:left"], "not NAME:X,Y"),
            (["--three", "1.5"], "must not get smaller"),
            (["--weights", "x", "--model", "lean"], "--weights and --model exclude each other"),
        ],
    )
    def test_wrong_usage(self, tmp_path, arguments, words):
        result = compass("bench", "--images", tmp_path, "--out", tmp_path / "out", *arguments)
        assert result.code == 2 and words in result.err and result.err.count("\n") == 1

    def test_equal_pictures_are_measured_once_and_shown_twice(self, tmp_path):
        (tmp_path / "in").mkdir()
        for name in "ab":
            crop(48, 32).save(tmp_path / "in" / f"{name}.png")
        arguments = ["--images", tmp_path / "in", "--out", tmp_path / "out", "--tables", "single", "--jobs", 1]
        result = compass("bench", *arguments, "--peers", "jpeg", "--metrics", "psnr", "--device", "cpu", "--no-page")
        assert result.code == 0, result.err
        found = [json.loads(line) for line in (tmp_path / "out" / "measured.jsonl").read_text().splitlines()]
        assert len({line["key"] for line in found}) == len(found)
        assert json.loads((tmp_path / "out" / "results.json").read_text())["pictures"] == ["a.png", "b.png"]

    def test_no_pictures(self, tmp_path):
        result = compass("bench", "--images", tmp_path / "kodak", "--out", tmp_path / "out")
        assert result.code == 1 and "r0k.us/graphics/kodak" in result.err and result.err.count("\n") == 1


def test_ratios():
    assert report._ratio(1.5) == "1.5" and report._ratio(0.004) == "1/250"
