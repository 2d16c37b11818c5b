"""Claims about one training step, against a slow one written out here: float64, one undivided batch, Adam by hand."""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradine.configs.schema import Network, Run, Training, from_dict
from gradine.stages.growth import Moment, Phase, share_rows
from gradine.stages.loop import initial_state
from gradine.stages.networks import Discriminator, Generator, initialise
from gradine.stages.step import (
    Rules,
    Share,
    TrainState,
    new_optimizer,
    non_finite_tensors,
    prepare_reals,
    train_step,
    update_average,
)

NETWORK = Network(latent_size=6, fmap_base=32, fmap_max=4)
RATE = 0.002
RULES = Rules(Training(penalty_weight=10.0, penalty_target=1.5, drift=0.01), NETWORK, penalty_divisor=2,
              average_decay=0.9, dtype=torch.float32)


def with_training(**changes: Any) -> Rules:
    return dataclasses.replace(RULES, training=dataclasses.replace(RULES.training, **changes))


def run_of(**training: Any) -> Run:
    return from_dict({"name": "x", "data": {"source": "a", "shards": "b"}, "training": training,
                      "network": dataclasses.asdict(NETWORK), "stages": [{"resolution": 4}, {"resolution": 8}]})


def new_state(size: int = 8, channels: int = 3, **training: Any) -> TrainState:
    nets = [kind(NETWORK, size, size > 4, channels) for kind in (Generator, Discriminator, Generator)]
    for net, role in zip(nets, ("generator", "discriminator", "average"), strict=True):
        initialise(net, 3, role)
    generator, discriminator, average = nets
    average.requires_grad_(False)
    run = run_of(**training)
    return TrainState(generator, discriminator, average, new_optimizer(generator, run),  # type: ignore[arg-type]
                      new_optimizer(discriminator, run), torch.zeros(2), 1000)


def moment(batch: int, alpha: float = 0.3, rate: float = RATE) -> Moment:
    return Moment(Phase(1, 8, "fade", 1000, 10_000, batch), 1000, alpha, rate)


def batch_of(count: int, seed: int = 0, size: int = 8, channels: int = 3) -> Share:
    source = torch.Generator().manual_seed(seed)
    return Share(reals=torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=source),
                 mirrored=torch.rand(count, generator=source) < 0.5,
                 critic_latents=torch.randn(count, 6, generator=source),
                 generator_latents=torch.randn(count, 6, generator=source),
                 mix=torch.rand(count, generator=source))


def split(batch: Share, micro: int) -> list[Share]:
    """Shares of `micro` rows, whole stddev groups."""
    count = len(batch.mix)
    groups, step = count // min(4, count), micro // min(4, count)
    return [batch.each(lambda tensor, low=low: tensor[share_rows(count, low, low + step)])
            for low in range(0, groups, step)]


def step(state: TrainState, shares: Share | list[Share], **at: Any) -> dict[str, Tensor]:
    shares = shares if isinstance(shares, list) else [shares]
    batch = at.pop("batch", sum(len(share.mix) for share in shares))
    rules = at.pop("rules", RULES)
    return train_step(state, shares, moment(batch, **at), rules)


def values(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def moments(adam: torch.optim.Adam) -> list[Tensor]:
    return [value.clone() for p in adam.param_groups[0]["params"] for _, value in sorted(adam.state[p].items())]


def everything(state: TrainState, part: str) -> list[Tensor]:
    """What an update of `part` changes."""
    adam = state.generator_optimizer if part == "generator" else state.discriminator_optimizer
    changed = [*values(getattr(state, part)).values(), *moments(adam)]
    return changed + (list(values(state.average).values()) if part == "generator" else [])


def same(a: Any, b: Any) -> bool:
    a, b = (list(x.values()) if isinstance(x, dict) else x for x in (a, b))
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- The slow step


class PlainAdam:
    """Kingma and Ba's algorithm 1, beta1 0 and beta2 0.99 unless told."""

    def __init__(self, net: nn.Module, beta1: float = 0.0) -> None:
        self.parameters, self.beta1, self.t = list(net.parameters()), beta1, 0
        self.m = [torch.zeros_like(p) for p in self.parameters]
        self.v = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self, grads: tuple[Tensor, ...], rate: float) -> None:
        self.t += 1
        for p, g, m, v in zip(self.parameters, grads, self.m, self.v, strict=True):
            m.copy_(self.beta1 * m + (1 - self.beta1) * g)
            v.copy_(0.99 * v + 0.01 * g**2)
            m_hat, v_hat = m / (1 - self.beta1**self.t), v / (1 - 0.99**self.t)
            p -= rate * m_hat / (v_hat.sqrt() + 1e-8)


