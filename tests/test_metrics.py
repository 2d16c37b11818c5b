"""Claims about the metrics, each against a plain version written out here or a value known by hand."""

import hashlib

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from gradine.stages import metrics
from gradine.stages.metrics import (
    MultiScaleSSIM,
    PixelFrechet,
    SlicedWasserstein,
    coverage,
    laplacian_level,
    multiscale_similarity,
    numbers,
    pixel_features,
    sliced_wasserstein_count,
)

BINOMIAL = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256
WEIGHTS = [0.0448, 0.2856, 0.3001, 0.2363, 0.1333]


def pictures(seed: int, count: int, side: int, channels: int = 3, noise: float = 20.0) -> Tensor:
    """Blocks of color with fine noise: something to measure at every scale."""
    rng = np.random.default_rng(seed)
    blocks = rng.uniform(40, 215, (count, channels, 4, 4)).repeat(side // 4, axis=2).repeat(side // 4, axis=3)
    return as_bytes(blocks + rng.normal(0, noise, blocks.shape))


def as_bytes(values) -> Tensor:
    return torch.from_numpy(np.asarray(values)).round().clamp(0, 255).to(torch.uint8)


def channels_innermost(images: Tensor) -> Tensor:
    """The same [N, C, H, H] in memory as decoders leave it: [N, H, H, C]."""
    memory = np.empty((len(images), *images.shape[2:], images.shape[1]), np.uint8)
    memory.transpose(0, 3, 1, 2)[:] = images.numpy()
    return torch.from_numpy(memory.transpose(0, 3, 1, 2))


def swd(reals: Tensor, fakes: Tensor, **options) -> dict[str, float]:
    metric = SlicedWasserstein(reals.shape[-1], **options)
    metric.update(reals, real=True)
    metric.update(fakes, real=False)
    return metric.compute()


def ssim(a: Tensor, b: Tensor) -> float:
    metric = MultiScaleSSIM()
    metric.update(a, b)
    return metric.compute()


def frechet(reals: Tensor, fakes: Tensor, **options) -> float:
    metric = PixelFrechet(**options)
    metric.update(reals, real=True)
    metric.update(fakes, real=False)
    return metric.compute()


# ---- Sliced Wasserstein


def plain_smooth(images):
    padded = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)), mode="reflect")
    out = np.empty_like(images)
    for y in range(images.shape[2]):
        for x in range(images.shape[3]):
            out[:, :, y, x] = (padded[:, :, y : y + 5, x : x + 5] * BINOMIAL).sum(axis=(2, 3))
    return out


def plain_up(images):
    spread = np.zeros((*images.shape[:2], images.shape[2] * 2, images.shape[3] * 2))
    spread[:, :, ::2, ::2] = images
    return 4 * plain_smooth(spread)


def plain_pyramid(images):
    """Coarsest level first."""
    levels = [images.numpy().astype(np.float64)]
    while levels[-1].shape[-1] > 16:
        levels.append(plain_smooth(levels[-1])[:, :, ::2, ::2])
        levels[-2] = levels[-2] - plain_up(levels[-1])
    return levels[::-1]


def plain_descriptors(level, rng):
    count, channels, side, _ = level.shape
    if side == 4:
        found = level.copy()
    else:
        half = 1 if side == 8 else 3
        centers = rng.integers(half, side - half, size=(count, 128, 2))
        found = np.array(
            [level[n, :, y - half : y + half + 1, x - half : x + half + 1] for n in range(count) for y, x in centers[n]]
        )
    for c in range(channels):
        found[:, c] = (found[:, c] - found[:, c].mean()) / found[:, c].std()
    return found.reshape(len(found), -1)


def plain_swd(reals, fakes, seed):
    def in_order(images):
        return torch.stack(sorted(images, key=lambda i: hashlib.blake2b(i.numpy().tobytes(), digest_size=16).digest()))

    rng, result = np.random.default_rng(seed), {}
    for real_level, fake_level in zip(plain_pyramid(in_order(reals)), plain_pyramid(in_order(fakes)), strict=True):
        a, b = plain_descriptors(real_level, rng), plain_descriptors(fake_level, rng)
        distances = []
        for directions in rng.standard_normal((4, a.shape[1], 128)):
            unit = directions / np.sqrt((directions**2).sum(axis=0))
            distances.append(np.abs(np.sort(a @ unit, axis=0) - np.sort(b @ unit, axis=0)).mean())
        result[str(real_level.shape[-1])] = 1000 * np.mean(distances)
    return result | {"average": np.mean(list(result.values()))}


