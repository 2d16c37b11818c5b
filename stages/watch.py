"""What is looked at on every tick: has the state lost its numbers (`Watch`), and do the figures leave their bands?
(`Alarms`). The first stops a stage, and the driver rolls back; the second tells a person, and training goes on.

Pure Python on plain numbers. The clock is images seen.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, median, quantiles
from typing import Any, TypeVar

from gradine.configs.schema import Run, Training
from gradine.stages.losses import penalty_divisor

T = TypeVar("T")

Alarm = dict[str, Any]
MASKED_IN_A_ROW = 20


class NonFinite(RuntimeError):
    """Training cannot go on from this state: it holds a NaN or infinity, or learns nothing any more."""

    def __init__(self, message: str, images_seen: int) -> None:
        super().__init__(message, images_seen)  # both in `args`: what pickle hands to the other side
        self.images_seen = images_seen

    def __str__(self) -> str:
        return str(self.args[0])


class Watch:
    """Ends a stage that cannot learn: 20 updates in a row of D, or of G, all masked, or a state that is not finite."""

    def __init__(self, batch_size: int, images_seen: int, masked: list[float]) -> None:
        self.batch_size = batch_size
        self.since = [(images_seen, count) for count in masked]  # of D, of G: where the row of masked ones began

    def look(self, images_seen: int, masked: list[float], non_finite: float) -> None:
        """Raises NonFinite. For ticks, on every worker, with the same numbers.

        masked: updates masked so far, of D and of G. non_finite: weights, moments and averages with a NaN or infinity.
        """
        if non_finite > 0:
            raise NonFinite(f"{non_finite:.0f} tensors of the weights, Adam's moments or the average hold a NaN or "
                            f"infinity at images_seen={images_seen:,}", images_seen)
        for index, (name, count) in enumerate(zip(("discriminator", "generator"), masked, strict=True)):
            start, before = self.since[index]
            updates = (images_seen - start) // self.batch_size
            if count - before < updates:
                self.since[index] = images_seen, count
            elif updates >= MASKED_IN_A_ROW:
                raise NonFinite(f"the last {updates} updates of the {name} were all masked, their gradients are not "
                                f"finite: nothing is learned since images_seen={start:,}", images_seen)


# Alarms ------------------------------------------------------------------------------------------------------------

HISTORY, WARM_UP, RECENT = 200, 16, 8  # ticks
YOUNG_SIGMAS, SIGMAS, STRAY_SIGMAS, MATURE = 8.0, 6.0, 4.0, 100
PASSED = 16  # ticks inside its band after which a figure that leaves it again is a new alarm
OFTEN = 3  # spikes within RECENT ticks: it diverges
PENALTY, LEVEL, GAP = "penalty / weight", "loss_g / reach", "(score_real - score_fake) / reach"


class Band:
    """Where a figure is expected: the median of late +- some sigmas (1.4826 x MAD) of it.

    Young, up to 100 known values, 8 sigmas, at least young_room; mature 6 sigmas, at least room; never more than limit,
    and 0 +- limit at the beginning. The last 8 values are not known yet, so that what begins now is held against what
    was before; one farther from the median than 4 sigmas and room never is, or a ramp would take the band along.
    """

    def __init__(self, room: float, young_room: float, limit: float) -> None:
        self.room, self.young_room, self.limit = room, young_room, limit
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.known: deque[float] = deque(maxlen=HISTORY)

    def spread(self) -> tuple[float, float]:
        """Median, and the standard deviation of a normal distribution of this MAD."""
        middle = median(self.known)
        return middle, 1.4826 * median(abs(value - middle) for value in self.known)

    def edges(self, fading: bool = False) -> tuple[float, float]:
        if len(self.known) < WARM_UP:
            return -self.limit, self.limit
        middle, sigma = self.spread()
        young = len(self.known) < MATURE
        width = max(YOUNG_SIGMAS * sigma, self.young_room) if young else max(SIGMAS * sigma, self.room)
        width = self.limit if fading else min(width, self.limit)
        return middle - width, middle + width

    def add(self, value: float) -> None:
        if len(self.recent) == RECENT:
            if len(self.known) >= WARM_UP:
                middle, sigma = self.spread()
            if len(self.known) < WARM_UP or abs(self.recent[0] - middle) <= max(STRAY_SIGMAS * sigma, self.room):
                self.known.append(self.recent[0])
        self.recent.append(value)


class Told:
    """What begins now: alarms that are true and were not told before, or had passed since."""

    def __init__(self) -> None:
        self.lasting: dict[str, int] = {}  # alarms that were told -> ticks since they were last true

    def begun(self, found: Mapping[str, T]) -> list[tuple[str, T]]:
        begun = [(kind, seen) for kind, seen in found.items() if kind not in self.lasting]
        self.lasting = {kind: ticks + 1 for kind, ticks in self.lasting.items() if ticks < PASSED}
        self.lasting.update(dict.fromkeys(found, 0))
        return begun


class Alarms:
    """Watches the ticks of one stage of a Wasserstein game with gradient penalty for figures that leave their bands.

    Three figures without a unit, so that one rule holds at every resolution and penalty target. `reach` is how far
    D's scores of two images lie apart that differ by 1 in every value, by its gradient: norm x sqrt(values per image).

        penalty / weight                    above 1: gradients beyond twice their target
        loss_g / reach                      the level of the fakes' scores
        (score_real - score_fake) / reach   the gap: how far apart D sees reals and fakes

    One tick of the first two outside is a `spike`, 3 of 8 ticks are `divergence`. When the median of 8 ticks of the
    gap lies above its band `discriminator wins`, below it `generator wins`: D does not follow. Each is told once, until
    the figures were back for 16 ticks. Fades move the gap lawfully: there its band has the width of its limit.

    Seen on 4 to 32 px: no alarm in healthy trainings, of which the worst used 94% of the gap's band; a learning rate
    x100 at once, D standing still within some hundred steps. It cannot see what is there from a stage's first ticks
    and stays below the limits, nor what is small: a rate x10 that merely oscillates, a G that stands still while D,
    narrow or far from done itself, gains little from it.
    """

    def __init__(self, penalty_weight: float = 10.0, penalty_divisor: int = 1, channels: int = 3) -> None:
        self.penalty_weight, self.penalty_divisor, self.channels = penalty_weight, penalty_divisor, channels
        self.bands = {PENALTY: Band(room=1.0, young_room=1.0, limit=3.0),
                      LEVEL: Band(room=1.0, young_room=1.0, limit=1.5),
                      GAP: Band(room=0.1, young_room=0.25, limit=0.75)}
        self.spikes: deque[bool] = deque(maxlen=RECENT)
        self.told = Told()

    @staticmethod
    def of(run: Run, stage: int) -> Alarms | Balance:
        """What fits the game of run.stages[stage]: these, by its penalty and channels, or the balance of its losses."""
        training = run.training
        if run.network.autoencodes or training.feature_matching or (
                (training.loss, training.penalty) != ("wasserstein", "gradient")):
            return Balance.of(run)
        divisor = penalty_divisor(run, run.stages[stage].resolution)
        return Alarms(run.training.penalty_weight, divisor, run.data.channels)

    def look(self, tick: dict[str, Any]) -> list[Alarm]:
        """`tick` event -> the alarms that begin with it, JSON-ready.

        A tick with a figure that is not finite says nothing here: its update was masked, and `Watch` counts these. Nor
        does one before the first penalty or the first step of G since the start, where training.penalty_every or
        training.d_steps is above 1.
        """
        if not {"gradient_norm", "penalty", "loss_g"} <= tick.keys():
            return []
        figures = self.figures(tick)
        if not all(map(math.isfinite, figures.values())):
            return []
        fading = tick["phase"] == "fade"
        edges = {name: band.edges(fading and name == GAP) for name, band in self.bands.items()}
        edges[PENALTY] = 0.0, edges[PENALTY][1]
        for name, value in figures.items():
            self.bands[name].add(value)
        recent = self.bands[GAP].recent
        figures[GAP] = median(recent) if len(recent) == RECENT else 0.0
        above = {name: value > edges[name][1] for name, value in figures.items()}
        outside = [name for name, value in figures.items() if above[name] or value < edges[name][0]]
        return [alarm(tick, kind, name, figures[name], edges[name], self.bands[name])
                for kind, name in self._begun(outside, above[GAP])]

    def figures(self, tick: dict[str, Any]) -> dict[str, float]:
        norm = tick["gradient_norm"] * self.penalty_divisor
        reach = max(norm * math.sqrt(self.channels) * tick["resolution"], 1e-30)
        return {PENALTY: tick["penalty"] / self.penalty_weight if self.penalty_weight else 0.0,
                LEVEL: tick["loss_g"] / reach, GAP: (tick["score_real"] - tick["score_fake"]) / reach}

    def _begun(self, outside: list[str], gap_above: bool) -> list[tuple[str, str]]:
        """(alarm, figure)."""
        found = {}
        if GAP in outside:
            found["discriminator wins" if gap_above else "generator wins"] = GAP
        spiking = next((name for name in outside if name != GAP), None)
        self.spikes.append(spiking is not None)
        if spiking:
            found["spike"] = spiking
            if sum(self.spikes) >= OFTEN:
                found["divergence"] = spiking
        return self.told.begun(found)


BRANCH = "resume=RESOLUTION branch=new stages.<n>.learning_rate=... (now {rate:g})"
MEANINGS = {
    "spike": "a spike; if no divergence is told after it, it has passed",
    "divergence": f"training diverges. Stop it, and go on from before with a lower learning rate: {BRANCH}",
    "discriminator wins": "the discriminator wins, and the generator learns little from it. If the samples no longer "
                          f"get better, go on from before with a lower learning rate: {BRANCH}",
    "generator wins": "the discriminator takes fakes for reals and does not follow the generator. If it stays so, go "
                      f"on from before with another learning rate: {BRANCH}",
}
RULE = (f"median of the stage's last {HISTORY} ticks +- {YOUNG_SIGMAS:g} x 1.4826 x MAD, at least {{0.young_room:g}}; "
        f"from {MATURE} ticks on {SIGMAS:g} x, at least {{0.room:g}}; never more than {{0.limit:g}}; that much for the "
        f"gap in fades, and for all around 0 in the first {WARM_UP + RECENT} ticks")


def alarm(tick: dict[str, Any], kind: str, figure: str, value: float, edges: tuple[float, float], band: Band) -> Alarm:
    """As the ledger has it: what was seen, what was expected and by which rule, and a line for a person."""
    low, high = edges
    what = f"the median of {RECENT} ticks of {figure}" if figure == GAP else figure
    return told(tick, kind, Finding(figure, value, high if value > high else low, RULE.format(band),
                                    f"{what} is {value:.3g}, expected {low:.3g} to {high:.3g}", MEANINGS[kind]))


@dataclass(frozen=True)
class Finding:
    figure: str
    value: float
    bound: float
    rule: str
    what: str  # was seen, for a person
    meaning: str  # and the way out


def told(tick: dict[str, Any], kind: str, found: Finding) -> Alarm:
    size, seen = tick["resolution"], tick["images_seen"]
    return {"alarm": kind, "figure": found.figure, "value": found.value, "bound": found.bound, "rule": found.rule,
            "images_seen": seen, "resolution": size,
            "message": f"{size}px after {seen:,} images: {found.what}: "
                       f"{found.meaning.format(rate=tick['learning_rate'])}."}


# Balance -----------------------------------------------------------------------------------------------------------

FOR_GOOD = 16  # ticks in a row
WON, LOST = 0.03, 1.25  # D's share: 0 at the bound of its loss, 1 where it is blind
BLIND = 0.9  # D's share from which on it cannot tell, and nothing pulls at G any more: at 1, the equilibrium
EARLY, VANISHED = 8, 1e-3  # ticks at the start; G's gradient as a share of what it was in them
WINDOW, WINDOWS, GROWTH, CROSSINGS, LEAST_SWING = 16, 4, 1.5, 3, 0.25
SETTLING = 2  # windows at the start, in which losses find their range
WORSE = 3.0  # times the reconstruction at its best
FIGURES = ("loss_d", "loss_g", "penalty", "classification", "information", "gradient_g", "reconstruction")
SHARE = "loss_d, 0 at its bound and 1 for a blind D"


@dataclass(frozen=True)
class Bounds:
    """What D's own loss is when it tells all reals from all fakes, and when it can tell none: 0 and 2 log 2, say."""

    sure: float
    blind: float

    @staticmethod
    def of(training: Training) -> Bounds | None:
        """By the targets' means and variances, flips included; None for a Wasserstein loss, which has no bound."""
        (real, real_variance), (fake, fake_variance) = target_moments(training)
        if real <= fake:
            return None  # there is nothing to tell
        match training.loss:
            case "minimax" | "non_saturating":  # cross-entropy is linear in the target
                return Bounds(entropy(real) + entropy(fake), 2 * entropy((real + fake) / 2))
            case "least_squares":
                sure = (real_variance + fake_variance) / 2
                return Bounds(sure, sure + (real - fake) ** 2 / 4)
            case "hinge":
                return Bounds(0.0, 2.0)
            case "relativistic":
                return Bounds(0.0, math.log(2))
        return None

    def share(self, loss: float) -> float:
        return (loss - self.sure) / (self.blind - self.sure)


