"""A stage's figures and pictures, from a stored checkpoint: the averaged generator at alpha = 1, at its resolution.

Reals are split in two equal sets: the first is what fakes are held against, the second gives the noise floor, the
distance that two sets of reals have by chance. Fakes, reals and floor always have the same count, and it is stated.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from gradine.configs.schema import Run
from gradine.stages import commits
from gradine.stages.data import Images
from gradine.stages.generate import draw_latents, generate, grid, load_average, save_png
from gradine.stages.metrics import (
    MultiScaleSSIM,
    PixelFrechet,
    SlicedWasserstein,
    coverage,
    pixel_features,
    sliced_wasserstein_count,
)
from gradine.stages.networks import Generator, initialise

Row = dict[str, Any]
MS_SSIM_IMAGES = 20_000  # as 10,000 pairs
COVERAGE_IMAGES = 2_000  # of each side at most: their distances take a second or two
NEIGHBORS = 5  # the k of coverage


def evaluate(run: Run, path: str, out: str, threads: int = 1) -> list[Row]:
    """Writes the sample and real grids below `out`/samples; returns one row per metric for metrics.jsonl.

    Raises commits.Damaged for a checkpoint that must not be used.
    """
    torch.set_num_threads(threads)
    device = torch.device("cuda" if run.evaluation.gpus and torch.cuda.is_available() else "cpu")
    files = commits.read(path)
    info = commits.state_of(files["state.json"])
    resolution, images_seen = info["resolution"], info["images_seen"]
    average = load_average(run, files).to(device)
    images = Images(run.data, resolution, threads)
    samples = Path(out) / "samples"
    shown = torch.cat(list(generate(average, draw_latents(run, "samples", run.evaluation.samples))))
    save_png(grid(shown), samples / f"r{resolution:04d}-{images_seen:09d}.png")
    reals = RealSets(run, images)
    save_png(grid(reals.first(min(run.evaluation.samples, len(images)))), samples / f"r{resolution:04d}-reals.png")

    untrained = None
    if run.evaluation.untrained:
        untrained = Generator(run.network, resolution, fades=False, image_channels=run.data.channels)
        initialise(untrained, run.training.seed, "generator")
        untrained.to(device)
    subjects = Subjects(run, reals, average, untrained, draw_latents(run, "evaluation", reals.count))
    rows = []
    for metric, compute in (("swd", swd), ("frechet_pixels16", frechet), ("ms_ssim", ms_ssim)):
        began = time.perf_counter()
        figures = compute(subjects)
        rows.append({"metric": metric, "value": None, "reason": None, "levels": None, "floor": None, "untrained": None,
                     "reals": None, "spread": None, "coverage": None, "coverage_count": None, "resolution": resolution,
                     "checkpoint": Path(path).name, "images_seen": images_seen, "count": reals.count,
                     "seed": run.training.seed, **figures, "seconds": round(time.perf_counter() - began, 2)})
    images.close()
    return rows


class RealSets:
    """Two disjoint sets of `count` reals in an order of their own, and no more than fit evaluation.memory_gb."""

    def __init__(self, run: Run, images: Images) -> None:
        self.images = images
        order = images.ids(run.training.seed, -len(images), len(images))  # epoch -1: training starts with epoch 0
        fitting = int(run.evaluation.memory_gb * 1e9 / (2 * run.data.channels * images.resolution**2))
        self.count = max(1, min(run.evaluation.count, sliced_wasserstein_count(len(images)), fitting))
        self.order = order

    def first(self, count: int) -> Tensor:
        return torch.from_numpy(self.images.pixels(self.order[:count]))

    def batches(self, start: int) -> Iterator[Tensor]:
        """Set 0 or 1 (start = 0 or count), a few images at a time."""
        for ids in np.array_split(self.order[start:start + self.count], -(-self.count // 64)):
            yield torch.from_numpy(self.images.pixels(ids))


@dataclass(frozen=True)
class Subjects:
    """What a metric looks at."""

    run: Run
    reals: RealSets
    average: Generator
    untrained: Generator | None
    latents: Tensor

    def held_against_reals(self) -> Iterator[tuple[str, Iterator[Tensor]]]:
        """Name and batches of each set that is compared with the first set of reals."""
        yield "value", generate(self.average, self.latents)
        yield "floor", self.reals.batches(self.reals.count)
        if self.untrained:
            yield "untrained", generate(self.untrained, self.latents)


def swd(it: Subjects) -> Row:
    """Sliced Wasserstein distance x 1e3: `value` is the average over `levels`."""
    if it.reals.count * 2 > len(it.reals.images):
        return {"reason": f"{len(it.reals.images)} reals are too few for two sets"}
    figures: Row = {}
    for name, batches in it.held_against_reals():
        metric = SlicedWasserstein(it.reals.images.resolution, seed=it.run.training.seed)
        levels = fed(metric, it.reals, batches)
        figures[name] = levels.pop("average")
        if name == "value":
            figures["levels"] = levels
    return figures


def frechet(it: Subjects) -> Row:
    """Frechet distance on pixels reduced to at most 16x16; needs no feature network, and is no FID. Of the averaged
    generator also `spread`, the variance of its pixels over that of the reals': near 0 where its images are all alike,
    and `coverage`: small where they are few, but also where they are not yet like the reals.
    """
    if it.reals.count < 2:
        return {"reason": f"{len(it.reals.images)} reals are too few for two sets of at least 2"}
    figures: Row = {}
    for name, batches in it.held_against_reals():
        metric = PixelFrechet(channels=it.run.data.channels)
        figures[name] = fed(metric, it.reals, batches)
        if name == "value":
            figures["spread"] = metric.spread()
    return {**figures, **covered(it)}


def covered(it: Subjects) -> Row:
    """`coverage` of the first set's first reals by as many fakes, and how many of each: at most COVERAGE_IMAGES."""
    if it.reals.count <= NEIGHBORS:
        return {}
    reals, fakes = first_features(it.reals.batches(0)), first_features(generate(it.average, it.latents))
    return {"coverage": coverage(reals, fakes, NEIGHBORS), "coverage_count": len(reals)}


