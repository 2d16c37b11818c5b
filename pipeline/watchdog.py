"""Who holds up a group of workers: hangs and stragglers, from the pulses of its ranks (stages/pulse.py).

Pure: whoever feeds it says what time it is, and what was seen on the nodes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from gradine.configs.schema import Cluster
from gradine.stages.pulse import TRAINING, WAITS_FOR_OTHERS, WINDOW_STEPS, Sight

Event = dict[str, Any]
LOOK_S = 2.0  # no more is counted between two looks: a driver that itself slept, or was busy, blames nobody


class Hang(RuntimeError):
    """A group of workers gets no further. Going on from a checkpoint with a new group may mend it."""


class Lost(RuntimeError):
    """A worker's process ended, whatever ended it."""


# Hangs ---------------------------------------------------------------------------------------------------------------


class Watchdog:
    """Hears what the ranks of one stage say, and says when nothing new has come for too long.

    A step ends in sums over all ranks, so one that stands still soon stops them all. From the first step on the limit
    is ray.step_timeout_s; before it, and while a checkpoint is waited for, ray.setup_timeout_s.
    """

    def __init__(self, limits: Cluster, workers: int, now: float) -> None:
        self.limits, self.looked = limits, now
        self.told: dict[int, tuple[int, str]] = dict.fromkeys(range(workers), (-1, ""))  # images seen, doing
        self.records = [""] * workers
        self.still = 0.0  # seconds in which no rank said anything new
        self.news = True
        self.looks = 0
        self.stepping = False

    def heard(self, rank: int, event: Event) -> None:
        told = (event["images_seen"], event["doing"]) if event["event"] == "pulse" else None
        self.news |= told != self.told[rank]
        if told:
            self.told[rank] = told
            self.stepping |= event["doing"] == "step"
            self.records[rank] = event.get("record", self.records[rank])

    def ended(self, rank: int) -> None:
        del self.told[rank]
        self.news = True

    def doubt(self, now: float) -> str:
        """`hang` when the limit has passed; `look`, now and then before, when a stopped process would explain it."""
        self.still += min(now - self.looked, LOOK_S)
        self.looked = now
        if self.news:
            self.still, self.looks, self.news = 0.0, 0, False
        long = not self.stepping or any(doing in ("write", "save") for _, doing in self.told.values())
        if self.still > (self.limits.setup_timeout_s if long else self.limits.step_timeout_s):
            return "hang"
        if self.still > self.limits.step_timeout_s * (self.looks + 1):
            self.looks += 1
            return "look"
        return ""


@dataclass(frozen=True)
class Witness:
    """What is known of one rank of a group that hangs."""

    rank: int
    node: str
    pid: int
    sight: Sight | None  # None: its node gave no answer
    stacks: str = ""

    @property
    def name(self) -> str:
        return f"rank {self.rank} (node {self.node}, pid {self.pid})"

    @property
    def stopped(self) -> bool:
        return self.sight is not None and self.sight.state in ("T", "t")

    def trouble(self, waited_s: float) -> tuple[int, str]:
        """What it is at, and how likely that is what the others wait for: 0 most, 4 not at all."""
        if self.sight is None:  # cut off, or only slow to answer: a thread seen to be stuck is better known
            return 2, "gives no answer, nor does its node"
        if self.stopped:
            return 0, "is stopped (SIGSTOP, or a debugger)"
        if not self.sight.state:
            return 0, "is gone"
        # A thread that hangs in a read, or holds the interpreter's lock: the steps wait for it wherever they are.
        if stuck := [line for line in self.sight.lines if line.thread != TRAINING and line.seconds > waited_s / 2]:
            return 1, f"is stuck: {stuck[0]}"
        own = next((line for line in self.sight.lines if line.thread == TRAINING), None)
        if own and own.doing in WAITS_FOR_OTHERS:
            return 4, "waits for the others"
        asleep = f", asleep in the kernel ({self.sight.kernel})" if self.sight.state == "D" else ""
        return 3, f"is at {own.doing} {own.detail} for {own.seconds:.0f} s{asleep}" if own else f"says nothing{asleep}"

    def testimony(self, waited_s: float) -> str:
        sight = self.sight or Sight("unknown", "", [])
        lines = "".join(f"  {line}\n" for line in sight.lines) or "  unknown\n"
        return (f"{self.name} {self.trouble(waited_s)[1]}\nprocess: state {sight.state or 'gone'}, in the kernel at "
                f"{sight.kernel or 'a place unknown'}\nthreads, by its record:\n{lines}"
                f"stacks:\n{self.stacks or 'none'}\n")