def target_moments(training: Training) -> tuple[tuple[float, float], tuple[float, float]]:
    """(mean, variance) of D's target for a real, and for a fake."""
    own = [(mean(ends), mean(ends) ** 2 + (ends[-1] - ends[0]) ** 2 / 12)  # the second moment of a uniform draw
           for ends in (training.real_labels, training.fake_labels)]
    flip = training.flip_labels
    mixed = [[(1 - flip) * kept + flip * taken for kept, taken in zip(own[index], own[1 - index], strict=True)]
             for index in (0, 1)]
    (real, real_square), (fake, fake_square) = mixed
    return (real, real_square - real**2), (fake, fake_square - fake**2)


def entropy(share: float) -> float:
    """Of a coin, in nats; a target beyond 0 or 1 counts as these."""
    return -sum(p * math.log(p) for p in (share, 1 - share) if 0 < p < 1) if 0 < share < 1 else 0.0


class Balance:
    """Watches the ticks of any other game for a player that wins for good, and of an autoencoder for getting worse.

        discriminator wins   D's loss within 3% of its bound, or `generator wins`: 25% above that of a D which guesses,
                             in 16 ticks in a row. At the value for a D which guesses is the equilibrium: no alarm.
        vanishing gradient   the median of 16 ticks of G's largest gradient entry below 1/1000 of that of its first 8
                             ticks, while D does more than guess; else nothing is left to learn
        oscillation          in 4 windows of 16 ticks one after the other, loss_g crosses its median 3 times or more,
                             and the range of its middle half grows by half from each window to the next, to a quarter
                             of what lies between a sure and a blind D, and twice what it ever was before
        divergence           of autoencoders: the median of 8 ticks of the reconstruction error above 3 times its best

    With penalty_every above 1 some ticks' loss_d holds a penalty, which may hide that D wins. What has no bound
    (Wasserstein with clipped weights, a diversity term) is watched for G's gradient and for oscillation alone.
    """

    def __init__(self, bounds: Bounds | None, beside: Mapping[str, float] | None = None,
                 autoencoder: bool = False) -> None:
        """beside: what loss_d holds beside the game's own loss, and how many times."""
        self.bounds, self.beside, self.autoencoder = bounds, beside or {}, autoencoder
        self.told = Told()
        self.shares: deque[float] = deque(maxlen=FOR_GOOD)
        self.early: list[float] = []
        self.gradients: deque[float] = deque(maxlen=FOR_GOOD)
        self.window: list[float] = []
        self.swings: list[float] = []  # of each window; 0 for one that does not swing
        self.errors: deque[float] = deque(maxlen=RECENT)
        self.best = math.inf

    @staticmethod
    def of(run: Run) -> Balance:
        training, autoencoder = run.training, run.network.autoencodes
        beside = {"classification": training.classification, "information": training.information}
        if training.penalty_every == 1:  # else some ticks' loss_d has none, and one cannot tell which
            beside["penalty"] = 1.0
        bounded = not autoencoder and not training.diversity  # which D raises on and on
        return Balance(Bounds.of(training) if bounded else None, beside, autoencoder)

    def look(self, tick: dict[str, Any]) -> list[Alarm]:
        """As Alarms.look: a tick may lack any figure, and one that is not finite says nothing."""
        figures: dict[str, float] = {
            name: tick[name] for name in FIGURES if name in tick}
        if not all(map(math.isfinite, figures.values())):
            return []
        found: dict[str, Finding] = {}
        if self.autoencoder:
            found |= self._reconstruction(figures)
        else:
            found |= self._winner(figures) | self._gradient(figures)
        found |= self._oscillation(figures)
        return [told(tick, kind, finding) for kind, finding in self.told.begun(found)]

    def _winner(self, figures: dict[str, float]) -> dict[str, Finding]:
        if self.bounds is None or "loss_d" not in figures:
            return {}
        own = figures["loss_d"] - sum(times * figures.get(name, 0.0) for name, times in self.beside.items())
        self.shares.append(self.bounds.share(own))
        if len(self.shares) < FOR_GOOD:
            return {}
        low, high = min(self.shares), max(self.shares)
        bounds = f"its bound is {self.bounds.sure:.3g}, that of a D that guesses {self.bounds.blind:.3g}"
        if high < WON:
            return {"discriminator wins": Finding(
                SHARE, high, WON, f"below {WON:g} in {FOR_GOOD} ticks in a row",
                f"the discriminator's loss is {own:.3g}, and {bounds}", WINS["discriminator"])}
        if low > LOST:
            return {"generator wins": Finding(
                SHARE, low, LOST, f"above {LOST:g} in {FOR_GOOD} ticks in a row",
                f"the discriminator's loss is {own:.3g}, and {bounds}", WINS["generator"])}
        return {}

    def _gradient(self, figures: dict[str, float]) -> dict[str, Finding]:
        if "gradient_g" not in figures:
            return {}
        if len(self.early) < EARLY:
            self.early.append(figures["gradient_g"])
            return {}
        self.gradients.append(figures["gradient_g"])
        if len(self.gradients) < FOR_GOOD:
            return {}
        now, bound = median(self.gradients), VANISHED * median(self.early)
        nothing_to_learn = bool(self.shares) and median(self.shares) >= BLIND
        if now > bound or nothing_to_learn:
            return {}
        return {"vanishing gradient": Finding(
            "gradient_g", now, bound, f"the median of {FOR_GOOD} ticks at least {VANISHED:g} of that of the stage's "
            f"first {EARLY} since it was started, unless the discriminator just guesses, or worse",
            f"the largest entry of the generator's gradient is {now:.3g}, at first it was {median(self.early):.3g}",
            VANISHING)}

    def _oscillation(self, figures: dict[str, float]) -> dict[str, Finding]:
        """Looked at when a window is full; what was seen there holds until the next one is."""
        if "loss_g" in figures:
            self.window.append(figures["loss_g"])
            if len(self.window) == WINDOW:
                self.swings.append(swing(self.window))
                self.window.clear()
        if len(self.swings) < SETTLING + WINDOWS:
            return {}
        last, before = self.swings[-WINDOWS:], self.swings[:-WINDOWS]
        grows = min(last) > 0 and all(later >= GROWTH * one for one, later in pairwise(last))
        bound = max([GROWTH * last[-2], *(2 * each for each in before),
                     LEAST_SWING * (self.bounds.blind - self.bounds.sure) if self.bounds else 0.0])
        if not grows or last[-1] < bound:
            return {}
        return {"oscillation": Finding(
            "loss_g", last[-1], bound, f"the range of the middle half of {WINDOW} ticks must not grow {WINDOWS - 1} "
            f"times in a row by {GROWTH:g}, while loss_g crosses its median",
            f"the generator's loss swings ever wider: by {', '.join(f'{each:.3g}' for each in last)} in turn",
            CHASING)}

    def _reconstruction(self, figures: dict[str, float]) -> dict[str, Finding]:
        if "reconstruction" not in figures:
            return {}
        self.errors.append(figures["reconstruction"])
        if len(self.errors) < RECENT:
            return {}
        now = median(self.errors)
        self.best = min(self.best, now)
        if now <= WORSE * self.best:
            return {}
        return {"divergence": Finding(
            "reconstruction", now, WORSE * self.best, f"the median of {RECENT} ticks at most {WORSE:g} times its best",
            f"the reconstruction error is {now:.3g} after {self.best:.3g} at best", MEANINGS["divergence"])}


