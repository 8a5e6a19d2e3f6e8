"""Files from strangers, and writes that are interrupted."""

import io
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import fuzz_pictures
import mutate
import numpy as np
import pytest
import torch
from conftest import compass, crop
from PIL import Image

import compass_codec
from compass_codec import container, pictures, weights
from compass_codec.codec import Codec
from compass_codec.errors import CompassError, PictureError


def test_broken_files_give_a_picture_or_one_clean_error(codec):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        outcomes = mutate.run(codec, mutate.samples(codec), 300, seed=7)
    finally:
        torch.set_num_threads(threads)
    # the set reaches the decoder as well as every kind of refusal
    assert {"picture", "DamagedError", "FormatError", "TruncatedError", "LimitError"} <= set(outcomes)


def test_header_checks_survive_the_fuzzers_own_seeds(small_file, monkeypatch):
    """The fuzz target's checks, on honest files and all their prefixes, without the fuzzer."""

    class Stub:
        @staticmethod
        def instrument_imports():
            import contextlib

            return contextlib.nullcontext()

    monkeypatch.setitem(sys.modules, "atheris", Stub)
    import fuzz_container

    for size in range(0, len(small_file), 7):
        fuzz_container.one_input(small_file[:size])
        fuzz_container.one_input(small_file[6:size])
    fuzz_container.one_input(small_file)


def damaged(small_file: bytes, layer: int) -> bytes:
    data = bytearray(small_file)
    data[container.read_header(small_file).layers[layer].start + 1] ^= 4
    return bytes(data)


def test_best_effort(tmp_path, small_file):
    file = tmp_path / "d.cmps"
    for layer in range(3):
        file.write_bytes(damaged(small_file, layer))
        assert compass("info", file).out.count("damaged") == 1
        result = compass("decode", file, "-o", tmp_path / "out.png")
        assert result.code == 1 and f"layer {layer} is damaged" in result.err and not (tmp_path / "out.png").exists()
        result = compass("decode", file, "--best-effort", "-o", tmp_path / f"best{layer}.png")
        if layer:
            assert result.code == 0 and f"layer {layer - 1}," in result.out
            assert f"layer {layer - 1} of 0 to 2 is the highest" in result.err
            named = ("decode", file, "--best-effort", "--layer", layer, "-o", tmp_path / f"named{layer}.png")
            assert f"layer {layer - 1} of 0 to 2 is the highest" in compass(*named).err
            lower = ("decode", file, "--best-effort", "--layer", layer - 1, "-o", tmp_path / f"lower{layer}.png")
            assert compass(*lower).err == ""
        else:
            assert result.code == 1 and "nothing decodes" in result.err
    file.write_bytes(small_file)
    assert "layer 2," in compass("decode", file, "--best-effort", "-o", tmp_path / "all.png").out


def test_pixel_limit(tmp_path, small_file):
    file = tmp_path / "x.cmps"
    file.write_bytes(small_file)
    result = compass("decode", file, "--max-pixels", 4799)
    assert result.code == 1 and "80 x 60" in result.err and "4799" in result.err
    assert compass("decode", file, "--max-pixels", 4800).code == 0


WRITE = "import os, sys, signal\nfrom pathlib import Path\nfrom compass_codec.files import write_file\n"


def interrupted(target: Path, how: str) -> subprocess.CompletedProcess:
    """Write 1 MB to ``target`` in a process of its own that ``how`` (code) interrupts."""
    code = WRITE + how + f"\nwrite_file(Path({str(target)!r}), bytes(10**6))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True)


@pytest.mark.parametrize("old", [b"the old file", None])
def test_killed_while_writing(tmp_path, old):
    target = tmp_path / "t.cmps"
    if old is not None:
        target.write_bytes(old)
    done = interrupted(target, "os.fsync = lambda f: os.kill(os.getpid(), signal.SIGKILL)")
    assert done.returncode == -signal.SIGKILL
    assert (target.read_bytes() if target.exists() else None) == old


@pytest.mark.parametrize(
    "how",
    [
        "import resource; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5))",  # as a full disk does, in the middle
        "os.fsync = lambda f: os.kill(os.getpid(), signal.SIGINT)",  # Ctrl-C
    ],
)
def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, how):
    target = tmp_path / "t.cmps"
    target.write_bytes(b"the old file")
    assert interrupted(target, how).returncode != 0
    assert [p.name for p in tmp_path.iterdir()] == ["t.cmps"] and target.read_bytes() == b"the old file"


