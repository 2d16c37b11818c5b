"""What is looked at on every tick: has the state lost its numbers (`Watch`), and do the figures leave their bands?
(`Alarms`). The first stops a stage, and the driver rolls back; the second tells a person, and training goes on.

Pure Python on plain numbers. The clock is images seen.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any

from gradine.configs.schema import Run
from gradine.stages.losses import penalty_divisor

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


class Alarms:
    """Watches the ticks of one stage for figures that leave their bands.

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
        self.lasting: dict[str, int] = {}  # alarms that were told -> ticks since they were last true

    @staticmethod
    def of(run: Run, stage: int) -> Alarms:
        """Those of run.stages[stage], by its penalty and channels."""
        divisor = penalty_divisor(run, run.stages[stage].resolution)
        return Alarms(run.training.penalty_weight, divisor, run.data.channels)

    def look(self, tick: dict[str, Any]) -> list[Alarm]:
        """`tick` event -> the alarms that begin with it, JSON-ready.

        A tick with a figure that is not finite says nothing here: its update was masked, and `Watch` counts these. Nor
        does one before the first penalty since the start, where training.penalty_every is above 1.
        """
        if "gradient_norm" not in tick:
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
        """(alarm, figure) of what is true now and was not told before, or had passed since."""
        found = {}
        if GAP in outside:
            found["discriminator wins" if gap_above else "generator wins"] = GAP
        spiking = next((name for name in outside if name != GAP), None)
        self.spikes.append(spiking is not None)
        if spiking:
            found["spike"] = spiking
            if sum(self.spikes) >= OFTEN:
                found["divergence"] = spiking
        begun = [(kind, name) for kind, name in found.items() if kind not in self.lasting]
        self.lasting = {kind: ticks + 1 for kind, ticks in self.lasting.items() if ticks < PASSED}
        self.lasting.update(dict.fromkeys(found, 0))
        return begun


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
    return {"alarm": kind, "figure": figure, "value": value, "bound": high if value > high else low,
            "rule": RULE.format(band), "images_seen": tick["images_seen"], "resolution": tick["resolution"],
            "message": f"{tick['resolution']}px after {tick['images_seen']:,} images: {what} is {value:.3g}, expected "
                       f"{low:.3g} to {high:.3g}: {MEANINGS[kind].format(rate=tick['learning_rate'])}."}
