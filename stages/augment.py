"""Augmentation of all that D sees, reals and fakes alike, so that D takes longer to know few images by heart.

Always (DiffAugment, Zhao et al. 2020), or as often as D overfits (ADA, Karras et al. 2020). G learns through it: every
transform is differentiable. Images are [N, C, R, R] in [-1, 1]; each row depends on its own random numbers alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

AUGMENTATION_DRAWS = 12  # uniforms a row needs: for each transform a gate, and a strength or two
TARGET = 0.6  # of ADA's heuristic: the mean sign of D's scores at reals
PACE = 500_000  # images in which the probability goes from 0 to 1
MOST = 0.8  # a generator that sees its images transformed more often than that learns to make transformed ones


def augmented(images: Tensor, uniforms: Tensor, probability: Tensor | float) -> Tensor:
    """Each transform befalls a row with `probability`, by its uniforms [N, AUGMENTATION_DRAWS] in [0, 1).

    In turn: brightness by up to 0.5 either way, saturation by up to twice, contrast by half to one and a half,
    a shift by up to R/8 in each direction, and a square of R/2, anywhere, is emptied. What is empty is 0, mid-gray.
    """
    column = iter(uniforms.view(len(images), AUGMENTATION_DRAWS, 1, 1, 1).unbind(1))

    def gated(transformed: Tensor, before: Tensor, gate: Tensor) -> Tensor:
        return torch.where(gate < probability, transformed, before)

    gate, by = next(column), next(column)
    images = gated(images + by - 0.5, images, gate)
    gate, by = next(column), next(column)
    gray = images.mean(dim=1, keepdim=True)
    images = gated(gray + (images - gray) * (2 * by), images, gate)
    gate, by = next(column), next(column)
    gray = images.mean(dim=(1, 2, 3), keepdim=True)
    images = gated(gray + (images - gray) * (by + 0.5), images, gate)
    gate, down, right = next(column), next(column), next(column)
    images = gated(shifted(images, down, right), images, gate)
    gate, down, right = next(column), next(column), next(column)
    return gated(images * ~square(images.shape[-1], down, right), images, gate)


def shifted(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """By -R//8..R//8 pixels, every whole number as likely, from uniforms [N, 1, 1, 1]."""
    size = images.shape[-1]
    most = size // 8
    for dim, uniform in ((2, down), (3, right)):
        by = whole(uniform, 2 * most + 1) - most
        source = torch.arange(size, device=images.device).view(1, 1, *((-1, 1) if dim == 2 else (1, -1))) - by
        # round the edge, then emptied: no pixel is read twice, so the derivative adds nothing up in a random order
        images = images.gather(dim, (source % size).expand_as(images)) * ((source >= 0) & (source < size))
    return images


def square(size: int, down: Tensor, right: Tensor) -> Tensor:
    """bool [N, 1, size, size]: a square of half the side, its middle anywhere from edge to edge."""
    def within(uniform: Tensor) -> Tensor:  # [N, 1, 1, size]
        start = whole(uniform, size + 1) - size // 4
        offset = torch.arange(size, device=uniform.device) - start
        return (offset >= 0) & (offset < size // 2)

    return within(down).transpose(2, 3) & within(right)


def whole(uniform: Tensor, count: int) -> Tensor:
    """0..count-1, each as likely: the largest float32 below 1, times count, still rounds to less than count."""
    return (uniform * count).long()


def sureness(loss: str, real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """ADA's sign of overfitting, [N]: 1 where D takes a real for one, -1 where not; 0 on average if D is blind."""
    match loss:
        case "wasserstein" | "relativistic":  # the level of these scores is free: a real counts against its row's fake
            return torch.sign(real_scores - fake_scores)
        case "least_squares":  # its targets are 1 and 0
            return torch.sign(real_scores - 0.5)
    return torch.sign(real_scores)


def adapted(probability: Tensor, sign_mean: Tensor, images: int) -> Tensor:
    """The probability, `images` later: up while the mean of `sureness` is above TARGET, else down, at one pace."""
    return (probability + torch.sign(sign_mean - TARGET) * (images / PACE)).clamp(0, MOST)