def test_full_disk_is_one_line(tmp_path):
    crop(32, 32).save(tmp_path / "p.png")
    code = (
        "import resource, signal, sys; from compass_codec.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50)); main()"
    )
    args = ["encode", str(tmp_path / "p.png"), "--scales", "1", "--device", "cpu"]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "p.cmps" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]


def test_not_enough_memory_is_one_line(tmp_path, small_file):
    (tmp_path / "x.cmps").write_bytes(small_file)
    code = (
        "import sys, torch; from compass_codec import cli; from compass_codec.codec import Codec\n"
        "Codec.predict = lambda *a: torch.empty(2**60)\ncli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "decode", str(tmp_path / "x.cmps")], capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.splitlines() == [f"compass: {tmp_path / 'x.cmps'}: not enough memory"]
    assert [p.name for p in tmp_path.iterdir()] == ["x.cmps"]


def test_a_device_is_written_to_and_not_replaced(tmp_path, small_file):
    (tmp_path / "x.cmps").write_bytes(small_file)
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE)
    assert compass("decode", tmp_path / "x.cmps", "--layer", 0, "-o", pipe).code == 0
    assert reader.communicate(timeout=30)[0].startswith(b"\x89PNG")
    assert pipe.is_fifo()


def test_closed_pipe_is_quiet(tmp_path, small_file):
    file = tmp_path / "x.cmps"
    file.write_bytes(small_file)
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "compass_codec", "info", str(file)]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.returncode == 1 and done.stderr == b""


def test_no_pickle_in_the_package():
    """Nothing that reads a file can run code from it. CompressAI's weights come in no safer form than what PyTorch
    reads as tensors alone."""
    package = Path(container.__file__).parent
    for path in package.rglob("*.py"):
        text = re.sub(r"torch\.load\([^()]*weights_only=True\)", "", path.read_text())
        for word in ("torch.load", "pickle", "yaml.load", "eval(", "exec("):
            assert word not in text.replace(".eval(", ""), (path, word)


def test_damaged_pictures_give_a_picture_or_one_clean_error():
    """Of every format that Pillow reads here; its plugins raise much that is no OSError."""
    outcomes = fuzz_pictures.run(600, seed=3)
    assert outcomes.pop("picture") > 100 and {"OSError", "UnidentifiedImageError"} < set(outcomes)


class Panic(BaseException):
    """As plugins in Rust raise it."""


@pytest.mark.parametrize("error", [RuntimeError, TypeError, struct.error, OverflowError, MemoryError, Panic])
def test_whatever_a_library_raises_is_an_error_of_the_picture(monkeypatch, error):
    def fail(*args, **options):
        raise error("one\n  two")

    picture = crop(8, 6)
    file = io.BytesIO(pictures.to_bytes(picture, Path("x.png")))
    monkeypatch.setattr(Image.Image, "load", fail)
    with pytest.raises(PictureError) as caught:
        pictures.read(file)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(PictureError):
        compass_codec.encode(picture, [1])
    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(PictureError):
        pictures.to_bytes(picture, Path("x.png"))


