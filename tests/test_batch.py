"""Many files at once, and sizes in place of scale factors."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import compass, crop
from PIL import Image

from compass_codec import container, pictures
from compass_codec.errors import OptionError
from compass_codec.jobs import batch
from compass_codec.jobs.job import EncodeOptions
from compass_codec.jobs.plan import plan_layers
from compass_codec.jobs.report import LayerReport


@pytest.fixture
def album(tmp_path) -> Path:
    """photos/a.png and photos/far/b.jpg, and beside them what is no picture or hidden."""
    album = tmp_path / "photos"
    (album / "far").mkdir(parents=True)
    crop(24, 16).save(album / "a.png")
    crop(20, 20).save(album / "far" / "b.jpg")
    (album / "notes.txt").write_text("no picture")
    (album / ".hidden.png").write_text("no picture either")
    return album


@pytest.mark.parametrize(("memory", "workers"), [(80, 8), (9, 2), (2, 1)])
def test_processes_share_a_gpu_that_has_room(monkeypatch, memory, workers):
    import torch

    found = SimpleNamespace(total_memory=memory << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert batch._default_workers("cuda", "auto") == workers
    assert batch._default_workers("cpu", "auto") == 16


def encode(*args: object):
    return compass("encode", *args, "--device", "cpu", "--scales", "1,2")


def layers(path: Path) -> list[tuple[int, int]]:
    return [(e.width, e.height) for e in container.read_header(path.read_bytes()).layers]


def test_a_folder_keeps_its_shape_there_and_back(album, tmp_path):
    result = encode(album, "--out-dir", tmp_path / "new" / "out", "-j", 1)
    assert result.code == 0, result.err
    out = tmp_path / "new" / "out"
    assert sorted(p.relative_to(out) for p in out.rglob("*.*")) == [Path("a.cmps"), Path("far/b.cmps")]
    assert result.out.splitlines()[-1].startswith("2 encoded; ")
    back = compass("decode", out, "--out-dir", tmp_path / "back", "--layer", 0, "--format", "jpg", "-j", 1)
    assert back.code == 0, back.err
    assert Image.open(tmp_path / "back" / "a.layer0.jpg").size == (12, 8)
    assert Image.open(tmp_path / "back" / "far" / "b.layer0.jpg").format == "JPEG"


def test_the_bytes_do_not_depend_on_the_number_of_processes(album, tmp_path):
    for count in (1, 2):
        assert encode(album, "--out-dir", tmp_path / str(count), "-j", count, "--precision", "float32").code == 0
    for name in ("a.cmps", "far/b.cmps"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_several_files_without_a_folder_lie_beside_their_sources(album):
    assert encode(album / "a.png", album / "far" / "b.jpg", "-j", 1).code == 0
    assert (album / "a.cmps").exists() and (album / "far" / "b.cmps").exists()


def test_a_bad_file_does_not_stop_the_others(album, tmp_path):
    (album / "bad.jpg").write_bytes(b"no picture")
    result = encode(album, album / "missing.png", "--out-dir", tmp_path / "out", "-j", 1)
    assert result.code == 1
    errors = result.err.splitlines()
    assert [Path(line.split(": ")[1]).name for line in errors] == ["bad.jpg", "missing.png"]
    assert result.out.splitlines()[-1].startswith("2 encoded, 2 failed; ")
    assert not list((tmp_path / "out").rglob("bad*"))


def test_what_is_up_to_date_is_left_alone(album, tmp_path):
    out = tmp_path / "out"
    args = (album, "--out-dir", out, "-j", 1)
    assert encode(*args).code == 0
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.cmps")}

    def written() -> set[str]:
        return {p.name for p, t in before.items() if p.stat().st_mtime_ns != t}

    again = encode(*args)
    assert again.code == 0 and again.out.splitlines()[-1].startswith("2 up to date; 0 bytes") and not written()
    # a newer picture of the same size is encoded again, without --force
    later = time.time() + 5
    os.utime(album / "a.png", (later, later))
    assert encode(*args).code == 0 and written() == {"a.cmps"}
    # other options need it
    other = encode(*args, "-q", "30")
    assert other.code == 1 and other.err.count("--force overwrites it") == 2 and written() == {"a.cmps"}
    assert encode(*args, "-q", "30", "--force").code == 0 and written() == {"a.cmps", "b.cmps"}
    assert container.read_header((out / "a.cmps").read_bytes()).layers[0].quality == 30


@pytest.mark.parametrize(
    "change",
    [
        ["--scales", "1,3"],
        ["--scales", "1,2", "-q", "61"],
        ["--scales", "1,2", "--target-size", "200"],
        ["--widths", "12,24"],
        ["--scales", "1,2", "--strip"],
    ],
)
def test_other_options_are_noticed(tmp_path, change):
    exif = Image.Exif()
    exif[0x010E] = "a portrait"
    crop(24, 16).save(tmp_path / "a.png", exif=exif)
    args = ("encode", tmp_path / "a.png", "--out-dir", tmp_path, "--device", "cpu")
    assert compass(*args, "--scales", "1,2").code == 0
    expected = 0 if "--widths" in change else 1  # which asks for what is there already
    assert compass(*args, *change).code == expected


def test_a_met_target_is_up_to_date(tmp_path):
    crop(64, 48).save(tmp_path / "a.png")
    for target, other in (("--target-size=700", "--target-size=600"), ("--target-psnr=29", "--scales=1,3")):
        args = ("encode", tmp_path / "a.png", "--out-dir", tmp_path, "--scales=1,2")
        assert compass(*args, target, "--force").code == 0
        assert "up to date" in compass(*args, target).out
        assert compass(*args, target, other).code == 1


def test_decoding_leaves_alone_what_is_up_to_date(tmp_path, small_file):
    (tmp_path / "a.cmps").write_bytes(small_file)
    args = ("decode", tmp_path / "a.cmps", "--out-dir", tmp_path / "out", "--layer", 1, "--device", "cpu")
    assert compass(*args).code == 0
    assert "up to date" in compass(*args).out
    target = tmp_path / "out" / "a.layer1.png"
    written = target.stat().st_mtime_ns
    later = time.time() + 5
    os.utime(tmp_path / "a.cmps", (later, later))
    assert compass(*args).code == 0 and target.stat().st_mtime_ns != written
    crop(7, 5).save(target)
    result = compass(*args)
    assert result.code == 1 and "exists already" in result.err and Image.open(target).size == (7, 5)
    assert compass(*args, "--force").code == 0 and Image.open(target).size == (40, 30)


def test_skipping_and_failing_load_no_torch(album, tmp_path):
    assert encode(album, "--out-dir", tmp_path / "out", "-j", 1).code == 0
    (album / "bad.jpg").write_bytes(b"no picture")
    code = "import sys; from compass_codec.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    args = ["encode", str(album), "--scales", "1,2", "--out-dir", str(tmp_path / "out"), "-j", "1"]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == "False", done.stderr


def test_two_files_for_one_output_are_refused_before_any_work(album, tmp_path):
    crop(8, 8).save(album / "a.jpg")
    result = encode(album, "--out-dir", tmp_path / "out")
    assert result.code == 1 and len(result.err.splitlines()) == 1
    assert "a.jpg" in result.err and "a.png" in result.err and not (tmp_path / "out").exists()


def test_a_file_named_twice_is_one_job(album, tmp_path):
    options = EncodeOptions(scales=(1.0,))
    found = batch.make_jobs([album, album / "a.png"], [], tmp_path, batch.picture_suffixes, ".cmps", options)
    assert [job.source.name for job in found.jobs] == ["a.png", "b.jpg"]
    assert found.jobs[1].target == tmp_path / "far" / "b.cmps"


@pytest.mark.parametrize("end", ["\n", "\0"])
def test_names_from_standard_input(album, tmp_path, monkeypatch, end):
    monkeypatch.chdir(tmp_path)
    odd = album / "one\ntwo.png" if end == "\0" else album / "one two.png"
    shutil.copy(album / "a.png", odd)
    names = end.join(str(p.relative_to(tmp_path)) for p in (odd, album / "far" / "b.jpg")) + end
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(names.encode())))
    result = encode("--files-from", "-", "--out-dir", "out", "-j", 1)
    assert result.code == 0, result.err
    assert layers(tmp_path / "out" / "photos" / "far" / "b.cmps")[-1] == (20, 20)
    assert (tmp_path / "out" / "photos" / odd.name).with_suffix(".cmps").exists()


def test_an_empty_list_is_nothing_to_do(tmp_path):
    (tmp_path / "list").write_text("\n")
    result = encode("--files-from", tmp_path / "list", "--out-dir", tmp_path / "out")
    assert (result.code, result.err) == (0, "") and "nothing to do" in result.out


@pytest.mark.parametrize(
    ("args", "code", "word"),
    [
        (["photos", "-o", "x.cmps", "--out-dir", "out"], 2, "--out-dir"),
        (["photos"], 1, "photos"),
        (["photos/far", "photos"], 1, "--out-dir"),
        (["-", "photos/a.png", "--out-dir", "out"], 2, "standard input"),
        (["empty", "--out-dir", "out"], 1, "empty"),
        (["photos", "--out-dir", "photos/a.png"], 2, "--out-dir"),
        (["--files-from", "missing", "--out-dir", "out"], 1, "missing"),
        (["photos", "--out-dir", "out", "-j", "0"], 2, "-j"),
        (["photos", "--out-dir", "out", "--weights", "none"], 1, "none"),
        (["photos/a.png", "-o", "-", "--json"], 2, "--json"),
        ([], 2, "files"),
    ],
)
def test_wrong_usage_is_one_line_before_any_work(album, tmp_path, monkeypatch, args, code, word):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    result = encode(*args)
    assert result.code == code and result.out == "", result
    assert len(result.err.splitlines()) == 1 and word in result.err
    assert not (tmp_path / "out").exists()


def test_one_line_of_json_for_each_file(album, tmp_path):
    (album / "bad.jpg").write_bytes(b"no picture")
    result = encode(album, "--out-dir", tmp_path / "out", "-j", 1, "--json")
    facts = {Path(f["file"]).name: f for f in map(json.loads, result.out.splitlines())}
    assert result.code == 1 and set(facts) == {"a.png", "b.jpg", "bad.jpg"}
    assert facts["bad.jpg"]["state"] == "failed" and "not a picture" in facts["bad.jpg"]["error"]
    good = facts["a.png"]
    data = (tmp_path / "out" / "a.cmps").read_bytes()
    assert good["size"] == len(data) == good["layers"][-1]["end"] and good["outputs"] == [
        str(tmp_path / "out" / "a.cmps")
    ]
    assert [(e["width"], e["height"]) for e in good["layers"]] == [(12, 8), (24, 16)]
    assert good["layers"][1]["end_bpp"] == pytest.approx(8 * len(data) / (24 * 16), abs=1e-4)
    one = compass("decode", tmp_path / "out" / "a.cmps", "--all", "--json")
    assert [Path(p).name for p in json.loads(one.out)["outputs"]] == ["a.layer0.png", "a.layer1.png"]


def test_equal_pictures_are_null_in_json():
    assert LayerReport(0, 1, 1, 1, 1, 1, 1, psnr=float("inf")).facts()["psnr"] is None


def test_interrupting_leaves_nothing_half_written(tmp_path):
    """Ctrl-C reaches all processes of a terminal at once; what is done stays, and no process does."""
    (tmp_path / "in").mkdir()
    for k in range(200):
        crop(32, 24).save(tmp_path / "in" / f"{k}.png")
    args = ["encode", str(tmp_path / "in"), "--scales", "1,2", "--out-dir", str(tmp_path / "out"), "-j", "2"]
    running = subprocess.Popen(
        [sys.executable, "-m", "compass_codec", *args, "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert running.stdout and running.stdout.readline()  # the first is done
    os.killpg(running.pid, signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130 and errors.split() == ["compass:", "stopped"], errors
    files = list((tmp_path / "out").iterdir())
    assert 0 < len(files) < 200
    for path in files:
        assert path.suffix == ".cmps" and container.states(container.read_header(path.read_bytes()), path.read_bytes())
    for _ in range(50):  # a process that ended stays a moment in the list of its session
        left = subprocess.run(["ps", "-o", "stat=", "-s", str(running.pid)], capture_output=True, text=True).stdout
        if not [state for state in left.split() if not state.startswith("Z")]:
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"processes left: {left}")


def test_sizes_with_a_shape_of_their_own(tmp_path):
    crop(60, 40).save(tmp_path / "in.png")
    args = ("encode", tmp_path / "in.png", "--sizes", "40x32,16x16", "--verify", "--device", "cpu")
    assert compass(*args).code == 0
    header = container.read_header((tmp_path / "in.cmps").read_bytes())
    assert [(e.width, e.height, e.scale) for e in header.layers] == [(16, 16, 1), (40, 32, 2.5)]
    assert compass("decode", tmp_path / "in.cmps").code == 0
    assert Image.open(tmp_path / "in.layer1.png").size == (40, 32)


def test_widths_follow_the_shape_of_the_picture(tmp_path):
    crop(60, 40).save(tmp_path / "in.png")
    result = compass("encode", tmp_path / "in.png", "--widths", "30,15,480,240", "--device", "cpu")
    assert layers(tmp_path / "in.cmps") == [(15, 10), (30, 20), (60, 40)]
    note = f"note: {tmp_path / 'in.png'}: "
    assert result.err.splitlines() == [
        f"{note}240 x 160, 480 x 320: not enlarged beyond the picture's 60 x 40 without --upscale",
        f"{note}1 of 4 layers dropped, as large as another",
    ]
    assert compass("encode", tmp_path / "in.png", "--widths", "30,90", "--upscale", "--force").err == ""
    assert layers(tmp_path / "in.cmps") == [(30, 20), (90, 60)]


def test_the_last_of_equal_layers_gives_the_quality():
    plan = plan_layers((50, 10), EncodeOptions(widths=(20, 60, 90), qualities=(10.0, 20.0, 30.0)))
    assert (plan.sizes, plan.qualities, plan.scales) == ([(20, 4), (50, 10)], [10, 30], [1, 2.5])
    assert plan_layers((1000, 1), EncodeOptions(widths=(2,))).sizes == [(2, 1)]
    with pytest.raises(OptionError, match="2 qualities for 3 layers"):
        plan_layers((50, 10), EncodeOptions(widths=(20, 60, 90), qualities=(10.0, 20.0)))


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--scales", "1,2", "--widths", "10,20"],
        ["--sizes", "10x20,20x10"],
        ["--sizes", "10x"],
        ["--sizes", "0x5"],
        ["--widths", "10,x"],
        ["--widths", "0,5"],
        ["--widths", ",".join(map(str, range(1, 18)))],
        ["--widths", "9999999"],
        ["--scales", "1,2", "--upscale"],
    ],
)
def test_bad_sizes(tmp_path, args):
    crop(8, 8).save(tmp_path / "in.png")
    result = compass("encode", tmp_path / "in.png", *args)
    assert result.code == 2 and result.out == "" and len(result.err.splitlines()) == 1
    assert not (tmp_path / "in.cmps").exists()


def test_alpha_and_metadata_go_there_and_back(tmp_path):
    image = crop(32, 24).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    exif = Image.Exif()
    exif[0x010E] = "a portrait"
    image.save(tmp_path / "in.png", exif=exif, icc_profile=_profile())
    for strip in ([], ["--strip"]):
        args = ["--force", "--device", "cpu"]
        assert compass("encode", tmp_path / "in.png", "--scales", "1,2", "--verify", *strip, *args).code == 0
        assert compass("decode", tmp_path / "in.cmps", "--layer", 0, "-o", tmp_path / "out.png", *args).code == 0
        out = Image.open(tmp_path / "out.png")
        assert out.mode == "RGBA" and out.size == (16, 12)
        assert out.getexif().get(0x010E) == (None if strip else "a portrait")
        assert ("icc_profile" in out.info) == (not strip)
    compass("encode", tmp_path / "in.png", "--scales", "1,2", *args)
    assert compass("decode", tmp_path / "in.cmps", "-o", tmp_path / "out.png", "--strip", *args).code == 0
    assert not Image.open(tmp_path / "out.png").getexif()


def _profile() -> bytes:
    from PIL import ImageCms

    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def test_a_note_says_what_was_converted(tmp_path):
    crop(16, 16).convert("L").save(tmp_path / "grey.png")
    loud = compass("encode", tmp_path / "grey.png", "--scales", "1")
    assert loud.err == f"note: {tmp_path / 'grey.png'}: greyscale converted to RGB\n"
    assert compass("encode", tmp_path / "grey.png", "--scales", "1", "--force", "--quiet").err == ""


def test_heic_is_a_picture_where_pillow_heif_is_installed():
    assert {".heic", ".heif", ".avif", ".png", ".mpo"} <= batch.picture_suffixes()


def test_without_pillow_heif_a_line_says_what_to_install(tmp_path, album):
    pictures.register()
    crop(24, 16).save(album / "c.heic", "HEIF")
    shutil.copy(album / "c.heic", album / "d.png")
    code = "import sys; sys.modules['pillow_heif'] = None; from compass_codec.cli import main; main()"

    def run(*args: object) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True)

    needs = 'needs pillow-heif: pip install "compass_codec[heic]"'
    one = run("encode", album / "c.heic", "-s", "1")
    assert (one.returncode, one.stderr) == (1, f"compass: {album / 'c.heic'}: a HEIC picture, which {needs}\n")
    (album / "a.png").unlink()
    (album / "far" / "b.jpg").unlink()
    walk = run("encode", album, "-s", "1", "-j", "1", "--out-dir", tmp_path / "out")
    assert walk.stderr == f"compass: {album / 'd.png'}: a HEIC picture, which {needs}\n"
    assert f"1 .heic ({needs})" in walk.stdout and walk.returncode == 1
    out = run("decode", album / "d.png", "--format", "heic")
    assert out.returncode == 2 and needs in out.stderr and len(out.stderr.splitlines()) == 1


def test_a_folder_that_cannot_be_read_is_one_failure_and_the_summary_says_what_was_left_out(
    album, tmp_path, monkeypatch
):
    (album / "locked").mkdir()
    scan = os.scandir

    def refusing(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    result = encode(album, "--out-dir", tmp_path / "out", "-j", 1)
    assert result.code == 1 and result.err == f"compass: {album / 'locked'}: Permission denied\n"
    last = result.out.splitlines()[-1]
    assert last.startswith("2 encoded, 1 failed; ") and "1 hidden" in last and "1 .txt" in last


@pytest.mark.parametrize("orientation", [1, 6])
def test_turned_tiffs_are_up_to_date(tmp_path, orientation):
    crop(24, 16).save(tmp_path / "a.tif", tiffinfo={274: orientation})
    args = (tmp_path / "a.tif", "--out-dir", tmp_path / "out", "-j", 1)
    assert encode(*args).code == 0
    assert "up to date" in encode(*args).out


@pytest.mark.parametrize("quality", [2.675, 99.995, 60])
def test_any_quality_is_up_to_date_and_verify_looks_at_outputs(tmp_path, quality):
    crop(8, 8).save(tmp_path / "a.png")
    args = (tmp_path / "a.png", "--out-dir", tmp_path / "out", "-j", 1, "-q", quality)
    assert encode(*args).code == 0 and "up to date" in encode(*args, "--verify").out
    data = bytearray((tmp_path / "out" / "a.cmps").read_bytes())
    data[-1] ^= 1
    (tmp_path / "out" / "a.cmps").write_bytes(data)
    assert "up to date" in encode(*args).out and "differs from what these options make" in encode(*args, "--verify").err


def test_a_source_of_the_future_is_encoded_once(tmp_path):
    crop(8, 8).save(tmp_path / "a.png")
    later = time.time() + 10**6
    os.utime(tmp_path / "a.png", (later, later))
    args = (tmp_path / "a.png", "--out-dir", tmp_path / "out", "-j", 1)
    assert encode(*args).code == 0 and "up to date" in encode(*args).out


@pytest.mark.parametrize("extension", ["ico", "pdf"])
def test_formats_that_hold_other_sizes_or_are_not_read_are_up_to_date(tmp_path, small_file, extension):
    (tmp_path / "a.cmps").write_bytes(small_file)
    args = ("decode", tmp_path / "a.cmps", "--out-dir", tmp_path / "out", "--layer", 0, "--format", extension)
    assert compass(*args).code == 0
    assert "up to date" in compass(*args).out


def test_whatever_is_raised_over_one_file_is_its_failure(album, tmp_path, monkeypatch):
    from compass_codec import pictures

    class Panic(BaseException):
        pass

    real = pictures.read

    def read(path):
        if Path(path).name == "a.png":
            raise Panic("of a\nlibrary")
        return real(path)

    monkeypatch.setattr(pictures, "read", read)
    result = encode(album, "--out-dir", tmp_path / "out", "-j", 1)
    assert result.code == 1 and result.err.endswith("a.png: unexpected Panic: of a library\n")
    assert result.out.splitlines()[-1].startswith("1 encoded, 1 failed; ")


@pytest.mark.parametrize("mark", ["utf-8-sig", "utf-16"])
def test_byte_order_marks_and_dashes_in_lists(tmp_path, mark):
    (tmp_path / "list").write_bytes("a.png\r\n-\r\n".encode(mark))
    assert batch.read_list(tmp_path / "list") == [Path("a.png"), Path("-")]
    found = batch.make_jobs([], [Path("-")], tmp_path, batch.picture_suffixes, ".cmps", EncodeOptions(scales=(1.0,)))
    assert found.jobs[0].source == Path.cwd() / "-"


WORKER = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from compass_codec.jobs import batch
if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, multiprocessing.get_context(sys.argv[1]), batch._start)
    print(pool.submit(os.getpid).result(), flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_end_with_a_killed_parent(tmp_path, method):
    (tmp_path / "parent.py").write_text(WORKER)
    with subprocess.Popen(
        [sys.executable, tmp_path / "parent.py", method], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout
        worker = int(parent.stdout.readline())
        parent.kill()
    for _ in range(100):
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(worker)], capture_output=True, text=True).stdout.strip()
        if not state or state.startswith("Z"):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker is left")


# a batch whose jobs, in workers too, are what their sources' names say
JOBS = """
import os, signal, sys, time
from pathlib import Path
from compass_codec import files
from compass_codec.jobs import batch, single
from compass_codec.jobs.job import DecodeOptions, Job
from compass_codec.jobs.report import LayerReport, Report