def first_features(batches: Iterator[Tensor]) -> Tensor:
    """Of the first COVERAGE_IMAGES images; those after them are neither read nor generated."""
    features: list[Tensor] = []
    room = COVERAGE_IMAGES
    for batch in batches:
        features.append(pixel_features(batch[:room]))
        room -= len(features[-1])
        if not room:
            break
    return torch.cat(features)


def fed(metric: Metric, reals: RealSets, others: Iterator[Tensor]) -> Any:
    """What the metric computes between the first set of reals and `others`."""
    for batch in reals.batches(0):
        metric.update(batch, real=True)
    for batch in others:
        metric.update(batch, real=False)
    return metric.compute()


def ms_ssim(it: Subjects) -> Row:
    """Diversity: mean similarity of random pairs of fakes, beside that of reals. Lower is more diverse."""
    resolution, images = it.reals.images.resolution, it.reals.images
    pairs = min(it.run.evaluation.count, MS_SSIM_IMAGES, len(images)) // 2
    if resolution < 64:
        return {"reason": f"defined from 64 px up, this stage has {resolution}", "count": 0}
    if pairs < 1:
        return {"reason": f"{len(images)} reals make no pair", "count": 0}
    first, second = draw_latents(it.run, "pairs", 2 * pairs).chunk(2)
    fakes, real_pairs = MultiScaleSSIM(), MultiScaleSSIM()
    for a, b in zip(generate(it.average, first), generate(it.average, second), strict=True):
        fakes.update(a, b)
    for ids in np.array_split(it.reals.order[:2 * pairs].reshape(2, pairs), -(-pairs // 32), axis=1):
        real_pairs.update(*(torch.from_numpy(images.pixels(half)) for half in ids))
    return {"value": fakes.compute(), "reals": real_pairs.compute(), "count": 2 * pairs}
