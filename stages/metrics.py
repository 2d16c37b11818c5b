"""Distances between generated and real images that need no pretrained network, and how many reals fakes come near.

Images are square uint8 tensors [N, C, H, H], 0..255, in any memory layout, scored at their own resolution. `reals`
come from the data, `fakes` from the averaged generator. States are lists to concatenate or sums: a metric fed on
several workers and merged (`merge_state`, or torchmetrics' own gathering) equals one fed everything, in any order and
in batches of any size. `compute()` gives Python floats; for all three, lower is better. Misuse raises ValueError.
The first two follow Karras et al. 2018, section 5. `coverage` takes features of any kind; there, higher is better.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor
from torchmetrics import Metric

COVERAGE_BLOCK = 2048  # features of each side at a time
LEVEL_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of MS-SSIM, finest level first (Wang et al. 2003)


def sliced_wasserstein_count(reals: int) -> int:
    """Images on each side of a sliced Wasserstein distance; as many reals stay free to measure its noise floor."""
    return min(16_384, reals // 2)


class SlicedWasserstein(Metric):
    """Sliced Wasserstein distance x 1e3 between the patches of reals and fakes, one per scale.

    From 16 px up each level of a Laplacian pyramid, `resolution` down to 16, gives `patches` 7x7 patches per image.
    Below 16 px, where the publication has no definition, the image is the only level: 3x3 patches at 8 px, the whole
    image at 4 px. The result depends on seed and image sets only: positions are drawn after sorting images by hash.
    All images stay in memory on their device; 16,384 need 2.7 GB more in `compute()`, which uses torch's thread count.
    """

    full_state_update = False
    higher_is_better = False
    reals: list[Tensor]
    fakes: list[Tensor]

    def __init__(self, resolution: int, seed: int = 0, repeats: int = 4, directions: int = 128, patches: int = 128):
        super().__init__()
        if resolution < 4 or resolution & (resolution - 1):
            raise ValueError(f"SlicedWasserstein: resolution={resolution} is no power of two. Use 4, 8, 16, ...")
        self.resolution, self.seed, self.repeats, self.directions = resolution, seed, repeats, directions
        self.patch_size, self.patches = {4: (4, 1), 8: (3, patches)}.get(resolution, (7, patches))
        self.add_state("reals", default=[], dist_reduce_fx="cat")
        self.add_state("fakes", default=[], dist_reduce_fx="cat")

    def update(self, images: Tensor, real: bool) -> None:
        """Collects [N, C, resolution, resolution] uint8 images of one side."""
        side = _checked_side("SlicedWasserstein", images)
        if side != self.resolution:
            raise ValueError(f"SlicedWasserstein({self.resolution}): images are {side} px. Make one for {side} px.")
        (self.reals if real else self.fakes).append(images)

    def compute(self) -> dict[str, float]:
        """{"16": .., "32": .., "average": ..}: distance x 1e3 by pixels per side, and the plain average."""
        reals, fakes = _in_hash_order(self.reals), _in_hash_order(self.fakes)
        if not reals or len(reals) != len(fakes):
            got = f"{len(reals)} reals, {len(fakes)} fakes"
            raise ValueError(f"SlicedWasserstein: {got}, must be equal, not 0. Cut the larger set to the smaller one.")
        rng = np.random.default_rng(self.seed)
        sides = [2**n for n in range(4, self.resolution.bit_length())] or [self.resolution]
        result = {str(side): 1e3 * self._distance_at(side, reals, fakes, rng) for side in sides}
        return {**result, "average": sum(result.values()) / len(result)}

    def _distance_at(self, side: int, reals: list[Tensor], fakes: list[Tensor], rng: np.random.Generator) -> float:
        """Both sets' descriptors of one level are the peak of memory; projections follow in small blocks."""
        real_descriptors, fake_descriptors = self._descriptors(reals, side, rng), self._descriptors(fakes, side, rng)
        directions = rng.standard_normal((self.repeats, real_descriptors.shape[1], self.directions))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        # Repeats are of equal size: the mean over repeats is the mean over all directions, in blocks of any size.
        blocks = torch.from_numpy(directions).float().transpose(1, 2).flatten(0, 1).split(8)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            sums = [_sorted_difference(block, real_descriptors, fake_descriptors, pool) for block in blocks]
        return sum(sums) / (self.repeats * self.directions)

    def _descriptors(self, images: list[Tensor], side: int, rng: np.random.Generator) -> Tensor:
        """-> [N * patches, C * size * size] float32, each channel with mean 0 and standard deviation 1 over the set."""
        size = self.patch_size
        corners = rng.integers(0, side - size + 1, size=(len(images), self.patches, 2))  # y, x; all that fit
        patches = np.empty((len(images), self.patches, len(images[0]), size, size), np.float32)
        for first in range(0, len(images), 64):
            chunk = slice(first, first + 64)
            level = laplacian_level(numbers(torch.stack(images[chunk]).cpu(), torch.float32), side).numpy()
            windows = sliding_window_view(level, (size, size), axis=(2, 3))
            patches[chunk] = windows[np.arange(len(level))[:, None], :, corners[chunk, :, 0], corners[chunk, :, 1]]
        descriptors = torch.from_numpy(patches).flatten(0, 1).flatten(2)
        deviation, mean = torch.std_mean(descriptors, dim=(0, 2), correction=0, keepdim=True)
        # Where nothing varies, as in fakes that are all one color, the channel becomes 0 instead of NaN.
        return descriptors.sub_(mean).div_(deviation.where(deviation > 0, 1)).flatten(1)


