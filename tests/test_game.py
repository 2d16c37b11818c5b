"""Claims about whole steps of any game, against a slow one written out here in float64, with plain optimizers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradine.configs.schema import Run, from_dict
from gradine.stages.augment import AUGMENTATION_DRAWS, augmented
from gradine.stages.families import new_discriminator, new_generator
from gradine.stages.growth import Moment, Phase
from gradine.stages.latents import draw
from gradine.stages.networks import Differentiable, Judgement
from gradine.stages.step import Rules, Share, TrainState, begin_phase, critic_objective, generator_objective, train_step

BATCH, RATE = 8, 0.05


class Painter(nn.Module):
    """[N, inputs] -> points [N, 2, 1, 1]."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, latents: Tensor, alpha: Any = 1.0, dtype: Any = None) -> Tensor:
        return self.layers(latents)[:, :, None, None]


class Judge(Differentiable):
    """Smooth, so that float32 and float64 take the same side nowhere."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 5), nn.Tanh())
        self.outer = nn.Linear(5, 1)
        self.heads = nn.Linear(5, heads) if heads else None

    def judged(self, images: Tensor, labels: Tensor | None) -> Judgement:
        features = self.inner(images.flatten(1))
        return Judgement(self.outer(features).squeeze(1), features,
                         self.heads(features) if self.heads else features[:, :0])


def run_of(codes: int = 0, continuous_codes: int = 0, **training: Any) -> Run:
    settings = {"loss": "non_saturating", "penalty": "none", "drift": 0.0, "mirror": False} | training
    network = {"kind": "mlp", "latent_size": 3, "codes": codes, "continuous_codes": continuous_codes}
    return from_dict({"name": "x", "data": {"source": "", "shards": "", "channels": 2, "points": {"kind": "gaussian"}},
                      "network": network, "training": settings, "stages": [{"resolution": 1, "batch_size": BATCH}]})


def new_state(run: Run) -> TrainState:
    torch.manual_seed(5)
    generator = Painter(run.network.input_size)
    discriminator = Judge(run.network.codes + run.network.continuous_codes)
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.mul_(2)
    unset = torch.optim.SGD(generator.parameters())
    average = copy.deepcopy(generator).requires_grad_(False)
    state = TrainState(generator, discriminator, average, unset, unset, torch.zeros(2))  # type: ignore[arg-type]
    begin_phase(state, run)
    return state


def share_of(run: Run, seed: int) -> Share:
    source = torch.Generator().manual_seed(seed)

    def latents() -> Tensor:
        return draw(run.network, BATCH, source)

    return Share(reals=torch.randn(BATCH, 2, 1, 1, generator=source) / 2 + 1, mirrored=torch.zeros(BATCH, dtype=bool),
                 critic_latents=latents(),
                 generator_latents=torch.cat([latents() for _ in range(run.training.g_steps)], dim=1),
                 mix=torch.rand(BATCH, generator=source), targets=torch.rand(BATCH, 2, generator=source))


def play(run: Run, state: TrainState, steps: int, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
    phase, rules = Phase(0, 1, "hold", 0, 10_000, BATCH), Rules.of(run, BATCH, 1)
    for step in range(steps):
        moment = Moment(phase, step * BATCH, 1.0, RATE)
        train_step(state, [share_of(run, step)], moment, rules, reduce)


# ---- The slow game


def log_sigmoid(x: Tensor) -> Tensor:
    return (1 / (1 + (-x).exp())).log()


def d_pays(loss: str, real: Tensor, fake: Tensor, targets: Tensor) -> Tensor:
    t, u = targets.unbind(1)
    cross_entropies = (-t * log_sigmoid(real) - (1 - t) * log_sigmoid(-real)
                       - u * log_sigmoid(fake) - (1 - u) * log_sigmoid(-fake))
    return {"minimax": cross_entropies, "non_saturating": cross_entropies, "wasserstein": fake - real,
            "hinge": (1 - real).clamp(min=0) + (1 + fake).clamp(min=0),
            "least_squares": (real - t) ** 2 / 2 + (fake - u) ** 2 / 2, "relativistic": -log_sigmoid(real - fake)}[loss]


def g_pays(loss: str, real: Tensor, fake: Tensor) -> Tensor:
    return {"wasserstein": -fake, "hinge": -fake, "minimax": log_sigmoid(-fake), "non_saturating": -log_sigmoid(fake),
            "least_squares": (fake - 1) ** 2 / 2, "relativistic": -log_sigmoid(fake - real)}[loss]


class PlainOptimizer:
    """Adam, or SGD with momentum as Sutskever et al. 2013 have it, with the pull to the mean of all weights before."""

    def __init__(self, network: nn.Module, run: Run, role: str) -> None:
        self.kind, self.settings = run.training.optimizer_of(role), run.training
        self.rate = RATE * (run.training.discriminator_rate if role == "discriminator" else 1)
        self.parameters = list(network.parameters())
        self.history: list[list[Tensor]] = []
        self.first, self.second = ([torch.zeros_like(p) for p in self.parameters] for _ in range(2))

    @torch.no_grad()
    def step(self, gradients: tuple[Tensor, ...]) -> None:
        t = self.settings
        self.history.append([p.clone() for p in self.parameters])
        count = len(self.history)
        for index, (p, g) in enumerate(zip(self.parameters, gradients, strict=True)):
            mean = sum(thetas[index] for thetas in self.history) / count
            g = g + 2 * t.historical_averaging * (p - mean)
            first, second = self.first[index], self.second[index]
            if self.kind == "adam":
                first.copy_(t.beta1 * first + (1 - t.beta1) * g)
                second.copy_(t.beta2 * second + (1 - t.beta2) * g**2)
                p -= self.rate * first / (1 - t.beta1**count) / ((second / (1 - t.beta2**count)) ** 0.5 + 1e-8)
            else:
                first.copy_(t.momentum * first + g)
                p -= self.rate * (g + t.momentum * first if t.nesterov else first)


def slow_game(run: Run, state: TrainState, steps: int) -> tuple[nn.Module, nn.Module]:
    t = run.training
    g, d = (copy.deepcopy(net).double() for net in (state.generator, state.discriminator))
    for_g, for_d = PlainOptimizer(g, run, "generator"), PlainOptimizer(d, run, "discriminator")

    def slope(at: Tensor) -> Tensor:
        at = at.detach().requires_grad_()
        return torch.autograd.grad(d(at).sum(), at, create_graph=True)[0].flatten(1)

    for step in range(steps):
        share = share_of(run, step).each(Tensor.double)
        fakes, reals = g(share.critic_latents).detach(), share.reals
        assert share.targets is not None
        pays = d_pays(t.loss, d(reals), d(fakes), share.targets).mean()
        pays = pays + t.drift * (d(reals) ** 2).mean()
        if t.penalty == "gradient" and step % t.penalty_every == 0:
            between = share.mix[:, None, None, None] * fakes + (1 - share.mix[:, None, None, None]) * reals
            pays = pays + t.penalty_every * t.penalty_weight * ((slope(between).norm(dim=1) - 1) ** 2).mean()
        if t.penalty in ("r1", "r1+r2"):
            pays = pays + t.penalty_weight / 2 * (slope(reals) ** 2).sum(1).mean()
        if t.penalty == "r1+r2":
            pays = pays + t.penalty_weight / 2 * (slope(fakes) ** 2).sum(1).mean()
        if t.diversity:
            pays = pays - t.diversity * (apart(d, reals) - apart(d, fakes))
        pays = pays + t.information * unread(run, d, fakes, share.critic_latents)
        for_d.step(torch.autograd.grad(pays, list(d.parameters()), materialize_grads=True))
        if t.clip:
            for parameter in d.parameters():
                parameter.data = parameter.data.clamp(-t.clip, t.clip)
        if (step + 1) % t.d_steps:
            continue
        for turn in range(t.g_steps):
            size = run.network.input_size
            latents = share.generator_latents[:, size * turn:size * (turn + 1)]
            fakes = g(latents)
            if t.feature_matching:
                pays = ((d.inner(reals.flatten(1)).mean(0) - d.inner(fakes.flatten(1)).mean(0)) ** 2).sum()
            else:
                pays = g_pays(t.loss, d(reals), d(fakes)).mean()
            if t.diversity:
                pays = pays - t.diversity * apart(d, fakes)
            pays = pays + t.information * unread(run, d, fakes, latents)
            for_g.step(torch.autograd.grad(pays, list(g.parameters())))
    return g, d


def apart(d: nn.Module, images: Tensor) -> Tensor:
    """Mean distance of two images' features, each of length 1."""
    unit = d.inner(images.flatten(1))
    unit = unit / (unit**2).sum(1, keepdim=True) ** 0.5
    pairs = [((unit[i] - unit[j]) ** 2).sum() ** 0.5 for i in range(BATCH) for j in range(i)]
    return torch.stack(pairs).mean()


