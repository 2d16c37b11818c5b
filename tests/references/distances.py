"""What other programs give for the features below: `python tests/references/distances.py` writes distances.json.

It runs in an environment of its own, with torch-fidelity, pytorch-fid, prdc and scipy; tests read only what it wrote,
and make the same features from the same seeds.
"""

import json
import os
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).with_suffix(".json")


def features(seed: int, count: int, size: int, shift: float = 0.0) -> np.ndarray:
    """[count, size] float64, correlated, of unequal variances, some of them skewed; `shift` sets the source apart."""
    mixing = np.random.default_rng(0).normal(size=(size, size)) / size**0.5 * np.geomspace(1, 0.01, size)
    rows = np.random.default_rng(seed).normal(size=(count, size)) * (1 + shift) + shift
    return np.logaddexp(0, rows) @ mixing + 0.5


def pair(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Reals and fakes of a figure; for "scores" the logits are the fakes."""
    sizes = {"frechet": (700, 300, 64), "frechet_2048": (4_200, 4_200, 2_048), "kernel": (400, 400, 64),
             "kernel_large": (2_000, 2_000, 64), "neighbors": (500, 400, 16), "scores": (0, 503, 30)}
    reals, fakes, size = sizes[name]
    if name == "scores":
        return features(1, 0, size), 8 * features(2, fakes, size)
    return features(1, reals, size), features(2, fakes, size, shift=0.1)


def main() -> None:
    import torch

    # torch-fidelity and pytorch-fid import torchvision, which beside some builds of torch misses two operators.
    for operator, arguments in (("nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
                                ("qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")):
        torch.library.define(f"torchvision::{operator}", arguments)
    import prdc
    import scipy.linalg
    from pytorch_fid.fid_score import calculate_frechet_distance
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    sqrtm = scipy.linalg.sqrtm
    # pytorch-fid 0.3.0 asks for `disp`, which newer versions of scipy no longer know.
    scipy.linalg.sqrtm = lambda matrix, disp=True: sqrtm(matrix) if disp else (sqrtm(matrix), 0.0)

    packages = ("torch-fidelity", "pytorch-fid", "prdc", "scipy", "numpy", "torch")
    found: dict = {"versions": {package: version(package) for package in packages}}
    for name in ("frechet", "frechet_2048"):
        reals, fakes = pair(name)
        began = time.perf_counter()
        torch_fidelity = fid_statistics_to_metric(*(fid_features_to_statistics(torch.from_numpy(rows))
                                                    for rows in (reals, fakes)), verbose=False)
        middle = time.perf_counter()
        pytorch_fid = calculate_frechet_distance(reals.mean(axis=0), np.cov(reals, rowvar=False),
                                                 fakes.mean(axis=0), np.cov(fakes, rowvar=False))
        found[name] = {"torch_fidelity": float(torch_fidelity["frechet_inception_distance"]),
                       "pytorch_fid": float(pytorch_fid),
                       "seconds": [round(middle - began, 2), round(time.perf_counter() - middle, 2)]}
    for name in ("kernel", "kernel_large"):
        reals, fakes = (torch.from_numpy(rows) for rows in pair(name))
        subsets = {"kid_subsets": 1, "kid_subset_size": len(reals)} if name == "kernel" else {}
        kernel = kid_features_to_metric(fakes, reals, **subsets, verbose=False)
        found[name] = {key.rsplit("_", 1)[1]: value for key, value in kernel.items()}

    reals, fakes = pair("neighbors")
    neighbors = prc_features_to_metric(torch.from_numpy(fakes), torch.from_numpy(reals), prc_neighborhood=3,
                                       verbose=False)
    found["neighbors"] = {"torch_fidelity_k3": {key: float(value) for key, value in neighbors.items()}}
    for k in (3, 5):
        figures = prdc.compute_prdc(reals, fakes, nearest_k=k)
        found["neighbors"][f"prdc_k{k}"] = {key: float(value) for key, value in figures.items()}

    logits = pair("scores")[1]
    scores = isc_features_to_metric(torch.from_numpy(logits[hash_order(logits)]), splits=10, shuffle=False)
    found["scores"] = {key.rsplit("_", 1)[1]: value for key, value in scores.items()}
    found["threads"] = [torch.get_num_threads(), os.cpu_count()]
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def hash_order(rows: np.ndarray) -> list[int]:
    """Rows sorted by the blake2b hashes (16 bytes) of their memory."""
    from hashlib import blake2b

    return sorted(range(len(rows)), key=lambda index: blake2b(rows[index].tobytes(), digest_size=16).digest())


if __name__ == "__main__":
    main()
