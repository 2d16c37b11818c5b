"""How a game on points stands at a checkpoint: figures against the reals' known density, a picture, a film of all.

Figures are of the averaged generator, as everywhere, and so is the best discriminator, which the trained one is held
against: the generator that D plays with trembles around the averaged one, and D remembers where it was of late. Places
are float64 [N, 2], maps [CELLS, CELLS] in the order x, y. See docs/points.md.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from gradine.configs.schema import Run, Training, UserError
from gradine.stages import checkpoint, commits
from gradine.stages.data import data_digest
from gradine.stages.distances import Confusion
from gradine.stages.evaluate import Evaluated, Figures, Row, rows
from gradine.stages.families import new_discriminator, new_generator
from gradine.stages.features import Network, Unavailable
from gradine.stages.generate import draw_latents, png
from gradine.stages.growth import random_seed
from gradine.stages.networks import initialise
from gradine.stages.points import NEAR, Mixture, PointSet
from gradine.stages.video import write_video

FAKES = 10_000  # of which figures are made, at most
DENSITY_FAKES, FRAME_FAKES = 1_000_000, 100_000  # of which the generator's density is made: for figures, for a film
CELLS = 128  # of a map, along each side
BANDWIDTH = 0.15  # of the fakes' density, in standard deviations of a mode
COMPARED = 0.01  # D is held against the best one where the reals' density is above this share of its peak
EMPTY_BELOW = 1e-3  # of the peak: where both densities together are less, no best D is shown
SHOWN = 1_000  # points of each kind in a picture
CHUNK = 50_000
KINDS = ("mean_error", "covariance_error", "modes", "high_quality", "optimal_discriminator", "discriminator")
REAL, FAKE = "#2b4f7e", "#b5541f"


class Plane:
    """A checkpoint's players and what they make of the plane; each part is made when it is first asked for."""

    resolution = 1

    def __init__(self, run: Run, path: str, device: torch.device, density_fakes: int = DENSITY_FAKES) -> None:
        self.run, self.device, self.density_fakes = run, device, density_fakes
        self.files = commits.read(path)
        self.checkpoint = Path(path).name
        self.images_seen: int = commits.state_of(self.files["state.json"])["images_seen"]
        self.count = min(run.evaluation.count, FAKES)
        self.mixture, self.data = Mixture.of(run.data.points), data_digest(run.data, 1)

    def network(self, setting: str) -> Network:
        raise Unavailable(f"points have no features {setting}")

    def player(self, role: str) -> nn.Module:
        """Of the files' roles `generator`, `discriminator`, `average`."""
        new = new_discriminator if role == "discriminator" else new_generator
        network = new(self.run.network, 1, False, 2)
        checkpoint.load_network(network, role, self.files)
        return network.to(self.device).eval().requires_grad_(False)

    def made(self, generator: nn.Module, purpose: str, count: int) -> Tensor:
        """[count, 2]"""
        latents = draw_latents(self.run, purpose, count).split(CHUNK)
        return torch.cat([generator(part.to(self.device)).flatten(1).cpu() for part in latents]).double()

    def reals(self, purpose: str, count: int) -> Tensor:
        """[count, 2] that the training did not see, but by chance."""
        return self.mixture.draw(count, torch.Generator().manual_seed(random_seed(0, purpose))).double()

    @cached_property
    def fakes(self) -> Tensor:
        return self.made(self.player("average"), "evaluation", self.count)

    @cached_property
    def untrained(self) -> Tensor | None:
        if not self.run.evaluation.untrained:
            return None
        generator = new_generator(self.run.network, 1, False, 2)
        initialise(generator, self.run.training.seed, "generator")
        return self.made(generator.to(self.device).eval().requires_grad_(False), "evaluation", self.count)

    @cached_property
    def judge(self) -> nn.Module:
        return self.player("discriminator")

    def scores(self, xy: Tensor) -> Tensor:
        """[N, 2] -> [N], float64"""
        images = xy.float()[:, :, None, None].split(CHUNK)
        return torch.cat([self.judge(part.to(self.device)).cpu() for part in images]).double()

    @cached_property
    def edges(self) -> tuple[np.ndarray, np.ndarray]:
        """[CELLS + 1] in x and in y, of a square that holds all modes and 4.5 standard deviations around them."""
        middle = self.mixture.mean
        half = float((self.mixture.modes - middle).abs().max() + 4.5 * self.mixture.covariance.diagonal().max().sqrt())
        x, y = (np.linspace(float(at) - half, float(at) + half, CELLS + 1) for at in middle)
        return x, y

    @cached_property
    def centres(self) -> Tensor:
        """[CELLS * CELLS, 2]"""
        x, y = (torch.from_numpy((edges[1:] + edges[:-1]) / 2) for edges in self.edges)
        return torch.cartesian_prod(x, y)

    @cached_property
    def density(self) -> Tensor:
        """Of the reals."""
        return self.mixture.density(self.centres).view(CELLS, CELLS)

    @cached_property
    def fakes_density(self) -> Tensor:
        """Of the averaged generator."""
        return self.density_of("average")

    def density_of(self, role: str) -> Tensor:
        """Of a generator, from many fakes."""
        x, y = (self.mixture.covariance.diagonal().sqrt() * BANDWIDTH).tolist()
        return smoothed_density(self.made(self.player(role), "density", self.density_fakes), self.edges, (x, y))

    @cached_property
    def best(self) -> Tensor:
        """The map of D*."""
        return optimal(self.density, self.fakes_density, self.run.training)

    @cached_property
    def told(self) -> Tensor:
        """The map of D's scores."""
        return self.scores(self.centres).view(CELLS, CELLS)


