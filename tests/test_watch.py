"""What the watch on training sees and what it leaves in peace: real steps of tiny networks, with a fault or none."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import itertools
import json
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradine.configs.schema import Run, from_dict
from gradine.pipeline import evaluations
from gradine.stages import evaluate, growth, step
from gradine.stages.features import open_network
from gradine.stages.generate import generate
from gradine.stages.losses import critic_loss, draw_targets
from gradine.stages.networks import Discriminator, Generator, initialise
from gradine.stages.subjects import Gathered
from gradine.stages.watch import Alarms, Balance, Bounds, NonFinite, Watch

Tick = dict[str, Any]
BATCH = 8
STAGES = Path(step.__file__).parent


def small_run(seed: int = 0, **stage: Any) -> Run:
    """4 px, then 8 px with a fade: 40, 50 and 70 steps; or one stage of 8 px."""
    stages = [stage] if stage else [{"resolution": 4, "hold_images": 40 * BATCH},
                                    {"resolution": 8, "fade_images": 50 * BATCH, "hold_images": 70 * BATCH}]
    return from_dict({"name": "watched", "data": {"source": "none", "shards": "none"},
                      "network": {"latent_size": 8, "fmap_base": 64, "fmap_max": 8}, "training": {"seed": seed},
                      "stages": [{"batch_size": BATCH, "threads": 1, **each} for each in stages]})


def smooth_images(resolution: int, count: int = 256) -> Tensor:
    """uint8 [count, 3, R, R]: four random corners and what lies between them."""
    corners = torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    return (F.interpolate(corners, resolution, mode="bilinear", align_corners=True) * 255).to(torch.uint8)


def share_at(run: Run, images: Tensor, images_seen: int) -> step.Share:
    rng = torch.Generator().manual_seed(growth.random_seed(run.training.seed, "test", images_seen))
    latents = torch.randn(2, BATCH, 8, generator=rng)
    return step.Share(images[torch.randint(len(images), (BATCH,), generator=rng)],
                      torch.rand(BATCH, generator=rng) < 0.5, latents[0], latents[1], torch.rand(BATCH, generator=rng))


def new_state(run: Run, resolution: int, older: step.TrainState | None) -> step.TrainState:
    fades = older is not None
    nets = [cls(run.network, resolution, fades) for cls in (Generator, Discriminator, Generator)]
    for net, role in zip(nets, ("generator", "discriminator", "generator"), strict=True):
        initialise(net, run.training.seed, role)
    if older:
        for net, old in zip(nets, (older.generator, older.discriminator, older.average), strict=True):
            net.load_state_dict(old.state_dict(), strict=False)
    return step.TrainState(*nets, *(step.new_optimizer(net, run) for net in nets[:2]),  # type: ignore[arg-type]
                           torch.zeros(2), older.images_seen if older else 0)


def ticks_of(run: Run) -> Iterator[Tick]:
    """Trains all stages by the real step, a tick at each."""
    plan, state = growth.schedule(run), None
    while state is None or state.images_seen < plan.end:
        moment = growth.at(plan, state.images_seen if state else 0)
        if moment.images_seen == plan.stage_span(moment.phase.stage)[0]:
            state = new_state(run, moment.phase.resolution, state)
            images, rules = smooth_images(moment.phase.resolution), step.Rules.of(run, BATCH, 1)
        elif moment.starts_phase:
            state.generator_optimizer, state.discriminator_optimizer = (
                step.new_optimizer(net, run) for net in (state.generator, state.discriminator))
        seen = step.train_step(state, [share_at(run, images, moment.images_seen)], moment, rules)
        yield {"event": "tick", "resolution": moment.phase.resolution, "phase": moment.phase.kind,
               "alpha": moment.alpha, "learning_rate": moment.learning_rate, "images_seen": state.images_seen,
               "masked": state.masked.tolist(), **{name: value.item() for name, value in seen.items()}}


def watched(ticks: list[Tick]) -> list[dict[str, Any]]:
    """The alarms of a run, each stage looked at by its own Alarms as the loop does."""
    looks = {tick["resolution"]: Alarms() for tick in ticks}
    return [alarm for tick in ticks for alarm in looks[tick["resolution"]].look(tick)]


# Watch -------------------------------------------------------------------------------------------------------------


def test_a_state_with_one_value_that_is_not_finite_ends_the_stage() -> None:
    watch = Watch(BATCH, 0, [0, 0])
    watch.look(BATCH, [0, 0], 0.0)
    with pytest.raises(NonFinite, match=r"1 tensors .* at images_seen=16") as caught:
        watch.look(2 * BATCH, [0, 0], 1.0)
    assert caught.value.images_seen == 2 * BATCH


def test_masked_updates_of_one_network_in_a_row_are_counted_from_its_last_one_that_went_through() -> None:
    watch = Watch(BATCH, 0, [0, 0])
    watch.look(19 * BATCH, [19, 0], 0)  # 19 of D's in a row
    watch.look(21 * BATCH, [20, 1], 0)  # of each network one of the last two went through
    watch.look(40 * BATCH, [20, 20], 0)  # 19 of G's in a row
    with pytest.raises(NonFinite, match="last 20 updates of the generator were all masked"):
        watch.look(41 * BATCH, [20, 21], 0)


def test_what_ends_a_stage_tells_the_driver_its_place_through_pickle() -> None:
    error = pickle.loads(pickle.dumps(NonFinite("a NaN", 640)))
    assert (str(error), error.images_seen) == ("a NaN", 640)


@pytest.mark.fault
def test_f25_updates_masked_without_end_are_counted_and_end_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in every gradient of D from step 11 on, in the real step: the 20th masked update in a row ends the stage."""
    run = small_run(resolution=4, hold_images=40 * BATCH)
    watch, seen, original = Watch(BATCH, 0, [0, 0]), 0, step.critic_loss

    def poisoned(*arguments: Any) -> Tensor:
        return original(*arguments) * (math.nan if seen >= 10 * BATCH else 1)

    monkeypatch.setattr(step, "critic_loss", poisoned)
    ticks = ticks_of(run)
    for tick in itertools.islice(ticks, 29):
        seen = tick["images_seen"]
        watch.look(seen, tick["masked"], 0.0)
    tick = next(ticks)
    assert (tick["images_seen"], tick["masked"]) == (30 * BATCH, [20, 0])
    with pytest.raises(NonFinite, match="last 20 updates of the discriminator"):
        watch.look(tick["images_seen"], tick["masked"], 0.0)


