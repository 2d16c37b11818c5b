"""A stage's figures and pictures, from a stored checkpoint: the averaged generator at alpha = 1, at its resolution.

Reals are split in two equal sets: the first is what fakes are held against, the second gives the noise floor, the
distance that two sets of reals have by chance. Fakes, reals and floor always have the same count, and it is stated.
Every row says what it was made of; a metric that cannot be computed has no value but a reason. See docs/metrics.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gradine.configs.schema import EnvironmentFault, Run, features_suffix, metric_name
from gradine.stages.data import labels_of
from gradine.stages.distances import (
    Confusion,
    CopyRate,
    FrechetDistance,
    InceptionScore,
    KernelDistance,
    Neighbors,
    PathLength,
    slerp,
)
from gradine.stages.features import Network, Unavailable
from gradine.stages.generate import COLUMNS, draw_latents, generate, generated, grid, png
from gradine.stages.growth import random_seed
from gradine.stages.latents import Parts
from gradine.stages.metrics import MultiScaleSSIM, SlicedWasserstein
from gradine.stages.subjects import Subjects, read

Row = dict[str, Any]
Figures = dict[str, Row]  # by kind of metric: what differs from one row to the next
PAIRWISE_IMAGES = 10_000  # of each side at most, where all pairs of images are compared
PATH_PAIRS, PATH_STEP = 1_000, 1e-4
SCORED_IMAGES = 2_000  # by the discriminator, of each kind
FEWEST_OF_CLASS = 10  # reals, for a distance of its own
CLASSES_SHOWN = 64  # rows of a grid at most
GALLERY = 8  # fakes beside their nearest training images
EMPTY: Row = {"value": None, "reason": None, "interval": None, "floor": None, "untrained": None, "reals": None,
              "parts": None}


class Subject(Protocol):
    """What a row tells of its subject."""

    run: Run
    count: int
    resolution: int
    checkpoint: str
    images_seen: int
    data: str

    def network(self, setting: str) -> Network: ...


@dataclass(frozen=True)
class Evaluated:
    rows: list[Row]  # of metrics.jsonl
    pictures: dict[str, bytes]  # name of a file in samples/ -> PNG
    notes: tuple[str, ...] = ()  # what a person should know of, though the figures came


def evaluate(run: Run, path: str, threads: int = 1) -> Evaluated:
    """All that run.evaluation asks for, of one checkpoint. A metric that cannot be computed has no value but a reason.

    Raises commits.Damaged for a checkpoint that must not be used, UserError or EnvironmentFault for such shards.
    """
    torch.set_num_threads(threads)
    device = torch.device("cuda" if run.evaluation.gpus and torch.cuda.is_available() else "cpu")
    if run.data.points.kind != "none":
        from gradine.stages import plane  # which draws, by matplotlib: a second that no other run should wait for

        return plane.evaluate(run, path, device)
    with ExitStack() as opened:
        it = Subjects(run, path, device, threads, opened)
        found = [row for name in run.evaluation.metrics for row in family(it, name)]
        if run.network.autoencodes:
            found += rows(it, ("reconstruction",), None, partial(reconstruction, it))
        return Evaluated(found, pictures(it), tuple(dict.fromkeys(it.notes)))


def pictures(it: Subjects) -> dict[str, bytes]:
    """Grids of samples and of reals, of classes a row each; and the fakes nearest to a training image above these."""
    size, samples, labels = it.resolution, it.run.evaluation.samples, None
    if it.labels is not None:
        rows = min(it.run.network.classes, CLASSES_SHOWN)
        labels, samples = torch.arange(rows).repeat_interleave(COLUMNS), rows * COLUMNS
    shown = torch.cat(list(generate(it.average, draw_latents(it.run, "samples", samples, labels=labels))))
    reals = it.reals.first(min(samples, len(it.images))) if labels is None else reals_by_class(it, rows)
    made = {f"r{size:04d}-{it.images_seen:09d}.png": png(grid(shown)), f"r{size:04d}-reals.png": png(grid(reals))}
    if it.gallery is not None:
        made[f"r{size:04d}-{it.images_seen:09d}-neighbors.png"] = png(grid(it.gallery, columns=len(it.gallery) // 2))
    return made


def reals_by_class(it: Subjects, rows: int) -> Tensor:
    """uint8 [8 * rows, C, R, R]: in each row reals of one class, black where it has no more."""
    assert it.labels is not None
    shown = torch.zeros(rows, COLUMNS, it.run.data.channels, it.resolution, it.resolution, dtype=torch.uint8)
    for number, row in enumerate(shown):
        ids = it.reals.order[(it.labels == number).numpy()][:COLUMNS]
        row[:len(ids)] = torch.from_numpy(it.images.pixels(ids))
    return shown.flatten(0, 1)


# Rows ----------------------------------------------------------------------------------------------------------------


def family(it: Subjects, name: str) -> Iterator[Row]:
    """The rows of one of the schema's FAMILIES, for each of the features where it is made of features."""
    if name == "classes" and it.run.network.conditioning == "auxiliary":
        yield from rows(it, ("class_accuracy",), None, partial(class_accuracy, it))
    if name == "classes" and not it.run.network.classes:
        return
    if name in OF_IMAGES:
        kinds, compute = OF_IMAGES[name]
        yield from rows(it, kinds, None, partial(compute, it))
        return
    kinds, of_features = OF_FEATURES[name]
    for setting in it.run.evaluation.features:
        if not (name == "is" and setting == "pixels"):  # which are no network's, and know no classes
            yield from rows(it, kinds, setting, partial(of_features, it, setting))