def smoothed_density(xy: Tensor, edges: tuple[np.ndarray, np.ndarray], deviations: tuple[float, float]) -> Tensor:
    """Density of points [N, 2] on a map: their histogram, spread by a normal kernel of these standard deviations."""
    x, y = xy.numpy().T
    counted = torch.from_numpy(np.histogram2d(x, y, bins=[*edges])[0])
    cells = [float(each[1] - each[0]) for each in edges]
    found = counted / (len(xy) * cells[0] * cells[1])
    for axis, (cell, deviation) in enumerate(zip(cells, deviations, strict=True)):
        reach = max(1, round(4 * deviation / cell))
        kernel = torch.exp(-(torch.arange(-reach, reach + 1, dtype=torch.float64) * cell / deviation).square() / 2)
        lines = found.movedim(axis, 1)[:, None]
        found = F.conv1d(lines, (kernel / kernel.sum())[None, None], padding=reach)[:, 0].movedim(1, axis)
    return found


def optimal(reals: Tensor, fakes: Tensor, training: Training) -> Tensor:
    """D* = p / (p + p_G) from the densities of both, proposition 1 of Goodfellow et al. 2014.

    With targets other than 1 and 0, it is the targets' mean at each place; half-way between them where nothing lies.
    """
    flip, real, fake = training.flip_labels, *(sum(ends) / len(ends) for ends in (training.real_labels,
                                                                                  training.fake_labels))
    real, fake = real + flip * (fake - real), fake + flip * (real - fake)
    both = reals + fakes
    return torch.where(both > 0, (real * reals + fake * fakes) / both, (real + fake) / 2)


def probability(training: Training, scores: Tensor) -> Tensor | None:
    """What D's scores say of being real; None with a loss whose scores are no probability."""
    match training.loss:
        case "minimax" | "non_saturating":
            return scores.sigmoid()
        case "least_squares":
            return scores  # whose optimum is D* itself
        case _:
            return None


# Figures -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(run: Run, path: str, device: torch.device) -> Evaluated:
    """The rows and the picture of one checkpoint. Raises commits.Damaged for one that must not be used."""
    it = Plane(run, path, device)
    found = [row for kinds, compute in ((KINDS[:4], of_fakes), (KINDS[4:5], of_best), (KINDS[5:], of_judge))
             for row in rows(it, kinds, None, lambda compute=compute: compute(it))]  # type: ignore[misc]
    return Evaluated(found, {f"r0001-{it.images_seen:09d}.png": picture(it)})


def of_fakes(it: Plane) -> Figures:
    reals = errors(it.mixture, it.reals("floor", it.count))
    untrained = errors(it.mixture, it.untrained) if it.untrained is not None else {}
    found: Figures = {}
    for kind, value in errors(it.mixture, it.fakes).items():
        beside = "floor" if kind.endswith("_error") else "reals"
        found[kind] = {"value": value, beside: reals[kind], "untrained": untrained.get(kind)}
    found["modes"]["parts"] = {"of": len(it.mixture.modes)}
    return found


def errors(mixture: Mixture, xy: Tensor) -> dict[str, float]:
    """How far points [N, 2] are from the mixture.

    mean_error: distance of the means, in the mixture's standard deviations in x and y; covariance_error: Frobenius norm
    of the covariances' difference, over that of the mixture's; high_quality: the share of points within NEAR standard
    deviations of a mode; modes: those that are nearest to at least one of these (Srivastava et al. 2017).
    """
    covariance = mixture.whole_covariance
    apart, nearest = mixture.distances(xy).min(dim=1)
    good = apart <= NEAR
    return {"mean_error": float(((xy.mean(dim=0) - mixture.mean) / covariance.diagonal().sqrt()).norm()),
            "covariance_error": float((torch.cov(xy.T) - covariance).norm() / covariance.norm()),
            "modes": len(nearest[good].unique()), "high_quality": float(good.double().mean())}