HIDING = {"nan_to_num", "nan_to_num_", "nansum", "nanmean", "nanmedian", "clamp", "clamp_", "clip", "clip_", "fmax",
          "fmin", "clamp_min", "clamp_max", "clip_grad_norm_", "clip_grad_value_", "where", "masked_fill"}
FINITE_ANYWAY = {
    "torch.where(finite_d * finite_g > 0, now, then)",  # a masked update leaves what batch norms have seen
    "torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)",  # choose, by flags that are drawn
    "torch.where(uniforms[:, 2:] < training.flip_labels, own.flip(1), own)"}


@pytest.mark.fault
@pytest.mark.parametrize("module", ["step", "losses", "networks", "loop"])
def test_f25_nothing_in_the_step_path_hides_a_number_that_is_not_finite(module: str) -> None:
    """Every call in the syntax trees of the step path: none of those that turn a NaN or infinity into a number."""
    tree = ast.parse((STAGES / f"{module}.py").read_text())
    names = {ast.unparse(call): call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)
             for call in ast.walk(tree) if isinstance(call, ast.Call)}
    assert names
    assert not {text for text, name in names.items() if name in HIDING} - FINITE_ANYWAY


# Alarms ------------------------------------------------------------------------------------------------------------

BEGIN = 80  # step of a fault
Change = Callable[[float, bool], float]  # learning rate, whether the generator's -> the rate that is used


def faulty(monkeypatch: pytest.MonkeyPatch, change: Change, steps: int, seed: int) -> list[Tick]:
    """The ticks of 8 px trained by the real step, the learning rates changed from step BEGIN on."""
    original, calls = step.masked_update, 0

    def masked_update(adam: torch.optim.Adam, learning_rate: float) -> Tensor:
        nonlocal calls
        number, of_generator = divmod(calls, 2)
        calls += 1
        return original(adam, change(learning_rate, bool(of_generator)) if number >= BEGIN else learning_rate)

    monkeypatch.setattr(step, "masked_update", masked_update)
    return list(ticks_of(small_run(seed, resolution=8, hold_images=steps * BATCH, learning_rate=0.003)))


def reach(tick: Tick) -> float:
    """Norm x sqrt(3 x 8 x 8)."""
    return float(tick["gradient_norm"] * 192**0.5)


def first_outside(values: list[float], seen: list[float], room: float, young_room: float, limit: float) -> int:
    """The tick from BEGIN on whose seen[n] first leaves the band of values[:n]: the rule of `Band`, written out."""
    for n in range(BEGIN, len(values)):
        known: list[float] = []
        for value in values[:n - 8]:
            middle = np.median(known or [0.0])
            sigma = 1.4826 * np.median(np.abs(np.array(known or [0.0]) - middle))
            if len(known) < 16 or abs(value - middle) <= max(4 * sigma, room):
                known.append(value)
        middle = np.median(known)
        sigma = 1.4826 * np.median(np.abs(np.array(known) - middle))
        width = max(8 * sigma, young_room) if len(known) < 100 else max(6 * sigma, room)
        if abs(seen[n] - middle) > min(width, limit):
            return n
    raise AssertionError(f"no tick of {len(values)} leaves its band")


