"""WGAN-GP (Gulrajani et al. 2017) with the drift term of Karras et al. 2018.

Scores are raw, [N]. Every loss is per sample, [N]; who adds them up decides over which batch the mean runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradine.configs.schema import Run


def critic_loss(real_scores: Tensor, fake_scores: Tensor, drift: float) -> Tensor:
    """What D minimises beside the penalty: fakes down, reals up, and the reals' scores kept near zero."""
    return fake_scores - real_scores + drift * real_scores.square()


def generator_loss(fake_scores: Tensor) -> Tensor:
    return -fake_scores


def gradient_norm(gradients: Tensor) -> Tensor:
    """|| gradient ||_2 of each image, over C, H, W; its derivative is 0 at norm 0."""
    return torch.linalg.vector_norm(gradients, dim=(1, 2, 3))


def gradient_penalty(norm: Tensor, weight: float, target: float) -> Tensor:
    """weight * (norm - target)**2 / target**2."""
    return weight * (norm / target - 1).square()


def penalty_divisor(run: Run, resolution: int) -> int:
    """How much smaller the norm is seen from the final resolution, k doublings away: 2**k; 1 at the current one.

    Nearest upscaling to the final image gives each pixel 4**k copies that share its gradient, so the norm is / 2**k.
    """
    return run.final_resolution // resolution if run.training.penalty_at == "final" else 1