def unread(run: Run, d: nn.Module, fakes: Tensor, latents: Tensor) -> Tensor | float:
    """-log of what D's heads make of the codes: noise 0..2, then a categorical code, then continuous ones."""
    codes = run.network.codes
    if not d.heads:
        return 0.0
    told = d.heads(d.inner(fakes.flatten(1)))  # type: ignore[operator]
    odds = told[:, :codes].exp()
    chosen = (odds * latents[:, 3:3 + codes]).sum(1) / odds.sum(1)
    return (((told[:, codes:] - latents[:, 3 + codes:]) ** 2).sum(1) / 2 - (chosen.log() if codes else 0)).mean()


# ---- Claims


@pytest.mark.parametrize("training", [
    {"loss": "minimax"}, {"loss": "non_saturating"}, {"loss": "least_squares"}, {"loss": "hinge"},
    {"loss": "wasserstein", "penalty": "gradient", "drift": 0.01},
    {"loss": "wasserstein", "penalty": "gradient", "penalty_every": 3},
    {"loss": "wasserstein", "clip": 0.3}, {"loss": "wasserstein", "clip": 0.3, "d_steps": 5},
    {"loss": "non_saturating", "penalty": "r1"}, {"loss": "hinge", "penalty": "gradient"},
    {"loss": "relativistic", "penalty": "r1+r2", "penalty_weight": 0.5}, {"loss": "relativistic"},
    {"feature_matching": True}, {"diversity": 0.5}, {"historical_averaging": 0.7},
    {"d_steps": 3}, {"g_steps": 2}, {"d_steps": 2, "g_steps": 3, "historical_averaging": 0.7},
    {"codes": 3}, {"continuous_codes": 2}, {"codes": 3, "continuous_codes": 2, "information": 0.4, "g_steps": 2},
    {"optimizer": "sgd"}, {"optimizer": "sgd", "nesterov": True}, {"optimizer": "sgd", "momentum": 0.0},
    {"discriminator_optimizer": "sgd", "discriminator_rate": 0.5}, {"beta1": 0.5, "beta2": 0.9},
], ids=lambda training: ",".join(f"{name}={value}" for name, value in training.items()))
def test_seven_steps_change_both_networks_as_the_slow_game_does(training: dict[str, Any]) -> None:
    run = run_of(**training)
    state = new_state(run)
    slow = slow_game(run, state, 7)
    before = copy.deepcopy((state.generator, state.discriminator))
    play(run, state, 7)
    for network, expected, start in zip((state.generator, state.discriminator), slow, before, strict=True):
        for (name, parameter), other, first in zip(network.named_parameters(), expected.parameters(),
                                                   start.parameters(), strict=True):
            torch.testing.assert_close(parameter.double(), other, atol=1e-4, rtol=1e-4)
            if name != "outer.bias":  # to which some games are blind
                assert not torch.equal(parameter, first), name


