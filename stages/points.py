"""The game on points of the plane: reals of a known density, and what the players make of it (Goodfellow et al. 2014).

A point is an image [2, 1, 1]: x and y, float32, of any size. Densities are per unit of area, float64. A run of points
has one stage of resolution 1, and no shards: its reals are drawn as they are used, each a function of its number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from gradine.configs.schema import Data, Points, UserError
from gradine.stages.growth import random_seed

BLOCK = 4096  # points drawn at a time
REALS = 2**31  # different ones that a run may see
NEAR = 3.0  # standard deviations from a mode's centre up to which a fake is of high quality


@dataclass(frozen=True)
class Mixture:
    """Equal shares of normal distributions of one covariance: `modes` [M, 2] are their centres, float64."""

    modes: Tensor
    covariance: Tensor  # [2, 2] of each

    @staticmethod
    def of(points: Points) -> Mixture:
        centre, (x, y) = torch.tensor(points.mean, dtype=torch.float64), points.deviations
        shared = points.correlation * x * y
        covariance = torch.tensor([[x * x, shared], [shared, y * y]], dtype=torch.float64)
        match points.kind:
            case "gaussian":
                places = torch.zeros(1, 2, dtype=torch.float64)
            case "ring":
                angles = torch.arange(points.modes, dtype=torch.float64) * (2 * math.pi / points.modes)
                places = torch.stack([angles.cos(), angles.sin()], dim=1) * points.radius
            case "grid":
                side = torch.linspace(-points.radius, points.radius, math.isqrt(points.modes), dtype=torch.float64)
                places = torch.cartesian_prod(side, side)
            case _:
                raise UserError(f"data.points.kind={points.kind!r} has no density. Use gaussian, ring or grid.")
        return Mixture(centre + places, covariance)

    @property
    def mean(self) -> Tensor:
        """[2]"""
        return self.modes.mean(dim=0)

    @property
    def whole_covariance(self) -> Tensor:
        """[2, 2] of all modes together: within them, and between their centres."""
        apart = self.modes - self.mean
        return self.covariance + apart.T @ apart / len(self.modes)

    def distances(self, xy: Tensor) -> Tensor:
        """[N, 2] -> [N, M] from each mode's centre, in standard deviations in that direction (Mahalanobis)."""
        apart = xy.double()[:, None] - self.modes
        return torch.linalg.solve_triangular(self._root, apart.reshape(-1, 2).T, upper=False).square().sum(dim=0).view(
            len(xy), len(self.modes)).sqrt()

    def density(self, xy: Tensor) -> Tensor:
        """[N, 2] -> [N]"""
        peak = 1 / (2 * math.pi * torch.linalg.det(self.covariance).sqrt() * len(self.modes))
        return peak * torch.exp(-self.distances(xy).square() / 2).sum(dim=1)

    def draw(self, count: int, source: torch.Generator) -> Tensor:
        """float32 [count, 2]"""
        modes = torch.randint(len(self.modes), (count,), generator=source)
        return self.at(modes, torch.randn(count, 2, generator=source, dtype=torch.float64)).float()

    def at(self, modes: Tensor, normal: Tensor) -> Tensor:
        """Modes' numbers [N] and draws of N(0, I) [N, 2] -> points [N, 2], float64."""
        return self.modes[modes] + normal @ self._root.T

    @property
    def _root(self) -> Tensor:
        return torch.linalg.cholesky(self.covariance)


class PointSet:
    """Points of a mixture by id, 0..REALS-1: stands where data.Images stands, but for images that are never read."""

    resolution = 1

    def __init__(self, data: Data) -> None:
        self.data, self.mixture = data, Mixture.of(data.points)
        self.counts = (REALS,)
        self.notes: list[str] = []
        self.decoding_s = 0.0
        self._block = lru_cache(maxsize=8)(self._drawn)

    def __len__(self) -> int:
        return REALS

    @property
    def labels(self) -> np.ndarray:
        raise UserError(f"data.points.kind={self.data.points.kind} has no labels. Use data.sampling=raw and "
                        "network.conditioning=none.")

    def sampler(self, seed: int) -> Callable[[int, int], np.ndarray]:
        """(start, count) -> ids: all in turn, from a place that the seed tells."""
        if self.data.sampling == "balanced":
            return self.labels  # type: ignore[return-value]  # raises
        first = random_seed(seed, "order") % REALS
        return lambda start, count: (np.arange(start, start + count) + first) % REALS

    def look_ahead(self, seed: int, position: int) -> None:
        """There is nothing to fetch."""

    def pixels(self, ids: np.ndarray) -> np.ndarray:
        """float32 [len(ids), 2, 1, 1]"""
        numbers, within = np.divmod(ids, BLOCK)
        xy = np.empty((len(ids), 2), np.float32)
        for number in np.unique(numbers).tolist():
            own = numbers == number
            xy[own] = self._block(number)[within[own]]
        return xy[:, :, None, None]

    def decoding(self, ids: np.ndarray) -> Callable[[], np.ndarray]:
        return lambda: self.pixels(ids)

    def close(self) -> None:
        """Nothing is open."""

    def _drawn(self, number: int) -> np.ndarray:
        """Points number * BLOCK .. + BLOCK - 1, float32 [BLOCK, 2]: by Box and Muller from raw Philox output, which is
        the same under every numpy version, as a Generator's normal draws need not be.
        """
        bits = np.random.Philox(random_seed(0, "points", number)).random_raw(3 * BLOCK).reshape(BLOCK, 3)
        modes = bits[:, 0] % len(self.mixture.modes)  # 2**64 is no multiple of every M: off by 1e-18
        radius, angle = (((bits[:, 1:] >> 11) + 0.5) * 2.0**-53).T  # in 0..1, never 0
        radius, angle = np.sqrt(-2 * np.log(radius)), 2 * np.pi * angle
        normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
        return self.mixture.at(torch.from_numpy(modes.astype(np.int64)), torch.from_numpy(normal)).float().numpy()
