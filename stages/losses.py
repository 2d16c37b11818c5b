"""What the players minimise. By default WGAN-GP (Gulrajani et al. 2017) with the drift term of Karras et al. 2018.

Scores are raw, [N]: a sigmoid, where a loss has one, is inside it. Every loss is per sample, [N]; who adds them up
decides over which batch the mean runs. What compares whole batches is a scalar: feature matching, diversity.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from gradine.configs.schema import Run, Training

# ---- The game


def critic_loss(loss: str, real_scores: Tensor, fake_scores: Tensor, targets: Tensor | None) -> Tensor:
    """What D minimises beside penalties, [N]. targets [N, 2]: of the real and of the fake in each row; None: 1 and 0.

    Only the losses that have targets (minimax, non-saturating, least squares) read them.
    """
    real_target, fake_target = targets.unbind(1) if targets is not None else (torch.ones_like(real_scores),
                                                                             torch.zeros_like(fake_scores))
    match loss:
        case "wasserstein":
            return fake_scores - real_scores
        case "minimax" | "non_saturating":  # -t log D - (1 - t) log(1 - D) of each
            return (F.softplus(real_scores) - real_target * real_scores
                    + F.softplus(fake_scores) - fake_target * fake_scores)
        case "least_squares":  # Mao et al. 2017 with a = 0, b = c = 1
            return ((real_scores - real_target).square() + (fake_scores - fake_target).square()) / 2
        case "hinge":  # Miyato et al. 2018
            return F.relu(1 - real_scores) + F.relu(1 + fake_scores)
        case "relativistic":  # Huang et al. 2024: each real is to score above the fake of its row
            return F.softplus(fake_scores - real_scores)
    raise AssertionError(loss)


def generator_loss(loss: str, fake_scores: Tensor, real_scores: Tensor | None = None) -> Tensor:
    """What G minimises, [N]. real_scores: for the relativistic loss alone."""
    match loss:
        case "wasserstein" | "hinge":
            return -fake_scores
        case "minimax":  # log(1 - sigmoid): flat where D is sure that a fake is one
            return -F.softplus(fake_scores)
        case "non_saturating":  # -log sigmoid: steepest there
            return F.softplus(-fake_scores)
        case "least_squares":
            return (fake_scores - 1).square() / 2
        case "relativistic":
            assert real_scores is not None
            return F.softplus(real_scores - fake_scores)
    raise AssertionError(loss)


def draw_targets(training: Training, uniforms: Tensor) -> Tensor:
    """D's targets [N, 2] of the real and the fake of each row, from uniforms [N, 4] in [0, 1).

    Each is fixed, or drawn between its two ends; then each, apart from the other, gives way to the other's with
    probability `flip_labels`.
    """
    own = torch.stack([ends[0] + (ends[-1] - ends[0]) * uniforms[:, column]
                       for column, ends in enumerate((training.real_labels, training.fake_labels))], dim=1)
    return torch.where(uniforms[:, 2:] < training.flip_labels, own.flip(1), own)


# ---- Bounds on D's scores and slope


def drift_term(real_scores: Tensor, weight: float) -> Tensor:
    """weight * D(real)**2: keeps near zero the scores whose level the Wasserstein loss leaves free."""
    return weight * real_scores.square()


def gradient_norm(gradients: Tensor) -> Tensor:
    """|| gradient ||_2 of each image, over C, H, W; its derivative is 0 at norm 0."""
    return torch.linalg.vector_norm(gradients, dim=(1, 2, 3))


def gradient_penalty(norm: Tensor, weight: float, target: float) -> Tensor:
    """weight * (norm - target)**2 / target**2."""
    return weight * (norm / target - 1).square()


def zero_centred_penalty(gradients: Tensor, weight: float) -> Tensor:
    """weight / 2 * || gradient ||_2**2 of each image (Mescheder et al. 2018): R1 at reals, R2 at fakes."""
    return weight / 2 * gradients.square().sum(dim=(1, 2, 3))


def penalty_divisor(run: Run, resolution: int) -> int:
    """How much smaller the norm is seen from the final resolution, k doublings away: 2**k; 1 at the current one.

    Nearest upscaling to the final image gives each pixel 4**k copies that share its gradient, so the norm is / 2**k.
    Penalties other than that of the norm are where the image is.
    """
    seen_from_final = run.training.penalty == "gradient" and run.training.penalty_at == "final"
    return run.final_resolution // resolution if seen_from_final else 1


# ---- Terms beside the game


def feature_matching(real_features: Tensor, fake_features: Tensor) -> Tensor:
    """|| mean of reals' features - mean of fakes' ||_2**2, of [N, F] each, for G (Salimans et al. 2016): a scalar."""
    return (real_features.detach().mean(0) - fake_features.mean(0)).square().sum()


def diversity_gap(real_features: Tensor, fake_features: Tensor) -> Tensor:
    """How much farther apart the reals of a batch lie than the fakes, by D's features [N, F]: a scalar.

    D raises it, so that it comes to see what fakes have in common; G lowers it by spreading its fakes.
    """
    return spread(real_features) - spread(fake_features)


def spread(features: Tensor) -> Tensor:
    """Mean distance of two different rows of [N, F], each scaled to length 1: D cannot win by larger features.

    The derivative at two equal rows is 0.
    """
    count = len(features)
    distances = F.pdist(F.normalize(features, dim=1, eps=1e-4))  # eps: the derivative at a row of zeros is 1/eps
    return distances.sum() / max(count * (count - 1) // 2, 1)


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits [N, classes] with one-hot labels, [N], in nats."""
    return -(labels * logits.log_softmax(1)).sum(1)


def information_loss(logits: Tensor, codes: Tensor, means: Tensor, continuous: Tensor) -> Tensor:
    """-log Q(code | image) [N], up to a constant, of what the image was made with (InfoGAN, Chen et al. 2016).

    logits and one-hot codes [N, codes]; Q's means, of variance 1, and the continuous codes [N, continuous_codes].
    Either may have no columns. With the codes' entropy it bounds I(code; image) from below: H(code) - E[this].
    """
    return classification_loss(logits, codes) + (means - continuous).square().sum(1) / 2


# ---- What acts on the weights themselves


@torch.no_grad()
def clip_weights(network: torch.nn.Module, bound: float) -> None:
    """All of the network's parameters into -bound..bound, in place (Arjovsky et al. 2017): after each step of D."""
    parameters: list[Tensor] = [*network.parameters()]
    torch._foreach_clamp_min_(parameters, -bound)
    torch._foreach_clamp_max_(parameters, bound)


@torch.no_grad()
def add_historical_averaging(parameters: Iterable[Tensor], means: list[Tensor], steps: int, weight: float) -> None:
    """To each .grad, that of weight * |theta - mean of theta_1..t|**2, history held constant (Salimans et al. 2016).

    `means`, of `steps` thetas so far (of zeros at first, with none), come to hold the current one too: t = steps + 1.
    """
    thetas = [*parameters]
    torch._foreach_lerp_(means, thetas, 1 / (steps + 1))
    for parameter, mean in zip(thetas, means, strict=True):
        if parameter.grad is not None:
            parameter.grad.add_(parameter - mean, alpha=2 * weight)