class SlowStep:
    """WGAN-GP, drift, Adam and the average on a float64 copy of the networks and the whole batch at once."""

    def __init__(self, state: TrainState, beta1: float = 0.0) -> None:
        self.g, self.d, self.average = (copy.deepcopy(net).double() for net in
                                        (state.generator, state.discriminator, state.average))
        self.g_adam, self.d_adam = PlainAdam(self.g, beta1), PlainAdam(self.d, beta1)

    def __call__(self, batch: Share, alpha: float, rate: float, rules: Rules) -> dict[str, float]:
        reals = torch.from_numpy(plain_reals(batch.reals.numpy(), batch.mirrored.numpy(), alpha))
        fakes = self.g(batch.critic_latents.double(), alpha).detach()
        real_scores, fake_scores = self.d(reals, alpha), self.d(fakes, alpha)
        u = batch.mix.double().view(-1, 1, 1, 1)
        between = ((1 - u) * reals + u * fakes).requires_grad_()
        gradient = torch.autograd.grad(self.d(between, alpha).sum(), between, create_graph=True)[0]
        norm = (gradient**2).sum(dim=(1, 2, 3)).sqrt() / rules.penalty_divisor
        penalty = rules.training.penalty_weight * (norm / rules.training.penalty_target - 1) ** 2
        loss_d = (fake_scores - real_scores + rules.training.drift * real_scores**2 + penalty).mean()
        self.d_gradients = torch.autograd.grad(loss_d, list(self.d.parameters()))
        self.d_adam.step(self.d_gradients, rate)
        loss_g = -self.d(self.g(batch.generator_latents.double(), alpha), alpha).mean()
        self.g_gradients = torch.autograd.grad(loss_g, list(self.g.parameters()))
        self.g_adam.step(self.g_gradients, rate)
        with torch.no_grad():
            for mean, p in zip(self.average.parameters(), self.g.parameters(), strict=True):
                mean.copy_(rules.average_decay * mean + (1 - rules.average_decay) * p)
        figures = {"loss_d": loss_d, "loss_g": loss_g, "penalty": penalty.mean(), "gradient_norm": norm.mean(),
                   "score_real": real_scores.mean(), "score_fake": fake_scores.mean(),
                   "gradient_g": max(gradient.abs().max() for gradient in self.g_gradients)}
        return {name: value.item() for name, value in figures.items()}


