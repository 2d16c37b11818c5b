"""Metrics against plain numpy and scipy: python -m tests.bench.metrics [--images N] [--scipy PYTHON]

Every side is a process of its own and all run one after the other on the same cores, so that memory is the process's
and the ratios are of one run. Beside each ratio of times by the wall stands that of processor seconds: on a machine
that others use too, the second is the one to compare.

1. Sliced Wasserstein distance of 16,384 + 16,384 images of 32 px, beside its definition written in plain numpy, which
   draws the same numbers and must give the same distance. It projects to rows: as columns numpy would sort them three
   times slower. Bars: 1.5 times as fast, and below 3 GB. Then the same number of patches from 128 px, for its memory.
2. Frechet distance of 5,000 + 5,000 features of 2,048 numbers, beside scipy's square root of the covariances' product,
   where there is a scipy: in this environment, or in that of --scipy PYTHON. Of given covariances ("root"), bar: 10
   times as fast; and with the moments of both sets, bar: 5 s.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np

BINOMIAL = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]).astype(np.float32) / 256
FEATURES, SIZE = 5_000, 2_048


def pictures(seed: int, count: int, side: int) -> np.ndarray:
    """[count, 3, side, side] uint8: blocks of color with noise."""
    rng = np.random.default_rng(seed)
    made = np.empty((count, 3, side, side), np.uint8)
    for first in range(0, count, 256):
        blocks = rng.integers(40, 190, (min(256, count - first), 3, 4, 4), np.uint8)
        grain = rng.integers(0, 64, (len(blocks), 3, side, side), np.uint8)
        made[first:first + 256] = blocks.repeat(side // 4, 2).repeat(side // 4, 3) + grain
    return made


# Sliced Wasserstein in plain numpy -----------------------------------------------------------------------------------


def smooth(images: np.ndarray) -> np.ndarray:
    side, padded = images.shape[-1], np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)), mode="reflect")
    return sum(BINOMIAL[y, x] * padded[:, :, y:y + side, x:x + side] for y in range(5) for x in range(5))


def pyramid(images: np.ndarray) -> list[np.ndarray]:
    """Coarsest level first."""
    levels = [images.astype(np.float32)]
    while levels[-1].shape[-1] > 16:
        levels.append(smooth(levels[-1])[:, :, ::2, ::2])
        spread = np.zeros_like(levels[-2])
        spread[:, :, ::2, ::2] = levels[-1]
        levels[-2] = levels[-2] - 4 * smooth(spread)
    return levels[::-1]


def descriptors(level: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    count, channels, side, _ = level.shape
    corners = rng.integers(0, side - 6, size=(count, 128, 2))
    windows = np.lib.stride_tricks.sliding_window_view(level, (7, 7), axis=(2, 3))
    found = windows[np.arange(count)[:, None], :, corners[..., 0], corners[..., 1]].reshape(count * 128, channels, 49)
    for channel in range(channels):
        found[:, channel] -= found[:, channel].mean(dtype=np.float64)
        found[:, channel] /= found[:, channel].std(dtype=np.float64)
    return found.reshape(count * 128, -1)


def plain_swd(reals: np.ndarray, fakes: np.ndarray) -> float:
    def in_order(images: np.ndarray) -> np.ndarray:
        keys = [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images]
        return images[sorted(range(len(images)), key=keys.__getitem__)]

    rng, distances = np.random.default_rng(0), []
    for level, other in zip(pyramid(in_order(reals)), pyramid(in_order(fakes)), strict=True):
        a, b = descriptors(level, rng), descriptors(other, rng)
        drawn = rng.standard_normal((4, a.shape[1], 128))
        drawn = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)
        found = [np.abs(np.sort(unit.T @ a.T) - np.sort(unit.T @ b.T)).mean(dtype=np.float64) for unit in drawn]
        distances.append(1e3 * np.mean(found))
    return float(np.mean(distances))


def our_swd(reals: np.ndarray, fakes: np.ndarray) -> float:
    import torch

    from gradine.stages.metrics import SlicedWasserstein

    metric = SlicedWasserstein(reals.shape[-1])
    metric.update(torch.from_numpy(reals), real=True)
    metric.update(torch.from_numpy(fakes), real=False)
    return metric.compute()["average"]


# Frechet distance ----------------------------------------------------------------------------------------------------


def features(seed: int) -> np.ndarray:
    """[5,000, 2,048] float32, correlated, of unequal variances."""
    mixing = np.random.default_rng(9).normal(size=(SIZE, SIZE)).astype(np.float32) / SIZE**0.5
    rows = np.random.default_rng(seed).normal(0.1 * seed, 1, (FEATURES, SIZE)).astype(np.float32)
    return rows @ (mixing * np.geomspace(1, 0.03, SIZE, dtype=np.float32))


def our_frechet(reals: np.ndarray, fakes: np.ndarray) -> float:
    """Moments included."""
    import torch

    from gradine.stages.distances import FrechetDistance

    metric = FrechetDistance()
    metric.update(torch.from_numpy(reals), real=True)
    metric.update(torch.from_numpy(fakes), real=False)
    return float(metric.compute())


def scipy_frechet(reals: np.ndarray, fakes: np.ndarray) -> float:
    from scipy.linalg import sqrtm  # type: ignore[import-not-found, unused-ignore]

    a, b = (np.cov(each.astype(np.float64).T) for each in (reals, fakes))
    apart = reals.mean(0, dtype=np.float64) - fakes.mean(0, dtype=np.float64)
    return float(apart @ apart + np.trace(a + b - 2 * sqrtm(a @ b).real))


def our_root(reals: np.ndarray, fakes: np.ndarray) -> float:
    """tr((C_r C_f)^(1/2)) of given covariances, the same as scipy's below."""
    import torch

    from gradine.stages.distances import frechet_distance

    zero = torch.zeros(SIZE, dtype=torch.float64)
    a, b = (torch.from_numpy(each) for each in (reals, fakes))
    return float(a.trace() + b.trace() - frechet_distance(zero, a, zero, b)) / 2


