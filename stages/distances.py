"""How far fakes are from reals, and whether they repeat or copy, from features that some network gave.

Features are [N, D] of any float dtype, one row per image; every sum is float64. Metrics keep the rows they are given
(N x D x their bytes, and a copy while computing) and put them into an order of their own, that of the rows' hashes.
So a result is the same to the last bit whatever the order, the batches, or the split over workers whose states are
merged (`merge_state`, or torchmetrics' own gathering). Never compare results of different counts or features.

`compute()` gives the value. `interval()` gives (low, high), 95 %, of what new images of the same two sources would
score, or None for too few rows. `real_statistics()` is what depends on the reals alone, a dict of tensors to be kept
with them; give it to another metric with `use_reals()` and it is not computed again. Misuse raises ValueError.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

GROUPS = 10  # the jackknife leaves one of them out at a time
T_QUANTILE = 2.262157  # 97.5 % of Student's t with GROUPS - 1 degrees of freedom
NORMAL_QUANTILE = 1.959964  # 97.5 % of the normal distribution
ROUNDING = 1e-12  # of squared lengths, in squared distances that come from products
COPY_NEIGHBORS = 5
STAND_INS = 10_000  # training images that stand in for held-out ones, at most
BLOCK = 2048  # rows of each side at a time, where all pairs are looked at: 34 MB of float64 a table

T = TypeVar("T")
Interval = tuple[float, float]
Statistics = dict[str, Tensor]
Sums = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class _Rows(Metric):
    """Keeps rows of several kinds whole: states are lists to concatenate."""

    full_state_update = False
    kinds: tuple[str, ...]

    def __init__(self) -> None:
        super().__init__()
        for kind in self.kinds:
            self.add_state(f"{kind}_rows", default=[], dist_reduce_fx="cat")
        self._worked: tuple[bytes, Any] = (b"", None)

    def _once(self, sets: Iterable["_Ordered"], work: Callable[[], T]) -> T:
        """What `work` gives for these rows, done again only if they changed: compute() and interval() share it."""
        key = b"".join(rows.digest.numpy().tobytes() for rows in sets)
        if self._worked[0] != key:
            self._worked = key, work()
        return self._worked[1]

    def _keep(self, kind: str, rows: Tensor) -> None:
        name = type(self).__name__
        if kind not in self.kinds:
            raise ValueError(f"{name}: kind={kind!r} is none of {', '.join(self.kinds)}. Use one of them.")
        if rows.ndim != 2 or not rows.is_floating_point():
            got = f"{rows.dtype} {[*rows.shape]}"
            raise ValueError(f"{name}: {kind} are {got}, must be floats [N, D]. Give one row of features per image.")
        if not rows.isfinite().all():
            raise ValueError(f"{name}: {kind} hold NaN or infinity, must be finite. Leave this figure out.")
        widths = {batch.shape[1] for other in self.kinds for batch in self._batches(other)}
        if widths - {rows.shape[1]}:
            rule = f"must have {widths.pop()} numbers a row, as the rows before"
            raise ValueError(f"{name}: {kind} are {[*rows.shape]}, {rule}. Use one feature network for all.")
        getattr(self, f"{kind}_rows").append(rows.detach())

    def _batches(self, kind: str) -> list[Tensor]:
        batches = getattr(self, f"{kind}_rows")
        return [batches] if isinstance(batches, Tensor) else batches  # gathered over workers: one tensor

    def _count(self, kind: str) -> int:
        return sum(map(len, self._batches(kind)))

    def _ordered(self, kind: str, least: int = 1) -> "_Ordered":
        rows = _Ordered(self._batches(kind))
        if len(rows) < least:
            name = type(self).__name__
            raise ValueError(f"{name}: {len(rows)} {kind}, must be at least {least}. Call update() with more.")
        return rows


class _Ordered:
    """Rows in the order of their hashes, one slice at a time; `digest` tells one set of rows from another."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.rows = torch.cat(batches) if batches else torch.zeros(0, 0)
        memory = self.rows.cpu().contiguous().view(torch.uint8).numpy()
        keys = [hashlib.blake2b(row, digest_size=16).digest() for row in memory]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        self.order = torch.tensor(order, dtype=torch.int64, device=self.rows.device)
        hashed = hashlib.sha256(b"".join(keys[index] for index in order)).digest()
        self.digest = torch.frombuffer(bytearray(hashed), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice) -> Tensor:
        """float64 [n, D]."""
        return self.rows[self.order[part]].double()

    def groups(self) -> list[slice]:
        """GROUPS shares of the rows, of sizes that differ by 1 at most."""
        ends = [len(self) * group // GROUPS for group in range(GROUPS + 1)]
        return [slice(*pair) for pair in pairwise(ends)]

    def blocks(self, part: slice | None = None) -> Iterable[slice]:
        """At most BLOCK rows at a time."""
        first, last = (part.start, part.stop) if part else (0, len(self))
        return (slice(start, min(start + BLOCK, last)) for start in range(first, last, BLOCK))

    def mean(self) -> Tensor:
        return sum((self[part].sum(dim=0) for part in self.blocks()), start=torch.zeros(())) / len(self)


class _KnownReals(_Rows):
    """May be given what depends on the reals alone."""

    def __init__(self) -> None:
        super().__init__()
        self._given: Statistics | None = None

    def reset(self) -> None:
        super().reset()
        self._given = None

    def use_reals(self, statistics: Statistics) -> None:
        """Takes what another metric's `real_statistics()` gave for the same reals; other reals are found out later."""
        self._given = statistics

    def _statistics_of(self, sets: Sequence[_Ordered], compute: Callable[[], Statistics]) -> Statistics:
        digest = torch.cat([rows.digest for rows in sets])
        if self._given is None:
            return {**compute(), "digest": digest}
        if not torch.equal(self._given["digest"].cpu(), digest):
            name, count = type(self).__name__, sum(map(len, sets))
            raise ValueError(f"{name}: the statistics given are not of these {count} reals. Compute them anew.")
        return self._given


class _TwoSets(_KnownReals):
    """Reals and fakes."""

    kinds = ("reals", "fakes")

    def update(self, features: Tensor, real: bool) -> None:
        """Collects [N, D] features of one side."""
        self._keep("reals" if real else "fakes", features)


# ---- Frechet distance


class FrechetDistance(_TwoSets):
    """|m_r - m_f|^2 + tr(C_r + C_f - 2 (C_r C_f)^(1/2)) of Gaussians fitted to both sets (Heusel et al. 2017).

    Covariances divide by N - 1. With the standard Inception features it is FID. Lower is better; its bias falls with
    N, so hold only equal counts against each other; N may be below D. Means and scatters are formed about each
    group's own mean, so features far from 0 lose nothing. `compute()` takes 8 D^2 bytes a group, 335 MB at D = 2,048.

    Reals' statistics suffice without their features. The interval is a jackknife that leaves out one tenth of the
    reals and of the fakes at a time; the bias that all these distances share does not widen it.
    """

    higher_is_better = False

    def compute(self) -> float:
        """0, up to rounding, for equal means and covariances; more otherwise."""
        return self._distances()(None)

    def interval(self) -> Interval | None:
        """None for fewer than 20 of either side: a tenth must be at least 2."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            reals = self._count("reals") or int(self._reals()["counts"].sum())
            if min(reals, self._count("fakes")) < 2 * GROUPS:
                return None
            distance = self._distances()
            low, high = _jackknife(distance(None), [distance(group) for group in range(GROUPS)])
            return max(0.0, low), high

    def _distances(self) -> Callable[[int | None], float]:
        """A function from a group that is left out, or None, to the distance of the others."""
        features = self._ordered("reals", least=2 if self._given is None else 0)
        fakes = self._ordered("fakes", least=2)
        if len(features) >= 2 and max(len(features), len(fakes)) < fakes.rows.shape[1]:
            if self._given is not None:
                self._statistics_of([features], dict)  # refuses those of other reals
            return lambda without: _frechet_of_few(features, fakes, without)
        reals, of_fakes = self._reals(), _group_moments(fakes)
        return lambda without: frechet_distance(*_gaussian(reals, without), *_gaussian(of_fakes, without))

    def spread(self) -> float | None:
        """tr(C_f) / tr(C_r) of what this process has seen: 1 for fakes as diverse as the reals, 0 for one and the same
        image again and again. None where reals do not differ, or there are not two of each.
        """
        if len(fakes := self._ordered("fakes", least=0)) < 2 or (self._given is None and self._count("reals") < 2):
            return None
        (mean, reals), (_, of_fakes) = _gaussian(self._reals()), _gaussian(_group_moments(fakes))
        total = float(reals.trace())
        if total <= 1e-24 * float(mean.square().sum()):  # equal rows leave rounding
            return None
        return float(of_fakes.trace()) / total

    def real_statistics(self) -> Statistics:
        """Count, mean and scatter of each group; of the scatter, symmetric, the lower triangle: 5 D^2 float64."""
        groups = self._reals()
        rows, columns = torch.tril_indices(*groups["scatters"].shape[1:])
        return {**groups, "scatters": groups["scatters"][:, rows, columns]}

    def _reals(self) -> Statistics:
        if self._given is None or self._count("reals"):
            reals = self._ordered("reals", least=2)
            return self._unpacked(self._statistics_of([reals], lambda: _group_moments(reals)))
        return self._unpacked(self._given)

    @staticmethod
    def _unpacked(groups: Statistics) -> Statistics:
        if groups["scatters"].ndim == 3:
            return groups
        size = groups["means"].shape[1]
        rows, columns = torch.tril_indices(size, size)
        scatters = groups["scatters"].new_empty(GROUPS, size, size)
        scatters[:, rows, columns] = scatters[:, columns, rows] = groups["scatters"]
        return {**groups, "scatters": scatters}


def _group_moments(rows: _Ordered) -> Statistics:
    """{"counts" [G], "means" [G, D], "scatters" [G, D, D]}: sums of squares about each group's own mean."""
    groups = [rows[part] for part in rows.groups()]
    means = [group.sum(dim=0) / max(1, len(group)) for group in groups]
    scatters = [(group - mean).T @ (group - mean) for group, mean in zip(groups, means, strict=True)]
    counts = torch.tensor([len(group) for group in groups], dtype=torch.float64, device=rows.rows.device)
    return {"counts": counts, "means": torch.stack(means), "scatters": torch.stack(scatters)}


def _gaussian(groups: Statistics, without: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D] of all groups, or all but one (Chan et al. 1979)."""
    kept = [group for group in range(GROUPS) if group != without]
    counts, means = groups["counts"][kept], groups["means"][kept]
    mean = counts @ means / counts.sum()
    between = (means - mean) * counts.sqrt()[:, None]
    scatter = between.T @ between
    for group in kept:
        scatter += groups["scatters"][group]
    return mean, scatter / (counts.sum() - 1)


def _frechet_of_few(reals: _Ordered, fakes: _Ordered, without: int | None) -> float:
    """Of fewer rows than dimensions, where the rows themselves are the smaller factors of their covariances."""
    means, factors = [], []
    for rows in (reals, fakes):
        kept = torch.cat([rows[part] for group, part in enumerate(rows.groups()) if group != without])
        means.append(kept.mean(dim=0))
        factors.append((kept - means[-1]) / math.sqrt(len(kept) - 1))
    # Singular values, not squared ones' roots: two equal sets are then at 0 to the last digits.
    shared = torch.linalg.svdvals(factors[0] @ factors[1].T).sum()
    distance = (means[0] - means[1]).square().sum() + sum(each.square().sum() for each in factors) - 2 * shared
    return max(0.0, float(distance))


def frechet_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of float64 [D] and [D, D]; singular covariances are fine."""
    # With C = R R', C_a C_b has the eigenvalues of the symmetric R_a' C_b R_a, but for zeros: no matrix square root.
    root = _factor(covariance_a)
    shared = torch.linalg.eigvalsh(root.T @ covariance_b @ root).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * shared
    return max(0.0, float(distance))


def _factor(covariance: Tensor) -> Tensor:
    """[D, D] -> R [D, rank] with R R' = covariance: Cholesky's, or by axes where some direction has no variance."""
    lower, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        return lower
    variances, axes = torch.linalg.eigh(covariance)
    kept = variances > variances[-1] * len(variances) * torch.finfo(variances.dtype).eps  # the others are rounding
    return axes[:, kept] * variances[kept].sqrt()


# ---- Kernel distance


class KernelDistance(_TwoSets):
    """Unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018), not x1000.

    Over all pairs: the average of what subsets drawn at random give, without their chance. About 0 for two sets of
    one source, also below 0. Lower is better. With the standard Inception features it is KID. Time grows with N^2
    (10,000 images of 2,048 features: half a minute), memory does not: 100 MB beside the features.

    Statistics of reals save their own pairs; their features are needed all the same. The interval is a jackknife
    that leaves out one tenth of the reals and of the fakes at a time.
    """

    higher_is_better = False

    def compute(self) -> float:
        return self._estimate(*self._sums())

    def interval(self) -> Interval | None:
        """None for fewer than 20 of either side."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            if min(self._count("reals"), self._count("fakes")) < 2 * GROUPS:
                return None
            sums = self._sums()
            return _jackknife(self._estimate(*sums), [self._estimate(*sums, without=group) for group in range(GROUPS)])

    def real_statistics(self) -> Statistics:
        """Sums of the kernel over pairs of different reals, by the groups of both."""
        reals = self._ordered("reals", least=2)
        return self._statistics_of([reals], lambda: _own_sums(reals))

    def _sums(self) -> Sums:
        """Sums over pairs by group [G, G]: reals, fakes, between them; and the groups' counts [G] of both."""
        reals, fakes = self._ordered("reals", least=2), self._ordered("fakes", least=2)

        def work() -> Sums:
            own, others = self._statistics_of([reals], lambda: _own_sums(reals)), _own_sums(fakes)
            return own["sums"], others["sums"], _kernel_sums(reals, fakes), own["counts"], others["counts"]

        return self._once((reals, fakes), work)

    @staticmethod
    def _estimate(reals: Tensor, fakes: Tensor, between: Tensor, real_counts: Tensor, fake_counts: Tensor,
                  without: int | None = None) -> float:
        kept = [group for group in range(GROUPS) if group != without]
        n, m = real_counts[kept].sum(), fake_counts[kept].sum()
        own_reals, own_fakes, shared = (sums[kept][:, kept].sum() for sums in (reals, fakes, between))
        return float(own_reals / (n * (n - 1)) + own_fakes / (m * (m - 1)) - 2 * shared / (n * m))


def _own_sums(rows: _Ordered) -> Statistics:
    counts = torch.tensor([part.stop - part.start for part in rows.groups()], dtype=torch.float64)
    return {"counts": counts, "sums": _kernel_sums(rows, rows)}


def _kernel_sums(a: _Ordered, b: _Ordered) -> Tensor:
    """[G, G] on the CPU: sums of the kernel between groups; without each row's pair with itself where b is a."""
    sums = torch.zeros(GROUPS, GROUPS, dtype=torch.float64)
    for i, first in enumerate(a.groups()):
        for j, second in enumerate(b.groups()):
            if a is b and j > i:
                continue
            for one in a.blocks(first):
                for other in b.blocks(second):
                    rows = a[one]
                    kernel = (rows @ b[other].T).div_(rows.shape[1]).add_(1)
                    kernel *= kernel.square()
                    if a is b and one == other:
                        kernel.fill_diagonal_(0)
                    sums[i, j] += kernel.sum().cpu()
    return sums + sums.tril(-1).T if a is b else sums


def _jackknife(value: float, left_out: Sequence[float]) -> Interval:
    """From the values of all groups but one: (G - 1) / G times their sum of squares is the variance (Tukey 1958)."""
    deviations = np.asarray(left_out) - np.mean(left_out)
    half = T_QUANTILE * math.sqrt((GROUPS - 1) / GROUPS * float(np.square(deviations).sum()))
    return value - half, value + half


# ---- Neighbors


class Neighbors(_TwoSets):
    """Who lies near whom, at most some 10,000 of each side: all pairs are looked at.

    A ball around an image reaches to its k-th nearest other image of its own set, its edge included, whereby a copy
    counts however rounding falls. precision: the share of fakes in the ball of some real; recall: of reals in that of
    some fake (k = 3; Kynkaanniemi et al. 2019). density: reals' balls a fake lies in, over k; coverage: the share of
    reals with a fake in their ball (k = 5; Naeem et al. 2020); as many new reals would cover about 31 in 32.
    duplicates: the share of fakes as near to another fake as only 1 % of the reals are to another real, so about 0.01
    for fakes as unlike each other as reals; None for unequal counts, since distances shrink as sets grow.

    The intervals hold the balls fixed, so that they tell how sure a share is, not how another draw would place the
    balls: Wilson's for shares (1927), the normal one for density.
    """

    higher_is_better = None
    PRECISION_K, COVERAGE_K = 3, 5

    def compute(self) -> dict[str, float | None]:
        """{"precision", "recall", "density", "coverage", "duplicates"}."""
        return {name: None if hits is None else float(hits.mean()) for name, hits in self._hits().items()}

    def interval(self) -> dict[str, Interval | None]:
        """The same names."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            return {name: None if hits is None else _wilson(hits) if name != "density" else _normal(hits)
                    for name, hits in self._hits().items()}

    def real_statistics(self) -> Statistics:
        """Squared distances [N, 5] from each real, in hash order, to its nearest others."""
        return self._radii(self._ordered("reals", least=self.COVERAGE_K + 1))

    def _radii(self, reals: _Ordered) -> Statistics:
        return self._statistics_of([reals], lambda: {"nearest": _nearest(reals, reals, self.COVERAGE_K)[0]})

    def _hits(self) -> dict[str, Tensor | None]:
        """Per image, 0 or 1; for density any number."""
        reals, fakes = (self._ordered(kind, least=self.COVERAGE_K + 1) for kind in self.kinds)
        return self._once((reals, fakes), lambda: self._look(reals, fakes))

    def _look(self, reals: _Ordered, fakes: _Ordered) -> dict[str, Tensor | None]:
        of_reals = self._radii(reals)["nearest"].to(reals.rows.device)
        center = reals.mean()
        of_fakes = _nearest(fakes, fakes, self.COVERAGE_K)[0]
        precision, recall, coverage = (of_reals.new_zeros(len(rows)) for rows in (fakes, reals, reals))
        density = of_reals.new_zeros(len(fakes))
        for one in reals.blocks():
            points = reals[one] - center
            near_reals = (_edge(points, of_reals[one, k - 1])[:, None] for k in (self.PRECISION_K, self.COVERAGE_K))
            ball, wide_ball = near_reals
            for other in fakes.blocks():
                others = fakes[other] - center
                squares = _squares(points, others)
                in_ball, in_wide_ball = squares <= ball, squares <= wide_ball
                precision[other] = precision[other].maximum(in_ball.any(dim=0).double())
                near_fakes = squares <= _edge(others, of_fakes[other, self.PRECISION_K - 1])
                recall[one] = recall[one].maximum(near_fakes.any(dim=1).double())
                density[other] += in_wide_ball.sum(dim=0, dtype=torch.float64) / self.COVERAGE_K
                coverage[one] = coverage[one].maximum(in_wide_ball.any(dim=1).double())
        duplicates = None
        if len(reals) == len(fakes):
            limit = torch.quantile(of_reals[:, 0].sqrt(), 0.01).square()
            lengths = torch.cat([(fakes[part] - center).square().sum(dim=1) for part in fakes.blocks()])
            duplicates = (of_fakes[:, 0] <= limit + ROUNDING * (lengths + limit)).double()
        return {"precision": precision, "recall": recall, "density": density, "coverage": coverage,
                "duplicates": duplicates}


def _squares(a: Tensor, b: Tensor) -> Tensor:
    """[n, D], [m, D] -> [n, m] squared distances, from products: exact to ROUNDING of the squared lengths."""
    return torch.addmm(b.square().sum(dim=1) + a.square().sum(dim=1, keepdim=True), a, b.T, alpha=-2).clamp_(min=0)


def _edge(points: Tensor, radius: Tensor) -> Tensor:
    """Squared radii [n], and as much as rounding can move a point that lies on the edge."""
    return radius + ROUNDING * (points.square().sum(dim=1) + radius)


def _nearest(points: _Ordered, others: _Ordered, count: int, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """-> [N, count] squared distances to the nearest others, the nearest first, and their places among `others`.

    Points that are the others themselves are no neighbors of themselves; their copies are. `limit`: of the first
    points only. The others' mean is subtracted from both: small numbers lose less when they cancel.
    """
    center = others.mean()
    found = []
    for one in points.blocks(slice(0, min(limit or len(points), len(points)))):
        rows = points[one] - center
        nearest, places = rows.new_full((len(rows), count), torch.inf), rows.new_zeros(len(rows), count).long()
        for other in others.blocks():
            squares = _squares(rows, others[other] - center)
            if points is others and one.start == other.start:
                squares.diagonal().fill_(torch.inf)
            squares, here = squares.topk(min(count, squares.shape[1]), largest=False)
            both, both_places = torch.cat([nearest, squares], dim=1), torch.cat([places, here + other.start], dim=1)
            nearest, kept = both.topk(count, largest=False)
            places = both_places.gather(1, kept)
        found.append((nearest, places))
    return torch.cat([squares for squares, _ in found]), torch.cat([places for _, places in found])


def _normal(values: Tensor) -> Interval:
    """Of the mean of [N] values."""
    half = NORMAL_QUANTILE * float(values.std()) / math.sqrt(len(values))
    return float(values.mean()) - half, float(values.mean()) + half


def _wilson(hits: Tensor) -> Interval:
    """Of a share, from [N] zeros and ones; never of width 0, also at a share of 0 or 1."""
    count, share = len(hits), float(hits.mean())
    weight = NORMAL_QUANTILE**2 / count
    half = NORMAL_QUANTILE * math.sqrt(share * (1 - share) / count + weight / (4 * count))
    low, high = ((share + weight / 2 + sign * half) / (1 + weight) for sign in (-1, 1))
    return low, high


# ---- Copies


class CopyRate(_KnownReals):
    """The share of fakes that are nearer to some training image than 99 % of images never trained on are.

    Nearer is meant relative to the crowd: an image's figure is its distance to the nearest training image over the
    mean distance to the COPY_NEIGHBORS nearest (after Carlini et al. 2023, section 5, who take 50). A copy has about
    0. A gray or blurred image, near to many but to none above all, has about 1 and is no copy, though its plain
    distance may be small. A fake counts at or below the 1 % quantile of the held-out images' figures. Without
    held-out images, training images against the others stand in: then near duplicates among them make the rule mild.

    About 0.01 for a generator that copies nothing; far above it look at `nearest()`. Features decide what a copy
    is: to pixels, a mirrored or shifted image is another. Where training mirrors, give mirrored features as well.
    The interval is Wilson's (1927) with the quantile held fixed. Time grows with training images x (fakes + held-out
    ones, or up to 10,000 training images); all of them may be many, the memory beside the features is 200 MB.
    """

    higher_is_better = False
    kinds = ("training", "held_out", "fakes")

    def update(self, features: Tensor, kind: str) -> None:
        """Collects [N, D] features of one kind: "training", "held_out" or "fakes"."""
        self._keep(kind, features)

    def compute(self) -> float:
        return float(self._copies().mean())

    def interval(self) -> Interval:
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            return _wilson(self._copies())

    def nearest(self) -> tuple[Tensor, Tensor]:
        """For each fake, in the order of updates: its figure (the lower, the more a copy) and the place of its nearest
        training image in the order of updates. float64 [M] and int64 [M], of what this process has seen.
        """
        training, fakes, (figures, places, _) = self._judged()
        given = torch.argsort(fakes.order)
        return figures[given], training.order[places][given]

    def real_statistics(self) -> Statistics:
        """Figures of the held-out images, or of the training images that stand in for them."""
        return self._known(self._training(), self._ordered("held_out", least=0))

    def _training(self) -> _Ordered:
        return self._ordered("training", least=COPY_NEIGHBORS + 1)

    def _copies(self) -> Tensor:
        return self._judged()[2][2]

    def _judged(self) -> tuple[_Ordered, _Ordered, tuple[Tensor, Tensor, Tensor]]:
        """Training, fakes, and for each of these in hash order: figure, place of the nearest, 1 for a copy."""
        training, held_out, fakes = self._training(), self._ordered("held_out", least=0), self._ordered("fakes")

        def work() -> tuple[Tensor, Tensor, Tensor]:
            figures, places = self._figures(fakes, training)
            limit = torch.quantile(self._known(training, held_out)["figures"], 0.01)
            return figures, places, (figures <= limit.to(figures.device)).double()

        return training, fakes, self._once((training, held_out, fakes), work)

    def _known(self, training: _Ordered, held_out: _Ordered) -> Statistics:
        def compute() -> Statistics:
            figures, _ = self._figures(held_out if len(held_out) else training, training, limit=STAND_INS)
            return {"figures": figures}

        return self._statistics_of([training, held_out], compute)

    @staticmethod
    def _figures(points: _Ordered, training: _Ordered, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """[N] figures, and the place [N] of the nearest training image."""
        squares, places = _nearest(points, training, COPY_NEIGHBORS, limit)
        center = training.mean()
        lengths = torch.cat([(points[part] - center).square().sum(dim=1) for part in points.blocks()])
        # A copy is at 0, not at what rounding left; so is one of an image that training holds several times.
        distances = torch.where(squares <= ROUNDING * lengths[:len(squares), None], 0, squares).sqrt()
        crowd = distances.mean(dim=1)
        return torch.where(crowd > 0, distances[:, 0] / crowd, 0), places[:, 0]


# ---- Inception score


class InceptionScore(_Rows):
    """exp of the mean over images of KL(p(y|x) || p(y)), the mean of 10 splits (Salimans et al. 2016).

    1 for images that all look alike to the classifier, up to its number of classes; higher is better, and it says
    nothing about the reals. The splits are tenths of the rows in hash order, so it depends on the set of logits only;
    it grows with N. The interval is Student's, from the 10 splits.
    """

    higher_is_better = True
    kinds = ("logits",)

    def update(self, logits: Tensor) -> None:
        """Collects [N, classes] before the softmax."""
        self._keep("logits", logits)

    def compute(self) -> float:
        return float(np.mean(self._splits()))

    def interval(self) -> Interval:
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            splits = self._splits()
            half = T_QUANTILE * float(np.std(splits, ddof=1)) / math.sqrt(GROUPS)
            return float(np.mean(splits)) - half, float(np.mean(splits)) + half

    def _splits(self) -> list[float]:
        rows = self._ordered("logits", least=GROUPS)
        scores = []
        for part in rows.groups():
            logs = rows[part].log_softmax(dim=1)
            scores.append(float(F.kl_div(logs.exp().mean(dim=0).log(), logs, log_target=True, reduction="none")
                                .sum(dim=1).mean().exp()))
        return scores


# ---- Path length


class PathLength(Metric):
    """How much images change along paths between latents: squared distance / eps^2 of the features of two images eps
    apart on a great circle (`slerp`), in the mean of what lies between the 1st and the 99th percentile, both included
    (Karras et al. 2019, section 4.1; percentiles to the lower and higher neighbor). Lower is smoother.

    The published one takes VGG16's features; compare only equal features. Take them before any rounding to bytes: a
    step of 1e-4 is far below one gray level. The interval is that of a trimmed mean (Tukey and McLaughlin 1963).
    """

    full_state_update = False
    higher_is_better = False
    lengths: list[Tensor]

    def __init__(self, eps: float = 1e-4) -> None:
        super().__init__()
        if not eps > 0:
            raise ValueError(f"PathLength: eps={eps}, must be above 0. Use 1e-4, as published.")
        self.eps = eps
        self.add_state("lengths", default=[], dist_reduce_fx="cat")

    def update(self, features_a: Tensor, features_b: Tensor) -> None:
        """Pairs features_a[n] with features_b[n]: both [N, D], of images at t and t + eps of one path."""
        if features_a.shape != features_b.shape or features_a.ndim != 2:
            got = f"{[*features_a.shape]} and {[*features_b.shape]}"
            raise ValueError(f"PathLength: features are {got}, must be [N, D] both. Give images of the same paths.")
        lengths = (features_a.double() - features_b.double()).square().sum(dim=1) / self.eps**2
        if not lengths.isfinite().all():
            raise ValueError("PathLength: features hold NaN or infinity, must be finite. Leave this figure out.")
        self.lengths.append(lengths)

    def compute(self) -> float:
        lengths, low, high = self._sorted()
        return float(lengths[low:high + 1].mean())

    def interval(self) -> Interval | None:
        """None for fewer than 20 pairs."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            lengths, low, high = self._sorted()
            if len(lengths) < 2 * GROUPS:
                return None
            mean, kept = float(lengths[low:high + 1].mean()), (high + 1 - low) / len(lengths)
            winsorized = lengths.clamp(lengths[low], lengths[high])
            half = NORMAL_QUANTILE * float(winsorized.std()) / (kept * math.sqrt(len(lengths)))
            return max(0.0, mean - half), mean + half

    def _sorted(self) -> tuple[Tensor, int, int]:
        """All lengths, the shortest first, and the places of the first and last one that count."""
        batches = [self.lengths] if isinstance(self.lengths, Tensor) else self.lengths
        lengths = torch.cat(batches or [torch.zeros(0)]).sort().values
        if not len(lengths):
            raise ValueError("PathLength: 0 pairs, must be at least 1. Call update() with features first.")
        last = len(lengths) - 1
        return lengths, last // 100, last - last // 100