def laplacian_level(images: Tensor, side: int) -> Tensor:
    """[N, C, H, H] float -> [N, C, side, side]: what the next halving would lose; at 16 px and below, what is left."""
    while images.shape[-1] > side:
        images = _smooth(images, stride=2)
    if side <= 16:
        return images
    spread = torch.zeros_like(images)
    spread[..., ::2, ::2] = _smooth(images, stride=2)
    return images - 4 * _smooth(spread)


def _smooth(images: Tensor, stride: int = 1) -> Tensor:
    """5x5 binomial filter on each channel, borders mirrored without repeating the edge."""
    channels, row = images.shape[1], torch.tensor([1, 4, 6, 4, 1]).to(images) / 16
    kernel = row.outer(row).expand(channels, 1, 5, 5)
    return F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), kernel, stride=stride, groups=channels)


def _sorted_difference(directions: Tensor, reals: Tensor, fakes: Tensor, pool: ThreadPoolExecutor) -> float:
    """[K, D] directions, [M, D] descriptors -> the sum over directions of the 1-d Wasserstein distance."""
    real_rows, fake_rows = (directions @ reals.T).numpy(), (directions @ fakes.T).numpy()
    # In place on contiguous float32 rows: numpy's fastest sort, and it runs without the interpreter's lock.
    list(pool.map(np.ndarray.sort, [*real_rows, *fake_rows]))
    return float(np.abs(real_rows - fake_rows).mean(axis=1, dtype=np.float64).sum())


def _in_hash_order(batches: list[Tensor] | Tensor) -> list[Tensor]:
    """Views of single images, in an order that no worker count, batch size or shuffle changes."""
    batches = [batches] if isinstance(batches, Tensor) else batches  # gathered over workers: one tensor
    images = (image for batch in batches for image in batch)
    return sorted(images, key=lambda image: hashlib.blake2b(image.cpu().numpy().tobytes(), digest_size=16).digest())


