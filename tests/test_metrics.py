"""Claims about the metrics, each against a plain version written out here or a value known by hand."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from gradine.stages.metrics import (
    MultiScaleSSIM,
    SlicedWasserstein,
    laplacian_level,
    multiscale_similarity,
    numbers,
    pixel_features,
)
from tests.references import images as references

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


@pytest.mark.parametrize("side", [4, 8, 16, 32, 64, 128])
def test_sliced_wasserstein_equals_the_publication_written_out(side):
    """At 128 px the patches are kept instead of the level."""
    count = 5 if side < 128 else 2
    reals, fakes = pictures(1, count, side), pictures(2, count, side, noise=35)
    result = swd(reals, fakes, seed=3)
    assert list(result) == [str(s) for s in (4, 8, 16, 32, 64, 128) if s == side or 16 <= s < side] + ["average"]
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


def draws(count: int, sets: int, noise: float) -> list[SlicedWasserstein]:
    """Distances between new draws of the same two kinds of images, which differ in brightness and color."""
    metrics = []
    for seed in range(sets):
        metrics.append(SlicedWasserstein(16, seed, patches=40, directions=32))
        shift = np.random.default_rng(seed).normal(0, 25, (2, count, 3, 1, 1))
        metrics[-1].update(as_bytes(pictures(2 * seed, count, 16).numpy() + shift[0]), real=True)
        metrics[-1].update(as_bytes(pictures(2 * seed + 1, count, 16, noise=noise).numpy() + shift[1]), real=False)
    return metrics


@pytest.mark.parametrize("noise", [20, 60], ids=["alike", "apart"])
def test_the_interval_of_a_sliced_wasserstein_distance_is_as_wide_as_new_draws_scatter(noise):
    found = draws(60, 30, noise)
    averages = np.array([metric.compute()["average"] for metric in found])
    low, high = np.array([metric.interval() for metric in found]).T
    assert (low < averages).all()
    assert (averages < high).all()
    inside = ((low < averages.mean()) & (averages.mean() < high)).mean()
    assert inside > 0.8  # of 95 % expected, in 30 draws
    assert 0.5 < ((high - low) / 2 / 2.262).mean() / averages.std(ddof=1) < 2


def test_fewer_than_ten_images_tell_no_interval_and_more_have_one_that_is_never_negative():
    few, enough = draws(9, 1, 20)[0], draws(10, 1, 20)[0]
    assert few.interval() is None
    low, high = enough.interval()
    assert 0 <= low < enough.compute()["average"] < high


def test_more_images_narrow_the_interval_of_the_sliced_wasserstein_distance():
    widths = [high - low for low, high in (draws(count, 1, 60)[0].interval() for count in (30, 120, 480))]
    assert widths[0] > 1.3 * widths[1] > 1.3**2 * widths[2]


def test_asking_for_the_interval_changes_neither_the_distance_nor_the_number_of_threads():
    threads = torch.get_num_threads()
    metric, asked = draws(20, 1, 20)[0], draws(20, 1, 20)[0]
    try:
        torch.set_num_threads(3)
        asked.interval()
        assert metric.compute() == asked.compute()
        with ThreadPoolExecutor(1) as pool:  # new threads inherit the number
            assert torch.get_num_threads() == pool.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(threads)


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


@pytest.mark.parametrize("side", references.SIDES)
def test_multiscale_similarity_equals_that_made_of_levels_by_scikit_image(side):
    expected = json.loads(references.RESULTS.read_text())["multiscale"][str(side)]
    a, b = (torch.from_numpy(images).double() for images in references.pairs(side))
    np.testing.assert_allclose(multiscale_similarity(a, b), expected, rtol=1e-9, atol=1e-12)


def test_identical_pairs_score_one():
    images = pictures(0, 3, 64)
    assert ssim(images, images) == pytest.approx(1, abs=1e-12)


def test_the_interval_of_the_similarity_is_the_normal_one_of_the_mean_over_pairs_in_any_batches():
    a, b = pictures(0, 12, 64), pictures(1, 12, 64, noise=60)
    of_pairs = np.array([ssim(a[n:n + 1], b[n:n + 1]) for n in range(12)])
    metric = MultiScaleSSIM()
    for share in (slice(0, 5), slice(5, 12)):
        metric.update(a[share], b[share])
    half = 1.959964 * of_pairs.std(ddof=1) / np.sqrt(12)
    assert metric.interval() == pytest.approx((of_pairs.mean() - half, of_pairs.mean() + half), rel=1e-4)


def test_the_interval_of_the_similarity_stays_within_zero_and_one_and_needs_two_pairs():
    images, metric = pictures(0, 3, 64), MultiScaleSSIM()
    metric.update(images[:1], images[:1])
    assert metric.interval() is None
    metric.update(images[1:], images[1:])
    assert metric.interval() == pytest.approx((1, 1), abs=1e-7)
    metric.update(images[:1], 255 - images[:1])  # 0: the mean is 3/4, and half the interval is .49
    assert metric.interval() == pytest.approx((0.75 - 0.49, 1), abs=1e-6)


def test_gray_pairs_are_as_similar_as_the_same_pairs_in_three_equal_channels():
    a, b = pictures(0, 3, 64, channels=1), pictures(0, 3, 64, channels=1, noise=60)
    assert 0 < ssim(a, b) < 1
    assert ssim(a, b) == pytest.approx(ssim(a.repeat(1, 3, 1, 1), b.repeat(1, 3, 1, 1)), rel=1e-12)
    assert ssim(a, b) == pytest.approx(plain_multiscale(a, b).mean(), rel=1e-9)


# ---- Pixels


@pytest.mark.parametrize(("side", "channels"), [(4, 3), (16, 1), (64, 3)])
def test_pixel_features_are_means_over_blocks_between_minus_one_and_one(side, channels):
    images, size = pictures(0, 5, side, channels), min(side, 16)
    blocks = images.numpy().reshape(5, channels, size, side // size, size, side // size).mean(axis=(3, 5))
    for same in (images, channels_innermost(images), images.float(), images.double()):
        np.testing.assert_allclose(pixel_features(same), blocks.reshape(5, -1) / 127.5 - 1, atol=1e-12)


# ---- All of them

SIDES = {SlicedWasserstein: 32, MultiScaleSSIM: 64}


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
        metric = new(kind)
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


def test_resolutions_without_a_definition_are_refused():
    with pytest.raises(ValueError, match="resolution=48 is no power of two"):
        SlicedWasserstein(48)
    with pytest.raises(ValueError, match=r"SlicedWasserstein\(32\): images are 16 px"):
        SlicedWasserstein(32).update(pictures(0, 1, 16), real=True)
    with pytest.raises(ValueError, match="32 px, must be at least 64"):
        ssim(pictures(0, 1, 32), pictures(0, 1, 32))
    with pytest.raises(ValueError, match="must be equal"):
        ssim(pictures(0, 2, 64), pictures(0, 1, 64))