def first_spike(ticks: list[Tick]) -> int:
    """Of penalty / weight or loss_g / reach, whichever is first."""
    penalties, levels = [tick["penalty"] / 10 for tick in ticks], [tick["loss_g"] / reach(tick) for tick in ticks]
    found = []
    for values, bounds in ((penalties, (1.0, 1.0, 3.0)), (levels, (1.0, 1.0, 1.5))):
        with contextlib.suppress(AssertionError):
            found.append(first_outside(values, values, *bounds))
    return min(found)


def first_win(ticks: list[Tick]) -> int:
    """Of the median of 8 gaps."""
    gaps = [(tick["score_real"] - tick["score_fake"]) / reach(tick) for tick in ticks]
    medians = [float(np.median(gaps[max(0, n - 7):n + 1])) for n in range(len(gaps))]
    return first_outside(gaps, medians, room=0.1, young_room=0.25, limit=0.75)


FAULTS: dict[str, tuple[Change, Callable[[list[Tick]], int], set[str], int]] = {
    "rate x100": (lambda rate, of_generator: rate * 100, first_spike, {"spike", "divergence"}, 100),
    "generator frozen": (lambda rate, of_generator: 0.0 if of_generator else rate, first_win,
                         {"discriminator wins"}, 140),
    "discriminator frozen": (lambda rate, of_generator: rate if of_generator else 0.0, first_win,
                             {"generator wins"}, 140),
}


