"""What an evaluation looks at: reals in two sets, fakes generated once, the features of both, a checkpoint's networks.

Images are uint8 [N, C, R, R] at the stage's resolution; features [N, D] float32. What depends on reals alone is kept
on the node and computed once for all checkpoints and runs. Each part is made when a metric first asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradine.configs.schema import Run
from gradine.stages import checkpoint, commits
from gradine.stages.data import Images, data_digest
from gradine.stages.features import Network, Outputs, Unavailable, open_network
from gradine.stages.generate import draw_latents, generate, load_average
from gradine.stages.metrics import MultiScaleSSIM
from gradine.stages.networks import Discriminator, Generator, initialise
from gradine.stages.statistics import Remembered

SWD_IMAGES = 16_384
MS_SSIM_IMAGES = 20_000  # as 10,000 pairs
FROM_FEATURES = {"fd", "kid", "neighbors", "is", "copies"}


class RealSets:
    """Two disjoint sets of `count` reals, or one, in an order of their own: the same images for every checkpoint."""

    def __init__(self, run: Run, images: Images, sets: int) -> None:
        self.images, self.sets = images, sets
        self.order = images.ids(run.training.seed, -len(images), len(images))  # epoch -1: training starts with epoch 0
        self.count = min(run.evaluation.count, len(images) // sets)

    def first(self, count: int) -> Tensor:
        return torch.from_numpy(self.images.pixels(self.order[:count]))

    def batches(self, which: int, count: int | None = None) -> Iterator[Tensor]:
        """uint8 [64, C, R, R] of set 0 or 1, or of its first `count` images."""
        start = which * self.count
        yield from read(self.images, self.order[start:start + (self.count if count is None else count)])


def read(images: Images, ids: np.ndarray) -> Iterator[Tensor]:
    for first in range(0, len(ids), 64):
        yield torch.from_numpy(images.pixels(ids[first:first + 64]))


def images_that_fit(run: Run, resolution: int) -> int:
    """Of each of two sets, in evaluation.memory_gb; 1 at least."""
    return max(1, int(run.evaluation.memory_gb * 1e9 / (2 * run.data.channels * resolution**2)))


@dataclass
class Gathered:
    """What one pass over generated images leaves behind."""

    pixels: list[Tensor] = field(default_factory=list)  # of the first SWD images
    outputs: dict[str, list[Outputs] | Exception] = field(default_factory=dict)  # by setting; why there are none
    similar: MultiScaleSSIM | None = None

    def features(self, setting: str) -> Tensor:
        """[N, D]; raises what the network raised."""
        return torch.cat([each.features for each in self._of(setting)])

    def logits(self, setting: str) -> Tensor:
        logits = [each.logits for each in self._of(setting) if each.logits is not None]
        if not logits:
            raise Unavailable("these features know no classes")
        return torch.cat(logits)

    def _of(self, setting: str) -> list[Outputs]:
        found = self.outputs[setting]
        if isinstance(found, Exception):
            raise found
        return found


class Subjects:
    """The checkpoint's networks, the reals, and what comes of them; each part is made when a metric first asks."""

    def __init__(self, run: Run, path: str, device: torch.device, threads: int, opened: ExitStack) -> None:
        self.run, self.device, self.threads, self.opened = run, device, threads, opened
        self.files = commits.read(path)
        info = commits.state_of(self.files["state.json"])
        self.checkpoint, self.resolution, self.images_seen = Path(path).name, info["resolution"], info["images_seen"]
        self.images = opened.enter_context(closing(Images(run.data, self.resolution, threads)))
        self.reals = RealSets(run, self.images, 2 if run.evaluation.floor else 1)
        self.count = self.reals.count
        self.data = data_digest(run.data, self.resolution)
        self.swd_count = min(self.count, SWD_IMAGES, images_that_fit(run, self.resolution))
        self.average = load_average(run, self.files).to(device)
        self.gallery: Tensor | None = None  # fakes, then as many training images
        self.notes = [*self.images.notes]  # what a person should know of, though the figures come all the same
        self._networks: dict[str, Network | Unavailable] = {}

    def network(self, setting: str) -> Network:
        """Raises Unavailable, the second time as the first."""
        if setting not in self._networks:
            try:
                self._networks[setting] = open_network(setting, self.run.evaluation, self.run.data.cache_dir,
                                                       self.device)
            except Unavailable as reason:
                self._networks[setting] = reason
        found = self._networks[setting]
        if isinstance(found, Unavailable):
            raise found
        return found

    @cached_property
    def untrained(self) -> Generator:
        """A generator of the same shape with the weights that training starts from."""
        generator = Generator(self.run.network, self.resolution, fades=False, image_channels=self.run.data.channels)
        initialise(generator, self.run.training.seed, "generator")
        return generator.to(self.device).eval().requires_grad_(False)

    @cached_property
    def discriminator(self) -> Discriminator:
        fades = self.resolution > self.run.stages[0].resolution
        network = Discriminator(self.run.network, self.resolution, fades, self.run.data.channels)
        checkpoint.load_network(network, "discriminator", self.files)
        return network.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def scores(self, images: Tensor) -> Tensor:
        """[N, C, R, R] in [-1, 1] -> the discriminator's scores of all whole minibatch-stddev groups of them."""
        group = min(4, len(images))
        return self.discriminator(images[:len(images) // group * group].float().to(self.device)).cpu()

    @cached_property
    def latents(self) -> Tensor:
        return draw_latents(self.run, "evaluation", max(self.count, self.ms_ssim_count))

    @property
    def ms_ssim_count(self) -> int:
        wanted = "ms_ssim" in self.run.evaluation.metrics and self.resolution >= 64
        return min(self.run.evaluation.count, MS_SSIM_IMAGES, len(self.images)) // 2 * 2 if wanted else 0

    @cached_property
    def fakes(self) -> Gathered:
        return self.gathered(self.average, self.latents, MultiScaleSSIM() if self.ms_ssim_count else None)

    @cached_property
    def untrained_fakes(self) -> Gathered:
        return self.gathered(self.untrained, self.latents[:self.count], None)

    def gathered(self, generator: Generator, latents: Tensor, similar: MultiScaleSSIM | None) -> Gathered:
        """Generates each image once: pixels for SWD, features of the first `count`, pairs for MS-SSIM."""
        left = Gathered(similar=similar)
        if FROM_FEATURES & {*self.run.evaluation.metrics}:
            left.outputs = {setting: [] for setting in self.run.evaluation.features}
        seen = 0
        for batch in generate(generator, latents):
            if seen < self.swd_count and "swd" in self.run.evaluation.metrics:
                left.pixels.append(batch[:self.swd_count - seen])
            if similar is not None and (pairs := min(len(batch), self.ms_ssim_count - seen) // 2) > 0:
                similar.update(batch[:2 * pairs:2], batch[1:2 * pairs:2])
            for setting, outputs in left.outputs.items():
                if seen < self.count and not isinstance(outputs, Exception):
                    try:
                        outputs.append(self.network(setting)(batch[:self.count - seen]))
                    except Exception as reason:
                        left.outputs[setting] = reason
            seen += len(batch)
        return left

    def remembered(self, features: str | None, **facts: Any) -> Remembered:
        """Keeps what depends on these reals, and on the network whose digest `features` is, alone."""
        setting = self.run.data
        keeper = Remembered(Path(setting.cache_dir).expanduser() / "statistics", {
            "data": self.data, "resolution": self.resolution, "seed": self.run.training.seed, "count": self.count,
            "sets": self.reals.sets, "features": features, **facts}, int(setting.cache_gb * 1e9))
        keeper.notes = self.notes
        return keeper

    def remembered_of(self, setting: str, with_held_out: bool = False) -> Remembered:
        held_out = with_held_out and self.run.evaluation.held_out
        return self.remembered(self.network(setting).digest, **(
            {"held_out": data_digest(self.held_out_images.data, self.resolution)} if held_out else {}))

    def real_outputs(self, setting: str, which: int) -> Outputs:
        """Features, and logits if there are any, of the first or second set of reals."""
        return self._outputs(setting, self.remembered_of(setting), f"set-{which}", lambda: self.reals.batches(which))

    def held_out(self, setting: str) -> Outputs | None:
        if not self.run.evaluation.held_out:
            return None
        return self._outputs(setting, self.remembered_of(setting, with_held_out=True), "held-out",
                             lambda: self.held_out_batches(self.run.evaluation.count))

    def held_out_batches(self, count: int) -> Iterator[Tensor]:
        return read(self.held_out_images, np.arange(min(count, len(self.held_out_images))))

    @cached_property
    def held_out_images(self) -> Images:
        data = replace(self.run.data, shards=self.run.evaluation.held_out, sampling="raw")
        return self.opened.enter_context(closing(Images(data, self.resolution, self.threads)))

    def _outputs(self, setting: str, keeper: Remembered, name: str, batches: Callable[[], Iterator[Tensor]]) -> Outputs:
        def compute() -> dict[str, Tensor]:
            made = [self.network(setting)(batch) for batch in batches()]
            logits = [each.logits for each in made if each.logits is not None]
            return {"features": torch.cat([each.features for each in made]),
                    **({"logits": torch.cat(logits)} if logits else {})}

        kept = keeper(name, compute)
        return Outputs(kept["features"], kept.get("logits"))

    def floors(self, keeper: Remembered, name: str, compute: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Figures of reals against reals; {} where there is one set alone."""
        if self.reals.sets < 2:
            return {}
        kept = keeper(f"floor-{name}", lambda: {key: torch.tensor(value, dtype=torch.float64)
                                                for key, value in compute().items()})
        return {key: float(value) for key, value in kept.items()}