def of_best(it: Plane) -> Figures:
    """The largest |D - D*| where reals lie; `floor`: the same of a D that says 1/2 everywhere. In `parts` the mean over
    the reals, and the largest one against the generator as it is, not averaged.
    """
    said = probability(it.run.training, it.told)
    if said is None:
        raise Unavailable(f"scores of training.loss={it.run.training.loss} are no probability")
    if it.run.network.mlp.minibatch != "none":
        raise Unavailable("with network.mlp.minibatch D judges no point alone")
    compared = it.density > COMPARED * it.density.max()
    apart, playing = ((said - best).abs()[compared] for best in (
        it.best, optimal(it.density, it.density_of("generator"), it.run.training)))
    weights = it.density[compared] / it.density[compared].sum()
    return {"optimal_discriminator": {
        "value": float(apart.max()), "floor": float((it.best - 0.5).abs()[compared].max()),
        "parts": {"mean": float((apart * weights).sum()), "against_the_playing_generator": float(playing.max())},
        "count": it.density_fakes}}


def of_judge(it: Plane) -> Figures:
    """As of images: the first reals that it was trained on, and others as the held-out ones."""
    metric = Confusion()
    points = PointSet(it.run.data)
    trained = points.pixels(points.sampler(it.run.training.seed)(0, it.count))
    metric.update(it.scores(torch.from_numpy(trained).flatten(1)), "training")
    metric.update(it.scores(it.reals("held out", it.count)), "held_out")
    metric.update(it.scores(it.made(it.player("average"), "scored", it.count)), "fakes")
    table: Row = {**metric.compute()}
    return {"discriminator": {"value": table.pop("accuracy"), "parts": table}}


# Pictures ------------------------------------------------------------------------------------------------------------


def picture(it: Plane) -> bytes:
    """PNG, 960 x 500: reals and fakes on the trained D's map, and on that of the best D."""
    figure = Figure(figsize=(9.6, 5.0), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    found = errors(it.mixture, it.fakes)
    figure.suptitle(f"{it.images_seen:,} points seen · modes {found['modes']} of {len(it.mixture.modes)} · "
                    f"{found['high_quality']:.0%} within {NEAR:g} standard deviations", fontsize=10)
    said = probability(it.run.training, it.told)
    if said is None:
        middle = it.told.mean()
        said = 0.5 + (it.told - middle) / (2 * (it.told - middle).abs().max().clamp(min=1e-9))
        name = f"trained D: scores, {float(it.told.min()):.3g} to {float(it.told.max()):.3g}"
    else:
        name = "trained D: probability of being real"
    draw(left, it, said, name)
    somewhere = it.density + it.fakes_density > EMPTY_BELOW * it.density.max()
    shades = draw(right, it, it.best.where(somewhere, torch.nan), "best D against this generator: p / (p + p_G)")
    figure.colorbar(shades, ax=[left, right], shrink=0.8, ticks=[0, 0.25, 0.5, 0.75, 1])
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return png(Image.open(file).convert("RGB").quantize(128))


def draw(axes: Axes, it: Plane, shade: Tensor, name: str) -> QuadContourSet:
    """One map with the points on it; -> what its colors mean."""
    x, y = ((edges[1:] + edges[:-1]) / 2 for edges in it.edges)
    colors = LinearSegmentedColormap.from_list("", ["#e8a87c", "white", "#8fb3d9"])
    axes.set_facecolor("#f2f2f2")  # where nothing lies, nothing is best
    shades = axes.contourf(x, y, np.ma.masked_invalid(shade.clamp(0, 1).T), levels=np.linspace(0, 1, 21), cmap=colors)
    axes.contour(x, y, it.density.T, levels=[COMPARED * float(it.density.max())], colors="gray", linewidths=0.6)
    for points, color, whose in ((it.reals("shown", SHOWN), REAL, "reals"), (it.fakes[:SHOWN], FAKE, "fakes")):
        axes.scatter(points[:, 0], points[:, 1], s=2, color=color, linewidths=0, label=whose)
    axes.set(xlim=it.edges[0][[0, -1]], ylim=it.edges[1][[0, -1]], aspect="equal")
    axes.set_title(name, fontsize=9)
    axes.legend(loc="upper right", fontsize=8, markerscale=4)
    return shades


@torch.no_grad()
def game(run: Run, paths: Iterable[str], out: Path, fps: int = 8) -> list[Path]:
    """Writes a picture of each checkpoint, and game.mp4 of all, the oldest first. UserError for a run of images."""
    if run.data.points.kind == "none":
        raise UserError(f"run {run.name} is of images: its densities are not known. Use one of points (data.points).")
    out.mkdir(parents=True, exist_ok=True)
    pictures = []
    for it in sorted((Plane(run, path, torch.device("cpu"), FRAME_FAKES) for path in paths),
                     key=lambda it: it.images_seen):
        pictures.append(out / f"r0001-{it.images_seen:09d}.png")
        pictures[-1].write_bytes(picture(it))
    if not pictures:
        raise UserError(f"run {run.name} has no checkpoint to show. Let it train first.")
    return [*pictures, write_video((np.asarray(Image.open(each).convert("RGB")) for each in pictures),
                                   out / "game.mp4", fps)]
