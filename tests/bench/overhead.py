"""What a run spends outside its steps: python -m tests.bench.overhead [RUN]

Reads the ledger of RUN, or trains the demo with a tenth of its images in a temporary folder. Every figure is a ratio of
times of one and the same run, or a wait between two of its stages. Bars: steps at least 95 % of the last stage's wall
time (on a GPU: of the host's), waiting for data under 2 %, at most 1 s from a stage to the next in a shared group.

Without RUN also a short run at full width: data, log, saves, average, Ray and all else together, bar 2 % of the steps.
A short run logs and saves more often than a long one, so those two count as often as in the published schedule.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace

from gradine.configs.schema import load
from gradine.pipeline import driver, evaluations
from gradine.pipeline.run_dir import RunDir
from tests.bench.step import FULL, machine, profiled
from tests.bench.step_process import gradine_step

BATCH, STEPS = 16, {16: 24, 32: 12}
EVERY = {"tick": 3_000, "checkpoint": 100_000}  # images between them in phases of 600,000


def short_demo(folder: str) -> RunDir:
    run = load("demo", [f"runs={folder}/runs", f"data.shards={folder}/shards"])
    stages = [replace(s, fade_images=s.fade_images // 10, hold_images=s.hold_images // 10) for s in run.stages]
    return driver.train(replace(run, stages=stages), shard_if_needed=True)


def print_table(folder: RunDir) -> None:
    ends = [line for line in folder.history() if line["event"] == "stage_end"]
    starts = [line for line in folder.history() if line["event"] == "stage_start"]
    print(f"{folder.path.name}\n   px    wall s   steps    data    save     log   to the next stage s")
    for index, end in enumerate(ends):
        shares = "".join(f"{end[f'{part}_s'] / end['wall_s']:>8.1%}" for part in ("step", "data", "save", "log"))
        following = [line["time"] for line in starts if line["time"] >= end["time"]]
        gap = ""
        if following and index + 1 < len(ends):  # until the next stage asks for its first batch
            gap = f"{following[0] - end['time'] + ends[index + 1]['setup_s']:>22.2f}"
        print(f"{end['resolution']:>5}{end['wall_s']:>10.1f}{shares}{gap}")


def full_width(folder: str) -> RunDir:
    """A few steps at 16 and 32 px on the demo's images; nothing is evaluated beside them."""
    stages = ", ".join(f"{{resolution: {size}, fade_images: {BATCH * steps}, hold_images: {BATCH * steps}, "
                       f"batch_size: {BATCH}}}" for size, steps in STEPS.items())
    evaluations.Evaluations.start = lambda *_: None  # type: ignore[method-assign, assignment]
    return driver.train(load("demo", [f"runs={folder}/runs", f"data.shards={folder}/shards", "name=full-width",
                                      f"network={FULL}", f"stages=[{stages}]", "tick_images=64", "evaluation.when=end",
                                      "checkpoints.every_images=1000000"]), shard_if_needed=True)


def print_outside(folder: RunDir) -> None:
    """Of each stage at full width, what lies outside the steps and, of what is inside, the average; over the steps."""
    parts = ("data", "tick", "checkpoint", "average", "rest")
    print(f"\n{folder.path.name}\n   px    format{''.join(f'{part:>12}' for part in parts)}    together; bar 2 %")
    ledger = folder.history()
    for end in (line for line in ledger if line["event"] == "stage_end"):
        own = [line for line in ledger if line.get("resolution") == end["resolution"]]
        form = next(line for line in own if line["event"] == "format")
        times = {event: sum(line["event"] == event for line in own) for event in EVERY}
        images = STEPS[end["resolution"]] * BATCH * (1 if end["resolution"] == min(STEPS) else 2)  # the first: no fade
        spent, _ = profiled(gradine_step(end["resolution"], BATCH, FULL, {key: form[key] for key in
                                                                         ("precision", "channels_last")}))
        inside = end["step_s"] / images  # seconds an image
        rest = end["wall_s"] - sum(end[f"{part}_s"] for part in ("setup", "step", "data", "log", "save"))
        outside = {"data": end["data_s"] / images, "rest": rest / images,
                   "tick": end["log_s"] / times["tick"] / EVERY["tick"],
                   "checkpoint": end["save_s"] / times["checkpoint"] / EVERY["checkpoint"],
                   "average": inside * spent["average"] / sum(spent.values())}
        print(f"{end['resolution']:>5}{form['precision']:>10}"
              f"{''.join(f'{outside[part] / inside:>12.2%}' for part in parts)}{sum(outside.values()) / inside:>12.2%}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print_table(RunDir.existing(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            print(machine())
            print_table(short_demo(temporary))
            print_outside(full_width(temporary))
