"""Claims about WGAN-GP with drift: numbers by hand, critics with known gradients, derivatives by differences."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

from gradine.configs.schema import Network, from_dict
from gradine.stages.losses import critic_loss, generator_loss, gradient_norm, gradient_penalty, penalty_divisor
from gradine.stages.networks import Discriminator


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def small_discriminator(size: int, width: int = 2, fades: bool = True, pool_first: bool = False) -> Discriminator:
    network = Network(latent_size=2, fmap_base=64, fmap_max=width, pool_before_activation=pool_first)
    net = Discriminator(network, size, fades).double()
    with torch.no_grad():
        for number, parameter in enumerate(net.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=number))
    return net


# ---- Losses


def test_the_critic_loss_is_fake_minus_real_plus_the_drift_of_the_reals() -> None:
    """Real 3, fake 5: 5 - 3 + 0.001 * 9 = 2.009. Real -2, fake 7: 9 + 0.004. The fake's square does not enter."""
    loss = critic_loss(torch.tensor([3.0, -2.0]), torch.tensor([5.0, 7.0]), drift=0.001)
    torch.testing.assert_close(loss, torch.tensor([2.009, 9.004]))


def test_without_drift_the_critic_loss_is_the_difference_of_scores() -> None:
    torch.testing.assert_close(critic_loss(torch.tensor([3.0]), torch.tensor([5.0]), drift=0.0), torch.tensor([2.0]))


def test_the_critic_lowers_fakes_and_raises_reals_until_the_drift_holds_them() -> None:
    real, fake = torch.tensor([0.0, 500.0], requires_grad=True), torch.tensor([0.0, 500.0], requires_grad=True)
    critic_loss(real, fake, drift=0.001).sum().backward()
    torch.testing.assert_close(real.grad, torch.tensor([-1.0, 0.0]))  # -1 + 2 * 0.001 * 500 = 0
    torch.testing.assert_close(fake.grad, torch.tensor([1.0, 1.0]))


def test_the_generator_loss_is_minus_the_score() -> None:
    assert generator_loss(torch.tensor([5.0, -2.0, 0.0])).tolist() == [-5.0, 2.0, 0.0]


# ---- Gradient norm


def norm_at(net: Discriminator, images: Tensor, alpha: float = 1.0) -> Tensor:
    """Of the gradient that the network itself writes out."""
    scores, pull = net.linearised(images, alpha)
    return gradient_norm(pull(torch.ones_like(scores)))


def norm_by_autograd(discriminate: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    images = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(discriminate(images).sum(), images, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).sqrt()


def test_the_norm_is_the_length_of_each_images_gradient_over_channels_height_and_width() -> None:
    gradients = noise(5, 3, 4, 2)
    lengths = [math.sqrt(sum(value**2 for value in image.flatten().tolist())) for image in gradients]
    torch.testing.assert_close(gradient_norm(gradients), torch.tensor(lengths, dtype=torch.float64))


@pytest.mark.parametrize("pool_first", [False, True])
@pytest.mark.parametrize(("size", "fades", "alpha"), [(4, False, 1.0), (8, False, 1.0), (8, True, 0.3), (8, True, 0.0),
                                                      (16, True, 0.3), (16, True, 1.0), (32, True, 0.7)])
def test_the_gradient_written_out_is_that_of_autograd_and_so_is_its_derivative_by_every_parameter(
        size: int, fades: bool, alpha: float, pool_first: bool) -> None:
    net, images = small_discriminator(size, 3, fades, pool_first), noise(8, 3, size, size, seed=9)
    by_autograd, written_out = norm_by_autograd(scores_of(net, alpha), images), norm_at(net, images, alpha)
    torch.testing.assert_close(written_out, by_autograd)
    expected, got = (torch.autograd.grad(norm.square().sum(), list(net.parameters()), materialize_grads=True)
                     for norm in (by_autograd, written_out))
    for (name, _), a, b in zip(net.named_parameters(), expected, got, strict=True):
        assert (a - b).norm() <= 1e-10 * max(a.norm(), 1e-3), name


def test_the_gradient_is_that_of_the_last_scores_weighted_and_of_the_last_minibatch_alone() -> None:
    """Two minibatches of four in one pass: each has stddev groups of its own, and only the second is asked about."""
    net, images, weights = small_discriminator(8), noise(8, 3, 8, 8, seed=9), noise(4, seed=3)
    scores, pull = net.linearised(images, 0.4, sets=2)
    for half in (slice(0, 4), slice(4, 8)):
        torch.testing.assert_close(scores[half], net(images[half], 0.4))
    second = images[4:].clone().requires_grad_()
    (expected,) = torch.autograd.grad((net(second, 0.4) * weights).sum(), second)
    torch.testing.assert_close(pull(weights), expected)


def test_at_a_gradient_of_zero_the_norm_is_zero_and_its_derivative_finite() -> None:
    gradients = torch.zeros(1, 2, 1, 1, requires_grad=True)
    norm = gradient_norm(gradients)
    assert norm.tolist() == [0.0]
    gradient_penalty(norm, 10.0, 1.0).sum().backward()
    assert gradients.grad is not None
    assert torch.isfinite(gradients.grad).all()


def test_a_discriminator_of_zeros_gets_finite_gradients_from_the_penalty() -> None:
    net = small_discriminator(8)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    gradient_penalty(norm_at(net, noise(4, 3, 8, 8)), 10.0, 1.0).sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in net.parameters())