@pytest.mark.parametrize(("d_steps", "g_steps", "moves"), [(1, 1, [1] * 6), (3, 1, [0, 0, 1] * 2), (2, 4, [0, 1] * 3)])
def test_g_moves_after_every_k_th_step_of_d(d_steps: int, g_steps: int, moves: list[int]) -> None:
    run = run_of(d_steps=d_steps, g_steps=g_steps)
    state, moved = new_state(run), []
    phase, rules = Phase(0, 1, "hold", 0, 10_000, BATCH), Rules.of(run, BATCH, 1)
    for step in range(6):
        g, d = ([p.detach().clone() for p in net.parameters()] for net in (state.generator, state.discriminator))
        train_step(state, [share_of(run, step)], Moment(phase, step * BATCH, 1.0, RATE), rules)
        assert any(not torch.equal(a, b) for a, b in zip(d, state.discriminator.parameters(), strict=True))
        moved.append(int(any(not torch.equal(a, b) for a, b in zip(g, state.generator.parameters(), strict=True))))
    assert moved == moves


def test_after_each_step_the_clipped_weights_stay_within_their_bounds_and_g_is_not_clipped() -> None:
    run = run_of(loss="wasserstein", clip=0.02)
    state = new_state(run)
    for steps in range(1, 4):
        play(run, state, steps)
        assert max(p.abs().max().item() for p in state.discriminator.parameters()) <= 0.02
        assert max(p.abs().max().item() for p in state.generator.parameters()) > 0.02


class Tiles(nn.Module):
    """[N, 3] -> flat images [N, 3, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, latents: Tensor, alpha: Any = 1.0, dtype: Any = None) -> Tensor:
        return (self.scale * latents)[:, :, None, None].expand(-1, -1, 8, 8)


class Recorder(Differentiable):
    """Keeps what it is shown, and takes every image for a real one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.shown = nn.Parameter(torch.tensor(1e-3)), []

    def judged(self, images: Tensor, labels: Tensor | None) -> Judgement:
        self.shown.append(images.detach())
        scores = self.weight * images.sum(dim=(1, 2, 3)) + 3
        return Judgement(scores, scores[:, None], scores[:, None][:, :0])