@pytest.mark.parametrize("side", [4, 8, 16, 32, 64])
def test_sliced_wasserstein_equals_the_publication_written_out(side):
    reals, fakes = pictures(1, 5, side), pictures(2, 5, side, noise=35)
    result = swd(reals, fakes, seed=3)
    assert list(result) == [str(s) for s in (4, 8, 16, 32, 64) if s == side or 16 <= s < side] + ["average"]
    assert result == pytest.approx(plain_swd(reals, fakes, seed=3), rel=1e-5)


@pytest.mark.parametrize("side", [4, 8, 16, 32])
def test_gray_images_have_a_sliced_wasserstein_distance_too(side):
    reals, fakes = pictures(1, 5, side, channels=1), pictures(2, 5, side, channels=1, noise=35)
    assert swd(reals, fakes) == pytest.approx(plain_swd(reals, fakes, seed=0), rel=1e-5)


def test_the_levels_of_the_pyramid_add_up_to_the_image():
    images = pictures(0, 2, 64).float()
    low, middle, high = (laplacian_level(images, side).double().numpy() for side in (16, 32, 64))
    np.testing.assert_allclose(plain_up(plain_up(low) + middle) + high, images.numpy(), atol=1e-3)


def test_sliced_wasserstein_does_not_depend_on_the_number_of_threads():
    reals, fakes = pictures(1, 4, 16), pictures(2, 4, 16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = swd(reals, fakes)
        torch.set_num_threads(3)
        assert swd(reals, fakes) == pytest.approx(alone, rel=1e-6)
    finally:
        torch.set_num_threads(threads)


def test_more_images_than_one_chunk_give_the_distance_of_the_whole_set():
    reals, fakes = pictures(1, 150, 16), pictures(2, 150, 16, noise=35)
    assert swd(reals, fakes) == pytest.approx(plain_swd(reals, fakes, seed=0), rel=1e-5)


def test_each_set_draws_its_own_patches_so_that_equal_sets_show_the_noise_floor():
    images = pictures(0, 100, 16)
    assert 0 < swd(images, images)["16"] < swd(images, pictures(1, 100, 16, noise=80))["16"] / 3


def test_equal_sets_of_whole_images_have_distance_zero():
    images = pictures(0, 20, 4)
    assert swd(images, images.flip(0)) == {"4": 0.0, "average": 0.0}


def test_another_seed_gives_another_draw_of_the_same_distance():
    reals, fakes = pictures(1, 30, 16), pictures(2, 30, 16, noise=80)
    first, second = swd(reals, fakes, seed=0)["16"], swd(reals, fakes, seed=1)["16"]
    assert first != second
    assert first == pytest.approx(second, rel=0.1)


def test_brightness_and_contrast_alone_leave_the_sliced_wasserstein_distance_at_its_floor():
    images = pictures(0, 20, 4)
    assert swd(images // 2 * 2, images // 2 + 50)["4"] < 1e-3


def test_sliced_wasserstein_takes_half_the_reals_up_to_16384():
    assert [sliced_wasserstein_count(n) for n in (2, 1001, 32_768, 10**6)] == [1, 500, 16_384, 16_384]


# ---- Multi-scale similarity


def plain_ssim_level(a, b):
    """Per image: SSIM and contrast-structure, window by window."""
    side = a.shape[-1]
    size = min(11, side)
    coordinates = np.arange(size) - (size - 1) / 2
    window = np.exp(-(coordinates[:, None] ** 2 + coordinates[None] ** 2) / (2 * (1.5 * size / 11) ** 2))
    window /= window.sum()
    similarities, contrasts = [], []
    for y in range(side - size + 1):
        for x in range(side - size + 1):
            p, q = a[:, :, y : y + size, x : x + size], b[:, :, y : y + size, x : x + size]
            mean_p, mean_q = (p * window).sum((2, 3)), (q * window).sum((2, 3))
            centered_p, centered_q = p - mean_p[..., None, None], q - mean_q[..., None, None]
            variance_p, variance_q = (centered_p**2 * window).sum((2, 3)), (centered_q**2 * window).sum((2, 3))
            covariance = (centered_p * centered_q * window).sum((2, 3))
            contrasts.append((2 * covariance + 7.65**2) / (variance_p + variance_q + 7.65**2))
            similarities.append(contrasts[-1] * (2 * mean_p * mean_q + 2.55**2) / (mean_p**2 + mean_q**2 + 2.55**2))
    return np.mean(similarities, axis=(0, 2)), np.mean(contrasts, axis=(0, 2))


def plain_multiscale(a, b):
    a, b = a.numpy().astype(np.float64), b.numpy().astype(np.float64)
    product = np.ones(len(a))
    for level, weight in enumerate(WEIGHTS):
        similarity, contrast = plain_ssim_level(a, b)
        product *= np.clip(similarity if level == 4 else contrast, 0, None) ** weight
        a, b = ((v[:, :, ::2, ::2] + v[:, :, 1::2, ::2] + v[:, :, ::2, 1::2] + v[:, :, 1::2, 1::2]) / 4 for v in (a, b))
    return product


def test_multiscale_similarity_equals_the_publication_written_out():
    a = pictures(0, 4, 64)
    b = torch.cat([as_bytes(a[:2].numpy() * 0.7 + pictures(1, 2, 64).numpy() * 0.3), pictures(2, 1, 64), 255 - a[3:]])
    expected = plain_multiscale(a, b)
    assert expected[0] > expected[2]
    assert expected[3] == 0  # an inverted image is clipped
    np.testing.assert_allclose(multiscale_similarity(a.double(), b.double()), expected, rtol=1e-9, atol=1e-12)
    assert ssim(a, b) == pytest.approx(expected.mean())


def checkers(cell: int) -> np.ndarray:
    """64 px of +1 and -1 in cells that a mean over two by two of them turns to 0."""
    return np.kron(np.indices((64 // cell, 64 // cell)).sum(axis=0) % 2 * 2 - 1, np.ones((cell, cell)))


@pytest.mark.parametrize(
    ("shared", "opposed"),
    [(20 * checkers(2), 60 * checkers(1)), (60 * checkers(8), 20 * checkers(16))],
    ids=["finest", "coarsest"],
)
def test_a_pair_opposed_at_one_level_only_scores_zero(shared, opposed):
    a, b = (as_bytes(np.tile(128 + shared + sign * opposed, (1, 3, 1, 1))) for sign in (1, -1))
    assert ssim(a, b) == 0


def test_multiscale_similarity_equals_the_pieces_of_torchmetrics():
    """Not its multiscale function: that averages the last level over mirrored borders, so only 5 px inside agree."""
    a = pictures(0, 2, 192).double()
    b = (0.6 * a + 0.4 * pictures(1, 2, 192).double()).round()
    left, right, expected = a, b, torch.ones(2, dtype=torch.float64)
    for level, weight in enumerate(WEIGHTS):
        last = level == 4
        pieces = structural_similarity_index_measure(
            left,
            right,
            data_range=255.0,
            reduction=None,
            return_full_image=last,
            return_contrast_sensitivity=not last,
        )
        piece = pieces[1][..., 5:-5, 5:-5].mean((1, 2, 3)) if last else pieces[1]
        expected *= piece.clamp(min=0) ** weight
        left, right = (v.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)) for v in (left, right))
    torch.testing.assert_close(multiscale_similarity(a, b), expected, rtol=1e-9, atol=0)


def test_identical_pairs_score_one():
    images = pictures(0, 3, 64)
    assert ssim(images, images) == pytest.approx(1, abs=1e-12)


def test_gray_pairs_are_as_similar_as_the_same_pairs_in_three_equal_channels():
    a, b = pictures(0, 3, 64, channels=1), pictures(0, 3, 64, channels=1, noise=60)
    assert 0 < ssim(a, b) < 1
    assert ssim(a, b) == pytest.approx(ssim(a.repeat(1, 3, 1, 1), b.repeat(1, 3, 1, 1)), rel=1e-12)
    assert ssim(a, b) == pytest.approx(plain_multiscale(a, b).mean(), rel=1e-9)


# ---- Frechet


def signed(images: Tensor) -> np.ndarray:
    return images.flatten(1).numpy() / 127.5 - 1


def test_frechet_of_one_gray_value_has_the_closed_form():
    reals, fakes = pictures(0, 50, 4, channels=1), pictures(1, 40, 4, channels=1)
    r, f = signed(reals).mean(axis=1), signed(fakes // 2).mean(axis=1)
    expected = (r.mean() - f.mean()) ** 2 + (r.std(ddof=1) - f.std(ddof=1)) ** 2
    assert frechet(reals, fakes // 2, size=1, channels=1) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_bright_pairs_of_values_has_the_closed_form():
    """tr((AB)^(1/2)) of 2x2 matrices is (tr(AB) + 2 det(AB)^(1/2))^(1/2)."""
    rng = np.random.default_rng(0)
    reals, fakes = (as_bytes(rng.integers(low, 256, (500, 2, 1, 1))) for low in (253, 250))
    fakes[:, 1] = torch.maximum(fakes[:, 0], fakes[:, 1])  # correlated, so that the covariances do not commute
    r, f = signed(reals), signed(fakes)
    a, b = np.cov(r.T), np.cov(f.T)
    root_trace = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    expected = ((r.mean(0) - f.mean(0)) ** 2).sum() + np.trace(a + b) - 2 * root_trace
    assert frechet(reals, fakes, size=1, channels=2) == pytest.approx(expected, rel=1e-9)


def test_frechet_takes_the_mean_over_blocks_and_the_root_of_the_product_of_covariances():
    reals, fakes = pictures(0, 60, 8), pictures(1, 60, 8) // 2
    r, f = (signed(v).reshape(60, 3, 2, 4, 2, 4).mean(axis=(3, 5)).reshape(60, 12) for v in (reals, fakes))
    product = np.cov(r.T) @ np.cov(f.T)
    expected = ((r.mean(0) - f.mean(0)) ** 2).sum() + np.trace(np.cov(r.T) + np.cov(f.T))
    expected -= 2 * np.sqrt(np.linalg.eigvals(product).real).sum()
    assert frechet(reals, fakes, size=2) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("side", [4, 16, 32])
def test_frechet_of_commuting_singular_covariances_is_known_by_hand(side):
    """Doubled pixels have four times the covariance: tr(C + 4C - 2 * 2C) = tr(C). 10 images of up to 768 pixels."""
    small = pictures(0, 10, min(side, 16)) // 2
    r, f = signed(small), signed(small * 2)
    expected = ((r.mean(0) - f.mean(0)) ** 2).sum() + r.var(axis=0, ddof=1).sum()
    images = small.repeat_interleave(side // small.shape[-1], 2).repeat_interleave(side // small.shape[-1], 3)
    assert frechet(images, images * 2) == pytest.approx(expected, rel=1e-6)


def test_frechet_of_gray_images_is_a_third_of_that_of_three_equal_channels():
    """Means and, along (1, 1, 1), standard deviations are sqrt(3) of the gray ones."""
    reals, fakes = pictures(0, 40, 8, channels=1), pictures(1, 40, 8, channels=1) // 2
    threefold = frechet(reals.repeat(1, 3, 1, 1), fakes.repeat(1, 3, 1, 1), size=4)
    assert frechet(reals, fakes, size=4, channels=1) == pytest.approx(threefold / 3, rel=1e-6)


def test_frechet_of_a_set_to_itself_is_zero():
    images = pictures(0, 30, 16)
    assert frechet(images, images.flip(0)) == pytest.approx(0, abs=1e-6)


def spread(reals: Tensor, fakes: Tensor, **options) -> float | None:
    metric = PixelFrechet(**options)
    metric.update(reals, real=True)
    for batch in fakes.split(7):
        metric.update(batch, real=False)
    return metric.spread()


def test_spread_is_the_variance_of_the_fakes_over_that_of_the_reals():
    """By hand, one gray pixel: 0 and 255 are -1 and 1, variance 2; 51 and 204 are -0.6 and 0.6, variance 0.72."""
    reals, fakes = (torch.tensor(values, dtype=torch.uint8).view(2, 1, 1, 1) for values in ([0, 255], [51, 204]))
    assert spread(reals, fakes, size=1, channels=1) == pytest.approx(0.36, rel=1e-12)
    reals, fakes = pictures(0, 50, 16), pictures(1, 40, 16) // 2
    traces = [np.trace(np.cov(signed(images).T)) for images in (reals, fakes)]
    assert spread(reals, fakes) == pytest.approx(traces[1] / traces[0], rel=1e-9)


@pytest.mark.parametrize("kept", [1, 2, 4, 128])
def test_spread_of_images_that_repeat_falls_with_their_number(kept: int):
    """128 fakes of which only `kept` differ: (kept - 1) / kept of the variance, so one image shows best."""
    reals, fakes = pictures(0, 2048, 4), pictures(1, 2048, 4).view(2048 // kept, kept, 3, 4, 4)
    seen = [spread(reals, few.repeat(128 // kept, 1, 1, 1), size=4) for few in fakes[:64]]
    assert sum(seen) / len(seen) == pytest.approx((kept - 1) / kept * 128 / 127, abs=0.03)


@pytest.mark.parametrize(("reals", "fakes"), [(1, 5), (5, 1), (0, 0)])
def test_spread_of_fewer_than_two_images_is_unknown(reals: int, fakes: int):
    metric = PixelFrechet()
    metric.update(pictures(0, reals, 16), real=True)
    metric.update(pictures(1, fakes, 16), real=False)
    assert metric.spread() is None


def test_spread_beside_reals_that_are_all_alike_is_unknown():
    assert spread(pictures(0, 1, 16).repeat(9, 1, 1, 1), pictures(1, 9, 16)) is None


def test_frechet_is_symmetric():
    a, b = pictures(0, 30, 8), pictures(1, 40, 8) // 2
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-6)


# ---- Coverage


def line(*points: float) -> Tensor:
    """Features of one number each."""
    return torch.tensor(points, dtype=torch.float64).view(-1, 1)


def normals(seed: int, count: int, size: int = 6) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, size)))


def plain_coverage(reals: Tensor, fakes: Tensor, k: int) -> float:
    """Naeem et al. 2020, point by point."""
    def distance(a, b) -> float:
        return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5

    points, others = reals.double().tolist(), fakes.double().tolist()
    covered = 0
    for i, real in enumerate(points):
        radius = sorted(distance(real, point) for j, point in enumerate(points) if j != i)[k - 1]
        covered += any(distance(real, fake) <= radius for fake in others)
    return covered / len(points)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("block", [7, 16, 2048])
def test_coverage_equals_the_publication_written_out_in_blocks_of_any_size(k, block, monkeypatch):
    monkeypatch.setattr(metrics, "COVERAGE_BLOCK", block)
    reals = normals(0, 48)
    for fakes in (normals(1, 33), normals(2, 48) + 1, normals(3, 5)):
        expected = plain_coverage(reals, fakes, k)
        assert 0 < expected < 1
        assert coverage(reals, fakes, k) == expected


@pytest.mark.parametrize(("fakes", "k", "expected"), [
    ([1.5], 1, 2 / 4),  # in the balls of 1 and 2
    ([2], 1, 3 / 4),  # on the edge of those of 1 and 10, too
    ([2], 2, 4 / 4),
    ([1.5, 1.5, 1.6], 1, 2 / 4),  # the second and third one add nothing
    ([-1.01, 20], 1, 0),
])
def test_coverage_of_points_on_a_line_is_known_by_hand(fakes, k, expected):
    """0, 1, 2 and 10: to the nearest other one 1, 1, 1 and 8, to the second nearest 2, 1, 2 and 9."""
    assert coverage(line(0, 1, 2, 10), line(*fakes), k) == expected


def test_copies_of_the_reals_cover_all_of_them_however_rounding_falls():
    """k-th neighbors among the fakes lie on the edge of every ball; here far from 0, of unlike length, and repeated."""
    reals = torch.cat([normals(0, 60, 100) * 10.0**normals(1, 60, 1), normals(2, 2, 100).repeat(9, 1)]) + 1e4
    for first in range(len(reals)):
        ball = (reals - reals[first]).norm(dim=1).argsort()[:6]  # itself and 5 others
        assert coverage(reals, reals[ball[-1:]]) >= 1 / len(reals)
        assert plain_coverage(reals[ball], reals[ball[-1:]], 5) == coverage(reals[ball], reals[ball[-1:]])
    assert coverage(reals, reals.flip(0)) == 1


def test_float32_features_far_from_zero_are_covered_as_near_it():
    """At 1,000 the squares of 64 float32 numbers are exact to 4, distances of 0.001 long lost."""
    reals, fakes = (1000 + 0.01 * normals(seed, 40, 64).float() for seed in (0, 1))
    assert coverage(reals, fakes, 3) == plain_coverage(reals, fakes, 3) == coverage(reals - 1000, fakes - 1000, 3)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_a_new_draw_covers_all_but_one_real_in_two_to_the_k(k):
    """Of a real's neighbors of either kind, the first k are all reals with probability 2^-k."""
    seen = [coverage(normals(seed, 400, 2), normals(seed + 100, 400, 2), k) for seed in range(10)]
    assert sum(seen) / len(seen) == pytest.approx(1 - 2**-k, abs=0.03)


def test_coverage_of_images_that_repeat_falls_with_their_number():
    """Where spread is near 1 already: of 271 reals, 12 images come near less than 0.3 times as many as 271 images."""
    reals, fakes = (pixel_features(pictures(seed, 271, 16)) for seed in (0, 1))
    seen = [coverage(reals, fakes[:kept].repeat(271 // kept, 1)) for kept in (1, 2, 4, 12, 64, 271)]
    assert seen == sorted(seen)
    assert seen[-1] > 0.9
    assert seen[3] < 0.3 * seen[-1] < seen[4]


@pytest.mark.parametrize(("side", "channels"), [(4, 3), (16, 1), (64, 3)])
def test_pixel_features_are_means_over_blocks_between_minus_one_and_one(side, channels):
    images, size = pictures(0, 5, side, channels), min(side, 16)
    blocks = images.numpy().reshape(5, channels, size, side // size, size, side // size).mean(axis=(3, 5))
    np.testing.assert_allclose(pixel_features(images), blocks.reshape(5, -1) / 127.5 - 1, atol=1e-12)


# ---- All of them

SIDES = {SlicedWasserstein: 32, PixelFrechet: 32, MultiScaleSSIM: 64}


def new(kind):
    return SlicedWasserstein(32) if kind is SlicedWasserstein else kind()


def feed(metric, reals, fakes):
    if isinstance(metric, MultiScaleSSIM):
        metric.update(reals, fakes)
    else:
        metric.update(reals, real=True)
        metric.update(fakes, real=False)


def flat(result) -> list[float]:
    values = list(result.values()) if isinstance(result, dict) else [result]
    assert all(type(value) is float for value in values)
    return values


@pytest.fixture(params=SIDES, ids=lambda kind: kind.__name__)
def case(request):
    """A kind of metric, reals, fakes, and the result of feeding them in one batch."""
    kind = request.param
    reals, fakes = pictures(0, 20, SIDES[kind]), pictures(1, 20, SIDES[kind], noise=40)
    whole = new(kind)
    feed(whole, reals, fakes)
    return kind, reals, fakes, pytest.approx(flat(whole.compute()), rel=1e-9)


def test_order_and_batch_size_do_not_change_the_result(case):
    kind, reals, fakes, expected = case
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    metric = new(kind)
    for share in shuffled.split(7):
        feed(metric, reals[share], fakes[share])
    assert flat(metric.compute()) == expected


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", SIDES)
def test_the_memory_layout_of_the_images_changes_no_bit_of_the_result(kind, channels):
    results = []
    for strided in (False, True):
        metric = PixelFrechet(channels=channels) if kind is PixelFrechet else new(kind)
        sets = [pictures(seed, 20, SIDES[kind], channels, noise) for seed, noise in ((0, 20), (1, 40))]
        feed(metric, *(channels_innermost(images) if strided else images for images in sets))
        results.append(flat(metric.compute()))
    assert results[0] == results[1]


@pytest.mark.parametrize("channels", [1, 3])
def test_bytes_of_any_memory_layout_become_numbers_in_one(channels):
    """So that the claim above rests on no kernel's order of sums."""
    images = pictures(0, 2, 8, channels)
    for same in (images, channels_innermost(images)):
        assert numbers(same, torch.float64).stride() == (64 * channels, 64, 8, 1)
        assert torch.equal(numbers(same, torch.float64), images.double())


def test_two_shares_merged_and_fed_further_equal_the_whole(case):
    kind, reals, fakes, expected = case
    first, second = new(kind), new(kind)
    feed(first, reals[:8], fakes[:8])
    feed(second, reals[8:15], fakes[8:15])
    first.merge_state(second)
    feed(first, reals[15:], fakes[15:])
    assert flat(first.compute()) == expected


def test_states_gathered_over_workers_equal_the_whole(case):
    kind, reals, fakes, _ = case
    worker, alone = new(kind), new(kind)
    feed(worker, reals, fakes)
    feed(alone, torch.cat([reals, reals]), torch.cat([fakes, fakes]))
    worker.distributed_available_fn = lambda: True
    worker.dist_sync_fn = lambda state, **_: [state, state]  # two workers that saw the same
    assert flat(worker.compute()) == pytest.approx(flat(alone.compute()), rel=1e-9)


def test_reset_forgets_all_images(case):
    kind, reals, fakes, expected = case
    metric = new(kind)
    feed(metric, fakes, fakes)
    metric.reset()
    feed(metric, reals, fakes)
    assert flat(metric.compute()) == expected


@pytest.mark.parametrize("kind", SIDES)
def test_growing_noise_moves_every_metric_one_way(kind):
    images = pictures(0, 60, SIDES[kind], noise=5)
    rng = np.random.default_rng(1)
    results = []
    for noise in (0, 20, 40, 80):
        metric = new(kind)
        feed(metric, images, as_bytes(images.numpy() + rng.normal(0, noise, images.shape)))
        results.append(flat(metric.compute()))
    ways = np.sign(np.diff(np.array(results), axis=0))
    assert (ways == (-1 if kind is MultiScaleSSIM else 1)).all()


@pytest.mark.parametrize("kind", SIDES)
@pytest.mark.parametrize("value", [0, 77, 255])
def test_fakes_of_one_color_give_a_finite_number(kind, value):
    reals = pictures(0, 10, SIDES[kind])
    for first, second in ((reals, torch.full_like(reals, value)), (torch.full_like(reals, value), reals)):
        metric = new(kind)
        feed(metric, first, second)
        assert np.isfinite(flat(metric.compute())).all()


# ---- Errors


@pytest.mark.parametrize("kind", SIDES)
def test_images_other_than_square_bytes_are_refused_with_the_way_out(kind):
    images = pictures(0, 2, SIDES[kind])
    for wrong in (images.float(), images[0], images[..., 1:]):
        with pytest.raises(ValueError, match=r"must be torch.uint8 \[N, C, H, H\]. From \[-1, 1\] use"):
            feed(new(kind), wrong, wrong)


def test_unequal_or_absent_sets_are_refused_with_both_counts():
    with pytest.raises(ValueError, match="3 reals, 2 fakes, must be equal"):
        swd(pictures(0, 3, 16), pictures(0, 2, 16))
    with pytest.raises(ValueError, match="0 reals, 0 fakes, must be equal, not 0"):
        swd(pictures(0, 0, 16), pictures(0, 0, 16))
    with pytest.raises(ValueError, match="0 pairs, must be at least 1"):
        ssim(pictures(0, 0, 64), pictures(0, 0, 64))
    with pytest.raises(ValueError, match="1 reals, 0 fakes, must be 2 each"):
        frechet(pictures(0, 1, 16), pictures(0, 0, 16))


def test_resolutions_without_a_definition_are_refused():
    with pytest.raises(ValueError, match="resolution=48 is no power of two"):
        SlicedWasserstein(48)
    with pytest.raises(ValueError, match=r"SlicedWasserstein\(32\): images are 16 px"):
        SlicedWasserstein(32).update(pictures(0, 1, 16), real=True)
    with pytest.raises(ValueError, match="32 px, must be at least 64"):
        ssim(pictures(0, 1, 32), pictures(0, 1, 32))
    with pytest.raises(ValueError, match="must be equal"):
        ssim(pictures(0, 2, 64), pictures(0, 1, 64))
    for reals, fakes in ((pictures(0, 2, 32), pictures(0, 2, 16)), 2 * [pictures(0, 2, 16, channels=1)]):
        with pytest.raises(ValueError, match="must have 3 channels, one resolution"):
            frechet(reals, fakes)
    with pytest.raises(ValueError, match="multiple of 16 px or smaller"):
        frechet(pictures(0, 2, 24), pictures(0, 2, 24))


@pytest.mark.parametrize(("reals", "fakes", "k"), [((5, 2), (9, 2), 5), ((9, 2), (0, 2), 5), ((9, 2), (9, 3), 5),
                                                   ((9, 2), (9, 2), 0), ((9,), (9,), 5)])
def test_coverage_without_enough_neighbors_or_of_other_features_is_refused(reals, fakes, k):
    with pytest.raises(ValueError, match=r"must be \[N > k, D\] .* Use more images, or a smaller k"):
        coverage(torch.zeros(reals), torch.zeros(fakes), k)
