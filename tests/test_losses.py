"""Claims about WGAN-GP with drift: numbers by hand, critics with known gradients, derivatives by differences."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

from gradine.configs.schema import Network, from_dict
from gradine.stages.losses import critic_loss, generator_loss, gradient_norm, gradient_penalty, penalty_divisor
from gradine.stages.networks import Discriminator


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def small_discriminator(size: int, width: int = 2, fades: bool = True) -> Discriminator:
    net = Discriminator(Network(latent_size=2, fmap_base=64, fmap_max=width), size, fades).double()
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


def test_the_norm_on_a_linear_critic_is_the_length_of_its_weights() -> None:
    weight = noise(3, 4, 4)
    images = noise(5, 3, 4, 4, seed=1)
    norm = gradient_norm(lambda x: (x * weight).sum(dim=(1, 2, 3)), images)
    length = math.sqrt(sum(w * w for w in weight.flatten().tolist()))
    torch.testing.assert_close(norm, torch.full((5,), length, dtype=torch.float64))


def test_the_norm_is_taken_per_image_over_channels_height_and_width() -> None:
    """score = c * sum(x): each of the 3 * 2 * 2 derivatives is c, so the norm is c * sqrt(12)."""
    factors = torch.tensor([1.0, 2.0, 0.5])
    norm = gradient_norm(lambda x: factors * x.sum(dim=(1, 2, 3)), torch.ones(3, 3, 2, 2))
    torch.testing.assert_close(norm, factors * math.sqrt(12))


def test_the_norm_is_taken_where_the_images_are() -> None:
    """score = sum(x**2) / 2 has the image itself as its gradient."""
    images = torch.zeros(2, 3, 4, 4)
    images[0, 0, 0, 0], images[0, 2, 3, 1] = 3.0, 4.0
    images[1] = 1.0
    norm = gradient_norm(lambda x: x.square().sum(dim=(1, 2, 3)) / 2, images)
    torch.testing.assert_close(norm, torch.tensor([5.0, math.sqrt(48)]))


def test_the_norm_can_be_trained_through_and_leaves_the_images_alone() -> None:
    weight, images = torch.tensor([3.0, 4.0], requires_grad=True), torch.zeros(1, 2, 1, 1)
    norm = gradient_norm(lambda x: (x * weight.view(1, 2, 1, 1)).sum(dim=(1, 2, 3)), images)
    norm.sum().backward()
    torch.testing.assert_close(weight.grad, torch.tensor([0.6, 0.8]))  # d |w| / d w = w / |w|
    assert not images.requires_grad
    assert images.grad is None


def test_no_gradient_flows_from_the_norm_into_what_made_the_images() -> None:
    source = torch.ones(1, 1, 1, 1, requires_grad=True)
    norm = gradient_norm(lambda x: (x**3).sum(dim=(1, 2, 3)), source * 2)
    with pytest.raises(RuntimeError, match=r"does not require grad|not have been used"):
        torch.autograd.grad(norm.sum(), source)


def test_at_a_gradient_of_zero_the_norm_is_zero_and_its_derivative_finite() -> None:
    weight = torch.zeros(2, requires_grad=True)
    norm = gradient_norm(lambda x: (x * weight.view(1, 2, 1, 1)).sum(dim=(1, 2, 3)), torch.ones(1, 2, 1, 1))
    assert norm.tolist() == [0.0]
    gradient_penalty(norm, 10.0, 1.0).sum().backward()
    assert weight.grad is not None
    assert torch.isfinite(weight.grad).all()


def test_a_discriminator_of_zeros_gets_finite_gradients_from_the_penalty() -> None:
    net = small_discriminator(8)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    gradient_penalty(gradient_norm(net, noise(4, 3, 8, 8)), 10.0, 1.0).sum().backward()
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
    torch.testing.assert_close(gradient_norm(from_large, large), gradient_norm(critic, small) / divisor)


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
    names = list(dict(net.named_parameters()))

    def penalty(*values: Tensor) -> Tensor:
        weights = dict(zip(names, values, strict=True))
        norm = gradient_norm(lambda x: functional_call(net, weights, (x, alpha)), images)
        return gradient_penalty(norm, 10.0, 1.0)

    assert gradcheck(penalty, tuple(p.detach().clone().requires_grad_() for p in net.parameters()))


def test_samples_of_one_stddev_group_shape_each_others_penalty_and_others_do_not() -> None:
    """The norm is of d(sum of scores)/d(image): 8 samples are two groups, {0, 2, 4, 6} and {1, 3, 5, 7}."""
    net, images = small_discriminator(4, fades=False), noise(8, 3, 4, 4, seed=9)
    base = gradient_norm(net, images)
    images[2] += 0.5
    moved = (gradient_norm(net, images) - base).abs() > 1e-9
    assert moved.tolist() == [True, False] * 4