@pytest.mark.parametrize("augment", ["always", "adaptive"])
def test_d_sees_reals_and_fakes_augmented_in_both_updates_each_by_their_own_draws(augment: str) -> None:
    run = from_dict({"name": "x", "data": {"source": "a", "shards": "b"}, "network": {"kind": "mlp", "latent_size": 3},
                     "training": {"loss": "non_saturating", "penalty": "none", "drift": 0.0, "augment": augment,
                                  "g_steps": 2}, "stages": [{"resolution": 8, "batch_size": BATCH}]})
    source, judge, painter = torch.Generator().manual_seed(1), Recorder(), Tiles()
    share = Share(reals=torch.randint(0, 256, (BATCH, 3, 8, 8), dtype=torch.uint8, generator=source),
                  mirrored=torch.zeros(BATCH, dtype=torch.bool), critic_latents=torch.randn(BATCH, 3, generator=source),
                  generator_latents=torch.randn(BATCH, 6, generator=source), mix=torch.zeros(BATCH),
                  augmentation=torch.rand(BATCH, 4 * AUGMENTATION_DRAWS, generator=source))
    unset = torch.optim.SGD(painter.parameters())
    state = TrainState(painter, judge, copy.deepcopy(painter), unset, unset, torch.zeros(2))  # type: ignore[arg-type]
    begin_phase(state, run)
    state.augmentation = torch.tensor(0.3) if augment == "adaptive" else None
    still = Moment(Phase(0, 8, "hold", 0, 10_000, BATCH), 0, 1.0, 0.0)  # rate 0: what will be shown can be told before
    seen = train_step(state, [share], still, Rules.of(run, BATCH, 1))
    latents = (share.critic_latents, *share.generator_latents.chunk(2, dim=1))
    plain = [share.reals.float() / 127.5 - 1, *(painter(each).detach() for each in latents)]
    assert len(judge.shown) == 4
    assert share.augmentation is not None
    draws, after = share.augmentation.chunk(4, dim=1), 0.3 + BATCH / 500_000  # D is sure: up, before G's turn
    for which, (images, shown) in enumerate(zip(plain, judge.shown, strict=True)):
        probability = 1.0 if augment == "always" else 0.3 if which < 2 else after
        torch.testing.assert_close(shown, augmented(images, draws[which], probability))
    if augment == "adaptive":
        assert state.augmentation.item() == pytest.approx(after, abs=1e-7)
        assert seen["augmentation"].item() == pytest.approx(after, abs=1e-7)


def test_d_learns_the_class_from_reals_and_g_is_asked_for_it_in_its_fakes() -> None:
    """By how much the weight of the classification raises either loss."""
    paid = {}
    for weight in (0.0, 2.0):
        run = from_dict({"name": "x", "data": {"source": "a", "shards": "b"}, "stages": [{"resolution": 8}],
                         "network": {"kind": "mlp", "latent_size": 3, "conditioning": "auxiliary", "classes": 4},
                         "training": {"loss": "hinge", "penalty": "none", "drift": 0.0, "classification": weight}})
        torch.manual_seed(2)
        generator, judge = new_generator(run.network, 8, False), new_discriminator(run.network, 8, False)
        source = torch.Generator().manual_seed(1)
        labels = torch.eye(4)[[0, 3, 1, 1, 2, 0, 3, 2]]
        latents = [torch.cat([torch.randn(BATCH, 3, generator=source), labels], dim=1) for _ in range(2)]
        share = Share(torch.randint(0, 256, (BATCH, 3, 8, 8), dtype=torch.uint8, generator=source),
                      torch.zeros(BATCH, dtype=torch.bool), *latents, torch.zeros(BATCH), labels)
        unset = torch.optim.SGD(generator.parameters())
        state = TrainState(generator, judge, generator, unset, unset, torch.zeros(2))
        rules = Rules.of(run, BATCH, 1)
        paid[weight] = [critic_objective(state, share, 1.0, rules, False)[0],
                        generator_objective(state, share, 1.0, rules)[0]]
    of_reals, of_fakes = (judge.linearised(images, labels=labels)[0].heads
                          for images in (share.reals.float() / 127.5 - 1, generator(share.generator_latents)))
    for with_it, without, logits in zip(paid[2.0], paid[0.0], (of_reals, of_fakes), strict=True):
        odds = logits.exp()
        expected = -2 * ((odds * labels).sum(1) / odds.sum(1)).log().sum()
        torch.testing.assert_close(with_it - without, expected)
