"""Restoration: what it is before and after training, how far it sees, and weights with and without it."""

import copy
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from compass_codec import container, strips
from compass_codec.codec import Codec
from compass_codec.errors import WeightsError
from compass_codec.layer import Match
from compass_codec.mean_scale import RESTORATION
from compass_codec.pictures import psnr
from compass_codec.restoration import FOLD, Restoration, Restorer
from compass_codec.training.export import describe
from compass_codec.weights import folder_or_default, identity

LEVEL = torch.tensor([1.5, 4.0])


def noisy(restorer: Restorer) -> Restorer:
    """With a last convolution as trained ones have it: not zero."""
    with torch.no_grad():
        restorer.last.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return restorer.requires_grad_(False)


@pytest.mark.parametrize("predicted", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (7, 10), (16, 33)])
def test_untrained_networks_change_nothing(size, predicted):
    x, known = torch.rand(2, 2, 3, *size)
    restorer = Restorer(8, 1, predicted)
    assert not restorer(x, known, LEVEL).any()
    changed = noisy(restorer)(x, known, LEVEL)
    assert changed.shape == x.shape and changed.any()
    assert not torch.equal(changed, restorer(x, known, LEVEL + 0.5))
    assert torch.equal(changed, restorer(x, known + 0.1, LEVEL)) != predicted