def test_ctrl_c_is_no_error_of_the_picture():
    with pytest.raises(KeyboardInterrupt), pictures.library("damaged picture"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("suffix", [".avif", ".gif", ".tga", ".pcx", ".sgi", ".jpg", ".webp", ".ico"])
def test_a_size_that_a_format_cannot_hold_is_refused(suffix):
    """Some of these formats write garbage then, without an error."""
    with pytest.raises(PictureError):
        pictures.to_bytes(Image.new("RGB", (2, 70_000)), Path(f"x{suffix}"))
    assert pictures.to_bytes(Image.new("RGB", (2, 300)), Path("x.png"))


def test_a_failing_picture_does_not_end_the_batch(tmp_path, codec):
    """An AVIF whose damage is no OSError, between two sound files."""
    (tmp_path / "in").mkdir()
    avif = pictures.to_bytes(crop(24, 16), Path("x.avif"))
    broken = (bytes(avif[:i] + bytes([avif[i] ^ 255]) + avif[i + 1 :]) for i in range(len(avif) // 3, len(avif)))
    (tmp_path / "in" / "b.avif").write_bytes(next(data for data in broken if raises_a_bug(data)))
    for name in "ac":
        crop(24, 16).save(tmp_path / "in" / f"{name}.png")
    result = compass("encode", tmp_path / "in", "-s", "1", "--out-dir", tmp_path / "out", "-j", "1", "--device", "cpu")
    assert result.code == 1 and len(result.err.splitlines()) == 1 and "b.avif: damaged picture" in result.err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.cmps", "c.cmps"]


def raises_a_bug(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, EOFError):
        return False
    except Exception:
        return True
    return False


def test_arrays_memoryviews_and_devices_from_python():
    picture = crop(24, 16)
    data = compass_codec.encode(np.asarray(picture), [1], device="cpu")
    assert data == compass_codec.encode(picture, [1], device="cpu")
    assert compass_codec.decode(memoryview(data), device="cpu") == compass_codec.decode(data, device="cpu")
    rgba = np.dstack([np.asarray(picture), np.arange(24 * 16).reshape(16, 24).astype(np.uint8)])
    decoded = compass_codec.decode(bytearray(compass_codec.encode(rgba, np.array([1]), np.float32(50))))
    assert (np.asarray(decoded)[..., 3] == rgba[..., 3]).all()
    pixels, codec = np.asarray(picture), Codec.load("cpu", str(weights.choose().folder))
    lower = pixels[::2, ::2]
    layered: list[tuple] = [
        ([lower / 255.0, pixels / 255.0], [1, 2], 50),
        ([lower.astype(np.uint16), pixels.astype(np.uint16)], [1, 2], 50),
        ([pixels, lower], [1, 2], 50),
        ([lower[..., 0], pixels[..., 0]], [1, 2], 50),
        ([rgba], [1], 50),
        ([pixels[:0]], [1], 50),
        ([[[1, 2], [3]]], [1], 50),
        ([lower, pixels], [1, 2], [50, "high"]),
    ]
    plain = codec.encode_layers([lower, pixels], [1, 2], 50).data
    assert codec.encode_layers([Image.fromarray(lower), picture], [1, 2], np.array(50)).data == plain
    assert codec.encode_layers([lower, pixels], [1, 2], 50, layer_weights=np.array([1.0, 2.0])).data == plain
    wrong = [
        lambda: compass_codec.encode(rgba.astype(float), [1]),
        lambda: compass_codec.encode(rgba[:0], [1]),
        lambda: compass_codec.encode("photo.png", [1]),
        lambda: compass_codec.encode(picture, "ab"),
        lambda: compass_codec.encode(picture, 2),
        lambda: compass_codec.encode(picture, [1], "high"),
        lambda: compass_codec.encode(picture, [1], None),
        lambda: compass_codec.encode(picture, [1], device="tpu"),
        lambda: compass_codec.encode(picture, [1], device="mps"),
        lambda: compass_codec.encode(picture, [1], device="cuda:99"),
        lambda: compass_codec.decode("text"),
        lambda: compass_codec.decode(5),
        lambda: Codec.load(precision="fp8"),
        *(lambda case=case: codec.encode_layers(*case) for case in layered),
    ]
    for call in wrong:
        with pytest.raises(CompassError):
            call()


def test_errors_are_one_line(tmp_path):
    for name, content in (("a\nb.png", b"no picture"), ("c\nd.png", None)):
        if content:
            (tmp_path / name).write_bytes(content)
        result = compass("encode", tmp_path / name, "-s", "1")
        assert result.code == 1 and len(result.err.splitlines()) == 1 and name.replace("\n", " ") in result.err
    assert str(PictureError(" spaces  stay ")) == " spaces  stay "
    assert str(PictureError("two\nlines \u2028 and a\r\n\n  half")) == "two lines and a half"


def test_a_format_that_cannot_work_is_refused_before_anything(tmp_path, small_file):
    (tmp_path / "x.cmps").write_bytes(small_file)
    for extension in ("wmf", "h5", "pgm"):
        result = compass("decode", tmp_path / "x.cmps", "--format", extension)
        assert result.code == 2 and len(result.err.splitlines()) == 1 and extension in result.err


def test_what_cannot_be_written_is_named(tmp_path):
    from compass_codec.files import write_file

    with pytest.raises(FileNotFoundError) as found:
        write_file(tmp_path / "none" / "a.cmps", b"data")
    assert found.value.filename == str(tmp_path / "none" / "a.cmps")


def test_an_interrupt_while_a_file_is_made_leaves_none(tmp_path, monkeypatch):
    from compass_codec.files import write_file

    make = os.open

    def interrupted(*about):
        os.close(make(*about))
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "open", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "a.cmps", b"data")
    assert list(tmp_path.iterdir()) == []