class MultiScaleSSIM(Metric):
    """Mean multi-scale structural similarity of pairs from one set: lower is more diverse (Odena et al. 2017).

    Identical pairs score 1; read it next to that of the reals. Float64; five levels, so defined from 64 px up only.
    """

    full_state_update = False
    higher_is_better = False
    total: Tensor
    pairs: Tensor

    def __init__(self):
        super().__init__()
        self.add_state("total", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("pairs", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, images_a: Tensor, images_b: Tensor) -> None:
        """Pairs images_a[n] with images_b[n]: both [N, C, H, H] uint8, H >= 64."""
        side = min(_checked_side("MultiScaleSSIM", images) for images in (images_a, images_b))
        if side < 64:
            raise ValueError(f"MultiScaleSSIM: {side} px, must be at least 64. Leave it out at smaller stages.")
        if images_a.shape != images_b.shape:
            got = f"{[*images_a.shape]} and {[*images_b.shape]}"
            raise ValueError(f"MultiScaleSSIM: shapes {got}, must be equal. Split an even number of images in two.")
        for a, b in zip(images_a.split(16), images_b.split(16), strict=True):
            self.total += multiscale_similarity(numbers(a, torch.float64), numbers(b, torch.float64)).sum()
        self.pairs += len(images_a)

    def compute(self) -> float:
        """Mean over all pairs, 0..1; an error without any."""
        if self.pairs == 0:
            raise ValueError("MultiScaleSSIM: 0 pairs, must be at least 1. Call update() with images first.")
        return float(self.total / self.pairs)


def multiscale_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Two [N, C, H, H], 0..255 -> [N]: contrast and structure at every level, brightness at the coarsest only."""
    *finer_weights, coarsest_weight = LEVEL_WEIGHTS
    result = a.new_ones(len(a))
    for weight in finer_weights:
        result *= _similarity(a, b)[1].clamp(min=0) ** weight  # a negative base has no real power
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return result * _similarity(a, b)[0].clamp(min=0) ** coarsest_weight


def _similarity(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two [N, C, H, H] -> SSIM and its contrast-structure factor, each [N], over channels and valid positions."""
    mean_a, mean_b = _window_mean(a), _window_mean(b)
    variances = _window_mean(a * a + b * b) - mean_a**2 - mean_b**2
    covariance = _window_mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    contrast = (2 * covariance + c2) / (variances + c2)
    brightness = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return (brightness * contrast).mean(dim=(1, 2, 3)), contrast.mean(dim=(1, 2, 3))


def _window_mean(images: Tensor) -> Tensor:
    """Gaussian mean over every window that fits: as two banded matrices, 5x faster in float64 than a convolution."""
    side = images.shape[-1]
    size = min(11, side)
    offsets = torch.arange(size).to(images) - (size - 1) / 2
    window = torch.softmax(-0.5 * (offsets / (1.5 * size / 11)) ** 2, dim=0)  # exp, divided by its sum
    band = torch.stack([F.pad(window, (first, side - size - first)) for first in range(side - size + 1)])
    return band @ images @ band.T


class PixelFrechet(Metric):
    """Frechet distance of Gaussians fitted to raw pixels, in the squared unit of [-1, 1] intensities.

    Images larger than `size` are reduced to it by the mean over blocks, smaller ones are taken as they are.
    Covariances divide by N - 1; N may be below the number of pixels, but never compare distances of different N.
    """

    full_state_update = False
    higher_is_better = False
    reals: Tensor  # sum of [1, pixels]' [1, pixels]: count, sum and second moments in one float64 matrix
    fakes: Tensor
    side: Tensor  # pixels per side of the images seen, 0 before the first

    def __init__(self, size: int = 16, channels: int = 3):
        super().__init__()
        self.size, self.channels = size, channels
        width = 1 + channels * size * size
        self.add_state("reals", default=torch.zeros(width, width, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("fakes", default=torch.zeros(width, width, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("side", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="max")

    def update(self, images: Tensor, real: bool) -> None:
        """Adds [N, channels, H, H] uint8 images, H a multiple of `size` or smaller than it."""
        side, seen = _checked_side("PixelFrechet", images), int(self.side)
        if images.shape[1] != self.channels or seen not in (0, side) or (side > self.size and side % self.size):
            rule = f"{self.channels} channels, one resolution, and that a multiple of {self.size} px or smaller"
            got = f"{tuple(images.shape)} after {seen or 'no'} px"
            raise ValueError(f"PixelFrechet: images are {got}, must have {rule}. Use PixelFrechet(size, channels).")
        self.side.fill_(side)
        pixels = pixel_features(images, self.size)
        # Column 0 of ones makes row 0 of the sum count and sum. Zeros up to the full width add nothing to the distance.
        rows = F.pad(F.pad(pixels, (1, 0), value=1.0), (0, len(self.reals) - 1 - pixels.shape[1]))
        target = self.reals if real else self.fakes
        target += rows.T @ rows

    def compute(self) -> float:
        """0, up to rounding, for equal means and covariances; more otherwise."""
        (real_count, *reals), (fake_count, *fakes) = _gaussian(self.reals), _gaussian(self.fakes)
        if min(real_count, fake_count) < 2:
            raise ValueError(f"PixelFrechet: {real_count} reals, {fake_count} fakes, must be 2 each. Update with more.")
        return frechet_distance(*reals, *fakes)

    def spread(self) -> float | None:
        """tr(cov fakes) / tr(cov reals) of what this process has seen: 1 for fakes as diverse as the reals, 0 for one
        and the same image again and again. None where reals do not differ, or there are not two of each.
        """
        (real_count, _, reals), (fake_count, _, fakes) = _gaussian(self.reals), _gaussian(self.fakes)
        total = float(reals.trace())
        if min(real_count, fake_count) < 2 or total < 1e-12:  # equal images leave rounding, of either sign
            return None
        return max(0.0, float(fakes.trace()) / total)


def _gaussian(moments: Tensor) -> tuple[int, Tensor, Tensor]:
    """[1 + D, 1 + D] sums -> count, mean [D], covariance [D, D]; not finite for fewer than 2 images."""
    count, mean = moments[0, 0], moments[0, 1:] / moments[0, 0]
    return int(count), mean, (moments[1:, 1:] - count * mean.outer(mean)) / (count - 1)


def frechet_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) in float64; singular [D, D] covariances are fine."""
    variances, axes = torch.linalg.eigh(covariance_a)
    kept = variances > variances[-1] * len(variances) * torch.finfo(variances.dtype).eps  # the others are rounding
    root = axes[:, kept] * variances[kept].sqrt()
    # C_a C_b has the eigenvalues of the symmetric root' C_b root (but for zeros): no matrix square root is needed.
    shared = torch.linalg.eigvalsh(root.T @ covariance_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * shared)


def pixel_features(images: Tensor, size: int = 16) -> Tensor:
    """[N, C, H, H] uint8 -> [N, C * min(H, size)^2] float64 in [-1, 1]: means over blocks where H is above `size`."""
    return F.avg_pool2d(numbers(images, torch.float64) / 127.5 - 1, max(1, images.shape[-1] // size)).flatten(1)


def coverage(reals: Tensor, fakes: Tensor, k: int = 5) -> float:
    """[N, D] and [M, D] features -> 0..1, the share of reals with a fake as near as their k-th nearest other real
    (Naeem et al. 2020). As many new reals would cover about 1 - 2^-k. It grows as N falls: compare equal counts.

    Float64, since distances come from products of features, which cancel: in float32 the near ones would be the least
    exact. In blocks of fixed size: some 150 MB beside the features at any N and M, and D = 768.
    """
    if k < 1 or len(reals) <= k or not len(fakes) or reals.shape[1:] != fakes.shape[1:] or reals.ndim != 2:
        rule = f"[N > k, D] and [M > 0, D] at k={k} of 1 or more"
        got = f"{[*reals.shape]} reals, {[*fakes.shape]} fakes"
        raise ValueError(f"coverage: {got}, must be {rule}. Use more images, or a smaller k.")
    center = reals.mean(dim=0, dtype=torch.float64)  # small numbers lose less when they cancel
    covered = 0
    for first in range(0, len(reals), COVERAGE_BLOCK):
        points = reals[first:first + COVERAGE_BLOCK].double() - center
        radius = _nearest(points, reals, center, k, own=first)[:, -1]
        rounding = 1e-12 * (points.square().sum(dim=1) + radius)  # a copy of a real lies on the edge: let it count
        covered += int((_nearest(points, fakes, center, 1)[:, 0] <= radius + rounding).sum())
    return covered / len(reals)


def _nearest(points: Tensor, others: Tensor, center: Tensor, count: int, own: int | None = None) -> Tensor:
    """[n, D] minus `center`, [m, D] -> [n, count]: squared distances to the nearest others, the nearest first.

    With `own`, points[i] is others[own + i], and no neighbor of itself; its copies are.
    """
    nearest = points.new_full((len(points), count), torch.inf)
    lengths = points.square().sum(dim=1, keepdim=True)
    for first in range(0, len(others), COVERAGE_BLOCK):
        block = others[first:first + COVERAGE_BLOCK].double() - center
        squares = torch.addmm(block.square().sum(dim=1) + lengths, points, block.T, alpha=-2).clamp_(min=0)
        if own == first:
            squares.fill_diagonal_(torch.inf)
        nearest = torch.cat([nearest, squares], dim=1).topk(count, largest=False).values
    return nearest


def numbers(images: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 -> `dtype`, in one memory layout: the order of sums, hence the last bits, follows the layout."""
    return images.to(dtype, memory_format=torch.contiguous_format)


def _checked_side(metric: str, images: Tensor) -> int:
    """Pixels per side of [N, C, H, H] uint8 images."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[2] != images.shape[3]:
        way_out = "From [-1, 1] use ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)."
        raise ValueError(f"{metric}: {images.dtype} {[*images.shape]}, must be torch.uint8 [N, C, H, H]. {way_out}")
    return images.shape[-1]