@pytest.mark.fault
@pytest.mark.parametrize("fault", FAULTS)
def test_f26_a_figure_that_leaves_its_band_is_told_within_one_tick(fault: str,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """From step 80 of real steps on: learning rate x100, or the generator's or the discriminator's rate 0."""
    change, first, kinds, steps = FAULTS[fault]
    ticks = faulty(monkeypatch, change, steps, seed=1)
    alarms = watched(ticks)
    left = ticks[first(ticks)]["images_seen"]
    assert left <= alarms[0]["images_seen"] <= left + BATCH
    assert kinds <= {alarm["alarm"] for alarm in alarms}
    assert alarms[0]["alarm"] in kinds
    assert all(alarm["value"] > alarm["bound"] > 0 or alarm["value"] < alarm["bound"] for alarm in alarms)


@pytest.mark.fault
def test_f26_a_gradient_spike_is_told_at_its_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One single update of the discriminator at 300 times its rate, after which its gradients are far too steep."""
    updates = itertools.count()
    ticks = faulty(monkeypatch, lambda rate, of_generator: rate * (300 if next(updates) == 0 else 1), 90, seed=1)
    alarms = watched(ticks)
    assert alarms[0]["alarm"] == "spike"
    assert alarms[0]["images_seen"] == ticks[first_spike(ticks)]["images_seen"] <= (BEGIN + 2) * BATCH


def test_an_alarm_is_for_a_person_and_for_the_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = faulty(monkeypatch, FAULTS["rate x100"][0], 90, seed=1)
    spike = watched(ticks)[0]
    assert json.loads(json.dumps(spike)) == spike
    assert set(spike) == {"alarm", "figure", "value", "bound", "rule", "images_seen", "resolution", "message"}
    assert spike["message"].startswith(f"8px after {spike['images_seen']:,} images: {spike['figure']} is ")
    divergence = next(alarm for alarm in watched(ticks) if alarm["alarm"] == "divergence")
    assert "resume=RESOLUTION branch=new stages.<n>.learning_rate=... (now 0.003)" in divergence["message"]


@pytest.mark.fault
@pytest.mark.parametrize("seed", range(20))
def test_f26_a_healthy_training_raises_no_alarm(seed: int) -> None:
    """Nothing: the real step from 4 px through a fade and hold of 8 px, a tick at each of 160 steps."""
    ticks = list(ticks_of(small_run(seed)))
    assert (len(ticks), {tick["phase"] for tick in ticks}) == (160, {"fade", "hold"})
    assert watched(ticks) == []


def steady(count: int, **last: float) -> list[Tick]:
    """Ticks that all but stand still, and what comes last."""
    calm = {"resolution": 8, "phase": "hold", "alpha": 1.0, "learning_rate": 0.001, "loss_d": -0.1, "loss_g": 0.1,
            "score_real": 0.2, "score_fake": -0.1, "penalty": 0.3, "gradient_norm": 1.0}
    ticks = [{**calm, "images_seen": n * BATCH, "penalty": 0.3 + 0.01 * (n % 3)} for n in range(1, count + 1)]
    return [*ticks[:-1], {**ticks[-1], **last}] if count else []


def test_an_alarm_is_told_once_until_the_figure_was_back_for_sixteen_ticks() -> None:
    alarms = Alarms()
    spiking, calm = steady(1, penalty=60.0)[0], steady(1)[0]

    def told(ticks: list[Tick]) -> list[str]:
        return [alarm["alarm"] for tick in ticks for alarm in alarms.look(tick)]

    assert told(steady(40)) == []
    assert told([spiking]) == ["spike"]
    assert told([spiking, spiking, spiking]) == ["divergence"]
    assert told([calm] * 15 + [spiking]) == []
    assert told([calm] * 17 + [spiking]) == ["spike"]


def test_a_stage_that_starts_or_resumes_diverged_is_told_without_a_history() -> None:
    assert [alarm["alarm"] for alarm in Alarms().look(steady(1, penalty=60.0)[0])] == ["spike"]
    assert Alarms().look(steady(1, penalty=29.0)[0]) == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_masked_update_s_figures_neither_alarm_nor_enter_the_history(value: float) -> None:
    alarms = Alarms()
    for tick in steady(60):
        assert alarms.look(tick) == []
        assert alarms.look({**tick, "loss_g": value, "penalty": value}) == []


def test_the_same_training_seen_from_a_final_resolution_or_in_gray_alarms_alike() -> None:
    """At norms a quarter of the present ones, and with a third of the values in an image."""
    tick = {**steady(1)[0], "score_real": 20.0, "score_fake": -20.0}
    halved = {**tick, "gradient_norm": tick["gradient_norm"] / 4}
    gray = {**tick, "gradient_norm": tick["gradient_norm"] * 3**0.5}
    pairs = [[(alarm["alarm"], pytest.approx(alarm["value"])) for _ in range(8) for alarm in alarms.look(each)]
             for alarms, each in ((Alarms(), tick), (Alarms(penalty_divisor=4), halved), (Alarms(channels=1), gray))]
    assert pairs[0]
    assert pairs[0] == pairs[1] == pairs[2]
    run = small_run()
    seen_from_32 = dataclasses.replace(run, training=dataclasses.replace(run.training, penalty_at="final"))
    assert [Alarms.of(seen_from_32, stage).penalty_divisor for stage in (0, 1)] == [2, 1]


# Balance -----------------------------------------------------------------------------------------------------------


def game(loss: str, **training: Any) -> Run:
    return from_dict({"name": "watched", "data": {"source": "none", "shards": "none"},
                      "network": {"latent_size": 8, "fmap_base": 64, "fmap_max": 8},
                      "training": {"loss": loss, "penalty": "r1", "drift": 0.0, **training},
                      "stages": [{"resolution": 8, "batch_size": BATCH}]})


def played(*series: dict[str, float]) -> list[Tick]:
    """Ticks of 8 px with these figures."""
    return [{"resolution": 8, "phase": "hold", "alpha": 1.0, "learning_rate": 0.001, "images_seen": n * BATCH,
             **figures} for n, figures in enumerate(series, 1)]


def told(run: Run, ticks: list[Tick]) -> list[tuple[str, int]]:
    """(alarm, at which tick)."""
    alarms = Alarms.of(run, 0)
    return [(alarm["alarm"], alarm["images_seen"] // BATCH) for tick in ticks for alarm in alarms.look(tick)]


BLIND = {"minimax": 2 * math.log(2), "non_saturating": 2 * math.log(2), "least_squares": 0.25, "hinge": 2.0,
         "relativistic": math.log(2)}


def searched(run: Run) -> tuple[float, float]:
    """The least D's loss can be, of each image, and of one score for all: over a grid of scores and drawn targets."""
    targets = draw_targets(run.training, torch.rand(4_000, 4, generator=torch.Generator().manual_seed(0)))
    scores = torch.linspace(-12, 12, 481)[:, None]

    def mean_loss(reals: Tensor, fakes: Tensor) -> Tensor:
        return critic_loss(run.training.loss, reals.expand(-1, 4_000), fakes.expand(-1, 4_000), targets).mean(1)

    def best(fakes_for: Callable[[Tensor], Tensor]) -> float:
        return float(mean_loss(scores, fakes_for(scores)).min())

    if run.training.loss == "relativistic":
        return best(torch.neg), best(lambda each: each)
    of_reals = best(torch.zeros_like) - float(mean_loss(torch.zeros(1, 1), torch.zeros(1, 1)))
    return of_reals + float(mean_loss(torch.zeros_like(scores), scores).min()), best(lambda each: each)


@pytest.mark.parametrize(("loss", "labels"), [*((loss, {}) for loss in BLIND), *(
    (loss, labels) for loss in ("minimax", "non_saturating", "least_squares") for labels in (
        {"real_labels": [0.9]}, {"real_labels": [0.7, 1.0], "fake_labels": [0.0, 0.3], "flip_labels": 0.1}))])
def test_the_bound_of_a_discriminator_s_loss_is_the_least_it_can_be(loss: str, labels: dict[str, Any]) -> None:
    """Of one that knows all, and of one that has but one score for everything."""
    run = game(loss, **labels)
    bounds = Bounds.of(run.training)
    assert bounds
    assert (bounds.sure, bounds.blind) == pytest.approx(searched(run), abs=4e-3)
    if not labels:
        assert (bounds.sure, bounds.blind) == pytest.approx((0, BLIND[loss]))


@pytest.mark.parametrize("loss", BLIND)
@pytest.mark.parametrize(("share", "kind"), [(0.01, "discriminator wins"), (0.1, None), (1.0, None), (1.1, None),
                                             (1.4, "generator wins")])
def test_a_player_wins_once_the_loss_of_d_stays_at_its_bound_or_above_that_of_a_guess(loss: str, share: float,
                                                                                      kind: str | None) -> None:
    """Beside a penalty as large, which is taken out. At the value of a D that guesses is the equilibrium."""
    blind = BLIND[loss]
    healthy = [{"loss_d": 0.6 * blind + 0.5, "penalty": 0.5}] * 20
    after = [{"loss_d": share * blind + 0.5, "penalty": 0.5}] * 40
    assert told(game(loss), played(*healthy, *after)) == ([(kind, 36)] if kind else [])


def test_a_loss_at_its_bound_now_and_then_is_no_win() -> None:
    low, high = {"loss_d": 0.001}, {"loss_d": 0.4}
    assert told(game("hinge"), played(*[*[low] * 15, high] * 10)) == []


def test_an_alarm_of_balance_says_what_was_seen_by_which_rule_and_the_way_out() -> None:
    alarms = Balance.of(game("non_saturating"))
    (found,) = [each for tick in played(*[{"loss_d": 0.01}] * 20) for each in alarms.look(tick)]
    assert json.loads(json.dumps(found)) == found
    assert set(found) == {"alarm", "figure", "value", "bound", "rule", "images_seen", "resolution", "message"}
    assert (found["images_seen"], found["bound"]) == (16 * BATCH, 0.03)
    assert found["value"] == pytest.approx(0.01 / (2 * math.log(2)))
    assert found["message"].startswith("8px after 128 images: the discriminator's loss is 0.01, and its bound is 0, "
                                       "that of a D that guesses 1.39: the discriminator wins")
    assert "training.penalty=r1" in found["message"]


@pytest.mark.parametrize(("factor", "share", "kinds"), [
    (2e-4, 0.5, ["vanishing gradient"]), (0.0, 0.5, ["vanishing gradient"]), (2e-3, 0.5, []),
    (2e-4, 1.0, []), (2e-4, 1.2, [])])  # nothing is left to learn: D guesses, or worse
def test_a_generator_whose_gradient_has_vanished_is_told_of_unless_d_guesses(factor: float, share: float,
                                                                             kinds: list[str]) -> None:
    start = [{"loss_d": 1.0, "gradient_g": 0.02 * (1 + n % 3)} for n in range(8)]  # median 0.04
    after = [{"loss_d": share * 2 * math.log(2), "gradient_g": factor * 0.04 * (1 + n % 2)} for n in range(40)]
    assert told(game("minimax"), played(*start, *after)) == [(kind, 24) for kind in kinds]


def losses_of(amplitude: Callable[[int], float], count: int, seed: int, period: float = 5.3) -> list[dict[str, float]]:
    """loss_g that swings by this amplitude about 0.7, with noise."""
    noise = np.random.default_rng(seed).normal(size=count)
    return [{"loss_g": 0.7 + amplitude(n) * math.sin(2 * math.pi * n / period) + 0.02 * noise[n], "loss_d": 1.0}
            for n in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_losses_that_swing_ever_wider_are_told_of_and_those_that_just_swing_are_not(seed: int) -> None:
    def grows(n: int) -> float:
        return 0.02 * 1.05 ** n

    found = told(game("non_saturating"), played(*losses_of(grows, 200, seed)))
    assert [kind for kind, _ in found] == ["oscillation"]
    assert told(game("non_saturating"), played(*losses_of(lambda n: 1.0, 300, seed))) == []
    assert told(game("non_saturating"), played(*losses_of(lambda n: min(n, 100) / 100, 300, seed))) == []


@pytest.mark.parametrize("kind", ["normal", "heavy", "walk", "trend"])
def test_noise_and_trends_are_no_oscillation(kind: str) -> None:
    rng, found, run = np.random.default_rng(0), 0, game("non_saturating")
    for _ in range(30):
        series = {"normal": rng.normal(size=300), "heavy": rng.standard_t(2, size=300),
                  "walk": rng.normal(size=300).cumsum(), "trend": np.exp(np.arange(300) / 20)}[kind]
        found += len(told(run, played(*({"loss_g": float(value)} for value in series))))
    assert found == 0


def test_an_autoencoder_is_told_of_once_it_gets_worse_and_never_of_a_player_that_wins() -> None:
    run = from_dict({"name": "watched", "data": {"source": "none", "shards": "none"},
                     "network": {"kind": "vae", "latent_size": 8, "fmap_base": 64, "fmap_max": 8},
                     "stages": [{"resolution": 8, "batch_size": BATCH}]})
    falling = [{"loss_g": 1 / n, "reconstruction": 1 / n, "divergence": 3.0, "gradient_g": 1 / n**4}
               for n in range(1, 101)]
    worse = [{"loss_g": 0.05, "reconstruction": 0.05}] * 10
    assert told(run, played(*falling)) == []
    assert told(run, played(*falling, *worse)) == [("divergence", 105)]


@pytest.mark.parametrize("missing", ["loss_d", "loss_g", "penalty", "gradient_norm", "gradient_g", "score_real"])
def test_a_tick_may_lack_any_figure(missing: str) -> None:
    whole = {"loss_d": 0.25, "loss_g": 0.7, "penalty": 0.1, "gradient_norm": 1.0, "score_real": 0.1, "score_fake": 0.0,
             "gradient_g": 0.1}
    series = played(*[{name: value for name, value in whole.items() if name != missing}] * 100)
    if missing != "score_real":  # which the critic's own step always gives
        assert told(small_run(resolution=8, hold_images=80), series) == []
    for loss in BLIND:
        assert told(game(loss), series) == []


def test_a_figure_that_is_not_finite_says_nothing_of_balance() -> None:
    series = played(*[{"loss_d": 0.001, "loss_g": math.nan}] * 40)
    assert told(game("hinge"), series) == []


@pytest.mark.parametrize(("training", "kind"), [
    ({}, Alarms), ({"feature_matching": True}, Balance), ({"penalty": "none", "clip": 0.01, "drift": 0.0}, Balance)])
def test_each_game_has_the_watch_that_fits_it(training: dict[str, Any], kind: type) -> None:
    raw = {"name": "watched", "data": {"source": "none", "shards": "none"}, "training": training,
           "stages": [{"resolution": 8, "batch_size": BATCH}]}
    assert type(Alarms.of(from_dict(raw), 0)) is kind


# Diversity ---------------------------------------------------------------------------------------------------------


REALS = 271  # what half of the bundled photographs are


def looked_at(generator: torch.nn.Module, reals: int) -> evaluate.Subjects:
    """What a metric looks at: pixels of smooth 8 px reals, and of the generator's images; nothing is kept."""
    latents = torch.randn(reals, 8, generator=torch.Generator().manual_seed(0))
    network = open_network("pixels", judged_run().evaluation, "", "cpu")
    known: Any = SimpleNamespace(
        run=judged_run(), count=reals, network=lambda setting: network, floors=lambda *asked: {},
        remembered_of=lambda setting, *reals: lambda name, compute: compute(),
        real_outputs=lambda setting, which: network(smooth_images(8, reals)),
        untrained_fakes=Gathered(outputs={"pixels": [network(smooth_images(8, reals))]}),
        fakes=Gathered(outputs={"pixels": [network(batch) for batch in generate(generator, latents)]}))
    return known


def judged_run(half_life: int = 100) -> Run:
    """8 px holds from 720 images to 1,280."""
    run = small_run()
    return dataclasses.replace(run, training=dataclasses.replace(run.training, average_half_life=half_life))


class Returns(Generator):
    """A generator that returns k smooth images, none of them a real, whatever it is asked for."""

    def __init__(self, kept: int) -> None:
        super().__init__(small_run().network, 8, fades=False)
        self.images = smooth_images(8, REALS + 1024)[-kept:].float() / 127.5 - 1

    def forward(self, latents: Tensor, alpha: float = 1.0) -> Tensor:
        return self.images[(latents[:, 0].abs() * 1e6).long() % len(self.images)]


def measured(kept: int, images_seen: int, reals: int = REALS) -> list[Tick]:
    """The rows of an averaged generator that returns `kept` images."""
    it = looked_at(Returns(kept), reals)
    return [{"metric": f"{kind}_pixels16", "resolution": 8, "images_seen": images_seen, "count": reals, **row}
            for kind, row in {**evaluate.frechet(it, "pixels"), **evaluate.neighbors(it, "pixels")}.items()]


def value(rows: list[Tick], metric: str) -> float:
    return next(row["value"] for row in rows if row["metric"] == metric)


@pytest.mark.fault
@pytest.mark.parametrize(("kept", "figure"), [(1, "spread_pixels16"), (2, "coverage_pixels16"),
                                              (4, "coverage_pixels16"), (8, "coverage_pixels16"), (1024, None)])
def test_f27_a_generator_that_comes_to_return_few_images_raises_the_alarm(kept: int, figure: str | None) -> None:
    """An averaged generator that returned 1,024 images returns k: 1, 2, 4, 8, or (no fault) 1,024 still."""
    before, rows = measured(1024, 1120), measured(kept, 1280)
    found = evaluations.collapse(judged_run(), [NULL, *rows], [NULL, *before])
    covered = value(before, "coverage_pixels16")
    assert covered > 0.9
    assert (found and found["figure"]) == figure
    if found:
        bound = {"spread_pixels16": 0.25, "coverage_pixels16": pytest.approx(0.3 * covered)}
        assert (found["alarm"], found["bound"]) == ("collapsing diversity", bound[found["figure"]])
        assert found["value"] == value(rows, found["figure"]) < found["bound"]
        assert set(found) == {"alarm", "figure", "value", "bound", "rule", "images_seen", "resolution", "message"}
        assert "8px after 1,280 images" in found["message"]
        assert json.loads(json.dumps(found)) == found


@pytest.mark.fault
def test_f27_a_generator_that_returned_one_image_from_the_start_raises_the_alarm() -> None:
    """An averaged generator that returns one image, in the first checkpoint measured."""
    found = evaluations.collapse(judged_run(), measured(1, 1280), [])
    assert found
    assert (found["figure"], found["value"]) == ("spread_pixels16", pytest.approx(0, abs=1e-12))


@pytest.mark.fault
def test_f27_a_collapse_is_told_beside_what_an_earlier_session_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """An averaged generator that returns 2 images, measured by a session that resumed one whose rows are on disk."""
    lines, recorded, said = measured(1024, 1120), [], []
    folder = SimpleNamespace(lines=lambda file: list(lines), append=lambda file, *rows: lines.extend(rows),
                             record=lambda event, **facts: recorded.append((event, facts)),
                             keep_pictures=lambda pictures: None)
    shown = SimpleNamespace(say=lambda text, style="": said.append(text))
    told = evaluations.Evaluations(judged_run(), folder, shown, SimpleNamespace(metric=lambda row: None))  # type: ignore[arg-type]
    of = SimpleNamespace(name="r0008-hold-000001280", resolution=8, images_seen=1280)
    told.running["task"] = evaluations.Measuring(of, None, None, 0.0)  # type: ignore[arg-type]
    monkeypatch.setattr("ray.wait", lambda refs, **options: (refs, []))
    monkeypatch.setattr("ray.get", lambda ref: evaluate.Evaluated(measured(2, 1280), {}))
    monkeypatch.setattr("ray.kill", lambda actor: None)
    told.collect()
    assert {row["images_seen"] for row in lines} == {1120, 1280}
    assert [event for event, _ in recorded] == ["alarm", "evaluation"]
    assert recorded[0][1]["figure"] == "coverage_pixels16"
    assert any("alarm, collapsing diversity: 8px after 1,280 images" in text for text in said)


@pytest.mark.parametrize(("modes", "told"), [(1, True), (5, True), (6, False), (8, False)])
def test_points_at_fewer_modes_than_there_are_raise_the_alarm(modes: int, told: bool) -> None:
    """A generator of points that found few of 8 modes; and one whose average is too young to be judged."""
    row = {"metric": "modes", "resolution": 8, "images_seen": 1280, "count": 10_000, "value": float(modes),
           "parts": {"of": 8}}
    found = evaluations.collapse(judged_run(), [row], [])
    assert bool(found) == told
    if found:
        assert (found["alarm"], found["figure"], found["bound"]) == ("collapsing diversity", "modes", 6)
        assert f"the generated points lie at {modes} of 8 modes" in found["message"]
    assert evaluations.collapse(judged_run(), [{**row, "images_seen": 1_100}], []) is None


NULL: Tick = {"metric": "swd", "resolution": 8, "images_seen": 1280, "value": None, "count": 24}


def judged(images_seen: int = 1280, half_life: int = 100, before: list[Tick] | None = None, spread: float | None = 0.8,
           coverage: float | None = 0.9, count: int = 200) -> bool:
    """Whether the alarm is raised for rows of 8 px, with earlier rows."""
    rows = [{**NULL, "metric": "spread_pixels16", "images_seen": images_seen, "value": spread},
            covering(coverage, images_seen=images_seen, count=count)]
    return evaluations.collapse(judged_run(half_life), rows, before or []) is not None


def covering(coverage: float | None, **facts: Any) -> Tick:
    return {"metric": "coverage_pixels16", "resolution": 8, "images_seen": 1120, "value": coverage, "count": 200,
            **facts}


def test_diversity_is_judged_once_the_average_had_four_half_lives_of_the_new_layers_alone() -> None:
    """8 px fades from 320 images to 720; four half-lives of 100 later it is 1,120."""
    assert [judged(seen, spread=0.1) for seen in (400, 720, 1119, 1120)] == [False, False, False, True]
    best = [covering(0.9, images_seen=1000)]
    assert [judged(seen, coverage=0.1, before=best) for seen in (1119, 1120)] == [False, True]
    assert not judged(spread=0.1, coverage=0.1, before=best, half_life=141)
    assert [judged(spread=spread) for spread in (None, 0.0, 0.249, 0.25)] == [False, True, True, False]
    assert evaluations.collapse(judged_run(), [], []) is None
    first, second = judged_run().stages
    run = dataclasses.replace(judged_run(), stages=[first, dataclasses.replace(second, hold_images=0)])
    low = {**NULL, "metric": "spread_pixels16", "images_seen": 720, "value": 0.1}
    assert evaluations.collapse(run, [low], []) is None  # all of it is a fade


def test_coverage_is_held_against_the_best_checkpoint_before_that_had_covered_half() -> None:
    known = [covering(0.6), covering(0.8), covering(0.7), covering(None), NULL,
             covering(1.0, metric="coverage_lite0_224")]
    assert [judged(coverage=value, before=known) for value in (0.0, 0.239, 0.241, 1.0)] == [True, True, False, False]
    assert not judged(coverage=0.0)
    assert not judged(coverage=0.0, before=[covering(0.49)])
    assert judged(coverage=0.0, before=[covering(0.5)])
    assert not judged(coverage=0.0, before=[covering(0.9, images_seen=1280)])  # itself, measured before
    assert not judged(coverage=None, before=known)


def test_without_pixels_among_the_features_diversity_is_judged_by_the_coverage_of_others() -> None:
    before = [covering(0.8, metric="coverage_lite0_224")]
    low = covering(0.1, metric="coverage_lite0_224", images_seen=1280)
    assert evaluations.collapse(judged_run(), [low], before)
    assert not evaluations.collapse(judged_run(), [low, covering(0.7, images_seen=1280)], [*before, covering(0.8)])


def test_another_resolution_s_coverage_counts_when_the_stage_ends_and_only_of_as_many_images() -> None:
    smaller = [covering(0.9, resolution=4, images_seen=320)]
    assert judged(1280, coverage=0.1, before=smaller)
    assert not judged(1272, coverage=0.1, before=smaller)
    assert judged(1272, coverage=0.1, before=[covering(0.9)])
    assert [judged(coverage=0.1, before=[covering(0.9, count=count)]) for count in (199, 200, 300)] == [
        False, True, True]


def copying(share: float | None, count: int = 100, searched: int = 50, held_out: int = 0, **facts: Any) -> Tick:
    return {**NULL, "metric": "copy_rate_pixels16", "value": share, "count": count,
            "parts": {"searched": searched, "training": 1000, "held_out": held_out}, **facts}


def test_fakes_that_are_training_images_by_any_features_raise_an_alarm() -> None:
    """One in a hundred is expected; one in four is the bound."""
    told = [len(evaluations.alarms(judged_run(), [copying(share)], [])) for share in (None, 0.01, 0.25, 0.26, 1.0)]
    assert told == [0, 0, 0, 1, 1]
    (found,) = evaluations.alarms(judged_run(), [copying(0.5), copying(0.9, metric="copy_rate_lite0_224")], [])
    assert (found["alarm"], found["figure"], found["value"], found["bound"]) == (
        "memorised training images", "copy_rate_lite0_224", 0.9, 0.25)
    assert "90.0% of the generated images" in found["message"]


@pytest.mark.parametrize("too_little", [{"count": 99}, {"searched": 49}, {"searched": 500, "held_out": 49},
                                        {"images_seen": 720}])
def test_copies_are_not_judged_of_few_images_or_of_an_average_that_is_young(too_little: dict[str, int]) -> None:
    assert not evaluations.alarms(judged_run(), [copying(1.0, **too_little)], [])


# Best checkpoints --------------------------------------------------------------------------------------------------


def test_the_best_checkpoint_of_a_resolution_has_the_lowest_value_and_of_equal_ones_is_the_earlier() -> None:
    rows = [{"metric": metric, "resolution": resolution, "images_seen": seen, "value": value,
             "checkpoint": f"r{resolution}-{seen}"}
            for metric, resolution, seen, value in (
                ("swd", 4, 100, None), ("swd", 8, 300, 5.0), ("swd", 8, 200, 5.0), ("swd", 8, 400, 9.0),
                ("swd", 16, 500, math.nan), ("swd", 16, 600, 7.0), ("ms_ssim", 8, 400, 0.1))]
    assert evaluations.best_checkpoints(rows, "swd") == {"r8-200", "r16-600"}
    assert evaluations.best_checkpoints(rows, "ms_ssim") == {"r8-400"}
    assert evaluations.best_checkpoints([], "swd") == set()
