"""What an evaluation looks at: reals in two sets, fakes generated once, the features of both, a checkpoint's networks.

Images are uint8 [N, C, R, R] at the stage's resolution; features [N, D] float32. What depends on reals alone is kept
on the node and computed once for all checkpoints and runs. Each part is made when a metric first asks for it.
"""

from __future__ import annotations

import hashlib
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
from gradine.stages.data import Images, data_digest, labels_of
from gradine.stages.families import AnyDiscriminator, AnyGenerator, new_discriminator, new_generator
from gradine.stages.features import Network, Outputs, Unavailable, open_network
from gradine.stages.generate import draw_latents, generate, images_at_once, load_average
from gradine.stages.latents import one_hot
from gradine.stages.metrics import MultiScaleSSIM
from gradine.stages.networks import Judgement, initialise
from gradine.stages.statistics import Remembered

SWD_IMAGES = 16_384
MS_SSIM_IMAGES = 20_000  # as 10,000 pairs
FROM_FEATURES = {"fd", "kid", "neighbors", "is", "copies", "classes"}


class RealSets:
    """Two disjoint sets of `count` reals, or one: the same images for every checkpoint and run."""

    def __init__(self, run: Run, images: Images, sets: int) -> None:
        self.images, self.sets = images, sets
        self.order = shuffled(len(images))
        self.count = min(run.evaluation.count, len(images) // sets)

    def first(self, count: int) -> Tensor:
        return torch.from_numpy(self.images.pixels(self.order[:count]))

    def ids(self, which: int) -> np.ndarray:
        """Of set 0 or 1."""
        return self.order[which * self.count:(which + 1) * self.count]

    def batches(self, which: int, count: int) -> Iterator[Tensor]:
        """The first `count` images of set 0 or 1, in the order of the shards."""
        yield from read(self.images, np.sort(self.ids(which)[:count]))


def shuffled(count: int) -> np.ndarray:
    """Sample ids 0..count-1, each place equally likely: shards may be sorted by class."""
    return np.random.default_rng(0).permutation(count)


def read(images: Images, ids: np.ndarray) -> Iterator[Tensor]:
    """uint8 [n, C, R, R], a few at a time."""
    step = 2 * images_at_once(images.resolution)
    for first in range(0, len(ids), step):
        yield torch.from_numpy(images.pixels(ids[first:first + step]))


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
        self._networks: dict[str, Network | Exception] = {}
        self._looked_at: dict[tuple[str, int], Outputs] = {}

    def network(self, setting: str) -> Network:
        """Raises Unavailable, or what else there was, the second time as the first."""
        if setting not in self._networks:
            try:
                self._networks[setting] = open_network(setting, self.run.evaluation, self.run.data.cache_dir,
                                                       self.device)
            except Exception as reason:  # no memory on a device, say: the metrics of the other features are computed
                self._networks[setting] = reason
        found = self._networks[setting]
        if isinstance(found, Exception):
            raise found
        return found

    @cached_property
    def untrained(self) -> AnyGenerator:
        """A generator of the same shape with the weights that training starts from."""
        generator = new_generator(self.run.network, self.resolution, False, self.run.data.channels)
        initialise(generator, self.run.training.seed, "generator")
        return generator.to(self.device).eval().requires_grad_(False)

    @cached_property
    def discriminator(self) -> AnyDiscriminator:
        """Of an autoencoder its encoder."""
        fades = self.resolution > self.run.stages[0].resolution
        network = new_discriminator(self.run.network, self.resolution, fades, self.run.data.channels)
        checkpoint.load_network(network, "discriminator", self.files)
        return network.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def judged(self, images: Tensor, labels: Tensor | None) -> Judgement:
        """[N, C, R, R] in [-1, 1], class numbers [N] -> what D says of all whole minibatch-stddev groups of them."""
        whole, step = len(images) // 4 * 4, images_at_once(self.resolution)
        found = []
        for first in range(0, whole, step):
            part = slice(first, min(first + step, whole))
            wanted = None if labels is None else one_hot(labels[part], self.run.network.classes).to(self.device)
            shown = images[part].float().to(self.device)
            found.append(self.discriminator.linearised(shown, labels=wanted)[0])
        if not found:
            return Judgement(*torch.zeros(3, 0, 0).unbind())._replace(scores=torch.zeros(0))
        return Judgement(*(torch.cat(parts).cpu() for parts in zip(*found, strict=True)))

    @cached_property
    def labels(self) -> Tensor | None:
        """Class numbers of the reals, int64, in their shuffled order, which those of the fakes follow; None: the run
        knows no classes."""
        if not self.run.network.classes:
            return None
        return labels_of(self.images, self.run.network.classes)[self.reals.order]

    def first_labels(self, count: int) -> Tensor | None:
        return None if self.labels is None else self.labels[:count]

    @cached_property
    def latents(self) -> Tensor:
        count = max(self.count, self.ms_ssim_count)
        return draw_latents(self.run, "evaluation", count, labels=self.first_labels(count))

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

    def gathered(self, generator: AnyGenerator, latents: Tensor, similar: MultiScaleSSIM | None) -> Gathered:
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

    def remembered(self, **facts: Any) -> Remembered:
        """Keeps what depends on these reals and on `facts` alone."""
        setting = self.run.data
        keeper = Remembered(Path(setting.cache_dir).expanduser() / "statistics", {
            "data": self.data, "resolution": self.resolution, "count": self.count, "sets": self.reals.sets, **facts},
            int(setting.cache_gb * 1e9))
        keeper.notes = self.notes
        return keeper

    def remembered_of(self, setting: str, *looked_at: Outputs) -> Remembered:
        """Keeps what depends on these very features of reals: other devices give them other last bits."""
        digests = [hashlib.sha256(each.features.numpy().tobytes()).hexdigest() for each in looked_at]
        return self.remembered(features=self.network(setting).digest, rows=digests)

    def real_outputs(self, setting: str, which: int) -> Outputs:
        """Features, and logits if there are any, of the first or second set of reals, in their shuffled order."""
        if (setting, which) not in self._looked_at:
            keeper = self.remembered(features=self.network(setting).digest)
            self._looked_at[setting, which] = self._outputs(setting, keeper, f"set-{which}", self.images,
                                                            self.reals.ids(which))
        return self._looked_at[setting, which]

    def held_out(self, setting: str, most: int) -> Outputs | None:
        """Of the first `most` of evaluation.held_out, in a shuffled order too."""
        if not self.run.evaluation.held_out:
            return None
        ids = self.held_out_ids(most)
        keeper = self.remembered(features=self.network(setting).digest, held_out=self.held_out_digest, of=len(ids))
        return self._outputs(setting, keeper, "held-out", self.held_out_images, ids)

    def held_out_ids(self, most: int) -> np.ndarray:
        return shuffled(len(self.held_out_images))[:most]

    @property
    def held_out_digest(self) -> str:
        return data_digest(self.held_out_images.data, self.resolution)

    @cached_property
    def held_out_images(self) -> Images:
        data = replace(self.run.data, shards=self.run.evaluation.held_out, sampling="raw")
        return self.opened.enter_context(closing(Images(data, self.resolution, self.threads)))

    @cached_property
    def held_out_labels(self) -> Tensor:
        """int64 [len], numbered as the classes trained on, whatever their numbers are in that set."""
        own, names = self.images.index["classes"], self.held_out_images.index["classes"]
        if missing := {*names} - {*own}:
            raise ValueError(f"evaluation.held_out has classes that data.shards have not: {', '.join(sorted(missing))}")
        return torch.tensor([own.index(name) for name in names])[torch.from_numpy(self.held_out_images.labels)]

    def _outputs(self, setting: str, keeper: Remembered, name: str, images: Images, ids: np.ndarray) -> Outputs:
        """Read in the order of the shards, given in that of `ids`."""
        network, place = self.network(setting), torch.from_numpy(np.argsort(np.argsort(ids)))

        def compute() -> dict[str, Tensor]:
            made = [network(batch) for batch in read(images, np.sort(ids))]
            logits = [each.logits for each in made if each.logits is not None]
            return {"features": torch.cat([each.features for each in made])[place],
                    **({"logits": torch.cat(logits)[place]} if logits else {})}

        kept = keeper(name, compute)
        return Outputs(kept["features"], kept.get("logits"))

    def floors(self, keeper: Remembered, name: str, compute: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Figures of reals against reals; {} where there is one set alone."""
        if self.reals.sets < 2:
            return {}
        kept = keeper(f"floor-{name}", lambda: {key: torch.tensor(value, dtype=torch.float64)
                                                for key, value in compute().items()})
        return {key: float(value) for key, value in kept.items()}
