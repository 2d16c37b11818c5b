"""Growth as pure arithmetic, without torch: images seen -> stage, phase, alpha, learning rate, batch share.

The clock is `images_seen`: reals shown to the discriminator, an int. A kimg is 1,000 of them. `alpha` is the weight
of the NEW layers, 0 at the start of a fade, 1 at its end (papers and programs disagree on the direction).
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from gradine.configs.schema import Network, Run, Stage


@dataclass(frozen=True)
class Phase:
    """A fade or a hold: the steps that start at `start <= images_seen < end`."""

    stage: int  # index into run.stages
    resolution: int
    kind: str  # `fade` or `hold`
    start: int
    images: int  # as configured; the phase lasts ceil(images / batch_size) whole batches
    batch_size: int

    @property
    def end(self) -> int:
        return self.start + math.ceil(self.images / self.batch_size) * self.batch_size


@dataclass(frozen=True)
class Moment:
    """What holds for the step that starts at `images_seen`."""

    phase: Phase
    images_seen: int
    alpha: float
    learning_rate: float

    @property
    def starts_phase(self) -> bool:
        """Adam's state is reset here: at the start of a fade, and at its end."""
        return self.images_seen == self.phase.start


@dataclass(frozen=True)
class Schedule:
    phases: tuple[Phase, ...]
    learning_rates: tuple[float, ...]  # per stage
    lr_ramp_images: int

    @property
    def end(self) -> int:
        return self.phases[-1].end

    def stage_span(self, stage: int) -> tuple[int, int]:
        """First and last `images_seen` of a stage; the last is where the next one starts."""
        own = [phase for phase in self.phases if phase.stage == stage]
        return own[0].start, own[-1].end


def schedule(run: Run) -> Schedule:
    """The run's phases, end to end. The first stage has nothing to fade from, so it only holds."""
    phases: list[Phase] = []
    start = 0
    for index, stage in enumerate(run.stages):
        for kind, images in (("fade", stage.fade_images if index else 0), ("hold", stage.hold_images)):
            if images:
                phases.append(Phase(index, stage.resolution, kind, start, images, stage.batch_size))
                start = phases[-1].end
    rates = tuple(stage.learning_rate for stage in run.stages)
    return Schedule(tuple(phases), rates, run.training.lr_ramp_images)


def at(plan: Schedule, images_seen: int) -> Moment:
    """The moment of the step that starts at `images_seen`, which must lie inside the schedule."""
    if not 0 <= images_seen < plan.end:
        raise ValueError(f"images_seen={images_seen} lies outside the schedule 0..{plan.end}")
    phase = plan.phases[bisect.bisect_right([p.start for p in plan.phases], images_seen) - 1]
    alpha = (images_seen - phase.start) / phase.images if phase.kind == "fade" else 1.0
    ramp = min(1.0, images_seen / plan.lr_ramp_images) if plan.lr_ramp_images else 1.0
    return Moment(phase, images_seen, alpha, plan.learning_rates[phase.stage] * ramp)


# Shares: who computes which rows of the global batch -------------------------------------------------------------


def group_size(batch_size: int) -> int:
    """Samples per minibatch-stddev group (section 3 of the paper: at most 4)."""
    return min(4, batch_size)


def share_rows(batch_size: int, low: int, high: int) -> list[int]:
    """Rows of the global batch that make up the stddev groups low..high-1.

    Groups are strided: row n belongs to group n mod M, M = batch_size / group_size. The strided formula applied to
    just these rows finds the same groups again.
    """
    groups = batch_size // group_size(batch_size)
    return [member * groups + group for member in range(group_size(batch_size)) for group in range(low, high)]


def micro_batches(stage: Stage, rank: int, workers: int) -> list[list[int]]:
    """The rows of each forward pass of one worker, in the order it accumulates them."""
    size = group_size(stage.batch_size)
    own = stage.batch_size // size // workers
    step = (stage.micro_batch or stage.batch_size // workers) // size
    return [share_rows(stage.batch_size, low, low + step) for low in range(rank * own, (rank + 1) * own, step)]


def random_seed(seed: int, purpose: str, images_seen: int = 0) -> int:
    """63 bits that depend on nothing but (seed, purpose, images_seen): no rank, no history."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{images_seen}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


# Sizes: what a network costs ---------------------------------------------------------------------------------------


def channels(network: Network, resolution: int) -> int:
    """Width of the block at `resolution` (nf(r - 1) with resolution = 2**r)."""
    return min(network.fmap_base // (resolution // 2), network.fmap_max)


def resolutions(final: int) -> Iterator[int]:
    """4, 8, ... final."""
    size = 4
    while size <= final:
        yield size
        size *= 2


KERNELS = {"transposed": (16, 4), "nearest": (9, 9), "shuffle": (36, 9)}  # of a pair of maps: weights, MACs a pixel


def layers(network: Network, resolution: int, image_channels: int = 3) -> list[tuple[int, int, int, int]]:
    """Inputs, outputs, weights of such a pair and MACs of it, of a generator's layers that is not progressive."""
    if network.kind == "mlp":
        widths = [network.input_size, *[network.mlp.width] * network.mlp.depth, image_channels * resolution**2]
        return [(*pair, 1, 1) for pair in itertools.pairwise(widths)]
    weights, macs = KERNELS[network.layers.upsampling]
    widths = [channels(network, size) for size in resolutions(resolution // 2)] + [image_channels]
    larger = [(older, own, weights, macs * 64 * 4**n) for n, (older, own) in enumerate(itertools.pairwise(widths))]
    return [(network.input_size, widths[0], 16, 16), *larger]


@lru_cache
def macs_per_image(network: Network, resolution: int, image_channels: int = 3) -> int:
    """Multiply-accumulates of one generator forward as the paper writes it; the discriminator's is about equal."""
    if network.kind != "progressive":
        return sum(older * own * macs for older, own, _, macs in layers(network, resolution, image_channels))
    width = channels(network, 4)
    total = network.input_size * width * 16 + width * width * 9 * 16
    for size in list(resolutions(resolution))[1:]:
        older, width = width, channels(network, size)
        total += (older + width) * width * 9 * size * size
    return total + width * image_channels * resolution * resolution


def parameters(network: Network, resolution: int, image_channels: int = 3) -> int:
    """Parameters of the generator alone with its last to-RGB, about the discriminator's too."""
    if network.kind != "progressive":
        made = layers(network, resolution, image_channels)
        batch_norm = network.convolutional and network.layers.generator_norm == "batch"
        scales = sum(own for _, own, *_ in made[:-1]) if batch_norm else 0
        return sum(older * own * weights + own for older, own, weights, _ in made) + scales
    width = channels(network, 4)
    total = network.input_size * width * 16 + width + width * width * 9 + width
    for size in list(resolutions(resolution))[1:]:
        older, width = width, channels(network, size)
        total += (older + width) * width * 9 + 2 * width
    return total + (width + 1) * image_channels


def images_between(phases: Sequence[Phase], start: int, end: int, stage: int) -> int:
    """Images of `stage` that lie in start..end."""
    return sum(max(0, min(end, p.end) - max(start, p.start)) for p in phases if p.stage == stage)
