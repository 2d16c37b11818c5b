"""What an autoencoder and a variational one (Kingma & Welling 2014) minimise: no game, one loss for both halves.

The encoder takes images to latents [N, latent_size], that of a vae to [N, 2 * latent_size]: mean and log variance of
q(z | x), a diagonal Gaussian. The generator is the decoder. Figures are per image, [N]; likelihoods are in nats.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def reconstruction(images: Tensor, shown: Tensor) -> Tensor:
    """Mean squared error over each image's values."""
    return (images - shown).square().mean(dim=(1, 2, 3))


def kl_to_prior(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, diag exp(log_variance)) || N(0, I)) of [N, latent_size] each."""
    return (mean.square() + log_variance.exp() - log_variance - 1).sum(dim=1) / 2


def reparameterised(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """A draw from q(z | x), differentiable by its mean and variance. noise: N(0, I), [N, latent_size]."""
    return mean + (log_variance / 2).exp() * noise


def bound(images: Tensor, shown: Tensor, mean: Tensor, log_variance: Tensor, std: float) -> Tensor:
    """log p(x | z) - KL(q(z | x) || p(z)), on average over z below log p(x); p(x | z) = N(x; shown(z), std**2 I)."""
    values = images[0].numel()
    log_likelihood = -values / 2 * (reconstruction(images, shown) / std**2 + math.log(2 * math.pi * std**2))
    return log_likelihood - kl_to_prior(mean, log_variance)


def objective(decoder: nn.Module, encoder: nn.Module, reals: Tensor, noise: Tensor, dtype: torch.dtype | None,
              kind: str, std: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss per image, [N], and what one wants to see of it. reals [N, C, R, R]; noise [N, latent_size] for a vae.

    The vae's is minus the bound per value of an image, of the autoencoder's size: learning rates carry over.
    """
    if kind == "autoencoder":
        errors = reconstruction(reals, decoder(encoder(reals, dtype=dtype), dtype=dtype))
        return errors, {"reconstruction": errors}
    mean, log_variance = encoder(reals, dtype=dtype).chunk(2, dim=1)
    shown = decoder(reparameterised(mean, log_variance, noise), dtype=dtype)
    loss = -bound(reals, shown, mean, log_variance, std) / reals[0].numel()
    return loss, {"reconstruction": reconstruction(reals, shown), "divergence": kl_to_prior(mean, log_variance)}