@pytest.mark.parametrize(("kind", "apart"), [(torch.float16, 1), (torch.bfloat16, 8)])
@pytest.mark.parametrize("predicted", [False, True])
def test_fewer_digits_are_those_of_the_convolutions_alone(predicted, kind, apart):
    torch.manual_seed(0)
    restorer, (x, known) = noisy(Restorer(8, 2, predicted)), torch.rand(2, 2, 3, 13, 20)
    short = copy.deepcopy(restorer)
    short.pixels_in(kind)
    for name, weight in short.state_dict().items():
        assert weight.dtype == (torch.float32 if name == "log_gain" else kind), name
    found, expected = (network(x, known, LEVEL) for network in (short, restorer))
    assert found.dtype == torch.float32 and 0 < (found - expected).abs().max() < apart * 5e-3 * expected.abs().max()


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_reach(blocks):
    """No pixel sees one further away than the network says."""
    torch.manual_seed(0)
    for restorer in map(noisy, Restoration(8, blocks).children()):
        x = torch.rand(1, 3, 80, 80)
        other = x.clone()
        other[..., 40, 41] += 0.5
        changed = (restorer(other, x, LEVEL[:1]) != restorer(x, x, LEVEL[:1])).any(1)[0].nonzero()
        far = (changed - torch.tensor([40, 41])).abs().max()
        assert restorer.reach // 2 < far < restorer.reach + FOLD


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Folders of weights: those installed, with restoration that does something whether trained or not, and without."""
    with_it, without = tmp_path_factory.mktemp("with"), tmp_path_factory.mktemp("without")
    for file in folder_or_default(None).glob("*.safetensors"):
        for folder in (with_it, without):
            shutil.copy(file, folder)
    (without / f"{RESTORATION}.safetensors").unlink(missing_ok=True)
    torch.manual_seed(0)
    restoration = Restoration(8, 1)
    for restorer in restoration.children():
        noisy(restorer)
    save_file({k: v.half() for k, v in restoration.state_dict().items()}, with_it / f"{RESTORATION}.safetensors")
    for folder in (with_it, without):
        describe(folder)
    return with_it, without


def test_weights_with_and_without(sets):
    with_it, without = (Codec.load("cpu", folder) for folder in sets)
    assert without.base.restorer is None and len(with_it.base.restorer.blocks) == 1
    assert with_it.model == identity(sets[0]) != identity(sets[1]) == without.model
    x = np.arange(3 * 40 * 50).reshape(40, 50, 3).astype(np.uint8) // 3
    seen = {}
    for name, codec in ("with", with_it), ("without", without):
        encoded = codec.encode(Image.fromarray(x), [1, 2], 60)
        for k, layer in enumerate(encoded.layers):
            assert np.array_equal(np.asarray(codec.decode(encoded.data, layer=k)), layer)
        seen[name] = encoded
    assert not np.array_equal(seen["with"].layers[0], seen["without"].layers[0])
    with pytest.raises(WeightsError, match=f"weights {with_it.model} are not here.*looked at: paper"):
        without.decode(seen["with"].data)


@pytest.mark.parametrize("blocks", [0, 3, 5])
def test_networks_of_any_depth_in_strips(sets, monkeypatch, blocks):
    """A picture in tiles is restored as a whole one is, but for the last digit of a float."""
    codec = Codec.load("cpu", sets[1])
    torch.manual_seed(0)
    codec.residual.restorer = noisy(Restorer(8, blocks, predicted=True))
    y, known = 4 * torch.randn(1, codec.residual.codec.m, 10, 9).round(), torch.rand(1, 3, 153, 140)
    with torch.inference_mode():
        whole = codec.residual.reconstruct([y], [known], 60, (153, 140)).astype(int)
        for table in (strips.STRIP, strips.TILE):
            monkeypatch.setitem(table, "cpu", 64)
        codec.residual.tile = 64
        tiled = codec.residual.reconstruct([y[:, :, :4], y[:, :, 4:]], [known], 60, (153, 140))
    assert np.abs(whole - tiled).max() <= 1 and (whole != tiled).mean() < 0.001


@pytest.mark.parametrize("strength", [16, 7])
def test_search_sees_what_the_decoder_shows(sets, strength):
    """The search's pixels are the layer's, but for rounding and for what filters add."""
    from compass_codec import search

    codec = Codec.load("cpu", sets[0])
    x = np.random.default_rng(2).integers(0, 255, (64, 64, 3), np.uint8)
    for layer, known in (codec.base, torch.full((1, 3, 64, 64), 0.5)), (codec.residual, torch.rand(1, 3, 64, 64) / 2):
        found = search.Search(layer)
        job = search.Job(x, known, None, strength, 60.0, 1.0, torch.Generator(), float("inf"))
        start = found.start(job, None)
        (tile,) = search.Tile.all(job.size)
        latent = (start.y.round()).requires_grad_()
        shown = found.shown(latent, job, tile, known)
        assert torch.autograd.grad(shown.square().sum(), latent)[0].any()
        with torch.inference_mode():
            seen = layer.reconstruct([latent.detach()], [known], 60.0, job.size, strength)
        error = np.abs(shown.detach()[0].clamp(0, 1).permute(1, 2, 0).numpy() * 255 - seen)
        assert error.max() <= 0.51


class Fixed(Codec):
    adaptive = False


@pytest.mark.parametrize("effort", [0, 1])
def test_strength(sets, effort):
    """Restoration that does harm is turned down, in every layer and to the bit as the decoder does; never if the
    encoder may not choose."""
    codec, fixed = Codec.load("cpu", sets[0]), Fixed.load("cpu", sets[0])
    image = Image.fromarray(np.linspace(40, 200, 96 * 80 * 3).astype(np.uint8).reshape(80, 96, 3))
    ours, theirs = (c.encode(image, [1, 2], 60, effort if c is codec else 0) for c in (codec, fixed))
    chosen, full = (
        [layer.side.strength for layer in container.read_header(e.data).layers if not layer.side.empty]
        for e in (ours, theirs)
    )
    assert chosen and max(chosen) < 16 and set(full) == {16}
    for k, layer in enumerate(ours.layers):
        assert np.array_equal(np.asarray(codec.decode(ours.data, k)), layer)
    top = np.asarray(image)
    assert psnr(top, ours.layers[-1]) > psnr(top, theirs.layers[-1])


def test_the_strength_of_least_error():
    rng = np.random.default_rng(0)
    picture = rng.integers(60, 200, (20, 30, 3), np.uint8)
    x = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
    added = torch.randn(1, 3, 20, 30, generator=torch.Generator().manual_seed(0)) / 50
    for part, wanted in (1.0, 16), (0.5, 8), (1.7, 27), (-1.0, 0), (3.0, 32):
        match, strip = Match(picture), x - part * added
        for rows in slice(0, 8), slice(8, 20):
            match.add(rows, strip[:, :, rows], added[:, :, rows])
        errors = [float((255 * (strip + s * added - x)).square().sum()) for s in (1.0, wanted / 16)]
        assert match.strength == wanted and match.saved == pytest.approx(errors[0] - errors[1], rel=1e-4, abs=1e-3)
    assert Match(picture).strength == 16 and Match(picture).saved == 0


def test_bad_weights(sets, tmp_path):
    for file in sets[0].iterdir():
        shutil.copy(file, tmp_path)
    file = tmp_path / f"{RESTORATION}.safetensors"
    tensors = load_file(file)
    del tensors["residual.last.weight"]
    save_file(tensors, file)
    with pytest.raises(WeightsError, match="cannot be used"):
        Codec.load("cpu", tmp_path)
    file.write_bytes(b"damaged")
    with pytest.raises(WeightsError, match="cannot be used"):
        Codec.load("cpu", tmp_path)
