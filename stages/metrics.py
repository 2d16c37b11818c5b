"""Distances between generated and real images that need no features, and the features that need no network.

Images are square uint8 tensors [N, C, H, H], 0..255, in any memory layout, scored at their own resolution. `reals`
come from the data, `fakes` from the averaged generator. States are lists to concatenate or sums: a metric fed on
several workers and merged (`merge_state`, or torchmetrics' own gathering) equals one fed everything, in any order and
in batches of any size. `compute()` gives Python floats; for both, lower is better. Misuse raises ValueError.
They follow Karras et al. 2018, section 5.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor
from torchmetrics import Metric

DIRECTIONS_AT_ONCE, IMAGES_AT_ONCE = 64, 64  # of a sliced Wasserstein distance; the first take 1 GB at 16,384 images
JACKKNIFE_GROUPS, JACKKNIFE_PATCHES = 10, 32  # all patches of an image say little more of how images differ
STUDENT_T = 2.262  # 97.5 % quantile for 9 degrees of freedom
LEVEL_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of MS-SSIM, finest level first (Wang et al. 2003)


class SlicedWasserstein(Metric):
    """Sliced Wasserstein distance x 1e3 between the patches of reals and fakes, one per scale.

    From 16 px up each level of a Laplacian pyramid, `resolution` down to 16, gives `patches` 7x7 patches per image.
    Below 16 px, where the publication has no definition, the image is the only level: 3x3 patches at 8 px, the whole
    image at 4 px. The result depends on seed and image sets only: positions are drawn after sorting images by hash.
    All images stay in memory on their device, since their order decides on positions. `compute()` takes 65 kB per image
    of one side for projections and at most 150 kB for the patches of both: 1.5 GB for 16,384 at 32 px, 3.6 GB from
    128 px up. It uses torch's thread count.
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
        sets = _in_hash_order(self.reals), _in_hash_order(self.fakes)
        count = len(sets[0])
        if not count or count != len(sets[1]):
            got = f"{count} reals, {len(sets[1])} fakes"
            raise ValueError(f"SlicedWasserstein: {got}, must be equal, not 0. Cut the larger set to the smaller one.")
        rng = np.random.default_rng(self.seed)
        sides = [2**n for n in range(4, self.resolution.bit_length())] or [self.resolution]
        # The peak of memory, made once: fresh pages cost more time than the numbers that fill them.
        rows = np.empty((2, DIRECTIONS_AT_ONCE, count * self.patches), np.float32)
        threads = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                levels = [self._distance_at(side, sets, rng, rows, pool) for side in sides]
        finally:
            torch.set_num_threads(threads)  # the pool's 1 holds for its own threads, but new ones would inherit it
        self.without = np.mean([without for _, without in levels], axis=0)
        result = {str(side): distance for side, (distance, _) in zip(sides, levels, strict=True)}
        return {**result, "average": sum(result.values()) / len(result)}

    def interval(self) -> tuple[float, float] | None:
        """Where 95 % of such averages lie, had other images been drawn: a jackknife over tenths of the images, by the
        first directions of each level. None for fewer than ten images of each side.
        """
        average = self.compute()["average"]
        # (g - 1) / g of the sum of squares. What is a constant more or less in each, as with fewer patches, drops out.
        half = STUDENT_T * float(np.sqrt((JACKKNIFE_GROUPS - 1) * self.without.var()))
        return None if np.isnan(half) else (max(0.0, average - half), average + half)

    def _distance_at(self, side: int, sets: tuple[list[Tensor], ...], rng: np.random.Generator, rows: np.ndarray,
                     pool: ThreadPoolExecutor) -> tuple[float, np.ndarray]:
        """Distance x 1e3 of one level, and what it is without each tenth of the images, by fewer directions."""
        count, positions = len(sets[0]), side - self.patch_size + 1
        # Drawn in this order: the reals' y and x, the fakes', the directions.
        corners = [rng.integers(0, positions, size=(count, self.patches, 2)).astype(np.uint16) for _ in sets]
        patches = [*pool.map(partial(_Patches, side, self.patch_size), sets, corners)]
        drawn = rng.standard_normal((self.repeats, len(sets[0][0]) * self.patch_size**2, self.directions))
        drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
        # Repeats are of equal size: the mean over repeats is the mean over all directions, in blocks of any size.
        directions = torch.from_numpy(drawn).float().transpose(1, 2).flatten(0, 1)

        total, without = 0.0, np.full(JACKKNIFE_GROUPS, np.nan)
        for number, block in enumerate(directions.split(DIRECTIONS_AT_ONCE)):
            projections = rows[:, :len(block)]
            for each, out in zip(patches, torch.from_numpy(projections), strict=True):
                list(pool.map(partial(each.project, block, out), range(0, count, IMAGES_AT_ONCE)))
            if number == 0 and count >= JACKKNIFE_GROUPS:
                tenths = pool.map(_differences_without_tenths, *projections.reshape(2, len(block), count, -1))
                without = 1e3 * np.mean([*tenths], axis=0)
            total += sum(pool.map(_sorted_difference, *projections))
        return 1e3 * total / len(directions), without


