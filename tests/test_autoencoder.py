"""Claims about the autoencoders' objectives: likelihoods, divergences and bounds by quadrature in one dimension."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from gradine.stages.autoencoder import bound, kl_to_prior, objective, reconstruction, reparameterised

GRID = torch.linspace(-12, 12, 24_001, dtype=torch.float64)  # of latents; step 0.001


def integral(values: Tensor) -> Tensor:
    return values.sum() * 0.001  # of what is 0 at both ends: the trapezoid's rule, exact to rounding for Gaussians


def normal(x: Tensor | float, mean: Tensor | float, std: float) -> Tensor:
    """Density, written out."""
    z = (torch.as_tensor(x, dtype=torch.float64) - mean) / std
    return (-z.square() / 2).exp() / (std * math.sqrt(2 * math.pi))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 0.4), (-1.5, 1.3)])
def test_the_divergence_is_the_integral_of_q_log_q_over_p(mean: float, std: float) -> None:
    q, p = normal(GRID, mean, std), normal(GRID, 0.0, 1.0)
    by_integral = integral(q * torch.where(q > 0, (q / p).log(), 0))
    two = torch.full((1, 2), 1.0, dtype=torch.float64)  # coordinates add up
    torch.testing.assert_close(kl_to_prior(mean * two, 2 * math.log(std) * two), 2 * by_integral[None])


class Linear(nn.Module):
    """One pixel: shown(z) = slope z + offset."""

    def __init__(self, slope: float, offset: float) -> None:
        super().__init__()
        self.slope, self.offset = slope, offset

    def forward(self, latents: Tensor, alpha: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return (self.slope * latents + self.offset).view(-1, 1, 1, 1)


def bound_by_average_over(mean: float, std: float, x: float, slope: float, offset: float, pixel_std: float) -> Tensor:
    """E_q of `bound`, the weights of whose latents are q's on the grid."""
    each = torch.ones(len(GRID), 1, dtype=torch.float64)
    images = x * each.view(-1, 1, 1, 1)
    values = bound(images, Linear(slope, offset)(GRID), mean * each, 2 * math.log(std) * each, pixel_std)
    return integral(normal(GRID, mean, std) * values)


@pytest.mark.parametrize(("x", "slope", "offset", "pixel_std"), [(0.4, 0.8, 0.1, 0.5), (-0.9, -1.5, 0.3, 0.2)])
def test_the_bound_is_log_p_at_the_exact_posterior_and_below_it_elsewhere(
        x: float, slope: float, offset: float, pixel_std: float) -> None:
    """Linear decoder: the posterior is Gaussian, known in closed form; log p(x) by quadrature over the prior."""
    evidence = integral(normal(GRID, 0.0, 1.0) * normal(x, slope * GRID + offset, pixel_std)).log()
    of_closed_form = normal(x, offset, math.hypot(slope, pixel_std)).log()
    torch.testing.assert_close(evidence, of_closed_form)
    precision = 1 + slope**2 / pixel_std**2
    mean, std = slope * (x - offset) / pixel_std**2 / precision, precision**-0.5
    torch.testing.assert_close(bound_by_average_over(mean, std, x, slope, offset, pixel_std), evidence)
    for other_mean, other_std in ((mean + 0.3, std), (mean, 1.5 * std), (mean, std / 2), (0.0, 1.0)):
        gap = evidence - bound_by_average_over(other_mean, other_std, x, slope, offset, pixel_std)
        divergence = (math.log(std / other_std) + (other_std**2 + (other_mean - mean) ** 2) / (2 * std**2) - 0.5)
        torch.testing.assert_close(gap, torch.tensor(divergence, dtype=torch.float64))  # of q from the posterior


def test_the_reconstruction_error_is_the_mean_square_over_an_images_values() -> None:
    images = torch.tensor([[1.0, 0.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]]).view(2, 1, 2, 2)
    assert reconstruction(images, torch.zeros(2, 1, 2, 2)).tolist() == [5 / 4, 0.0]


def test_reparameterised_draws_have_the_mean_and_variance_asked_for_and_derivatives_by_them() -> None:
    mean, log_variance = torch.tensor([[0.5, -2.0]]), torch.tensor([[math.log(4), math.log(0.25)]])
    drawn = reparameterised(mean, log_variance, torch.randn(100_000, 2, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(drawn.mean(0), mean[0], atol=0.03, rtol=0)
    torch.testing.assert_close(drawn.std(0), torch.tensor([2.0, 0.5]), atol=0, rtol=0.01)
    mean.requires_grad_(), log_variance.requires_grad_()
    reparameterised(mean, log_variance, torch.tensor([[1.0, -3.0]])).sum().backward()
    torch.testing.assert_close(mean.grad, torch.ones(1, 2))
    torch.testing.assert_close(log_variance.grad, torch.tensor([[1.0, -0.75]]))  # noise * std / 2


class Half(nn.Module):
    """Encoder of 1x1 images: mean x / 2 (and log variance -1), or latent x / 2."""

    def __init__(self, variational: bool) -> None:
        super().__init__()
        self.variational = variational

    def forward(self, images: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        half = images.flatten(1) / 2
        return torch.cat([half, -torch.ones_like(half)], dim=1) if self.variational else half


def test_an_autoencoder_minimises_the_error_of_what_it_decodes() -> None:
    """x = 2 and -1: latents 1 and -0.5, shown 3 z: errors 1 and 0.25."""
    reals = torch.tensor([2.0, -1.0]).view(2, 1, 1, 1)
    loss, seen = objective(Linear(3.0, 0.0), Half(False), reals, torch.zeros(2, 1), None, "autoencoder", 0.1)
    assert loss.tolist() == [1.0, 0.25]
    assert {name: figure.tolist() for name, figure in seen.items()} == {"reconstruction": [1.0, 0.25]}


def test_a_vae_minimises_minus_its_bound_per_value() -> None:
    """x = 2: q = N(1, 1/e), noise 0.5, so z = 1 + exp(-1/2)/2; shown 3 z; pixels of std 0.1."""
    z = 1 + math.exp(-0.5) / 2
    shown, divergence = 3 * z, (1 + math.exp(-1) + 1 - 1) / 2
    log_likelihood = -((2 - shown) ** 2) / (2 * 0.01) - math.log(0.1 * math.sqrt(2 * math.pi))
    loss, seen = objective(Linear(3.0, 0.0), Half(True), torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1), 0.5), None,
                           "vae", 0.1)
    torch.testing.assert_close(loss, torch.tensor([divergence - log_likelihood]))
    torch.testing.assert_close(seen["reconstruction"], torch.tensor([(2 - shown) ** 2]))
    torch.testing.assert_close(seen["divergence"], torch.tensor([divergence]))


def test_the_vaes_loss_is_shared_out_over_an_images_values() -> None:
    """A decoder that shows nothing, a q that is the prior: at std 1 a value costs log sqrt(2 pi) + x**2 / 2 nats."""
    class Blind(nn.Module):
        def forward(self, latents: Tensor, dtype: torch.dtype | None = None) -> Tensor:
            return torch.zeros(len(latents), 3, 4, 4)

    class Prior(nn.Module):
        def forward(self, images: Tensor, dtype: torch.dtype | None = None) -> Tensor:
            return torch.zeros(len(images), 4)

    loss, _ = objective(Blind(), Prior(), torch.full((2, 3, 4, 4), 0.5), torch.zeros(2, 2), None, "vae", 1.0)
    torch.testing.assert_close(loss, torch.full((2,), math.log(2 * math.pi) / 2 + 0.125))
