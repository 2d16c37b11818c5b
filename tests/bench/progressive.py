"""Does growing pay? The same images once in stages of 4 to 64 px, once at 64 px alone.

python -m tests.bench.progressive [--images N] [--seed N] [--folder F]

Two runs of gradine's own driver on the bundled photographs, both at once and on one thread each, so that whatever else
the machine does meets both. Same networks, batch, learning rate, precision and data. The grown run divides N images as
the published schedule does: one part at 4 px, two parts (fade, hold) at each stage above. Where it has seen N images,
the two are compared at equal images. It then goes on at 64 px for about as long as the other still takes: that is the
comparison at equal time. Nothing of that changes its first N images, which have no view of the schedule's end.

Times count from a run's first step: data, growing and saving are in them, sharding and evaluation are not. Processor
seconds are those of the training process with all its threads; on a shared machine they are the ones to compare.
Distances are measured when both runs have ended, on checkpoints in which 64 px is fully faded in. The same command
again, with the same folder, measures what is missing and prints the tables again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from gradine.configs.schema import Run, dump, load
from gradine.pipeline.commands import evaluate_run
from gradine.pipeline.run_dir import RunDir

SIZES = (4, 8, 16, 32, 64)
BATCH = 16
PARTS = 2 * len(SIZES) - 1  # of N: one at 4 px, two at each size above
PARTS_AFTER = 6  # at 64 px: by arithmetic the run alone takes 2.8 times as long for N images, and 6 = 9 - 9 / 2.8
LOOK_S = 0.5  # between two looks at the processor's clock
METRICS = ("swd", "kid_lite0_128")


def settings(name: str, folder: Path, images: int, seed: int) -> Run:
    """`grown` or `alone`, which differ in their stages only; both keep a checkpoint every part."""
    part = images // PARTS // BATCH * BATCH
    phases = [(4, 0, part), *((size, part, part) for size in SIZES[1:-1]), (64, part, (1 + PARTS_AFTER) * part)]
    stages = [f"{{resolution: {size}, fade_images: {fade}, hold_images: {hold}, batch_size: {BATCH}, threads: 1, "
              "learning_rate: 0.003}" for size, fade, hold in (phases if name == "grown" else [(64, 0, PARTS * part)])]
    return load("demo", [
        f"name={name}", f"runs={folder}", f"data.shards={folder}/shards", f"data.cache_dir={folder}/cache",
        "network={latent_size: 64, fmap_base: 512, fmap_max: 32}", f"stages=[{', '.join(stages)}]",
        f"training.seed={seed}", "training.precision=bfloat16", "training.channels_last=true",
        f"checkpoints.every_images={part}", "checkpoints.keep=1000", "evaluation.when=end",
        "evaluation.metrics=[]"])


# Both runs at once -------------------------------------------------------------------------------------------------


def train(runs: list[Run], folder: Path) -> None:
    """Trains the runs side by side; <folder>/<name>.processor.jsonl gets rows of [time, processor seconds]."""
    subprocess.run([sys.executable, "-m", "gradine.pipeline", "shard", runs[0].data.source, runs[0].data.shards,
                    "--resolution", "64", f"shard_images={runs[0].data.shard_images}"], check=True)
    started = []
    for run in runs:
        config = folder / f"{run.name}.yaml"
        config.write_text(dump(run))
        with (folder / f"{run.name}.log").open("w") as log:
            started.append(subprocess.Popen([sys.executable, "-m", "gradine.pipeline", "train", str(config)],
                                            stdout=log, stderr=subprocess.STDOUT,
                                            env={**os.environ, "OMP_NUM_THREADS": "1"}))
    while any(process.poll() is None for process in started):
        for run, process in zip(runs, started, strict=True):
            if (seconds := processor_seconds(process.pid)) is not None:
                with (folder / f"{run.name}.processor.jsonl").open("a") as samples:
                    samples.write(json.dumps([time.time(), seconds]) + "\n")
        time.sleep(LOOK_S)
    for run, process in zip(runs, started, strict=True):
        if process.returncode:
            raise SystemExit(f"{run.name} ended with exit code {process.returncode}: see {folder}/{run.name}.log")


def processor_seconds(driver: int) -> float | None:
    """Of the training worker among a driver's descendants, all threads; None while there is none."""
    for pid in descendants(driver):
        with suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::Worker"):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user and system time
    return None


def descendants(pid: int) -> Iterator[int]:
    with suppress(OSError):
        for file in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in map(int, file.read_text().split()):
                yield child
                yield from descendants(child)


# What came of them ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A checkpoint at 64 px: what it took to come there, and how near its images are to the reals."""

    images_seen: int
    processor_s: float
    wall_s: float
    rows: dict[str, dict[str, Any]]  # of metrics.jsonl, by metric

    def shown(self, metric: str) -> str:
        row = self.rows[metric]
        low, high = row["interval"] or (None, None)
        return "-" if low is None else f"{row['value']:.4g} ({low:.4g} to {high:.4g})"


class Times:
    """Seconds from a run's first step, by the wall and by the processor's clock."""

    def __init__(self, folder: Path, name: str) -> None:
        self.lines = RunDir.existing(folder / name).lines("ledger.jsonl")
        self.ends = [line for line in self.lines if line["event"] == "stage_end"]
        samples = [json.loads(line) for line in (folder / f"{name}.processor.jsonl").read_text().splitlines()]
        self.clock, self.processor = np.array(samples).T
        first = self.ends[0]
        self.began = first["time"] - first["wall_s"] + first["setup_s"]

    def at(self, when: float) -> tuple[float, float]:
        """(processor, wall) seconds up to a time of day."""
        used, before = np.interp([when, self.began], self.clock, self.processor)
        return float(used - before), when - self.began