class _Patches:
    """[P, size, size] patches of each of N images at one level of the pyramid: [N * P, C * size * size] descriptors,
    each channel with mean 0 and standard deviation 1 over the set. All at once would be 1.2 GB for 16,384 images, so
    a few images' are cut out at a time, anew for each block of directions.
    """

    def __init__(self, side: int, size: int, images: list[Tensor], corners: np.ndarray) -> None:
        """`corners` are y, x [N, P, 2]."""
        (channels, resolution, _), patches = images[0].shape, corners.shape[1]
        self.size, self.corners = size, corners
        stacked = patches * size**2 < side**2  # then patches, one below the other, are kept instead of the level
        shape = (patches * size, size) if stacked else (side, side)
        self.level = np.empty((len(images), channels, *shape), np.float32)
        sums = torch.zeros(2, channels, dtype=torch.float64)
        pivot = torch.zeros(channels, 1)
        step = max(1, min(IMAGES_AT_ONCE, 2**22 // resolution**2))
        for first in range(0, len(images), step):
            chunk = slice(first, first + step)
            level = laplacian_level(numbers(torch.stack(images[chunk]).cpu(), torch.float32), side).numpy()
            cut = _cut(level, corners[chunk], size)
            self.level[chunk] = cut.swapaxes(1, 2).reshape(len(level), channels, *shape) if stacked else level
            values = torch.from_numpy(cut).flatten(0, 1).flatten(2)
            if first == 0:
                pivot = values[0, :, :1].clone()  # so that what does not vary sums up to exactly 0
            values -= pivot
            sums += torch.stack([part.sum(dim=0).double().sum(dim=1) for part in (values, values.square())])
        mean, square = sums / (len(images) * patches * size**2)
        deviation = (square - mean**2).clamp(min=0).sqrt()
        self.level -= (mean + pivot[:, 0]).float().view(-1, 1, 1).numpy()
        # Where nothing varies, as in fakes that are all one color, the channel becomes 0 instead of NaN.
        self.level /= deviation.where(deviation > 0, 1).float().view(-1, 1, 1).numpy()
        if stacked:
            below = np.stack([size * np.arange(patches), np.zeros(patches, np.int64)], axis=1)
            self.corners = np.broadcast_to(below, corners.shape)

    def project(self, directions: Tensor, out: Tensor, first: int) -> None:
        """[K, D] directions -> their columns of out [K, N * P], for a few images from `first` on."""
        chunk = slice(first, first + IMAGES_AT_ONCE)
        descriptors = torch.from_numpy(_cut(self.level[chunk], self.corners[chunk], self.size)).flatten(0, 1).flatten(1)
        start = first * self.corners.shape[1]
        torch.mm(directions, descriptors.T, out=out[:, start:start + len(descriptors)])


def _cut(level: np.ndarray, corners: np.ndarray, size: int) -> np.ndarray:
    """[N, C, H, W] with [N, P, 2] corners y, x -> [N, P, C, size, size]."""
    windows = sliding_window_view(level, (size, size), axis=(2, 3))
    return windows[np.arange(len(level))[:, None], :, corners[..., 0], corners[..., 1]]


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


def _sorted_difference(reals: np.ndarray, fakes: np.ndarray) -> float:
    """Two [M] -> their 1-d Wasserstein distance. Both are used up."""
    # In place on contiguous float32 rows: numpy's fastest sort, and it runs without the interpreter's lock.
    reals.sort()
    fakes.sort()
    np.abs(np.subtract(reals, fakes, out=reals), out=reals)
    return float(reals.mean(dtype=np.float64))


def _differences_without_tenths(reals: np.ndarray, fakes: np.ndarray) -> list[float]:
    """Two [N, P] projections -> the distance without each tenth of the images, by some patches of each image.

    Descriptors have mean 0 over the set, hence so does what is left. Images stand in the order of their hashes, so
    that neighbors are no more alike than others, but copies stay together.
    """
    differences = []
    for first, end in pairwise(np.linspace(0, len(reals), JACKKNIFE_GROUPS + 1).astype(int)):
        rest = [np.delete(row[:, :JACKKNIFE_PATCHES], slice(first, end), axis=0).ravel() for row in (reals, fakes)]
        differences.append(_sorted_difference(*(row - row.mean() for row in rest)))
    return differences


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
    squares: Tensor
    pairs: Tensor

    def __init__(self):
        super().__init__()
        for name in ("total", "squares"):
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
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
            similarities = multiscale_similarity(numbers(a, torch.float64), numbers(b, torch.float64))
            self.total += similarities.sum()
            self.squares += similarities.square().sum()
        self.pairs += len(images_a)

    def compute(self) -> float:
        """Mean over all pairs, 0..1; an error without any."""
        if self.pairs == 0:
            raise ValueError("MultiScaleSSIM: 0 pairs, must be at least 1. Call update() with images first.")
        return float(self.total / self.pairs)

    def interval(self) -> tuple[float, float] | None:
        """Where 95 % of such means lie, had other pairs been drawn: normal, within 0..1. None for fewer than two."""
        mean = self.compute()
        if self.pairs < 2:
            return None
        variance = (self.squares - self.total**2 / self.pairs) / (self.pairs - 1)
        half = 1.96 * float((variance.clamp(min=0) / self.pairs).sqrt())
        return max(0.0, mean - half), min(1.0, mean + half)


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


def pixel_features(images: Tensor, size: int = 16) -> Tensor:
    """[N, C, H, H] -> [N, C * min(H, size)^2] float64 in [-1, 1]: means over blocks where H is above `size`."""
    block = max(1, images.shape[-1] // size)
    exact = torch.float64 if images.is_floating_point() else torch.int32  # sums of bytes: 6 times as fast at 1024 px
    sums = images.unflatten(3, (-1, block)).unflatten(2, (-1, block)).sum(dim=(3, 5), dtype=exact)
    return (sums.double() / (127.5 * block**2) - 1).flatten(1)


def numbers(images: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 -> `dtype`, in one memory layout: the order of sums, hence the last bits, follows the layout."""
    return images.to(dtype, memory_format=torch.contiguous_format)


def _checked_side(metric: str, images: Tensor) -> int:
    """Pixels per side of [N, C, H, H] uint8 images."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[2] != images.shape[3]:
        way_out = "From [-1, 1] use ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)."
        raise ValueError(f"{metric}: {images.dtype} {[*images.shape]}, must be torch.uint8 [N, C, H, H]. {way_out}")
    return images.shape[-1]
