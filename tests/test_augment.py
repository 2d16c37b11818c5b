"""Claims about augmentation: each transform by hand, how often it happens, and how ADA adapts that."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from gradine.stages.augment import AUGMENTATION_DRAWS, adapted, augmented, sureness


def uniforms(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, AUGMENTATION_DRAWS, generator=torch.Generator().manual_seed(seed))


def pictures(count: int = 6, size: int = 16, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)


# In the order of the draws: gate, then strengths.
BRIGHTNESS, SATURATION, CONTRAST, SHIFT, CUTOUT = 0, 2, 4, 6, 9


def only(transform: int, *strengths: float, count: int = 1) -> Tensor:
    """Uniforms of rows that pass the gate of one transform, at probability 0.5."""
    draws = torch.full((count, AUGMENTATION_DRAWS), 0.75)
    draws[:, transform] = 0.25
    draws[:, transform + 1:transform + 1 + len(strengths)] = torch.tensor(strengths)
    return draws


@pytest.mark.parametrize("probability", [0.0, torch.tensor(0.0)])
def test_with_probability_zero_every_image_is_the_same_bit_for_bit(probability: Tensor | float) -> None:
    images = pictures()
    images[0, 0, 0, 0] = -0.0
    shown = augmented(images, uniforms(6), probability)
    assert torch.equal(shown.view(torch.int32), images.view(torch.int32))


def test_with_probability_one_every_image_changes() -> None:
    images = pictures(50)
    assert (augmented(images, uniforms(50), 1.0) != images).flatten(1).any(1).all()


def test_a_rows_transforms_depend_on_its_own_image_and_uniforms_alone() -> None:
    images, draws = pictures(), uniforms(6)
    alone = torch.cat([augmented(images[[i]], draws[[i]], 0.7) for i in range(6)])
    assert torch.equal(augmented(images, draws, 0.7), alone)


def test_brightness_adds_up_to_a_half_either_way() -> None:
    images = pictures(1)
    for strength, added in ((0.0, -0.5), (0.5, 0.0), (0.9, 0.4)):
        torch.testing.assert_close(augmented(images, only(BRIGHTNESS, strength), 0.5), images + added)


def test_saturation_moves_colours_from_gray_to_twice_as_far_from_it() -> None:
    """Pixel (0.6, 0, 0): gray is 0.2."""
    images = torch.tensor([0.6, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    for strength, pixel in ((0.0, [0.2, 0.2, 0.2]), (0.5, [0.6, 0.0, 0.0]), (1.0, [1.0, -0.2, -0.2])):
        shown = augmented(images, only(SATURATION, strength), 0.5)
        torch.testing.assert_close(shown, torch.tensor(pixel).view(1, 3, 1, 1).expand(1, 3, 8, 8))
    gray = pictures(1, channels=1)
    assert torch.equal(augmented(gray, only(SATURATION, 0.9), 0.5), gray)


def test_contrast_scales_the_distance_from_the_images_mean_by_a_half_to_one_and_a_half() -> None:
    images = pictures(1)
    mean = images.mean()
    for strength, factor in ((0.0, 0.5), (0.5, 1.0), (0.9, 1.4)):
        torch.testing.assert_close(augmented(images, only(CONTRAST, strength), 0.5), mean + factor * (images - mean))


@pytest.mark.parametrize(("down", "right"), [*itertools.product((-2, -1, 0, 1, 2), (-2, 0, 1))])
def test_a_shift_moves_whole_pixels_and_leaves_zeros_behind(down: int, right: int) -> None:
    """16 px: by up to 2, the five shifts as likely each."""
    images, expected = pictures(1), torch.zeros(1, 3, 16, 16)
    for y, x in itertools.product(range(16), range(16)):
        if 0 <= y - down < 16 and 0 <= x - right < 16:
            expected[..., y, x] = images[..., y - down, x - right]
    draws = only(SHIFT, (down + 2.5) / 5, (right + 2.5) / 5)
    assert torch.equal(augmented(images, draws, 0.5), expected)


def test_the_largest_uniform_below_one_stays_within_the_widest_shift() -> None:
    images, last = pictures(1, 8), 1 - 2**-24
    shown = augmented(images, only(SHIFT, last, last), 0.5)
    assert torch.equal(shown[..., 1:, 1:], images[..., :-1, :-1])


def test_shifts_are_as_likely_each_and_none_at_4_px() -> None:
    ramp = torch.arange(1.0, 17.0).expand(4000, 1, 16, 16)
    draws = uniforms(4000)
    draws[:, [BRIGHTNESS, SATURATION, CONTRAST, CUTOUT]], draws[:, SHIFT] = 0.75, 0.25
    shift = 8 - augmented(ramp, draws, 0.5)[:, 0, 8, 7]
    assert [(shift == by).float().mean().item() for by in range(-2, 3)] == pytest.approx([0.2] * 5, abs=0.025)
    assert torch.equal(augmented(ramp[:, :, :4, :4], draws, 0.5), ramp[:, :, :4, :4])


@pytest.mark.parametrize(("middle", "rows"), [(0, range(4)), (8, range(4, 12)), (16, range(12, 16)), (5, range(1, 9))])
def test_cutout_empties_a_square_of_half_the_side_whose_middle_is_anywhere(middle: int, rows: range) -> None:
    images = torch.ones(1, 3, 16, 16)
    shown = augmented(images, only(CUTOUT, (middle + 0.5) / 17, 8.5 / 17), 0.5)
    images[:, :, rows.start:rows.stop, 4:12] = 0
    assert torch.equal(shown, images)


@pytest.mark.parametrize("probability", [0.2, 0.8])
def test_each_transform_befalls_the_share_of_images_asked_for_apart_from_the_others(probability: float) -> None:
    """One gate at a time, the same draws for all."""
    draws, images, changed = uniforms(10_000), pictures(1, 8).expand(10_000, 3, 8, 8), []
    gates = [BRIGHTNESS, SATURATION, CONTRAST, SHIFT, CUTOUT]
    for transform in gates:
        alone = draws.clone()
        alone[:, [other for other in gates if other != transform]] = 1.0
        changed.append((augmented(images, alone, torch.tensor(probability)) != images).flatten(1).any(1))
    shares = torch.stack(changed).float()
    expected = [probability] * 3 + [probability * 8 / 9, probability]  # one shift of nine moves nothing
    assert shares.mean(1).tolist() == pytest.approx(expected, abs=0.02)
    assert (torch.corrcoef(shares) - torch.eye(5)).abs().max() < 0.05


def test_g_learns_through_every_transform() -> None:
    """All of them at once, against finite differences, to the second order: D's penalties need that."""
    images, draws = pictures(2, 8).double().requires_grad_(), uniforms(2, seed=3).double()
    assert torch.autograd.gradcheck(lambda x: augmented(x, draws, 1.0).sin(), (images,), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: augmented(x, draws, 1.0).sin(), (images,), fast_mode=True)