def slerp(a: Tensor, b: Tensor, t: Tensor | float) -> Tensor:
    """The point at share t of the shorter great circle from a to b: [N, L] latents of any length, t a number or [N] ->
    [N, L] of length 1, in the latents' dtype (Shoemake 1985).

    Only directions count, as for the generator, which normalises its latents. Opposite latents have no shorter way.
    """
    start, end = F.normalize(a.double(), dim=1), F.normalize(b.double(), dim=1)
    share = torch.as_tensor(t, dtype=torch.float64, device=a.device).reshape(-1, 1)
    cosine = (start * end).sum(dim=1, keepdim=True).clamp(-1, 1)
    angle, across = share * cosine.acos(), F.normalize(end - cosine * start, dim=1)
    return F.normalize(start * angle.cos() + across * angle.sin(), dim=1).to(a.dtype)


# ---- What the discriminator knows


class Confusion(_Rows):
    """What a discriminator takes for real, at the threshold half-way between its mean scores of training images and of
    one half of the fakes; counted on the other half of them and on held-out images, without any on training images.

    The fakes' halves are by the scores' hashes, so no order matters. `accuracy` is the mean of the two shares it has
    right: 0.5 for one that cannot tell. `overfit` is (mean of training - held-out) / (training - fakes): 0 where it
    treats images it never saw as those it trained on, 1 where it treats them as fakes (Karras et al. 2020, section 3,
    with held-out and fakes changed in sign); None without held-out images or where fakes score as high as training.
    """

    higher_is_better = None
    kinds = ("training", "held_out", "fakes")

    def update(self, scores: Tensor, kind: str) -> None:
        """Collects [N] scores, higher for more real, of one kind: "training", "held_out" or "fakes"."""
        if scores.ndim != 1:
            raise ValueError(f"Confusion: scores are {[*scores.shape]}, must be [N]. Use scores.flatten().")
        self._keep(kind, scores[:, None])

    def compute(self) -> dict[str, float | None]:
        """{"real_as_real", "real_as_fake", "fake_as_fake", "fake_as_real": counts; "accuracy", "threshold",
        "overfit"}."""
        training, held_out = self._ordered("training")[:], self._ordered("held_out", least=0)[:]
        fakes = self._ordered("fakes", least=2)[:]
        half = len(fakes) // 2
        threshold = float(training.mean() + fakes[:half].mean()) / 2
        reals, fakes_counted = held_out if len(held_out) else training, fakes[half:]
        real_hits, fake_hits = int((reals > threshold).sum()), int((fakes_counted <= threshold).sum())
        overfit, gap = None, float(training.mean() - fakes.mean())
        if len(held_out) and gap > 0:
            overfit = float(training.mean() - held_out.mean()) / gap
        return {"real_as_real": real_hits, "real_as_fake": len(reals) - real_hits, "fake_as_fake": fake_hits,
                "fake_as_real": len(fakes_counted) - fake_hits, "threshold": threshold, "overfit": overfit,
                "accuracy": (real_hits / len(reals) + fake_hits / len(fakes_counted)) / 2}