def rows(it: Subject, kinds: Iterable[str], setting: str | None, compute: Callable[[], Figures]) -> Iterator[Row]:
    """What `compute` found as rows; of a metric that failed, why."""
    began = time.perf_counter()
    try:
        figures = compute()
    except Exception as error:  # whatever one metric dies of, the others are computed
        named = isinstance(error, Unavailable | ValueError | EnvironmentFault)  # UserError is a ValueError
        reason = str(error) if named else f"{type(error).__name__}: {error}"
        figures = {kind: {"reason": " ".join(reason.split())[:500]} for kind in kinds}
    seconds = round(time.perf_counter() - began, 2)
    digest = None
    with suppress(Exception):
        digest = it.network(setting).digest if setting else None
    for kind in kinds:
        found = {**EMPTY, "count": it.count, **figures.get(kind, {"reason": "not computed"})}
        if found["value"] is not None and not math.isfinite(found["value"]):
            found.update(value=None, reason="not finite")
        yield {"metric": metric_name(kind, setting) if setting else kind, **finite(found),
               "features": features_suffix(setting) if setting else None, "features_digest": digest,
               "resolution": it.resolution, "checkpoint": it.checkpoint, "images_seen": it.images_seen,
               "seed": it.run.training.seed, "data": it.data, "seconds": seconds}


