"""The Ray engine on two workers of this machine."""

import builtins
import json
import logging
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import compass, crop
from PIL import Image

from compass_codec import container, weights
from compass_codec.jobs import cluster, single


@pytest.fixture(scope="module")
def two_workers():
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=0,
        object_store_memory=80 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield
    ray.shutdown()


def test_the_same_bytes_as_here(two_workers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "far").mkdir(parents=True)
    for name, size in (("a", (24, 16)), ("far/b", (17, 31)), ("c", (40, 40))):
        crop(*size).save(tmp_path / "photos" / f"{name}.png")
    (tmp_path / "photos" / "bad.jpg").write_bytes(b"no picture")
    args = ("encode", "photos", "--scales", "1,2", "--device", "cpu", "--precision", "float32")
    here = compass(*args, "--out-dir", "here", "-j", 1)
    there = compass(*args, "--out-dir", "there", "--ray", "-j", 2)
    assert here.code == there.code == 1
    assert there.err.count("\n") == 1 and "bad.jpg: not a picture" in there.err
    for name in ("a", "far/b", "c"):
        assert (tmp_path / "here" / f"{name}.cmps").read_bytes() == (tmp_path / "there" / f"{name}.cmps").read_bytes()
    lines = [sorted(line.split(":")[0] for line in result.out.splitlines()[:-1]) for result in (here, there)]
    assert lines[1] == [line.replace("here", "there") for line in lines[0]]
    back = compass("decode", "there", "--out-dir", "back", "--layer", 0, "--ray", "--device", "cpu")
    assert back.code == 0, back.err
    assert Image.open(tmp_path / "back" / "far" / "b.layer0.png").size == (8, 16)


def test_sets_of_weights_that_only_this_process_knows(two_workers, tmp_path, monkeypatch):
    """COMPASS_MODELS and --weights are those of the command, and relative to where it runs."""
    monkeypatch.chdir(tmp_path)
    installed, mine = weights.choose(), tmp_path / "sets" / "mine"
    mine.mkdir(parents=True)
    for path in installed.parts:
        (mine / path.name).symlink_to(path)
    (mine / "model.json").write_text(json.dumps(installed.spec | {"profile": "mine"}))
    monkeypatch.setenv("COMPASS_MODELS", "sets")
    crop(9, 8).save("a.png")
    args = ("--ray", "-j", 1, "--device", "cpu", "--out-dir", "out")
    result = compass("encode", "a.png", "--scales", "1", "--model", "mine", *args)
    assert result.code == 0, result.err
    header = container.read_header((tmp_path / "out" / "a.cmps").read_bytes())
    assert header.model == weights.identity(mine) != installed.identity
    monkeypatch.delenv("COMPASS_MODELS")
    result = compass("decode", "out/a.cmps", "--weights", "sets/mine", *args)
    assert result.code == 0, result.err


class Dying(cluster.Worker):
    """A worker that its jobs kill, by their names."""

    def __init__(self, *args):
        super().__init__(*args)
        real = single.run

        def run(job):
            if job.source.name == "killed.png":
                os.kill(os.getpid(), signal.SIGKILL)
            if job.source.name == "odd.png":
                raise RuntimeError("of a library")
            return real(job)

        single.run = run


def test_a_worker_that_dies_is_the_failure_of_its_file_alone(two_workers, tmp_path, monkeypatch):
    from ray import cloudpickle

    monkeypatch.setattr(cluster, "Worker", Dying)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the cluster does not see this module
    for name in ("a", "killed", "b", "odd", "c"):
        crop(9, 8).save(tmp_path / f"{name}.png")
    args = ("--out-dir", tmp_path / "out", "--ray", "-j", 2, "--device", "cpu")
    result = compass("encode", tmp_path, "--scales", "1", *args)
    assert result.code == 1 and len(result.err.splitlines()) == 2, result
    assert (
        "killed.png: its process died" in result.err and "odd.png: unexpected RuntimeError: of a library" in result.err
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.cmps", "b.cmps", "c.cmps"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGKILL])
def test_what_ends_the_command_ends_its_workers(tmp_path, number):
    pytest.importorskip("ray.data")
    (tmp_path / "in").mkdir()
    for k in range(100):
        crop(32, 24).save(tmp_path / "in" / f"{k}.png")
    args = ["encode", tmp_path / "in", "--scales", "1,2", "--out-dir", tmp_path / "out", "--ray", "-j", "1"]
    with subprocess.Popen(
        [sys.executable, "-m", "compass_codec", *args, "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as running:
        assert running.stdout and running.stdout.readline()  # the first is done
        running.send_signal(number)
        running.communicate(timeout=60)
    ask = ["ps", "-o", "stat=,args=", "-s", str(running.pid)]
    for _ in range(300):
        lines = subprocess.run(ask, capture_output=True, text=True).stdout.splitlines()
        found = [line for line in lines if not line.startswith("Z")]  # what has ended waits to be asked how
        # two watchers of Ray notice a killed command after a minute
        if not [line for line in found if "Agent" not in line]:
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"processes left: {found}")
    assert number == signal.SIGKILL or not found


def test_what_is_wrong_for_all_is_one_line(two_workers, tmp_path):
    crop(8, 8).save(tmp_path / "a.png")
    args = ("encode", tmp_path / "a.png", "--scales", "1", "--ray", "--out-dir", tmp_path / "out")
    result = compass(*args, "--weights", tmp_path / "none")
    assert result.code == 1 and len(result.err.splitlines()) == 1 and "cannot read the weights" in result.err
    result = compass("encode", "-", "--scales", "1", "--ray")
    assert result.code == 1 and "standard input" in result.err


def test_without_ray_there_is_one_clear_line(tmp_path, monkeypatch):
    find = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.split(".")[0] == "ray":
            raise ImportError("No module named 'ray'")
        return find(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    crop(8, 8).save(tmp_path / "a.png")
    result = compass("encode", tmp_path / "a.png", "--scales", "1", "--ray")
    assert result.code == 1 and len(result.err.splitlines()) == 1 and "compass_codec[ray]" in result.err


def test_places():
    def node(alive=True, **resources):
        return {"Alive": alive, "Resources": resources}

    assert cluster._places([node(CPU=4.0), node(CPU=8.0)], None, 100) == (12, {"num_cpus": 1})
    assert cluster._places([node(CPU=4.0), node(CPU=8.0)], 20, 3) == (3, {"num_cpus": 1})
    assert cluster._places([node(CPU=4.0, GPU=2.0), node(CPU=8.0), node(False, GPU=4.0)], None, 100) == (
        2,
        {"num_gpus": 1},
    )