def verdict(waited_s: float, witnesses: list[Witness]) -> str:
    """Who is to blame, in one line."""
    found = [(*one.trouble(waited_s), one) for one in witnesses]
    worst = min(grade for grade, _, _ in found)
    if worst == 4 and len(found) > 1:
        nodes = ", ".join(sorted({one.node for one in witnesses}))
        return f"every rank waits for the others: is the network between {nodes} cut?"
    blamed = [f"{one.name} {what}" for grade, what, one in found if grade == worst]
    more = f" and {len(blamed) - 2} more" * (len(blamed) > 2)
    return "; ".join(blamed[:2]) + more


# Stragglers ----------------------------------------------------------------------------------------------------------

TIMES = 3.0  # as slow as the median of the others
IN_A_ROW, LASTING_S = 2, 2.0  # windows, and seconds: what passes by itself is no straggler
RULE = (f"more than {TIMES:g} x the median of the other ranks, in {IN_A_ROW} windows of {WINDOW_STEPS} steps in a row "
        f"that took {LASTING_S:g} s or longer")
ADVICE = {"compute": "its CPUs or GPU are shared with others, throttled or slower than theirs",
          "data": "its disk or network is slow, or shared with others"}


@dataclass(frozen=True)
class Times:
    """Of one rank in one window of steps, in seconds a step."""

    compute_s: float  # median; without waiting for other ranks
    data_s: float  # mean wait for a batch
    made_s: float  # work on a batch, by threads beside the training

    def slow(self, others: list[Times]) -> Iterator[tuple[str, float, float]]:
        """(phase, seconds, bound) where this rank holds up the others."""
        bound = {name: TIMES * median(getattr(one, name) for one in others) for name in vars(self)}
        if self.compute_s > bound["compute_s"]:
            yield "compute", self.compute_s, bound["compute_s"]
        # Whoever reads a little slower does all the waiting for data, so the work itself is compared too.
        if self.data_s > max(bound["data_s"], self.compute_s) and self.made_s > bound["made_s"]:
            yield "data", self.data_s, bound["data_s"]


class Stragglers:
    """Compares the ranks' times over the same steps. `heard` gives each alarm once, until it had passed."""

    def __init__(self, workers: int, resolution: int, nodes: Callable[[], list[str]]) -> None:
        self.workers, self.resolution, self.nodes = workers, resolution, nodes
        self.windows: dict[int, dict[int, Times]] = {}  # images seen at its end -> rank -> times
        self.recent: dict[tuple[int, str], deque[float]] = {}  # rank, phase -> seconds of slow windows, 0 of others
        self.lasting: set[tuple[int, str]] = set()  # told, and not passed

    def heard(self, rank: int, windows: list[list[float]]) -> Iterator[Event]:
        for end, *times in windows:
            self.windows.setdefault(int(end), {})[rank] = Times(*times)
            if len(self.windows[int(end)]) == self.workers > 1:
                yield from self.compare(int(end), self.windows[int(end)])
                self.windows = {later: ranks for later, ranks in self.windows.items() if later > end}

    def compare(self, end: int, by_rank: dict[int, Times]) -> Iterator[Event]:
        for rank, own in by_rank.items():
            slow = {phase: figures for phase, *figures in own.slow([by_rank[r] for r in by_rank if r != rank])}
            for phase in ADVICE:
                key, took_s = (rank, phase), WINDOW_STEPS * (own.compute_s + own.data_s)
                row = self.recent.setdefault(key, deque(maxlen=1000))
                row.append(took_s if phase in slow else 0.0)
                if not any([*row][-IN_A_ROW:]):
                    self.lasting.discard(key)
                since = next((n for n, seconds in enumerate(reversed(row)) if not seconds), len(row))
                if since >= IN_A_ROW and sum([*row][-since:]) >= LASTING_S and key not in self.lasting:
                    self.lasting.add(key)
                    yield self.alarm(rank, phase, end, *slow[phase])

    def alarm(self, rank: int, phase: str, end: int, seconds: float, bound: float) -> Event:
        node = self.nodes()[rank]
        what = "computes" if phase == "compute" else "waits for data"
        return {"event": "alarm", "alarm": "straggler", "rank": rank, "node": node, "phase": phase,
                "figure": f"{phase} seconds a step", "value": seconds, "bound": bound, "rule": RULE,
                "images_seen": end, "resolution": self.resolution,
                "message": f"{self.resolution}px after {end:,} images: rank {rank} on node {node} holds up the others: "
                           f"it {what} {seconds:.2g} s a step, they {bound / TIMES:.2g} s: {ADVICE[phase]}."}