def plain_reals(pixels: np.ndarray, mirrored: np.ndarray, alpha: float) -> np.ndarray:
    """Pixel by pixel: to [-1, 1], mirrored, blended with the mean of its 2x2 box."""
    out = np.empty(pixels.shape, np.float64)
    for n, c, y, x in np.ndindex(*pixels.shape):
        row = pixels[n, c].astype(np.float64) / 127.5 - 1
        row = row[:, ::-1] if mirrored[n] else row
        box = row[y // 2 * 2:y // 2 * 2 + 2, x // 2 * 2:x // 2 * 2 + 2].mean()
        out[n, c, y, x] = alpha * row[y, x] + (1 - alpha) * box
    return out


def assert_moved_alike(before: dict[str, Tensor], fast: nn.Module, slow: nn.Module, share: float = 1e-3) -> None:
    """Each tensor moved, and its movement differs from the slow one's by at most `share` of it."""
    for (name, p), q in zip(fast.named_parameters(), slow.parameters(), strict=True):
        moved, expected = (p.detach().double() - before[name].double()), q.detach() - before[name].double()
        assert expected.norm() > 0, name
        assert (moved - expected).norm() <= share * expected.norm(), name


@pytest.mark.parametrize(("alpha", "size", "channels", "beta1", "micro"), [
    (0.3, 8, 3, 0.0, 8), (0.3, 8, 3, 0.0, 4), (0.3, 8, 1, 0.0, 4), (1.0, 4, 3, 0.0, 4), (0.8, 8, 3, 0.5, 8)])
def test_three_steps_move_the_weights_as_the_slow_step_does(alpha: float, size: int, channels: int, beta1: float,
                                                            micro: int) -> None:
    state = new_state(size, channels, beta1=beta1)
    slow = SlowStep(state, beta1)
    start = {part: values(getattr(state, part)) for part in ("generator", "discriminator", "average")}
    for number in range(3):
        batch = batch_of(8, number, size, channels)
        rate = RATE * (number + 1)
        expected = slow(batch, alpha, rate, RULES)
        figures = step(state, split(batch, micro), alpha=alpha, rate=rate)
        assert figures.keys() == expected.keys()
        for name, value in expected.items():
            assert figures[name].item() == pytest.approx(value, rel=1e-4, abs=1e-5), name
            assert not figures[name].requires_grad
    assert_moved_alike(start["generator"], state.generator, slow.g)
    assert_moved_alike(start["discriminator"], state.discriminator, slow.d)
    assert_moved_alike(start["average"], state.average, slow.average)
    assert state.images_seen == 1024
    assert state.masked.tolist() == [0, 0]


@pytest.mark.parametrize(("weight", "target", "divisor", "drift"), [
    (10.0, 1.0, 1, 0.001), (10.0, 750.0, 1, 0.001), (1.0, 1.0, 256, 0.0), (0.0, 1.0, 1, 0.5)])
def test_each_constant_of_the_rules_acts_where_it_should(weight: float, target: float, divisor: int,
                                                         drift: float) -> None:
    training = Training(penalty_weight=weight, penalty_target=target, drift=drift)
    rules = Rules(training, NETWORK, divisor, average_decay=0.9, dtype=torch.float32)
    state, batch = new_state(), batch_of(8)
    slow = SlowStep(state)
    expected = slow(batch, 0.3, RATE, rules)
    assert step(state, batch, rules=rules)["loss_d"].item() == pytest.approx(expected["loss_d"], rel=1e-4)
    for (name, fast), plain in zip(gradients(state.discriminator).items(), slow.d_gradients, strict=True):
        assert (fast - plain).norm() <= 1e-4 * plain.norm() + 1e-6, name


def test_the_rules_are_those_of_the_run() -> None:
    run = run_of(penalty_weight=7.0, penalty_target=750.0, drift=0.02, average_half_life=64)
    rules = Rules.of(run, batch_size=16, penalty_divisor=4)
    assert rules == Rules(run.training, NETWORK, 4, 0.5 ** 0.25, torch.float32)
    assert (rules.training.penalty_weight, rules.training.drift) == (7.0, 0.02)
    assert Rules.of(run_of(precision="bfloat16"), 16, 1).dtype == torch.bfloat16


# ---- Splits


@pytest.mark.parametrize(("count", "micro"), [(8, 4), (12, 4), (24, 4), (24, 8), (24, 12), (3, 3)])
def test_gradients_do_not_depend_on_how_the_batch_is_split(count: int, micro: int) -> None:
    batch, whole, parts = batch_of(count), new_state(), new_state()
    step(whole, batch, rate=0.0)  # so that G's phase meets the same D
    step(parts, split(batch, micro), rate=0.0)
    for net in ("discriminator", "generator"):
        expected, got = gradients(getattr(whole, net)), gradients(getattr(parts, net))
        for name, a in expected.items():
            assert (a - got[name]).abs().max() <= 1e-6 * max(1, a.abs().max()), (net, name)


def test_a_split_that_cuts_groups_would_have_shown() -> None:
    """The claim above can fail: consecutive rows as shares give other gradients."""
    batch, whole, cut = batch_of(8), new_state(), new_state()
    step(whole, batch)
    step(cut, [batch.each(lambda t: t[:4]), batch.each(lambda t: t[4:])])
    a, b = (gradients(state.discriminator)["blocks.4.conv.weight"] for state in (whole, cut))
    assert (a - b).norm() > 1e-4 * a.norm()


def test_the_sum_of_two_workers_gradients_is_that_of_the_whole_batch() -> None:
    """Each worker has half of the groups."""
    batch, whole = batch_of(16), new_state()
    step(whole, batch, rate=0.0)
    halves = [new_state() for _ in range(2)]
    for state, rank in zip(halves, range(2), strict=True):
        step(state, split(batch, 4)[rank * 2:rank * 2 + 2], batch=16, rate=0.0)
    for net in ("discriminator", "generator"):
        first, second = (gradients(getattr(state, net)) for state in halves)
        for name, expected in gradients(getattr(whole, net)).items():
            got = first[name] + second[name]
            assert (got - expected).abs().max() <= 1e-6 * max(1, expected.abs().max()), (net, name)


def test_the_figures_of_two_workers_add_up_to_the_batch_means() -> None:
    batch = batch_of(16)
    whole = step(new_state(), batch, rate=0.0)
    parts = [step(new_state(), split(batch, 8)[rank], batch=16, rate=0.0) for rank in range(2)]
    del whole["gradient_g"]  # of gradients that are summed, which here they are not
    assert len(whole) == 6
    for name, figure in whole.items():
        assert sum(p[name].item() for p in parts) == pytest.approx(figure.item(), rel=1e-5, abs=1e-6)


def test_gradients_are_reduced_once_per_network_as_one_vector_in_the_parameters_order() -> None:
    state, plain = new_state(), new_state()
    vectors: list[Tensor] = []

    def double(vector: Tensor) -> Tensor:
        vectors.append(vector.clone())
        return vector * 2

    train_step(plain, split(batch_of(12), 4), moment(12, rate=0.0), RULES)
    train_step(state, split(batch_of(12), 4), moment(12, rate=0.0), RULES, double)
    for vector, part in zip(vectors, ("discriminator", "generator"), strict=True):
        alone, reduced = (list(gradients(getattr(s, part)).values()) for s in (plain, state))
        assert torch.equal(vector, torch.cat([g.flatten() for g in alone]))
        for one, two in zip(alone, reduced, strict=True):
            assert torch.equal(2 * one, two)


# ---- The reals


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.9, 1.0])
def test_reals_are_scaled_mirrored_and_faded(alpha: float) -> None:
    batch = batch_of(5)
    assert 0 < batch.mirrored.sum() < 5
    images = prepare_reals(batch.reals, batch.mirrored, alpha)
    assert images.dtype == torch.float32
    plain = plain_reals(batch.reals.numpy(), batch.mirrored.numpy(), alpha)
    np.testing.assert_allclose(images.numpy(), plain, atol=1e-6)