def work(job):
    if job.source.name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if job.source.name == "odd":
        raise RuntimeError("of a\\nlibrary")
    if job.source.name == "exit":
        sys.exit(3)
    if job.source.name == "slow":
        os.fsync = lambda file: (os.write(1, b"\\nwriting\\n"), time.sleep(60))
        files.write_file(job.target, b"half")
    return Report(job.source, "decoded")

single.run = work
if __name__ == "__main__":
    count, *names = sys.argv[1:]
    for report in batch.run([Job(Path(name), Path("out", name), DecodeOptions()) for name in names], int(count)):
        print(report.source, report.state, report.error, sep="|", flush=True)
"""


def test_a_process_that_dies_is_the_failure_of_its_file_alone(tmp_path):
    (tmp_path / "batch.py").write_text(JOBS)
    names = ["a", "killed", "b", "odd", "c", "exit", "d"]
    done = subprocess.run([sys.executable, tmp_path / "batch.py", "2", *names], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    reports = dict(line.split("|", 1) for line in done.stdout.splitlines())
    assert {name: reports[name] for name in "abcd"} == dict.fromkeys("abcd", "decoded|None")
    assert reports["odd"] == "failed|odd: unexpected RuntimeError: of a library"
    assert reports["killed"] == f"failed|killed: {batch.DIED}" and reports["exit"] == f"failed|exit: {batch.DIED}"


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_whatever_stops_the_command_stops_its_processes(tmp_path, count, number):
    (tmp_path / "batch.py").write_text(JOBS)
    (tmp_path / "out").mkdir()
    with subprocess.Popen(
        [sys.executable, "batch.py", str(count), "slow", *"abcdefgh"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        cwd=tmp_path,
    ) as running:
        assert running.stdout
        assert "writing\n" in iter(running.stdout.readline, "")
        running.send_signal(number)
        running.communicate(timeout=30)  # to the end of what its workers hold open too
    assert running.returncode in (-number, 128 + number, 1)
    if (count, number) != (1, signal.SIGKILL):  # which leaves no time to clean up
        assert list((tmp_path / "out").iterdir()) == []
