"""What a cluster would make of a run, on paper: workers, time, memory, network and storage of each stage.

Pure: settings, what a run has measured and what its shards hold in, predictions out. Sizes are bytes, times seconds.
A step of n workers takes compute / n, then two sums over all workers (D's gradients, G's). A sum is a ring: each worker
sends 2 (n - 1) / n of the vector in 2 (n - 1) messages. Reading goes on beside the steps, so the slower one counts;
what a stage reads before its first step comes on top.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gradine.configs.combinations import coupling
from gradine.configs.schema import Network, Run, Stage, require
from gradine.pipeline import plan as planning
from gradine.pipeline.display import duration
from gradine.stages import growth
from gradine.stages.store import is_remote

# Assumed of any cluster; `gradine plan --nodes` shows them below its table.
NETWORK_BYTES_S = 1.25e9  # 10 Gbit/s, each node's way out
LATENCY_S = 50e-6  # of a message
INSIDE_BYTES_S = {"cpu": 1.2e9, "gpu": 10e9}  # between workers of a node; cpu: gloo on loopback, as measured
STORAGE_BYTES_S = 1e9  # the shared disk or object store, all nodes together
# Measured once, per core: pixels decoded a second, and floats of the sliced Wasserstein distance sorted.
DECODED_PX_S = {"raw": 3_600e6, "jpeg": 196e6, "webp": 50e6, "png": 36e6}
SORTED_FLOATS_S = 22e6
SIZE_OF_RAW = {"raw": 1.0, "jpeg": 0.2, "webp": 0.4, "png": 0.55}  # of photographs, where no shards tell
PATCHES, DIRECTIONS, MOST_SORTED, PAIRED, PATHS, SCORED = 128, 512, 16_384, 20_000, 1_000, 2_000  # of an evaluation
LOOKED_AT_S = {"lite0": 43, "lite0_128": 130, "inception": 5, "inception_clean": 5}  # images a second and core
TAR = 512  # bytes of a member's header, and what its content is rounded up to


@dataclass(frozen=True)
class Nodes:
    count: int
    workers: int  # that each has the cores or GPUs for

    @staticmethod
    def of(text: str) -> Nodes:
        """`8x4`: eight nodes with room for four workers each. UserError for anything else."""
        found = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", text)
        require(bool(found), f"--nodes {text!r} is not NODESxWORKERS, two whole numbers from 1 up, e.g. 8x4: "
                             "8 nodes with room for 4 workers each.")
        assert found
        return Nodes(int(found[1]), int(found[2]))


@dataclass(frozen=True)
class Level:
    """The images of one resolution."""

    image_bytes: float  # in its tars
    images: int | None = None  # None: unknown, there are no shards yet
    # `cache`: decoded once on each node; `disk`: a shared one, each worker its own rows; `node`: downloaded once by
    # each; `remote`: by each in every epoch. Whichever it is, each node reads every shard whole once, for its sha256.
    read_from: str = "disk"


@dataclass(frozen=True)
class Measured:
    """What a run's own ledger tells, by resolution."""

    worker_s: dict[int, float] = field(default_factory=dict)  # one worker's time for an image, steps whole
    evaluation_s: dict[int, float] = field(default_factory=dict)

    @staticmethod
    def of(history: Iterable[dict[str, Any]]) -> Measured:
        """Medians over the ticks and evaluations of a ledger."""
        workers, work, evaluations = 1, dict[int, list[float]](), dict[int, list[float]]()
        for line in history:
            if line["event"] == "stage_start":
                workers = line["workers"]
            elif line["event"] == "tick" and line["images_per_s"]:
                work.setdefault(line["resolution"], []).append(workers / line["images_per_s"])
            elif line["event"] == "evaluation" and not line["error"]:
                evaluations.setdefault(line["resolution"], []).append(line["seconds"])
        return Measured({size: statistics.median(times) for size, times in work.items()},
                        {size: statistics.median(times) for size, times in evaluations.items()})


@dataclass(frozen=True)
class Prediction:
    """One stage on so many workers. `busy_s`: what its parts take, of which the largest bounds it."""

    resolution: int
    workers: int
    nodes: int
    because: str  # why there are no more workers
    memory_gb: float  # of a worker
    step_s: float
    seconds: float  # of what is left of the stage, `start_s` included
    start_s: float  # each worker reads the checkpoint; each node the level, as far as that is not beside the steps
    sent: float  # by each worker for a step's two sums
    leaving: float  # of that, what leaves each node
    read_s: float  # bytes a second that each node reads, after its first epoch
    level: Level
    checkpoint: int  # bytes
    evaluation_s: float  # of all its checkpoints that are measured, beside the training
    busy_s: dict[str, float]
    measured: bool

    @property
    def bound(self) -> str:
        return max(self.busy_s, key=lambda name: self.busy_s[name])