# ---- How often: ADA


@pytest.mark.parametrize(("before", "sign_mean", "images", "after"), [
    (0.2, 0.7, 500, 0.201), (0.2, 0.5, 500, 0.199), (0.2, 1.0, 50_000, 0.3), (0.2, -1.0, 50_000, 0.1),
    (0.0, 0.0, 500, 0.0), (0.7995, 0.9, 500, 0.8), (0.2, 0.6, 500, 0.2)])
def test_the_probability_climbs_while_d_is_surer_than_its_target_at_a_pace_of_half_a_million_images(
        before: float, sign_mean: float, images: int, after: float) -> None:
    torch.testing.assert_close(adapted(torch.tensor(before), torch.tensor(sign_mean), images), torch.tensor(after))


def test_a_d_that_knows_its_reals_by_heart_meets_the_highest_probability_after_400_000_images() -> None:
    probability = torch.tensor(0.0)
    for step in range(4100):
        probability = adapted(probability, torch.tensor(1.0), 100)
        if step == 3899:
            assert probability.item() == pytest.approx(0.78, abs=1e-3)
    assert probability.item() == pytest.approx(0.8)


def test_sureness_is_the_side_of_a_blind_ds_score_on_which_the_reals_fall() -> None:
    real, fake = torch.tensor([0.3, -0.2, 2.0]), torch.tensor([0.4, -0.7, 1.0])
    for loss in ("minimax", "non_saturating", "hinge"):
        assert sureness(loss, real, fake).tolist() == [1, -1, 1]
    assert sureness("least_squares", real, fake).tolist() == [-1, -1, 1]  # blind: 0.5
    for loss in ("wasserstein", "relativistic"):
        assert sureness(loss, real, fake).tolist() == [-1, 1, 1]
        assert torch.equal(sureness(loss, real + 9, fake + 9), sureness(loss, real, fake))