def test_reals_reach_exactly_from_minus_one_to_one() -> None:
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 3, 2, 2)
    images = prepare_reals(pixels, torch.tensor([False]), 1.0)
    assert images[0, 0, 0].tolist() == [-1.0, 1.0]
    assert torch.equal(prepare_reals(pixels, torch.tensor([True]), 1.0), -images)


def test_a_fade_starts_with_blocks_and_mirroring_comes_before_it() -> None:
    pixels = torch.tensor([[0, 255, 255, 255], [0, 255, 255, 255]], dtype=torch.uint8).expand(1, 3, 2, 4)
    assert prepare_reals(pixels, torch.tensor([True]), 0.0)[0, 0].tolist() == [[1.0, 1.0, 0.0, 0.0]] * 2


def test_the_step_shows_the_networks_the_faded_mirrored_reals_and_its_alpha() -> None:
    seen: list[tuple[Tensor, float]] = []
    state, batch = new_state(), batch_of(8)
    linearised = state.discriminator.linearised

    def seeing(images: Tensor, alpha: float, *rest: Any, **more: Any) -> Any:
        seen.append((images.detach(), alpha))
        return linearised(images, alpha, *rest, **more)

    state.discriminator.linearised = seeing  # type: ignore[method-assign]
    step(state, batch, alpha=0.25)
    reals, fakes, mixed = seen[0][0].chunk(3)
    np.testing.assert_allclose(reals.numpy(), plain_reals(batch.reals.numpy(), batch.mirrored.numpy(), 0.25), atol=1e-6)
    torch.testing.assert_close(mixed, torch.lerp(reals, fakes, batch.mix.view(-1, 1, 1, 1)))
    assert [(len(images), alpha) for images, alpha in seen] == [(24, 0.25), (8, 0.25)]  # the second: G's fakes


