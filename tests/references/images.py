"""What scikit-image gives for the images below: `python tests/references/images.py` writes images.json.

It runs in an environment of its own, with scikit-image; tests read only what it wrote, and make the same images.
"""

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).with_suffix(".json")
SIDES = (192, 256)  # the coarsest of five levels still holds a window of 11 px
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def pairs(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Two [4, 3, side, side] uint8: soft blocks of color, then the same with more and more of other blocks."""
    rng = np.random.default_rng(side)

    def blocks() -> np.ndarray:
        picture = np.zeros((4, 3, side, side))
        for size in (4, 16, 64):
            picture += np.kron(rng.uniform(-50, 50, (4, 3, side // size, side // size)), np.ones((size, size)))
        return picture

    first, second = blocks(), blocks()
    share = np.array([0.05, 0.3, 0.7, 1.0]).reshape(4, 1, 1, 1)
    noise = rng.normal(0, 5, (2, 4, 3, side, side))
    return tuple((127.5 + picture + grain).round().clip(0, 255).astype(np.uint8)
                 for picture, grain in zip((first, (1 - share) * first + share * second), noise, strict=True))


def multiscale(a: np.ndarray, b: np.ndarray) -> float:
    """Of one pair [3, side, side], from scikit-image's SSIM at each level, over windows that lie inside."""
    from skimage.metrics import structural_similarity

    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255.0,
               "channel_axis": 0}
    a, b, result = a.astype(np.float64), b.astype(np.float64), 1.0
    for weight in WEIGHTS[:-1]:
        # With so large a constant the brightness factor is 1, which leaves that of contrast and structure.
        result *= max(0.0, structural_similarity(a, b, K1=1e9, **options)) ** weight
        a, b = (v.reshape(3, v.shape[1] // 2, 2, -1, 2).mean(axis=(2, 4)) for v in (a, b))
    return result * max(0.0, structural_similarity(a, b, **options)) ** WEIGHTS[-1]


if __name__ == "__main__":
    found = {str(side): [multiscale(a, b) for a, b in zip(*pairs(side), strict=True)] for side in SIDES}
    made_by = {"scikit-image": version("scikit-image"), "numpy": version("numpy")}
    RESULTS.write_text(json.dumps({"made by": made_by, "multiscale": found}, indent=1) + "\n")
