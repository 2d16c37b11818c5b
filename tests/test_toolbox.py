"""Claims about what goes beside the game: terms on D's features and heads, and on the weights themselves; latents."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from gradine.configs.schema import Data, Network, Run, Stage
from gradine.stages.latents import Parts, draw
from gradine.stages.losses import (
    add_historical_averaging,
    classification_loss,
    clip_weights,
    diversity_gap,
    feature_matching,
    information_loss,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- Feature matching


def test_feature_matching_is_the_squared_distance_of_the_mean_features() -> None:
    """Means (2, 1) and (0.5, 3): 1.5**2 + 2**2."""
    reals, fakes = torch.tensor([[1.0, 0.0], [3.0, 2.0]]), torch.tensor([[0.0, 3.0], [1.0, 3.0]])
    assert feature_matching(reals, fakes).item() == 2.25 + 4


def test_feature_matching_is_at_rest_where_the_means_agree_and_moves_fakes_alone() -> None:
    reals = torch.tensor([[1.0, 0.0], [3.0, 2.0]], requires_grad=True)
    fakes = torch.tensor([[2.0, 3.0], [2.0, -1.0]], requires_grad=True)
    loss = feature_matching(reals, fakes)
    loss.backward()
    assert loss.item() == 0
    assert reals.grad is None
    assert fakes.grad is not None
    assert not fakes.grad.any()


def test_following_the_gradient_of_feature_matching_brings_the_fakes_mean_to_the_reals() -> None:
    reals, fakes = noise(6, 4), noise(6, 4, seed=1).requires_grad_()
    (gradient,) = torch.autograd.grad(feature_matching(reals, fakes), fakes)
    torch.testing.assert_close(fakes - 3 * gradient, fakes - (fakes.mean(0) - reals.mean(0)))  # 6 rows share 2 (m - m')


# ---- Diversity


def test_the_diversity_gap_is_the_mean_distance_of_two_reals_less_that_of_two_fakes_by_direction() -> None:
    """Reals along x, y and -x: directions root 2, root 2 and 2 apart. Fakes along x, x and y: 0 and twice root 2."""
    reals = torch.tensor([[5.0, 0.0], [0.0, 0.1], [-3.0, 0.0]])
    fakes = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 4.0]])
    root = math.sqrt(2)
    assert diversity_gap(reals, fakes).item() == pytest.approx((2 * root + 2) / 3 - 2 * root / 3, rel=1e-6)


def test_against_fakes_all_alike_the_gap_is_the_spread_of_the_reals() -> None:
    reals = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert diversity_gap(reals, torch.ones(2, 2)).item() == pytest.approx(math.sqrt(2), rel=1e-6)


def test_equal_sets_have_no_gap_and_longer_features_make_none() -> None:
    features = noise(5, 3)
    torch.testing.assert_close(diversity_gap(features, 7 * features), torch.tensor(0.0, dtype=torch.float64))


def test_g_closes_the_gap_by_spreading_its_fakes() -> None:
    reals, fakes = noise(5, 3), torch.ones(5, 3, dtype=torch.float64) + noise(5, 3, seed=1) / 10
    gap = diversity_gap(reals, fakes.requires_grad_())
    (gradient,) = torch.autograd.grad(gap, fakes)
    moved = (fakes - 0.1 * gradient).detach()
    assert diversity_gap(reals, moved) < gap
    assert torch.pdist(moved).mean() > torch.pdist(fakes).mean()


@pytest.mark.parametrize("features", [torch.ones(4, 3), torch.zeros(4, 3), torch.ones(1, 3)])
def test_equal_features_zeros_and_a_single_one_give_a_finite_gap_and_derivative(features: Tensor) -> None:
    fakes = features.clone().requires_grad_()
    gap = diversity_gap(features, fakes)
    gap.backward()
    assert gap.item() == 0
    assert fakes.grad is not None
    assert not fakes.grad.any()


# ---- Heads: the label's and the codes'


def test_the_classification_loss_is_minus_the_log_of_the_labels_probability() -> None:
    """Odds 1 : 2 : 5, and the label of 5: -log 5/8."""
    logits = torch.tensor([[1.0, 2.0, 5.0]]).log().expand(2, 3) + torch.tensor([[0.0], [40.0]])
    loss = classification_loss(logits, torch.eye(3)[[2, 0]])
    torch.testing.assert_close(loss, torch.tensor([math.log(8 / 5), math.log(8)]))


def test_the_information_loss_is_minus_log_q_of_both_kinds_of_code_up_to_the_gaussian_constant() -> None:
    logits, codes = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[0.0, 1.0]])
    means, continuous = torch.tensor([[0.5, -1.0]]), torch.tensor([[-0.5, 1.0]])
    categorical, gaussian = math.log(4 / 3), (1 + 4) / 2
    none = torch.zeros(1, 0)
    for arguments, expected in (((logits, codes, means, continuous), categorical + gaussian),
                                ((logits, codes, none, none), categorical),
                                ((none, none, means, continuous), gaussian)):
        torch.testing.assert_close(information_loss(*arguments), torch.tensor([expected]))
    density = torch.distributions.Normal(means, 1.0).log_prob(continuous).sum()
    assert gaussian == pytest.approx(-density.item() - math.log(2 * math.pi), rel=1e-6)  # two of log sqrt(2 pi)


def test_entropy_less_the_information_loss_is_a_bound_that_the_true_posterior_reaches() -> None:
    """Code 0 or 1 fair, seen through a channel that errs in one of five: I = log 2 - H(1/5)."""
    seen, codes = torch.cartesian_prod(torch.arange(2), torch.arange(2)).unbind(1)
    weight = torch.where(seen == codes, 0.4, 0.1)
    information = math.log(2) + 0.8 * math.log(0.8) + 0.2 * math.log(0.2)

    def lower_bound(posterior: list[list[float]]) -> float:
        logits, none = torch.tensor(posterior)[seen].log(), torch.zeros(4, 0)
        return math.log(2) - (weight * information_loss(logits, torch.eye(2)[codes], none, none)).sum().item()

    assert lower_bound([[0.8, 0.2], [0.2, 0.8]]) == pytest.approx(information, abs=1e-6)
    for worse in ([[0.9, 0.1], [0.1, 0.9]], [[0.5, 0.5], [0.5, 0.5]], [[0.2, 0.8], [0.8, 0.2]]):
        assert lower_bound(worse) < information - 1e-3


# ---- On the weights


def test_clipping_brings_weights_beyond_the_bounds_onto_them_and_leaves_the_others() -> None:
    network = nn.Linear(2, 2)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[0.5, -0.5], [0.005, -0.002]]))
        network.bias.copy_(torch.tensor([0.01, -3.0]))
    clip_weights(network, 0.01)
    torch.testing.assert_close(network.weight.detach(), torch.tensor([[0.01, -0.01], [0.005, -0.002]]))
    torch.testing.assert_close(network.bias.detach(), torch.tensor([0.01, -0.01]))


def test_historical_averaging_pulls_to_the_plain_mean_of_all_weights_so_far() -> None:
    """A walk of 20 thetas; at each, the gradient of weight * |theta - mean(theta_1..t)|**2 by theta alone."""
    parameters = [nn.Parameter(noise(3, 2)), nn.Parameter(noise(4))]
    means = [torch.zeros_like(parameter) for parameter in parameters]
    history: list[list[Tensor]] = []
    for step in range(20):
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(noise(*parameter.shape, seed=step + 1))
        history.append([parameter.detach().clone() for parameter in parameters])
        own = [noise(*parameter.shape, seed=100 + step) for parameter in parameters]
        for parameter, gradient in zip(parameters, own, strict=True):
            parameter.grad = gradient.clone()
        add_historical_averaging(parameters, means, step, 0.3)
        for index, parameter in enumerate(parameters):
            plain = sum(thetas[index] for thetas in history) / len(history)
            torch.testing.assert_close(means[index], plain)
            torch.testing.assert_close(parameter.grad, own[index] + 0.6 * (parameter.detach() - plain))


def test_historical_averaging_adds_nothing_at_the_first_step_nor_to_what_has_no_gradient() -> None:
    parameters = [nn.Parameter(noise(3)), nn.Parameter(noise(2, seed=1))]
    parameters[0].grad = torch.zeros(3, dtype=torch.float64)
    add_historical_averaging(parameters, [torch.zeros_like(parameter) for parameter in parameters], 0, 5.0)
    assert not parameters[0].grad.any()
    assert parameters[1].grad is None


def test_historical_averaging_brings_players_that_circle_each_other_to_rest() -> None:
    """min over x, max over y of x y: plain gradient steps spiral outwards."""
    def last_radius(weight: float) -> float:
        x, y = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([0.0]))
        means = [torch.zeros(1), torch.zeros(1)]
        for step in range(400):
            x.grad, y.grad = y.detach().clone(), -x.detach().clone()
            add_historical_averaging([x, y], means, step, weight)
            with torch.no_grad():
                for player in (x, y):
                    player.sub_(player.grad, alpha=0.1)  # type: ignore[arg-type]
        return math.hypot(x.item(), y.item())

    assert last_radius(0.0) > 5
    assert last_radius(0.5) < 0.2


# ---- Latents


def drawn(kind: str, count: int = 20_000, **settings: int) -> Tensor:
    network = Network(latent_size=8, latents=kind, **settings)  # type: ignore[arg-type]
    return draw(network, count, torch.Generator().manual_seed(0))


def test_gaussian_latents_are_normal_uniform_ones_even_and_spherical_ones_of_one_length() -> None:
    """Mean squares 1, 1/3 and 1; mean fourth powers 3, 1/5 and, on the sphere of n = 8, 3 n / (n + 2)."""
    for kind, second, fourth in (("gaussian", 1.0, 3.0), ("uniform", 1 / 3, 1 / 5), ("sphere", 1.0, 2.4)):
        latents = drawn(kind)
        assert latents.mean().abs() < 0.01
        assert latents.square().mean().item() == pytest.approx(second, rel=0.01)
        assert latents.pow(4).mean().item() == pytest.approx(fourth, rel=0.02)
        assert (torch.corrcoef(latents.T) - torch.eye(8)).abs().max() < 0.03
    torch.testing.assert_close(drawn("sphere").norm(dim=1), torch.full((20_000,), math.sqrt(8)))
    assert drawn("uniform").abs().max() <= 1


def test_latents_end_with_the_label_the_code_and_the_continuous_codes() -> None:
    network = Network(latent_size=8, conditioning="projection", classes=3, codes=4, continuous_codes=2)
    latents = draw(network, 4000, torch.Generator().manual_seed(0))
    parts = Parts.of(network)
    assert latents.shape == (4000, network.input_size) == (4000, 17)
    assert latents[:5, parts.label].tolist() == torch.eye(3)[[0, 1, 2, 0, 1]].tolist()  # in turn
    codes, continuous = latents[:, parts.code], latents[:, parts.continuous]
    assert torch.equal(codes.sort(dim=1).values, torch.tensor([0.0, 0, 0, 1]).expand(4000, 4))
    assert codes.mean(0).tolist() == pytest.approx([0.25] * 4, abs=0.03)
    assert continuous.abs().max() <= 1
    assert continuous.square().mean().item() == pytest.approx(1 / 3, rel=0.04)
    asked = draw(network, 3, torch.Generator().manual_seed(0), torch.tensor([2, 2, 0]))
    assert asked[:, parts.label].tolist() == torch.eye(3)[[2, 2, 0]].tolist()


# ---- The table of docs/toolbox.md


ROOT = Path(__file__).parents[1]
ROWS = [line.split(" | ") for line in (ROOT / "docs" / "toolbox.md").read_text().splitlines()
        if re.match(r"\| \d+ \|", line)]


def test_the_table_has_every_method_once() -> None:
    assert [int(row[0].strip("| ")) for row in ROWS] == list(range(1, 33))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[1])
def test_what_the_table_names_exists(row: list[str]) -> None:
    """Settings with these values (their checks would refuse others), and files."""
    _, _, settings, code, tests = row
    named = re.findall(r"((?:data|network|training|evaluation)[\w.]*)\.(\w+)(?:=([^` ]+))?", settings)
    for section, name, value in named:
        holder: Any = Run(name="x", data=Data(source="a", shards="b"), stages=[Stage(resolution=4)])
        for part in section.split("."):
            holder = getattr(holder, part)
        assert hasattr(holder, name), f"{section}.{name}"
        if value:
            replace(holder, **{name: yaml.safe_load(value)})
    for file in re.findall(r"(?:stages|tests)/\w+\.py", f"{code} {tests}"):
        assert (ROOT / file).exists(), file