def channels_innermost(images: Tensor) -> Tensor:
    """The same [N, C, H, H] in memory as decoders leave it: [N, H, H, C]."""
    memory = np.empty((len(images), *images.shape[2:], images.shape[1]), np.uint8)
    memory.transpose(0, 3, 1, 2)[:] = images.numpy()
    return torch.from_numpy(memory.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_memory_layout_of_the_reals_changes_no_bit_of_a_step(channels: int, alpha: float,
                                                                 layout: torch.memory_format) -> None:
    states, figures = [], []
    for strided in (False, True):
        state = new_state(16, channels)
        for net in (state.generator, state.discriminator, state.average):
            net.to(memory_format=layout)  # type: ignore[call-overload]
        for number in range(2):
            batch = batch_of(8, number, 16, channels)
            if strided:
                batch = dataclasses.replace(batch, reals=channels_innermost(batch.reals))
                assert batch.reals.stride() == (16 * 16 * channels, 1, 16 * channels, channels)
            figures.append(step(state, batch.to(torch.device("cpu")), alpha=alpha))
        states.append(state)
    assert same(figures[0], figures[2])
    assert same(figures[1], figures[3])
    for part in ("generator", "discriminator"):
        assert same(everything(states[0], part), everything(states[1], part))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_the_networks_see_reals_of_any_layout_in_one(channels: int, alpha: float) -> None:
    batch = batch_of(4, channels=channels)
    for pixels in (batch.reals, channels_innermost(batch.reals)):
        assert prepare_reals(pixels, batch.mirrored, alpha).stride() == (64 * channels, 64, 8, 1)


# ---- Who moves when


def test_the_generators_latents_change_only_the_generators_update() -> None:
    batch, a, b = batch_of(8), new_state(), new_state()
    step(a, batch)
    step(b, dataclasses.replace(batch, generator_latents=batch_of(8, 99).generator_latents))
    assert same(everything(a, "discriminator"), everything(b, "discriminator"))
    assert not same(values(a.generator), values(b.generator))


def test_the_critics_latents_change_the_critics_update() -> None:
    batch, a, b = batch_of(8), new_state(), new_state()
    step(a, batch)
    step(b, dataclasses.replace(batch, critic_latents=batch_of(8, 99).critic_latents))
    assert not same(values(a.discriminator), values(b.discriminator))


def test_the_generators_phase_leaves_the_discriminator_and_its_gradients_as_its_own_phase_did() -> None:
    after_d: list[Any] = []
    state = new_state()
    # G's first use of its latents is after D's update: the second forward of G
    state.generator.register_forward_pre_hook(
        lambda *_: after_d.append((values(state.discriminator), gradients(state.discriminator))))
    before = values(state.discriminator)
    step(state, batch_of(8))
    (at_first, _), (at_second, grads) = after_d
    assert same(at_first, before)
    assert not same(at_second, before)
    assert same(values(state.discriminator), at_second)
    assert same(gradients(state.discriminator), grads)
    assert all(p.requires_grad for p in state.discriminator.parameters())


def test_no_gradient_of_the_critics_phase_reaches_the_generator() -> None:
    state = new_state()
    state.generator.zero_grad(set_to_none=True)
    left: list[int] = []
    state.generator.register_forward_pre_hook(lambda *_: left.append(len(gradients(state.generator))))
    step(state, batch_of(8))
    assert left == [0, 0]


def test_layers_that_are_faded_out_stay_as_they_are_and_keep_a_place_in_adam() -> None:
    """Their gradient is zero by the blend's own weight: at alpha 1 nothing is computed to find that out."""
    state = new_state()
    before = {part: values(getattr(state, part)) for part in ("generator", "discriminator")}
    step(state, batch_of(8), alpha=1.0)
    for part, older in (("generator", "to_rgb.4."), ("discriminator", "from_rgb.4.")):
        net, adam = getattr(state, part), getattr(state, f"{part}_optimizer")
        for name, parameter in net.named_parameters():
            assert torch.equal(parameter, before[part][name]) == name.startswith(older), name
            assert adam.state[parameter]["step"].item() == 1


# ---- A lazy penalty


def test_a_lazy_penalty_comes_every_k_steps_of_its_phase_and_weighs_k_times_as_much() -> None:
    every, lazy = RULES, with_training(penalty_every=3)
    for number in range(7):
        at = Moment(Phase(1, 8, "fade", 1000, 10_000, 8), 1000 + 8 * number, 0.3, RATE)
        plain_state, state, batch = new_state(), new_state(), batch_of(8, number)
        plain, got = (train_step(it, [batch], at, rules) for it, rules in ((plain_state, every), (state, lazy)))
        penalised = number in (0, 3, 6)
        assert ("penalty" in got) == ("gradient_norm" in got) == penalised
        without = (plain["loss_d"] - plain["penalty"]).item()
        assert got["loss_d"].item() == pytest.approx(without + penalised * 3 * plain["penalty"].item(), rel=1e-5)


def test_a_step_without_penalty_moves_the_critic_as_a_penalty_of_weight_zero_does() -> None:
    lazy, none = with_training(penalty_every=2), with_training(penalty_weight=0.0)
    at = Moment(Phase(1, 8, "fade", 1000, 10_000, 8), 1008, 0.3, 0.0)
    states = new_state(), new_state()
    for state, rules in zip(states, (lazy, none), strict=True):
        train_step(state, [batch_of(8)], at, rules)
    for (name, a), b in zip(gradients(states[0].discriminator).items(), gradients(states[1].discriminator).values(),
                            strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_gradients_of_the_step_before_are_not_added() -> None:
    batch, fresh, used = batch_of(8), new_state(), new_state()
    step(used, batch_of(8, 5), rate=0.0)
    step(fresh, batch, rate=0.0)
    step(used, batch, rate=0.0)
    assert same(gradients(fresh.discriminator), gradients(used.discriminator))
    assert same(gradients(fresh.generator), gradients(used.generator))


# ---- Learning rate


@pytest.mark.parametrize("rate", [0.001, 0.003])
def test_the_first_step_of_a_fresh_adam_moves_weights_by_the_learning_rate(rate: float) -> None:
    """With beta1 0 and no history, m / sqrt(v) is the gradient's sign."""
    state = new_state()
    before = {part: values(getattr(state, part)) for part in ("generator", "discriminator")}
    step(state, batch_of(8), rate=rate)
    for part, old in before.items():
        moved = torch.cat([(p.detach() - old[name]).abs().flatten()
                           for name, p in getattr(state, part).named_parameters()])
        assert moved.median().item() == pytest.approx(rate, rel=1e-3)
        assert moved.max().item() == pytest.approx(rate, rel=1e-2)


def test_a_learning_rate_of_zero_moves_nothing_but_the_clock() -> None:
    state = new_state()
    before = [values(net) for net in (state.generator, state.discriminator)]
    step(state, batch_of(8), rate=0.0)
    assert same(values(state.generator), before[0])
    assert same(values(state.discriminator), before[1])
    assert state.images_seen == 1008


def test_adam_is_that_of_the_settings() -> None:
    adam = new_optimizer(nn.Linear(1, 1), run_of(beta1=0, beta2=0.9))
    assert adam.param_groups[0]["betas"] == (0.0, 0.9)
    assert all(type(beta) is float for beta in adam.param_groups[0]["betas"])
    assert adam.param_groups[0]["eps"] == 1e-8
    assert adam.param_groups[0]["weight_decay"] == 0
    assert not adam.state


# ---- The average


def test_the_average_forgets_half_of_a_weight_in_its_half_life() -> None:
    """A generator held still (rate 0): after 5 steps of 8 images the distance has halved 40 / half-life times."""
    for half_life, left in ((40, 0.5), (20, 0.25), (80, math.sqrt(0.5))):
        state = new_state()
        with torch.no_grad():
            for p in state.average.parameters():
                p.zero_()
        rules = Rules.of(run_of(average_half_life=half_life), 8, 1)
        for number in range(5):
            step(state, batch_of(8, number), rate=0.0, rules=rules)
        for mean, p in zip(state.average.parameters(), state.generator.parameters(), strict=True):
            torch.testing.assert_close(mean, p.detach() * (1 - left), rtol=1e-5, atol=1e-7)


def test_the_half_life_does_not_depend_on_the_batch() -> None:
    run, many, few = run_of(average_half_life=1000), 1.0, 1.0
    for _ in range(30):
        many *= Rules.of(run, 16, 1).average_decay
    for _ in range(5):
        few *= Rules.of(run, 96, 1).average_decay
    assert many == pytest.approx(few)
    assert many == pytest.approx(0.5 ** 0.48)


def test_the_average_follows_the_weights_after_their_update() -> None:
    state, expected = new_state(), values(new_state().average)
    for number in range(4):
        step(state, batch_of(8, number))
        expected = {name: 0.9 * mean + 0.1 * values(state.generator)[name] for name, mean in expected.items()}
    for name, mean in state.average.named_parameters():
        torch.testing.assert_close(mean, expected[name])
    assert all(p.grad is None for p in state.average.parameters())


def test_an_average_of_weight_zero_stays_bit_for_bit() -> None:
    state, before = new_state(), values(new_state().average)
    update_average(state.average, state.generator, torch.tensor(0.0))
    assert same(values(state.average), before)


# ---- Gradients that are not finite


def infect(net: nn.Module, value: float) -> Callable[[], None]:
    """One element of one gradient becomes `value`, until removed."""
    parameter = list(net.parameters())[-2]

    def spoil(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[-1] = value
        return gradient

    return parameter.register_hook(spoil).remove


def spoiled_batch(part: str, batch: Share) -> Share:
    if part == "discriminator":
        reals = batch.reals.float()
        reals[3, 1, 2, 2] = math.nan
        return dataclasses.replace(batch, reals=reals)
    latents = batch.generator_latents.clone()
    latents[5, 0] = math.inf
    return dataclasses.replace(batch, generator_latents=latents)


@pytest.mark.parametrize("micro", [8, 4])
@pytest.mark.parametrize("cause", ["batch", "inf", "-inf", "nan"])
@pytest.mark.parametrize("part", ["discriminator", "generator"])
def test_a_gradient_that_is_not_finite_masks_exactly_that_networks_update(part: str, cause: str, micro: int) -> None:
    other = "generator" if part == "discriminator" else "discriminator"
    state = new_state()
    step(state, batch_of(8))  # moments to lose
    before, others_before = everything(state, part), everything(state, other)
    batch, clean_up = batch_of(8, 1), lambda: None
    if cause == "batch":
        batch = spoiled_batch(part, batch)
    else:
        clean_up = infect(getattr(state, part), float(cause))
    step(state, split(batch, micro))
    clean_up()
    if part == "discriminator":
        assert same(everything(state, part), before)
        assert not same(everything(state, other), others_before)
        assert state.masked.tolist() == [1, 0]
    else:
        assert same(everything(state, part), before)  # the average too
        assert not same(everything(state, other), others_before)
        assert state.masked.tolist() == [0, 1]
    assert state.images_seen == 1016
    assert not non_finite_tensors([*state.generator.named_parameters(), *state.discriminator.named_parameters()])
    step(state, batch_of(8, 2))
    assert not same(everything(state, part), before)
    assert state.images_seen == 1024
    assert state.masked.sum() == 1


def test_both_updates_can_be_masked_in_one_step_and_are_counted_apart() -> None:
    state = new_state()
    step(state, batch_of(8))
    before = [*everything(state, "generator"), *everything(state, "discriminator")]
    for net in (state.generator, state.discriminator):
        infect(net, math.nan)
    for number in range(3):
        step(state, batch_of(8, number))
    assert same([*everything(state, "generator"), *everything(state, "discriminator")], before)
    assert state.masked.tolist() == [3, 3]
    assert state.images_seen == 1032


def test_a_masked_first_update_leaves_adam_before_its_first_step() -> None:
    """The one that follows is corrected for bias as a first step is: it moves weights by the learning rate."""
    state = new_state()
    clean_up = infect(state.discriminator, math.inf)
    before = values(state.discriminator)
    step(state, batch_of(8))
    clean_up()
    for p in state.discriminator.parameters():
        assert state.discriminator_optimizer.state[p]["step"].item() == 0
        assert not state.discriminator_optimizer.state[p]["exp_avg_sq"].any()
    step(state, batch_of(8, 1))
    moved = torch.cat([(p.detach() - before[n]).abs().flatten() for n, p in state.discriminator.named_parameters()])
    assert moved.median().item() == pytest.approx(RATE, rel=1e-3)


def test_a_run_with_a_masked_update_goes_on_as_if_that_update_had_not_been() -> None:
    """D's update masked in the second of three steps: the slow steps, told to leave it out, end at the same weights."""
    state = new_state()
    start, slow = values(state.discriminator), SlowStep(state)
    for number in range(3):
        batch, clean_up = batch_of(8, number), lambda: None
        weights = copy.deepcopy((slow.d.state_dict(), slow.d_adam.m, slow.d_adam.v, slow.d_adam.t))
        if number == 1:
            clean_up = infect(state.discriminator, math.nan)
            slow.d_adam.step = lambda *_: None  # type: ignore[method-assign]
        slow(batch, 0.3, RATE, RULES)
        step(state, batch)
        clean_up()
        if number == 1:
            del slow.d_adam.step
            torch.testing.assert_close(slow.d.state_dict(), weights[0])
    assert_moved_alike(start, state.discriminator, slow.d)
    assert all(state.discriminator_optimizer.state[p]["step"].item() == 2 for p in state.discriminator.parameters())


def test_large_but_finite_gradients_are_not_skipped() -> None:
    state = new_state()
    infect(state.discriminator, 1e38)
    before = values(state.discriminator)
    step(state, batch_of(8))
    assert state.masked.tolist() == [0, 0]
    assert not same(values(state.discriminator), before)


def test_tensors_that_are_not_finite_are_named() -> None:
    named = [("fine", torch.ones(2)), ("nan", torch.tensor([1.0, math.nan])), ("inf", torch.tensor([[-math.inf]]))]
    assert non_finite_tensors(iter(named)) == ["nan", "inf"]


# ---- Precision


def test_bfloat16_is_for_the_convolutions_and_weights_and_gradients_stay_float32() -> None:
    state, seen = new_state(), set()
    for net in (state.generator, state.discriminator):
        for layer in net.modules():
            if layer.__class__.__name__ == "EqualizedConv":
                layer.register_forward_hook(lambda _m, _i, out: seen.add(out.dtype))
    figures = step(state, batch_of(8), rules=dataclasses.replace(RULES, dtype=torch.bfloat16))
    assert seen == {torch.bfloat16}
    for net in (state.generator, state.discriminator):
        assert {p.dtype for p in net.parameters()} == {torch.float32}
        assert {g.dtype for g in gradients(net).values()} == {torch.float32}
    assert {figure.dtype for figure in figures.values()} == {torch.float32}
    plain = step(new_state(), batch_of(8))
    assert figures["loss_d"].item() == pytest.approx(plain["loss_d"].item(), rel=0.05)


def test_a_share_moves_to_a_device_whole() -> None:
    share = batch_of(4).to(torch.device("meta"))
    assert {tensor.device.type for tensor in vars(share).values() if tensor is not None} == {"meta"}
    assert share.reals.dtype == torch.uint8


@pytest.mark.parametrize("channels", [1, 3])
def test_a_share_of_strided_reals_moves_too_and_keeps_its_pixels(channels: int) -> None:
    batch = batch_of(4, channels=channels)
    strided = dataclasses.replace(batch, reals=channels_innermost(batch.reals))
    assert strided.to(torch.device("meta")).reals.shape == batch.reals.shape
    assert torch.equal(strided.to(torch.device("cpu")).reals, batch.reals)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a GPU")
@pytest.mark.parametrize("channels", [1, 3])
def test_a_share_of_strided_reals_reaches_a_gpu_from_pinned_memory(channels: int) -> None:
    batch = batch_of(4, channels=channels)
    pinned = dataclasses.replace(batch, reals=channels_innermost(batch.reals)).pinned()
    assert pinned.reals.is_pinned()
    moved = pinned.to(torch.device("cuda"))
    assert torch.equal(moved.reals.cpu(), batch.reals)


def test_upscaled_pixels_in_the_slow_step_are_torchs_own() -> None:
    """The slow loop is itself checked once, against an interpolation it does not use."""
    batch = batch_of(2)
    flat = plain_reals(batch.reals.numpy(), np.zeros(2, bool), 0.0)
    images = batch.reals.double() / 127.5 - 1
    np.testing.assert_allclose(flat, F.interpolate(F.avg_pool2d(images, 2), scale_factor=2).numpy(), atol=1e-12)


# ---- Batch norm


def test_a_masked_update_leaves_what_batch_norms_have_seen() -> None:
    run = from_dict({"name": "x", "data": {"source": "a", "shards": "b"}, "stages": [{"resolution": 8}],
                     "training": {"loss": "non_saturating", "penalty": "none", "drift": 0},
                     "network": {"kind": "dcgan", "latent_size": 6, "fmap_base": 32, "fmap_max": 4}})
    state = initial_state(run, 0, None, torch.device("cpu"), None)
    at, rules = Moment(Phase(0, 8, "hold", 0, 800, 8), 0, 1.0, RATE), Rules.of(run, 8, 1)
    train_step(state, [batch_of(8)], at, rules)
    roles = "generator", "discriminator", "average"
    seen = {role: copy.deepcopy(getattr(state, role).state_dict()) for role in roles}
    broken = dataclasses.replace(batch_of(8), critic_latents=torch.full((8, 6), math.nan))
    train_step(state, [broken], at, rules)
    assert state.masked.tolist() == [1, 0]
    for role, tensors in seen.items():
        for name, tensor in getattr(state, role).state_dict().items():
            assert torch.isfinite(tensor).all(), (role, name)
            if "running" in name and role != "average":  # which goes on towards the generator
                assert torch.equal(tensor, tensors[name]), (role, name)