def swing(values: Sequence[float]) -> float:
    """The range of the middle half of what goes up and down; 0 for what hardly crosses its median: a trend."""
    middle = median(values)
    above = [value > middle for value in values]
    crossings = sum(one != other for one, other in pairwise(above))
    low, _, high = quantiles(values, n=4)
    return high - low if crossings >= CROSSINGS else 0.0


WINS = {
    "discriminator": "the discriminator wins: it tells all images apart, and the generator learns little from it. If "
                     "it stays so, hold it back: training.penalty=r1, training.real_labels=[0.9], "
                     "training.augment=adaptive or a lower training.discriminator_rate, in a new run, or "
                     f"{BRANCH}",
    "generator": "the discriminator is worse than one that guesses and does not follow the generator. If it stays so, "
                 f"strengthen it: a higher training.d_steps or training.discriminator_rate in a new run, or {BRANCH}",
}
VANISHING = ("the generator no longer learns. If it stays so, use a loss that pulls where the discriminator is sure, "
             "such as training.loss=non_saturating, or hold the discriminator back with training.penalty=r1, in a new "
             "run")
CHASING = ("the players chase each other in ever wider circles. Go on from before with a lower learning rate: "
           f"{BRANCH}; or damp them in a new run: training.penalty=r1, a lower training.beta1")
