"""A stage's figures and pictures, from a stored checkpoint: the averaged generator at alpha = 1, at its resolution.

Reals are split in two equal sets: the first is what fakes are held against, the second gives the noise floor, the
distance that two sets of reals have by chance. Fakes, reals and floor always have the same count, and it is stated.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradine.configs.schema import Run
from gradine.stages import checkpoint
from gradine.stages.data import Images
from gradine.stages.generate import draw_latents, generate, grid, load_average, save_png
from gradine.stages.metrics import MultiScaleSSIM, PixelFrechet, SlicedWasserstein, sliced_wasserstein_count
from gradine.stages.networks import Generator, initialise

Row = dict[str, Any]
MS_SSIM_IMAGES = 20_000  # as 10,000 pairs


def evaluate(run: Run, path: str, out: str, threads: int = 1) -> list[Row]:
    """Writes the sample and real grids below `out`/samples; returns one row per metric for metrics.jsonl.

    Raises checkpoint.Damaged for a checkpoint that must not be used.
    """
    torch.set_num_threads(threads)
    device = torch.device("cuda" if run.evaluation.gpus and torch.cuda.is_available() else "cpu")
    files = checkpoint.read(path)
    info = json.loads(files["state.json"])
    resolution, images_seen = info["resolution"], info["images_seen"]
    average = load_average(run, files).to(device)
    images = Images.open(run.data, resolution, threads)
    samples = Path(out) / "samples"
    shown = torch.cat(list(generate(average, draw_latents(run, "samples", run.evaluation.samples))))
    save_png(grid(shown), samples / f"r{resolution:04d}-{images_seen:09d}.png")
    reals = RealSets(run, images)
    save_png(grid(reals.first(min(run.evaluation.samples, len(images)))), samples / f"r{resolution:04d}-reals.png")

    untrained = None
    if run.evaluation.untrained:
        untrained = Generator(run.network, resolution, fades=False)
        initialise(untrained, run.training.seed, "generator")
        untrained.to(device)
    latents = draw_latents(run, "evaluation", reals.count)
    rows = []
    for metric, compute in (("swd", swd), ("frechet_pixels16", frechet), ("ms_ssim", ms_ssim)):
        began = time.perf_counter()
        figures = compute(run, reals, average, untrained, latents)
        rows.append({"metric": metric, "value": None, "reason": None, "levels": None, "floor": None, "untrained": None,
                     "reals": None, "resolution": resolution, "checkpoint": Path(path).name,
                     "images_seen": images_seen, "count": reals.count, "seed": run.training.seed, **figures,
                     "seconds": round(time.perf_counter() - began, 2)})
    images.close()
    return rows


class RealSets:
    """Two disjoint sets of `count` reals in an order of their own, and no more than fit evaluation.memory_gb."""

    def __init__(self, run: Run, images: Images) -> None:
        self.images = images
        order = images.ids(run.training.seed, -len(images), len(images))  # epoch -1: training starts with epoch 0
        fitting = int(run.evaluation.memory_gb * 1e9 / (2 * 3 * images.resolution**2))
        self.count = max(1, min(run.evaluation.count, sliced_wasserstein_count(len(images)), fitting))
        self.order = order

    def first(self, count: int) -> Tensor:
        return torch.from_numpy(self.images.pixels(self.order[:count]))

    def feed(self, start: int, receive: Callable[[Tensor], None]) -> None:
        """Hands over set 0 or 1 (start = 0 or count), a few images at a time."""
        for ids in np.array_split(self.order[start:start + self.count], -(-self.count // 64)):
            receive(torch.from_numpy(self.images.pixels(ids)))


def swd(run: Run, reals: RealSets, average: Generator, untrained: Generator | None, latents: Tensor) -> Row:
    """Sliced Wasserstein distance x 1e3: `value` is the average over `levels`."""
    if reals.count * 2 > len(reals.images):
        return {"reason": f"{len(reals.images)} reals are too few for two sets"}

    def distance(feed: Callable[[Callable[[Tensor], None]], None]) -> dict[str, float]:
        metric = SlicedWasserstein(reals.images.resolution, seed=run.training.seed)
        reals.feed(0, lambda batch: metric.update(batch, real=True))
        feed(lambda batch: metric.update(batch, real=False))
        return metric.compute()

    levels = distance(lambda receive: feed_fakes(average, latents, receive))
    floor = distance(lambda receive: reals.feed(reals.count, receive))
    start = distance(lambda receive: feed_fakes(untrained, latents, receive)) if untrained else {"average": None}
    return {"value": levels.pop("average"), "levels": levels, "floor": floor["average"], "untrained": start["average"]}


def frechet(run: Run, reals: RealSets, average: Generator, untrained: Generator | None, latents: Tensor) -> Row:
    """Frechet distance on pixels reduced to at most 16x16; needs no feature network, and is no FID."""
    if reals.count < 2:
        return {"reason": f"{len(reals.images)} reals are too few for two sets of at least 2"}

    def distance(feed: Callable[[Callable[[Tensor], None]], None]) -> float:
        metric = PixelFrechet()
        reals.feed(0, lambda batch: metric.update(batch, real=True))
        feed(lambda batch: metric.update(batch, real=False))
        return metric.compute()

    return {"value": distance(lambda receive: feed_fakes(average, latents, receive)),
            "floor": distance(lambda receive: reals.feed(reals.count, receive)),
            "untrained": distance(lambda receive: feed_fakes(untrained, latents, receive)) if untrained else None}


def ms_ssim(run: Run, reals: RealSets, average: Generator, untrained: Generator | None, latents: Tensor) -> Row:
    """Diversity: mean similarity of random pairs of fakes, beside that of reals. Lower is more diverse."""
    resolution = reals.images.resolution
    pairs = min(run.evaluation.count, MS_SSIM_IMAGES, len(reals.images)) // 2
    if resolution < 64:
        return {"reason": f"defined from 64 px up, this stage has {resolution}", "count": 0}
    if pairs < 1:
        return {"reason": f"{len(reals.images)} reals make no pair", "count": 0}
    first, second = draw_latents(run, "pairs", 2 * pairs).chunk(2)
    fakes, real_pairs = MultiScaleSSIM(), MultiScaleSSIM()
    for a, b in zip(generate(average, first), generate(average, second), strict=True):
        fakes.update(a, b)
    for ids in np.array_split(reals.order[:2 * pairs].reshape(2, pairs), -(-pairs // 32), axis=1):
        real_pairs.update(*(torch.from_numpy(reals.images.pixels(half)) for half in ids))
    return {"value": fakes.compute(), "reals": real_pairs.compute(), "count": 2 * pairs}


def feed_fakes(generator: Generator, latents: Tensor, receive: Callable[[Tensor], None]) -> None:
    for batch in generate(generator, latents):
        receive(batch)
