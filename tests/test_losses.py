"""Claims about the losses and penalties: numbers by hand, critics with known gradients, derivatives by differences."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

from gradine.configs.schema import LOSSES, Network, Training, from_dict
from gradine.stages.losses import (
    critic_loss,
    draw_targets,
    drift_term,
    generator_loss,
    gradient_norm,
    gradient_penalty,
    penalty_divisor,
    zero_centred_penalty,
)
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


# ---- Losses: their values at hand-set scores


def sigmoid(score: float) -> float:
    return 1 / (1 + math.exp(-score))


def test_the_wasserstein_critic_loss_is_fake_minus_real() -> None:
    """Real 3, fake 5: 2. Real -2, fake 7: 9."""
    loss = critic_loss("wasserstein", torch.tensor([3.0, -2.0]), torch.tensor([5.0, 7.0]), None)
    assert loss.tolist() == [2.0, 9.0]


def test_the_drift_is_its_weight_times_the_squared_score() -> None:
    torch.testing.assert_close(drift_term(torch.tensor([3.0, -2.0, 0.0]), 0.001), torch.tensor([0.009, 0.004, 0.0]))


def test_the_critic_lowers_fakes_and_raises_reals_until_the_drift_holds_them() -> None:
    real, fake = torch.tensor([0.0, 500.0], requires_grad=True), torch.tensor([0.0, 500.0], requires_grad=True)
    (critic_loss("wasserstein", real, fake, None) + drift_term(real, 0.001)).sum().backward()
    torch.testing.assert_close(real.grad, torch.tensor([-1.0, 0.0]))  # -1 + 2 * 0.001 * 500 = 0
    torch.testing.assert_close(fake.grad, torch.tensor([1.0, 1.0]))


@pytest.mark.parametrize("loss", ["minimax", "non_saturating"])
def test_with_a_log_loss_d_pays_for_the_probabilities_it_denies(loss: str) -> None:
    """Scores log 3 and -log 4 say real with probability 3/4 and 1/5: -log 3/4 - log 4/5 = log 5/3."""
    paid = critic_loss(loss, torch.tensor([math.log(3)]), torch.tensor([-math.log(4)]), None)
    torch.testing.assert_close(paid, torch.tensor([math.log(5 / 3)]))


@pytest.mark.parametrize(("real_target", "fake_target"), [(0.9, 0.0), (0.7, 0.3), (1.2, 0.1), (0.0, 1.0)])
def test_a_log_loss_is_cross_entropy_with_the_targets_given(real_target: float, fake_target: float) -> None:
    real, fake = 0.8, -1.3
    expected = -(real_target * math.log(sigmoid(real)) + (1 - real_target) * math.log(1 - sigmoid(real))
                 + fake_target * math.log(sigmoid(fake)) + (1 - fake_target) * math.log(1 - sigmoid(fake)))
    targets = torch.tensor([[real_target, fake_target]])
    torch.testing.assert_close(critic_loss("minimax", torch.tensor([real]), torch.tensor([fake]), targets),
                               torch.tensor([expected]))


def test_smoothing_the_real_target_alone_stops_d_at_the_score_of_that_probability() -> None:
    """Reals to 0.9: the loss is flat where sigmoid(score) is 0.9, at log 9, and pulls back from beyond."""
    real = torch.tensor([math.log(9), 10.0, 0.0], requires_grad=True)
    critic_loss("minimax", real, torch.zeros(3), torch.tensor([[0.9, 0.0]] * 3)).sum().backward()
    assert real.grad is not None
    torch.testing.assert_close(real.grad, torch.tensor([0.0, sigmoid(10) - 0.9, -0.4]))


def test_the_minimax_game_is_worth_minus_log_4_where_d_sees_no_difference() -> None:
    """Two coins, p and q: the best D scores log(p/q), and E log D(x) + E log(1 - D(G)) = -log 4 + 2 JSD(p, q)."""
    def value(p: Tensor, q: Tensor, scores: Tensor) -> Tensor:
        pairs = torch.cartesian_prod(torch.arange(2), torch.arange(2)).unbind(1)
        return -(p[pairs[0]] * q[pairs[1]] * critic_loss("minimax", scores[pairs[0]], scores[pairs[1]], None)).sum()

    fair, bent = torch.tensor([0.5, 0.5]), torch.tensor([0.8, 0.2])
    torch.testing.assert_close(value(fair, fair, torch.zeros(2)), torch.tensor(-math.log(4)))
    middle = (fair + bent) / 2
    divergence = ((fair * (fair / middle).log()).sum() + (bent * (bent / middle).log()).sum()) / 2
    best = value(bent, fair, (bent / fair).log())
    torch.testing.assert_close(best, -math.log(4) + 2 * divergence)
    for scores in ((bent / fair).log() + 0.1, (bent / fair).log() * 1.2, torch.zeros(2)):
        assert value(bent, fair, scores) < best


def test_d_of_least_squares_pays_half_the_squared_distances_to_its_targets() -> None:
    """Real 3, fake -1: ((3 - 1)**2 + (-1)**2) / 2 = 2.5; with targets 0.9 and 0.3: (2.1**2 + 1.3**2) / 2 = 3.05."""
    real, fake = torch.tensor([3.0]), torch.tensor([-1.0])
    assert critic_loss("least_squares", real, fake, None).tolist() == [2.5]
    torch.testing.assert_close(critic_loss("least_squares", real, fake, torch.tensor([[0.9, 0.3]])),
                               torch.tensor([3.05]))


def test_d_of_the_hinge_pays_for_reals_below_1_and_fakes_above_minus_1() -> None:
    """Rows: both beyond the margin, both inside it, both on the wrong side."""
    real, fake = torch.tensor([2.0, 0.25, -1.5]), torch.tensor([-1.0, -0.5, 3.0])
    assert critic_loss("hinge", real, fake, None).tolist() == [0.0, 0.75 + 0.5, 2.5 + 4.0]


def test_d_of_the_relativistic_loss_pays_for_the_real_that_does_not_beat_the_fake_of_its_row() -> None:
    """Real above fake by log 3, whatever their level: -log 3/4. Equal: log 2."""
    real, fake = torch.tensor([math.log(3), 50 + math.log(3), 7.0]), torch.tensor([0.0, 50.0, 7.0])
    torch.testing.assert_close(critic_loss("relativistic", real, fake, None),
                               torch.tensor([math.log(4 / 3), math.log(4 / 3), math.log(2)]))


@pytest.mark.parametrize(("loss", "expected"), [
    ("wasserstein", [-math.log(3), 2.0]), ("hinge", [-math.log(3), 2.0]),
    ("minimax", [math.log(1 / 4), math.log(1 - sigmoid(-2))]),
    ("non_saturating", [math.log(4 / 3), -math.log(sigmoid(-2))]),
    ("least_squares", [(math.log(3) - 1) ** 2 / 2, 4.5])])
def test_what_g_pays_at_fakes_that_score_log_3_and_minus_2(loss: str, expected: list[float]) -> None:
    """log 3 is taken for real with probability 3/4."""
    torch.testing.assert_close(generator_loss(loss, torch.tensor([math.log(3), -2.0])), torch.tensor(expected))


def test_g_of_the_relativistic_loss_pays_what_d_would_with_the_pair_turned_round() -> None:
    """Fake below the real by log 3: -log 1/4; above it: -log 3/4."""
    paid = generator_loss("relativistic", torch.tensor([0.0, math.log(3)]), torch.tensor([math.log(3), 0.0]))
    torch.testing.assert_close(paid, torch.tensor([math.log(4), math.log(4 / 3)]))


def test_the_saturating_g_learns_little_from_a_fake_that_d_is_sure_of_and_the_other_much() -> None:
    """Derivatives -sigmoid and sigmoid - 1 at score -8."""
    slopes = []
    for loss in ("minimax", "non_saturating"):
        score = torch.tensor([-8.0], requires_grad=True)
        generator_loss(loss, score).sum().backward()
        slopes.append(score.grad.item())  # type: ignore[union-attr]
    assert slopes == pytest.approx([-sigmoid(-8), sigmoid(-8) - 1], rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_d_gains_by_higher_reals_and_lower_fakes_and_g_by_higher_fakes(loss: str) -> None:
    for scores in ((0.3, 0.2), (-0.6, 0.7)):  # least squares turns round beyond its targets, 1 and 0
        real, fake = (torch.tensor([score], requires_grad=True) for score in scores)
        of_real, of_fake = torch.autograd.grad(critic_loss(loss, real, fake, None).sum(), (real, fake))
        (of_g,) = torch.autograd.grad(generator_loss(loss, fake, real.detach()).sum(), fake)
        assert of_real < 0 < of_fake
        assert of_g < 0


@pytest.mark.parametrize("loss", LOSSES)
def test_scores_of_a_thousand_give_finite_losses_and_derivatives(loss: str) -> None:
    real, fake = (torch.tensor([1000.0, -1000.0][::step], requires_grad=True) for step in (1, -1))
    paid = critic_loss(loss, real, fake, None).sum() + generator_loss(loss, fake, real).sum()
    for tensor in (paid, *torch.autograd.grad(paid, (real, fake))):
        assert torch.isfinite(tensor).all()


# ---- D's targets


def targets_drawn(count: int = 100_000, **settings: object) -> Tensor:
    uniforms = torch.rand(count, 4, generator=torch.Generator().manual_seed(0))
    return draw_targets(Training(**settings), uniforms)  # type: ignore[arg-type]


def test_by_default_every_real_is_to_be_1_and_every_fake_0() -> None:
    assert targets_drawn(100).tolist() == [[1.0, 0.0]] * 100


def test_one_sided_smoothing_leaves_the_fakes_target() -> None:
    torch.testing.assert_close(targets_drawn(100, real_labels=[0.9]), torch.tensor([[0.9, 0.0]]).expand(100, 2))


def test_targets_are_drawn_evenly_between_their_ends_and_apart_from_each_other() -> None:
    real, fake = targets_drawn(real_labels=[0.7, 1.2], fake_labels=[0.0, 0.3]).unbind(1)
    for drawn, low, high in ((real, 0.7, 1.2), (fake, 0.0, 0.3)):
        assert low <= drawn.min() < low + 1e-4
        assert high - 1e-4 < drawn.max() <= high
        assert drawn.mean().item() == pytest.approx((low + high) / 2, abs=2e-3)  # 4 standard errors of a mean: 1.8e-3
        assert drawn.std().item() == pytest.approx((high - low) / math.sqrt(12), rel=0.01)
    assert abs(torch.corrcoef(torch.stack([real, fake]))[0, 1]) < 0.015


def test_flips_befall_a_real_and_a_fake_each_with_the_probability_given() -> None:
    flipped = targets_drawn(flip_labels=0.1) != torch.tensor([1.0, 0.0])
    assert flipped.float().mean(0).tolist() == pytest.approx([0.1, 0.1], abs=4e-3)
    assert flipped.all(1).float().mean().item() == pytest.approx(0.01, abs=2e-3)  # apart from each other


def test_a_flipped_real_has_a_fakes_target_drawn_like_one() -> None:
    real, fake = targets_drawn(real_labels=[0.7, 1.2], fake_labels=[0.0, 0.3], flip_labels=0.25).unbind(1)
    for drawn, of_the_other, mean in ((real, real < 0.5, 0.15), (fake, fake > 0.5, 0.95)):
        assert of_the_other.float().mean().item() == pytest.approx(0.25, abs=6e-3)
        assert drawn[of_the_other].mean().item() == pytest.approx(mean, abs=5e-3)


# ---- Gradient norm


def norm_at(net: Discriminator, images: Tensor, alpha: float = 1.0) -> Tensor:
    """Of the gradient that the network itself writes out."""
    judgement, pull = net.linearised(images, alpha)
    return gradient_norm(pull(torch.ones_like(judgement.scores)))


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
    judgement, pull = net.linearised(images, 0.4, sets=2)
    for half in (slice(0, 4), slice(4, 8)):
        torch.testing.assert_close(judgement.scores[half], net(images[half], 0.4))
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


def test_a_zero_centred_penalty_is_half_its_weight_times_the_squared_length_of_each_gradient() -> None:
    """Gradients (3, 4) and (0, 2), weight 10: 5 * 25 and 5 * 4."""
    gradients = torch.tensor([[3.0, 4.0], [0.0, 2.0]]).view(2, 2, 1, 1)
    assert zero_centred_penalty(gradients, 10.0).tolist() == [125.0, 20.0]


def test_r1_of_a_linear_d_decays_its_weights() -> None:
    """D(x) = <w, x>: the gradient is w at each image, and the derivative of gamma/2 |w|**2 is gamma w."""
    weights = torch.tensor([[1.0, -2.0], [0.5, 3.0]], requires_grad=True)
    images = noise(5, 1, 2, 2).float().requires_grad_()
    (gradients,) = torch.autograd.grad((images * weights).sum(), images, create_graph=True)
    zero_centred_penalty(gradients, 4.0).mean().backward()
    torch.testing.assert_close(weights.grad, 4 * weights.detach())


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_penalties_are_per_sample(loss: str) -> None:
    scores = torch.zeros(7)
    for per_sample in (critic_loss(loss, scores, scores, None), generator_loss(loss, scores, scores),
                       drift_term(scores, 1.0), gradient_penalty(scores, 10.0, 1.0),
                       zero_centred_penalty(torch.zeros(7, 3, 2, 2), 10.0)):
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
