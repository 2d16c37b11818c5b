"""What `gradine preflight` says, and what the run then shows: python -m tests.bench.preflight [--share S] [--rounds N]

The demo's recipe with a share of its images: preflight, then the run, N times, in a temporary folder. Bars: from each
stage to the next the ratio of images/s within 15 % of the run's (median of the rounds), and the peak memory of a
worker within 15 %. The run's images/s are those of all its stage's time but the setup: data, log and saves included.
On a machine that others use too the halves of a round differ by chance: --processor counts the workers' processor
seconds in both, each worker on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

from gradine.configs.schema import Run, Stage, load
from gradine.pipeline import driver, preflight, session
from gradine.pipeline.group import Group

BAR = 0.15
TICK_IMAGES = 60  # as in the whole recipe, where a phase has 200 ticks: a short one would log after every step


class OnProcessor(Group):
    """Workers whose clocks count the processor seconds of their process."""

    def join_workers(self, setting: Stage) -> None:
        super().join_workers(setting)
        self.call(count_processor_seconds)


def count_processor_seconds() -> None:
    from gradine.stages import loop, trial

    loop.time = trial.time = SimpleNamespace(perf_counter=time.process_time)  # type: ignore[assignment,attr-defined]


def short(folder: str, share: float, changes: list[str]) -> Run:
    run = load("demo", [f"runs={folder}/runs", f"data.shards={folder}/shards", *changes])
    stages = [replace(s, fade_images=int(s.fade_images * share), hold_images=int(s.hold_images * share))
              for s in run.stages]
    return replace(run, stages=stages, tick_images=TICK_IMAGES)


def predicted(run: Run) -> list[tuple[float, float]]:
    """(images/s, GB) by stage."""
    return [(row.images_per_s, row.gpu_gb or row.memory_gb) for row in preflight.preflight(run)[1]]


def shown(run: Run) -> list[tuple[float, float]]:
    """The same of a run from its beginning to its end."""
    folder = driver.train(run, shard_if_needed=True)
    seen, rates = 0, []
    for end in (line for line in folder.history() if line["event"] == "stage_end"):
        parts = ", ".join(f"{part} {end[f'{part}_s']:.2f}" for part in ("wall", "setup", "step", "data", "log", "save"))
        print(f"{end['resolution']:>5}px  seconds: {parts}")
        rates.append(((end["images_seen"] - seen) / (end["wall_s"] - end["setup_s"]), end["peak_memory_mb"] / 1e3))
        seen = end["images_seen"]
    return rates


def report(sizes: list[int], rounds: list[tuple[list[tuple[float, float]], list[tuple[float, float]]]]) -> bool:
    """Prints a line per stage and per step to the next. -> whether all bars are met"""
    def off(values: list[float]) -> str:
        middle = statistics.median(values)
        return f"{middle:+8.1%} [{min(values):+.1%} .. {max(values):+.1%}] {'' if abs(middle) <= BAR else 'MISSED'}"

    met = []
    print("   px  images/s said     shown    GB said   shown   off by")
    for index, size in enumerate(sizes):
        said, had = ([statistics.median(part[index][n] for part in side) for n in (0, 1)]
                     for side in zip(*rounds, strict=True))
        errors = [a[index][1] / b[index][1] - 1 for a, b in rounds]
        met.append(abs(statistics.median(errors)) <= BAR)
        print(f"{size:>5}{said[0]:>15.4g}{had[0]:>10.4g}{said[1]:>11.3f}{had[1]:>8.3f}{off(errors)}")
    print("from   to    ratio said    shown   off by")
    for index, (size, following) in enumerate(pairwise(sizes)):
        a, b = ([one[side][index][0] / one[side][index + 1][0] for one in rounds] for side in (0, 1))
        errors = [x / y - 1 for x, y in zip(a, b, strict=True)]
        met.append(abs(statistics.median(errors)) <= BAR)
        print(f"{size:>4}{following:>5}{statistics.median(a):>14.3f}{statistics.median(b):>9.3f}{off(errors)}")
    return all(met)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.2, help="of the demo's images")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processor", action="store_true", help="count processor seconds")
    parser.add_argument("changes", nargs="*", help="settings, e.g. training.precision=float32")
    given = parser.parse_args()
    if given.processor:
        preflight.Group = session.Group = OnProcessor  # type: ignore[attr-defined,misc]
        given.changes.append("stages.*.threads=1")
    found = []
    for number in range(given.rounds):
        with tempfile.TemporaryDirectory() as temporary:
            run = short(temporary, given.share, given.changes)
            found.append((predicted(run), shown(run)))
        print(f"round {number + 1}")
        met = report([stage.resolution for stage in run.stages], found)
    raise SystemExit(0 if met else "a bar was missed")