def scipy_root(reals: np.ndarray, fakes: np.ndarray) -> float:
    from scipy.linalg import sqrtm  # type: ignore[import-not-found, unused-ignore]

    return float(np.trace(sqrtm(reals @ fakes).real))


# Sides in processes --------------------------------------------------------------------------------------------------

SIDES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "our swd": our_swd, "plain swd": plain_swd, "our frechet": our_frechet, "scipy frechet": scipy_frechet,
    "our root": our_root, "scipy root": scipy_root}


def side(name: str, count: int, pixels: int) -> None:
    """Prints what one side found, how long it took, and what the process held at most."""
    sets = [pictures(n, count, pixels) if "swd" in name else features(n) for n in (0, 1)]
    if "root" in name:
        sets = [np.cov(each.astype(np.float64).T) for each in sets]
    if "our" in name:
        import gradine.stages.distances  # noqa: F401  not to be paid for by the first use
    began, cpu = time.perf_counter(), time.process_time()
    value = SIDES[name](*sets)
    wall_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps({"value": value, "wall_s": wall_s, "cpu_s": cpu_s, "GB": held}))


def of(name: str, count: int = 0, pixels: int = 0, python: str = sys.executable) -> dict[str, float]:
    done = subprocess.run([python, "-m", "tests.bench.metrics", "--side", name, "--images", str(count), "--pixels",
                           str(pixels)], text=True, stdout=subprocess.PIPE, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{name:<14} {found['wall_s']:7.1f} s, {found['cpu_s']:7.1f} s of processors, {found['GB']:.2f} GB, "
          f"value {found['value']:.9g}", flush=True)
    return found


def compare(ours: dict[str, float], theirs: dict[str, float], bar: float, agreement: float) -> None:
    apart = abs(ours["value"] / theirs["value"] - 1)
    print(f"  {theirs['wall_s'] / ours['wall_s']:.2f} times as fast (bar {bar:g}), by processor seconds "
          f"{theirs['cpu_s'] / ours['cpu_s']:.2f}; values differ by {apart:.1e}", flush=True)
    if apart > agreement:
        raise SystemExit(f"the two sides differ by more than {agreement:g}: not the same metric")


def main(count: int, scipy: str | None) -> None:
    ours = of("our swd", count, 32)
    compare(ours, of("plain swd", count, 32), 1.5, 1e-5)
    print(f"  {ours['GB']:.2f} GB (bar 3 for 16,384 images)")
    print("at 128 px, a quarter of the images:")
    of("our swd", count // 4, 128)

    python = scipy or (sys.executable if find_spec("scipy") else None)
    for kind, bar in (("root", 10), ("frechet", 1)):
        ours = of(f"our {kind}")
        if python:
            compare(ours, of(f"scipy {kind}", python=python), bar, 1e-6)
    print(f"  {ours['wall_s']:.1f} s with moments (bar 5)")
    if not python:
        print("  no scipy here to compare with: name an interpreter that has it by --scipy")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16_384)
    parser.add_argument("--scipy", metavar="PYTHON")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--pixels", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        side(given.side, given.images, given.pixels)
    else:
        main(given.images, given.scipy)