# What a stage's networks weigh -----------------------------------------------------------------------------------


def generator_parameters(network: Network, resolution: int, fades: bool, image_channels: int = 3) -> int:
    """With the older to-RGB that a stage which fades has too."""
    older = (growth.channels(network, resolution // 2) + 1) * image_channels if fades else 0
    return growth.parameters(network, resolution, image_channels) + older


def discriminator_parameters(network: Network, resolution: int, fades: bool, image_channels: int = 3) -> int:
    """Of networks that are not progressive roughly."""
    if network.kind != "progressive":
        return growth.parameters(network, resolution, image_channels)
    width, hidden = growth.channels(network, 4), min(network.fmap_base, network.fmap_max)
    total = (width + 1) * width * 9 + width + width * 16 * hidden + hidden + hidden + 1
    for size in list(growth.resolutions(resolution))[1:]:
        own, smaller = growth.channels(network, size), growth.channels(network, size // 2)
        total += own * own * 9 + own + own * smaller * 9 + smaller
    shown = [resolution // 2, resolution] if fades else [resolution]
    return total + sum((image_channels + 1) * growth.channels(network, size) for size in shown)


def gradient_bytes(run: Run, index: int) -> tuple[int, int]:
    """Of D and of G, as float32 whatever the precision of the convolutions."""
    network, resolution, channels = run.network, run.stages[index].resolution, run.data.channels
    return (4 * discriminator_parameters(network, resolution, index > 0, channels),
            4 * generator_parameters(network, resolution, index > 0, channels))


def checkpoint_bytes(run: Run, index: int) -> int:
    """G, D, the average of G, and two moments of each parameter of both."""
    of_d, of_g = gradient_bytes(run, index)
    return 3 * of_d + 4 * of_g


# How long things take --------------------------------------------------------------------------------------------


def ring_bytes(size: float, workers: int) -> float:
    """What each worker sends while a vector of `size` bytes is summed over all of them."""
    return 2 * (workers - 1) / workers * size


def sum_s(size: float, workers: int, bytes_s: float) -> float:
    return 2 * (workers - 1) * LATENCY_S + ring_bytes(size, workers) / bytes_s


def level_of(run: Run, resolution: int, images: int | None = None, size: int | None = None) -> Level:
    """`size`: bytes of the level's shards; without it an assumption."""
    data, raw = run.data, resolution**2 * run.data.channels
    content = raw * SIZE_OF_RAW[data.encoding_of(resolution)]
    each = size / images if size and images else TAR + math.ceil(content / TAR) * TAR
    if images is not None and images * raw <= data.cache_gb * 1e9:
        return Level(each, images, "cache")
    if not is_remote(data.shards):
        return Level(each, images, "disk")
    return Level(each, images, "node" if images and images * each <= data.download_gb * 1e9 else "remote")


def levels_of(run: Run, indices: dict[int, dict[str, Any]]) -> dict[int, Level]:
    """By resolution; `indices` are the index.json of the levels that are there."""
    known = {size: (index["images"], sum(shard["bytes"] for shard in index["shards"]))
             for size, index in indices.items()}
    return {stage.resolution: level_of(run, stage.resolution, *known.get(stage.resolution, ())) for stage in run.stages}


def evaluation_s(run: Run, resolution: int, images: int | None) -> float:
    """The generator's passes, the feature networks', and the sorting of patches; what else is computed is less."""
    asked = run.evaluation
    known = images if images is not None else 2 * max(asked.count, MOST_SORTED)
    count = max(1, min(asked.count, known // (1 + asked.floor)))
    fitting = int(asked.memory_gb * 1e9 / (2 * run.data.channels * resolution**2))
    sorted_images = max(1, min(count, MOST_SORTED, fitting))
    paired = min(asked.count, PAIRED, known) if resolution >= 64 and "ms_ssim" in asked.metrics else 0
    passes = max(count, paired) + count * asked.untrained
    steps = 2 * min(count, PATHS) * ("path_length" in asked.metrics)
    passes += steps + min(count, SCORED) * ("discriminator" in asked.metrics)
    threads, gpu = max(1, int(asked.cpus)), planning.ASSUMED_GMACS["gpu"] * asked.gpus
    faster = gpu / planning.ASSUMED_GMACS["cpu"] or threads  # than one core
    generating = passes * planning.macs_per_image(run, resolution) / (1e9 * planning.ASSUMED_GMACS["cpu"] * faster)
    seen = count * (2 + asked.floor + asked.untrained) + steps
    looking = sum(seen / LOOKED_AT_S[name] for name in asked.features if name in LOOKED_AT_S) / faster
    sets = 2 * (1 + asked.floor + asked.untrained) * ("swd" in asked.metrics)  # each distance sorts both of its sets
    pyramid = max(1, int(math.log2(resolution)) - 3)
    floats = pyramid * sets * DIRECTIONS * sorted_images * (PATCHES if resolution > 4 else 1)
    return generating + looking + floats / SORTED_FLOATS_S / threads


def worker_s(run: Run, stage: Stage, measured: Measured) -> float:
    """One worker's time for one image."""
    if stage.resolution in measured.worker_s:
        return measured.worker_s[stage.resolution]
    units, device = (max(1.0, stage.gpus), "gpu") if stage.gpus else (max(1, stage.threads), "cpu")
    work = planning.MACS_PER_IMAGE_AND_STEP * planning.macs_per_image(run, stage.resolution)
    return work / (planning.ASSUMED_GMACS[device] * 1e9 * units)


# Which workers a stage gets --------------------------------------------------------------------------------------


def worker_choices(stage: Stage, nodes: Nodes, micro: int) -> list[int]:
    """The numbers of workers a stage may have there. `micro`: its micro-batch if that is set, 0 if it may shrink."""
    groups, room = stage.batch_size // growth.group_size(stage.batch_size), room_for(stage, nodes)
    return [n for n in range(1, min(groups, room) + 1)
            if groups % n == 0 and (not micro or stage.batch_size // n % micro == 0)]


def room_for(stage: Stage, nodes: Nodes) -> int:
    if 0 < stage.gpus < 1:  # a part of a GPU is for a stage's only worker
        return 1
    return {"STRICT_PACK": nodes.workers, "STRICT_SPREAD": nodes.count}.get(stage.placement,
                                                                            nodes.count * nodes.workers)


def nodes_for(stage: Stage, nodes: Nodes, workers: int) -> int:
    """How many nodes these workers lie on."""
    if "SPREAD" in stage.placement:
        return min(nodes.count, workers)
    return math.ceil(workers / nodes.workers)


def links_out(stage: Stage, nodes: Nodes, workers: int) -> int:
    """Of the ring of workers, how many links leave one node: packed, neighbours in the ring share a node."""
    on = nodes_for(stage, nodes, workers)
    return 0 if on == 1 else math.ceil(workers / on) if "SPREAD" in stage.placement else 1


def predict(run: Run, index: int, nodes: Nodes, left: int, micro: int, level: Level, measured: Measured) -> Prediction:
    """The stage on the number of workers that is fastest there; of equally fast ones, the fewest. `left`: images."""
    stage = run.stages[index]
    choices = [1] if (whole := coupling(run)) else worker_choices(stage, nodes, micro)
    best = min((_with(run, index, nodes, left, level, measured, n) for n in choices),
               key=lambda it: it.seconds or it.step_s)
    groups, room = stage.batch_size // growth.group_size(stage.batch_size), room_for(stage, nodes)
    if best.workers < choices[-1]:
        because = "more is slower"
    elif whole:
        because = "one batch"
    elif best.workers == nodes.count * nodes.workers:
        because = "all there are"
    elif best.workers == room:
        because = stage.placement if room > 1 or not 0 < stage.gpus < 1 else f"gpus={stage.gpus:g}"
    else:
        by_groups = worker_choices(stage, nodes, 0)[-1] == best.workers
        because = f"{groups} group{'s' * (groups > 1)}" if by_groups else f"micro_batch={micro}"
    return replace(best, because=because)


def _with(run: Run, index: int, nodes: Nodes, left: int, level: Level, measured: Measured, n: int) -> Prediction:
    stage = run.stages[index]
    size, batch, steps = stage.resolution, stage.batch_size, left / stage.batch_size
    on, links = nodes_for(stage, nodes, n), links_out(stage, nodes, n)
    inside = INSIDE_BYTES_S["gpu" if stage.gpus else "cpu"]
    bytes_s = min(inside, NETWORK_BYTES_S / links) if links else inside
    vectors = gradient_bytes(run, index)
    compute, sums = batch / n * worker_s(run, stage, measured), sum(sum_s(vector, n, bytes_s) for vector in vectors)
    read = {"disk": batch / on, "remote": batch}.get(level.read_from, 0.0) * level.image_bytes
    reading, start = on * read / STORAGE_BYTES_S, on * (level.images or 0) * level.image_bytes / STORAGE_BYTES_S
    pixels_s = DECODED_PX_S[run.data.encoding_of(size)] * max(1, stage.threads)
    if level.read_from == "cache":
        start = max(start, (level.images or 0) * size**2 / pixels_s)
    else:
        reading = max(reading, batch / n * size**2 / pixels_s)
    step = max(compute + sums, reading)
    if level.read_from != "cache":  # the first epoch's steps go on meanwhile
        start = max(0.0, start - min(left, level.images or 0) / batch * step)
    sent, saved = sum(ring_bytes(vector, n) for vector in vectors), checkpoint_bytes(run, index)
    start += n * saved / STORAGE_BYTES_S
    saves = left / run.checkpoints.every_images + 1
    measuring = measured.evaluation_s.get(size) or evaluation_s(run, size, level.images)
    busy = {"compute": steps * compute, "network": steps * sums, "reading": steps * reading + start,
            "saving": saves * saved / STORAGE_BYTES_S}
    whole = stage.micro_batch in (0, batch // stage.workers)  # else memory, or a person, has set a smaller one
    micro = batch // n if whole else math.gcd(stage.micro_batch, batch // n)
    return Prediction(
        resolution=size, workers=n, nodes=on, because="", step_s=step, start_s=start, sent=sent,
        seconds=steps * step + start if left else 0.0,
        memory_gb=planning.memory_gb(run, replace(stage, workers=n, micro_batch=micro)), leaving=links * sent,
        read_s=read / step, level=level, checkpoint=saved, busy_s=busy, measured=size in measured.worker_s,
        evaluation_s=measuring * (saves if run.evaluation.when == "checkpoint" else 1))


def predictions(run: Run, asked: Run, nodes: Nodes, left: Sequence[int], levels: dict[int, Level],
                measured: Measured) -> list[Prediction]:
    """A prediction per stage of `run`. `asked`: the run as configured, where a micro-batch of 0 may shrink."""
    return [predict(run, index, nodes, left[index], asked.stages[index].micro_batch, levels[stage.resolution], measured)
            for index, stage in enumerate(run.stages)]


# What is printed -------------------------------------------------------------------------------------------------


def page(found: Sequence[Prediction], nodes: Nodes) -> str:
    """The predictions as a table and what it rests on, 120 columns wide at most."""
    total, measuring = sum(it.seconds for it in found), sum(it.evaluation_s for it in found if it.seconds)
    lines = [f"on {nodes.count}x{nodes.workers} (nodes x workers each), every stage with as many as make it fastest:",
             "",
             "   px workers nodes        because    GB    step          time    bound sent MB out MB/s in MB/s saved MB"
             " start measure"]
    for it in found:
        guess = "" if it.measured or not it.seconds else "~"
        read = f"{it.read_s / 1e6:.3g}" if it.read_s else it.level.read_from
        share = f"{it.evaluation_s / it.seconds:.0%}" if it.seconds else ""
        lines.append(
            f"{it.resolution:>5}{it.workers:>8}{it.nodes:>6}{it.because:>15}{it.memory_gb:>6.2f}"
            f"{short(it.step_s):>8}{guess + duration(it.seconds):>14}{it.bound if it.seconds else 'done':>9}"
            f"{it.sent / 1e6:>8.4g}{it.leaving / it.step_s / 1e6:>9.4g}{read:>8}{it.checkpoint / 1e6:>9.4g}"
            f"{it.workers * it.checkpoint / 1e9:>6.1f}{share:>8}")
    return "\n".join(lines) + f"""

total    {duration(total)}, with at most {max(it.workers for it in found)} of {nodes.count * nodes.workers} workers; \
measuring {duration(measuring)}, one task beside them
workers  what to set as stages.<n>.workers; because: why not more. Each has one minibatch-stddev group or more
bound    what takes longest: compute, network (the two sums of a step), reading or saving
sent     by a worker in a step; out: leaves each node; in: shards each node reads, after all of them once for their
         sha256; `cache`, `node`: only then. start: GB when every worker of a group reads the checkpoint it starts from
saved    a checkpoint; measure: its time over the stage's
assumed  {NETWORK_BYTES_S * 8 / 1e9:g} Gbit/s and {LATENCY_S * 1e6:g} us a message between nodes, \
{INSIDE_BYTES_S['cpu'] / 1e9:g} GB/s inside one ({INSIDE_BYTES_S['gpu'] / 1e9:g} with GPUs), \
storage {STORAGE_BYTES_S / 1e9:g} GB/s for all
~        guessed from {planning.ASSUMED_GMACS['cpu']:g} GMAC/s per core, {planning.ASSUMED_GMACS['gpu']:,.0f} per GPU; \
without ~ from this run's own speed"""


def short(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