def measure(folder: Path, name: str) -> list[Measured]:
    """Every checkpoint of 64 px at alpha 1, in order; measured now if it was not yet."""
    path, times = folder / name, Times(folder, name)
    run = load(RunDir.existing(path).config)
    faded = sum(stage.fade_images + stage.hold_images for stage in run.stages[:-1])
    faded += run.stages[-1].fade_images if run.stages[1:] else 0
    saved = [line for line in times.lines if line["event"] == "checkpoint" and line["resolution"] == 64
             and line["images_seen"] >= faded]
    found = []
    for line in saved:
        checkpoint = Path(line["path"]).name
        known = rows_of(path, checkpoint)
        if not known:
            with redirect_stdout(StringIO()):
                evaluate_run(path, checkpoint, 0, ["metrics=[swd,kid]", "features=[lite0_128]", "untrained=false"], "")
            known = rows_of(path, checkpoint)
        found.append(Measured(line["images_seen"], *times.at(line["time"]), known))
    return found


def rows_of(path: Path, checkpoint: str) -> dict[str, dict[str, Any]]:
    rows = RunDir.existing(path).lines("metrics.jsonl")
    return {row["metric"]: row for row in rows if row["checkpoint"] == checkpoint and row["metric"] in METRICS}


def print_stages(folder: Path, name: str) -> None:
    """Images, and processor, wall and step seconds of each stage."""
    times, before, images = Times(folder, name), (0.0, 0.0), 0
    print(f"\n{name}: seconds by stage\n   px    images  processor      wall     steps    images/processor s")
    for end in times.ends:
        now, new = times.at(end["time"]), end["images_seen"] - images
        used = now[0] - before[0]
        print(f"{end['resolution']:>5}{new:>10,}{used:>11.1f}{now[1] - before[1]:>10.1f}{end['step_s']:>10.1f}"
              f"{new / used:>15.1f}")
        before, images = now, end["images_seen"]


def print_table(name: str, points: list[Measured]) -> None:
    print(f"\n{name}: at 64 px\n    images  processor s    wall s   " + "".join(f"{metric:>27}" for metric in METRICS))
    for point in points:
        print(f"{point.images_seen:>10,}{point.processor_s:>13.0f}{point.wall_s:>10.0f}   "
              + "".join(f"{point.shown(metric):>27}" for metric in METRICS))


def compare(grown: list[Measured], alone: list[Measured]) -> None:
    """At equal images, and at equal time; where no checkpoint lies at that time, alone gets its next one."""
    equal, end = at_equal_images(grown, alone), alone[-1]
    print(f"\nat equal images ({equal.images_seen:,}): grown {equal.processor_s:.0f} processor s, 64 px alone "
          f"{end.processor_s:.0f}, ratio {end.processor_s / equal.processor_s:.2f}; "
          f"by the wall {end.wall_s / equal.wall_s:.2f}")
    for metric in METRICS:
        print(f"{metric}, noise floor {end.rows[metric]['floor']:.4g}: grown {equal.shown(metric)}, "
              f"alone {end.shown(metric)}\n  at equal processor seconds")
        for point in grown:
            later = next((other for other in alone if other.processor_s >= point.processor_s), None)
            if not later:  # its last: a comparison would favor the grown run
                break
            print(f"  grown after {point.processor_s:5.0f} s {point.shown(metric):>25},   "
                  f"alone after {later.processor_s:5.0f} s {later.shown(metric):>25}")


def at_equal_images(grown: list[Measured], alone: list[Measured]) -> Measured:
    return next(point for point in grown if point.images_seen == alone[-1].images_seen)


def draw(grown: list[Measured], alone: list[Measured], file: Path) -> None:
    """SWD against processor minutes with its intervals; a ring where both have seen as many images."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for label, points, color in (("64 px alone", alone, "#d62728"), ("grown from 4 px", grown, "#1f77b4")):
        minutes, rows = [point.processor_s / 60 for point in points], [point.rows["swd"] for point in points]
        axes.fill_between(minutes, *np.array([row["interval"] for row in rows]).T, color=color, alpha=0.2, linewidth=0)
        axes.plot(minutes, [row["value"] for row in rows], color=color, marker=".", label=label)
        same = at_equal_images(points, alone)
        axes.plot(same.processor_s / 60, same.rows["swd"]["value"], "o", color=color, markersize=11, fillstyle="none")
    axes.axhline(alone[-1].rows["swd"]["floor"], color="gray", linewidth=0.8, linestyle=":")
    axes.set(xlabel="processor minutes of one thread", ylabel="SWD at 64 px", xlim=(0, None), ylim=(0, None))
    axes.legend()
    figure.savefig(file, dpi=110)


def main(folder: Path, images: int, seed: int) -> None:
    runs = [settings(name, folder, images, seed) for name in ("grown", "alone")]
    if not (folder / "trained").exists():
        train(runs, folder)
        (folder / "trained").touch()
    for run in runs:
        print_stages(folder, run.name)
    grown, alone = (measure(folder, run.name) for run in runs)
    print_table("grown", grown)
    print_table("alone", alone)
    compare(grown, alone)
    draw(grown, alone, folder / "progressive.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Progressive growing against training at 64 px alone.")
    parser.add_argument("--images", type=int, default=31_680, help="of each run, until they are compared")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for runs and picture; default: a temporary one")
    given = parser.parse_args()
    if given.folder:
        given.folder.mkdir(parents=True, exist_ok=True)
        main(given.folder.absolute(), given.images, given.seed)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary), given.images, given.seed)