# ---- Penalty


@pytest.mark.parametrize(("norm", "weight", "target", "penalty"), [
    (1.0, 10.0, 1.0, 0.0), (3.0, 10.0, 1.0, 40.0), (0.0, 10.0, 1.0, 10.0), (0.5, 10.0, 1.0, 2.5), (2.0, 4.0, 1.0, 4.0),
    (750.0, 10.0, 750.0, 0.0), (0.0, 10.0, 750.0, 10.0), (1500.0, 10.0, 750.0, 10.0), (825.0, 10.0, 750.0, 0.1)])
def test_the_penalty_is_weight_times_the_squared_distance_to_the_target_in_units_of_the_target(
        norm: float, weight: float, target: float, penalty: float) -> None:
    torch.testing.assert_close(gradient_penalty(torch.tensor([norm]), weight, target), torch.tensor([penalty]))


def test_losses_and_penalty_are_per_sample() -> None:
    scores = torch.zeros(7)
    for per_sample in (critic_loss(scores, scores, 0.001), generator_loss(scores), gradient_penalty(scores, 10.0, 1.0)):
        assert per_sample.shape == (7,)


def penalty_divisors(at: str, final: int) -> list[int]:
    sizes = [2**r for r in range(2, final.bit_length())]
    run = from_dict({"name": "x", "data": {"source": "a", "shards": "b"}, "training": {"penalty_at": at},
                     "stages": [{"resolution": size} for size in sizes]})
    return [penalty_divisor(run, size) for size in sizes]


def test_the_norm_is_divided_by_two_per_doubling_to_the_final_resolution() -> None:
    assert penalty_divisors("final", 1024) == [256, 128, 64, 32, 16, 8, 4, 2, 1]
    assert penalty_divisors("final", 32) == [8, 4, 2, 1]
    assert penalty_divisors("current", 1024) == [1] * 9


@pytest.mark.parametrize("doublings", [1, 2, 3])
def test_the_divisor_is_the_norm_seen_from_the_larger_image(doublings: int) -> None:
    """A critic that first averages 2**k boxes of a larger image: its gradient there is shorter by 2**k."""
    weight, small = noise(3, 4, 4), noise(2, 3, 4, 4, seed=1)
    side = 2**doublings

    def critic(x: Tensor) -> Tensor:
        return (x.tanh() * weight).sum(dim=(1, 2, 3))

    def from_large(x: Tensor) -> Tensor:
        return critic(x.unflatten(2, (4, side)).unflatten(4, (4, side)).mean(dim=(3, 5)))

    large = small.repeat_interleave(side, dim=2).repeat_interleave(side, dim=3)
    divisor = penalty_divisors("final", 4 * side)[0]
    torch.testing.assert_close(norm_by_autograd(from_large, large), norm_by_autograd(critic, small) / divisor)


# ---- Derivatives of the real thing, against finite differences


def scores_of(net: Discriminator, alpha: float) -> Callable[[Tensor], Tensor]:
    return lambda images: net(images, alpha)


@pytest.mark.parametrize(("size", "count", "fast"), [(4, 4, False), (8, 8, True), (16, 4, True)])
def test_scores_have_right_first_and_second_derivatives_by_the_image(size: int, count: int, fast: bool) -> None:
    net = small_discriminator(size, fades=size > 4)
    images = noise(count, 3, size, size, seed=9).requires_grad_()
    assert gradcheck(scores_of(net, 0.4), (images,), fast_mode=fast)
    assert gradgradcheck(scores_of(net, 0.4), (images,), fast_mode=fast)


@pytest.mark.parametrize(("size", "alpha"), [(4, 1.0), (8, 0.4), (8, 1.0)])
def test_the_penalty_has_right_derivatives_by_every_parameter(size: int, alpha: float) -> None:
    net = small_discriminator(size, fades=size > 4)
    images = noise(8, 3, size, size, seed=9)
    names = [f"net.{name}" for name, _ in net.named_parameters()]

    class Norm(nn.Module):  # functional_call reaches a module's forward only
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self) -> Tensor:
            return norm_at(self.net, images, alpha)

    def penalty(*values: Tensor) -> Tensor:
        return gradient_penalty(functional_call(Norm(), dict(zip(names, values, strict=True)), ()), 10.0, 1.0)

    assert gradcheck(penalty, tuple(p.detach().clone().requires_grad_() for p in net.parameters()))


def test_samples_of_one_stddev_group_shape_each_others_penalty_and_others_do_not() -> None:
    """The norm is of d(sum of scores)/d(image): 8 samples are two groups, {0, 2, 4, 6} and {1, 3, 5, 7}."""
    net, images = small_discriminator(4, fades=False), noise(8, 3, 4, 4, seed=9)
    base = norm_at(net, images)
    images[2] += 0.5
    moved = (norm_at(net, images) - base).abs() > 1e-9
    assert moved.tolist() == [True, False] * 4
