"""What distances see in real images: python -m tests.bench.real_sets SHARDS RESOLUTION [COUNT] [FEATURES]

Two halves of a set of shards, clean against clean, then the second one spoiled in several ways. A distance that is
worth its name puts the clean half nearest, and stronger spoils farther.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from gradine.configs.schema import Data, Evaluation
from gradine.stages.data import Images, read_index
from gradine.stages.distances import FrechetDistance, KernelDistance
from gradine.stages.features import open_network


def noise(images: Tensor, sigma: float) -> Tensor:
    drawn = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + sigma * drawn).round().clamp(0, 255).byte()


def blur(images: Tensor, sigma: float) -> Tensor:
    reach, channels = round(3 * sigma), images.shape[1]
    row = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (row.outer(row) / row.sum() ** 2).expand(channels, 1, -1, -1)
    padded = F.pad(images.float(), [reach] * 4, mode="reflect")
    return F.conv2d(padded, kernel, groups=channels).round().byte()


def repeated(images: Tensor, share: float) -> Tensor:
    """As many, of which only the first `share` are different."""
    few = images[:max(1, round(share * len(images)))]
    return few.repeat(-(-len(images) // len(few)), 1, 1, 1)[:len(images)]


SPOILS = {"clean": lambda images: images, "noise 8": lambda images: noise(images, 8),
          "noise 16": lambda images: noise(images, 16), "noise 32": lambda images: noise(images, 32),
          "blur 0.5": lambda images: blur(images, 0.5), "blur 1": lambda images: blur(images, 1),
          "blur 2": lambda images: blur(images, 2), "5 % of the images": lambda images: repeated(images, 0.05)}


def main(shards: str, resolution: int, count: int, names: list[str]) -> None:
    torch.set_num_threads(1)
    data = Data(source="", shards=shards, cache_gb=0)
    images = Images(replace(data, channels=read_index(data, resolution)["channels"]), resolution)
    count = min(count, len(images) // 2)
    ids = images.ids(0, 0, 2 * count)
    first, second = (torch.from_numpy(images.pixels(half)).contiguous() for half in (ids[:count], ids[count:]))
    for name in names:
        network = open_network(name, Evaluation(), "", "cpu")
        reals = network(first).features
        print(f"{network.name}, {count} + {count} images of {resolution} px: Frechet and kernel distance, 95 %")
        for spoil, change in SPOILS.items():
            fakes, found = network(change(second)).features, []
            for metric in (FrechetDistance(), KernelDistance()):
                metric.update(reals, real=True)
                metric.update(fakes, real=False)
                low, high = metric.interval() or (float("nan"),) * 2
                found.append(f"{metric.compute():10.4g} ({low:.4g} to {high:.4g})")
            print(f"{spoil:>18}  {'  '.join(found)}", flush=True)


if __name__ == "__main__":
    shards, resolution, *rest = sys.argv[1:]
    main(shards, int(resolution), int(rest[0]) if rest else 1_600, rest[1].split(",") if rest[1:] else ["pixels"])