def finite(value: Any) -> Any:
    """Without NaN and infinity, which JSON has not: None in their place."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        found = [finite(each) for each in value]
        return None if None in found else found
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Of images -----------------------------------------------------------------------------------------------------------


def swd(it: Subjects) -> Figures:
    """Sliced Wasserstein distance x 1e3: `value` is the average over `parts`, the levels of the pyramid."""
    count = it.swd_count

    def fed(pixels: Iterable[Tensor]) -> SlicedWasserstein:
        metric = SlicedWasserstein(it.resolution, seed=it.run.training.seed)
        for batch in it.reals.batches(0, count):
            metric.update(batch, real=True)
        for batch in pixels:
            metric.update(batch, real=False)
        return metric

    if not it.count:
        raise ValueError(f"{len(it.images)} reals are too few for {it.reals.sets} sets")
    metric = fed(it.fakes.pixels)
    it.fakes.pixels.clear()  # two sets of images at a time are what memory holds
    levels = dict(metric.compute())
    row: Row = {"value": levels.pop("average"), "parts": levels, "interval": metric.interval(), "count": count}
    del metric
    if it.run.evaluation.untrained:
        row["untrained"] = fed(it.untrained_fakes.pixels).compute()["average"]
        it.untrained_fakes.pixels.clear()
    row |= it.floors(it.remembered(swd=count, seed=it.run.training.seed), "swd", lambda: {
        "floor": fed(it.reals.batches(1, count)).compute()["average"]})
    return {"swd": row}


def ms_ssim(it: Subjects) -> Figures:
    """Diversity: mean similarity of random pairs of fakes, beside that of reals. Lower is more diverse."""
    if it.resolution < 64:
        return {"ms_ssim": {"reason": f"defined from 64 px up, this stage has {it.resolution}", "count": 0}}
    count = it.ms_ssim_count
    if not count or it.fakes.similar is None:
        raise ValueError(f"{len(it.images)} reals make no pair")

    def of_reals() -> dict[str, Tensor]:
        metric = MultiScaleSSIM()
        for batch in read(it.images, it.reals.order[:count]):
            metric.update(batch[:len(batch) // 2 * 2:2], batch[1::2])
        return {"reals": torch.tensor(metric.compute(), dtype=torch.float64)}

    fakes = it.fakes.similar
    reals = float(it.remembered(pairs=count // 2)("ms-ssim", of_reals)["reals"])
    return {"ms_ssim": {"value": fakes.compute(), "interval": fakes.interval(), "reals": reals, "count": count}}


def discriminator(it: Subjects) -> Figures:
    """How the discriminator scores reals, held-out ones where there are, and fresh fakes: `value` is its accuracy."""
    if it.run.network.autoencodes:
        return {"discriminator": {"reason": "an autoencoder has no discriminator", "count": 0}}
    count = min(it.count, SCORED_IMAGES)
    metric = Confusion()
    for kind, images, labels in [*scored_reals(it, count), ("fakes", *scored_fakes(it, count))]:
        for batch, own in labelled(images, labels):
            metric.update(it.judged(batch, own).scores, kind)
    table = {**metric.compute(), "held_out": it.held_out_digest if it.run.evaluation.held_out else None}
    return {"discriminator": {"value": table.pop("accuracy"), "parts": table, "count": count}}


def class_accuracy(it: Subjects) -> Figures:
    """The share of fakes that the discriminator's auxiliary classifier takes for the class they were asked as."""
    count = min(it.count, SCORED_IMAGES)
    right = {kind: torch.cat([it.judged(batch, own).heads[:, :it.run.network.classes].argmax(1)
                              == own[:len(batch) // 4 * 4] for batch, own in labelled(images, labels)])
             for kind, images, labels in [*scored_reals(it, count), ("fakes", *scored_fakes(it, count))]}
    fakes = right["fakes"].double()
    return {"class_accuracy": {"value": float(fakes.mean()), "count": len(fakes),
                               "reals": float(right.get("held_out", right["training"]).double().mean())}}


def scored_reals(it: Subjects, count: int) -> Iterator[tuple[str, Iterable[Tensor], Tensor | None]]:
    """(kind, images in [-1, 1], their class numbers) of reals of the first set, and of held-out ones."""
    sets = [("training", it.images, np.sort(it.reals.ids(0)[:count]))]
    if it.run.evaluation.held_out:
        sets.append(("held_out", it.held_out_images, it.held_out_ids(count)))
    for kind, images, ids in sets:
        labels = None
        if classes := it.run.network.classes:
            labels = (labels_of(it.images, classes) if kind == "training" else it.held_out_labels)[ids]
        yield kind, (batch / 127.5 - 1 for batch in read(images, ids)), labels


def scored_fakes(it: Subjects, count: int) -> tuple[Iterable[Tensor], Tensor | None]:
    """Fresh ones, of the classes of the first reals."""
    labels = it.first_labels(count)
    return generated(it.average, draw_latents(it.run, "scored", count, labels=labels)), labels


def labelled(batches: Iterable[Tensor], labels: Tensor | None) -> Iterator[tuple[Tensor, Any]]:
    """Each batch with its part of the labels, or with None."""
    first = 0
    for batch in batches:
        yield batch, None if labels is None else labels[first:first + len(batch)]
        first += len(batch)


@torch.no_grad()
def reconstruction(it: Subjects) -> Figures:
    """An autoencoder's mean squared error, of values in [-1, 1]: of held-out reals, else of the second set."""
    count, errors = min(it.count, SCORED_IMAGES), []
    batches = (read(it.held_out_images, it.held_out_ids(count)) if it.run.evaluation.held_out
               else it.reals.batches(it.reals.sets - 1, count))
    for batch in batches:
        images = (batch / 127.5 - 1).to(it.device)
        latents = it.discriminator(images)[:, :it.run.network.latent_size]  # its encoder; of a vae the mean
        errors.append((it.average(latents) - images).square().mean((1, 2, 3)).cpu())
    found = torch.cat(errors).double()
    return {"reconstruction": {"value": float(found.mean()), "count": len(found), "parts": {
        "held_out": len(found) if it.run.evaluation.held_out else 0}}}


# Of features ---------------------------------------------------------------------------------------------------------


def frechet(it: Subjects, setting: str) -> Figures:
    """Frechet distance of features; `spread` is the trace of the fakes' covariance over that of the reals'."""
    metric, row = distance(it, setting, FrechetDistance, "fd", it.count)
    spread = metric.spread()
    return {"fd": row, "spread": {"value": spread, "reason": "the reals do not differ" if spread is None else None}}


def kernel(it: Subjects, setting: str) -> Figures:
    return {"kid": distance(it, setting, KernelDistance, "kid", min(it.count, PAIRWISE_IMAGES))[1]}


def distance(it: Subjects, setting: str, kind: type[FrechetDistance] | type[KernelDistance], name: str, count: int
             ) -> tuple[Any, Row]:
    """The metric, fed, and its row."""
    against = held_against_reals(it, setting, kind, name, count)
    metric = against(it.fakes.features(setting)[:count])
    row: Row = {"value": metric.compute(), "interval": metric.interval(), "count": count}
    if it.run.evaluation.untrained:
        row["untrained"] = against(it.untrained_fakes.features(setting)[:count]).compute()
    row |= it.floors(it.remembered_of(setting, it.real_outputs(setting, 0)), f"{name}-{count}", lambda: {
        "floor": against(it.real_outputs(setting, 1).features[:count]).compute()})
    return metric, row


def held_against_reals(it: Subjects, setting: str, kind: Callable[[], Any], name: str, count: int
                       ) -> Callable[[Tensor], Any]:
    """A function from features of fakes to the metric between them and the first set's first `count` reals."""
    reals = it.real_outputs(setting, 0).features[:count]

    def of_reals() -> Any:
        metric = kind()
        metric.update(reals, real=True)
        return metric

    keeper = it.remembered_of(setting, it.real_outputs(setting, 0))
    known = keeper(f"{name}-{count}", lambda: of_reals().real_statistics())

    def against(fakes: Tensor) -> Any:
        metric = of_reals()
        metric.use_reals(known)
        metric.update(fakes, real=False)
        return metric

    return against


def neighbors(it: Subjects, setting: str) -> Figures:
    """Precision, recall, density, coverage and duplicates; the floor is what a second set of reals scores."""
    count = min(it.count, PAIRWISE_IMAGES)
    against = held_against_reals(it, setting, Neighbors, "neighbors", count)
    metric = against(it.fakes.features(setting)[:count])
    values, intervals = metric.compute(), metric.interval()
    floors = it.floors(it.remembered_of(setting, it.real_outputs(setting, 0)), f"neighbors-{count}",
                       lambda: against(it.real_outputs(setting, 1).features[:count]).compute())
    return {name: {"value": value, "interval": intervals[name], "floor": floors.get(name), "count": count}
            for name, value in values.items()}


def inception_score(it: Subjects, setting: str) -> Figures:
    metric = InceptionScore()
    metric.update(it.fakes.logits(setting))

    def of_reals() -> dict[str, Tensor]:
        logits, reals = it.real_outputs(setting, 0).logits, InceptionScore()
        assert logits is not None, "a network that classifies fakes classifies reals"
        reals.update(logits)
        return {"reals": torch.tensor(reals.compute(), dtype=torch.float64)}

    reals = float(it.remembered_of(setting, it.real_outputs(setting, 0))("is", of_reals)["reals"])
    return {"is": {"value": metric.compute(), "interval": metric.interval(), "reals": reals}}


def class_frechet(it: Subjects, setting: str) -> Figures:
    """The mean over classes of the Frechet distance between their fakes and their reals; `parts` has each class's.

    Fakes have the classes of the first set of reals, so that both sides of a class are as many.
    """
    assert it.labels is not None
    classes, count = it.run.network.classes, it.count
    first, second = it.labels[:count], it.labels[count:2 * count]
    enough = [number for number in range(classes) if int((first == number).sum()) >= FEWEST_OF_CLASS]
    if not enough:
        raise ValueError(f"no class has {FEWEST_OF_CLASS} of the {count} reals")
    reals = it.real_outputs(setting, 0).features

    def by_class(features: Tensor, labels: Tensor, asked: list[int]) -> dict[int, float]:
        found = {}
        for number in asked:
            metric = FrechetDistance()
            metric.update(reals[first == number], real=True)
            metric.update(features[labels == number], real=False)
            found[number] = metric.compute()
        return found

    of_fakes = by_class(it.fakes.features(setting)[:count], first, enough)
    names = it.images.index.get("classes") or []
    parts = {names[number] if number < len(names) else str(number): of_fakes.get(number) for number in range(classes)}
    row: Row = {"value": fmean(of_fakes.values()), "parts": parts}
    if it.run.evaluation.untrained:
        row["untrained"] = fmean(by_class(it.untrained_fakes.features(setting)[:count], first, enough).values())
    if all(int((second == number).sum()) >= FEWEST_OF_CLASS for number in enough):
        row |= it.floors(it.remembered_of(setting, it.real_outputs(setting, 0)), f"classes-{classes}", lambda: {
            "floor": fmean(by_class(it.real_outputs(setting, 1).features, second, enough).values())})
    return {"class_fd": row}


def path_length(it: Subjects, setting: str) -> Figures:
    """Mean squared step in features between images whose latents are PATH_STEP apart on an arc, over its square."""
    network, pairs = it.network(setting), min(it.count, PATH_PAIRS)
    first, second = draw_latents(it.run, "path", 2 * pairs).double().chunk(2)
    noise = Parts.of(it.run.network).noise  # the class and codes stay
    source = torch.Generator().manual_seed(random_seed(it.run.training.seed, "path/places"))
    places = torch.rand(pairs, 1, generator=source, dtype=torch.float64)
    ends = [torch.cat([slerp(first[:, noise], second[:, noise], places + step), first[:, noise.stop:]], dim=1).float()
            for step in (0, PATH_STEP)]
    metric = PathLength(PATH_STEP)
    # Both ends of a step go through the networks together: what rounding does to one, it does to the other.
    for images in generated(it.average, torch.stack(ends, dim=1).flatten(0, 1)):
        features = network.raw(images * 127.5 + 127.5)
        metric.update(features[::2], features[1::2])
    return {"path_length": {"value": metric.compute(), "interval": metric.interval(), "count": pairs}}


def copies(it: Subjects, setting: str) -> Figures:
    """The share of fakes nearer to a training image than held-out reals, or other training images, are."""
    looked_at = [it.real_outputs(setting, which) for which in range(it.reals.sets)]
    training = torch.cat([each.features for each in looked_at])[:2 * PAIRWISE_IMAGES]
    held_out = it.held_out(setting, PAIRWISE_IMAGES)
    metric = CopyRate()
    metric.update(training, "training")
    if held_out:
        metric.update(held_out.features, "held_out")
        looked_at.append(held_out)
    metric.use_reals(it.remembered_of(setting, *looked_at)("copies", metric.real_statistics))
    metric.update(it.fakes.features(setting)[:PAIRWISE_IMAGES], "fakes")
    value, (figures, nearest) = metric.compute(), metric.nearest()
    most = figures.argsort()[:GALLERY]
    shown = torch.cat(list(generate(it.average, it.latents[most])))
    it.gallery = torch.cat([shown, torch.from_numpy(it.images.pixels(it.reals.order[nearest[most].numpy()]))])
    return {"copy_rate": {"value": value, "interval": metric.interval(), "count": len(figures), "parts": {
        "searched": len(training), "training": len(it.images), "held_out": len(held_out.features) if held_out else 0,
        "held_out_data": it.held_out_digest if held_out else None}}}


OF_IMAGES: dict[str, tuple[tuple[str, ...], Callable[[Subjects], Figures]]] = {
    "swd": (("swd",), swd), "ms_ssim": (("ms_ssim",), ms_ssim), "discriminator": (("discriminator",), discriminator)}
OF_FEATURES: dict[str, tuple[tuple[str, ...], Callable[[Subjects, str], Figures]]] = {
    "fd": (("fd", "spread"), frechet), "kid": (("kid",), kernel), "is": (("is",), inception_score),
    "neighbors": (("precision", "recall", "density", "coverage", "duplicates"), neighbors),
    "path_length": (("path_length",), path_length), "copies": (("copy_rate",), copies),
    "classes": (("class_fd",), class_frechet)}
