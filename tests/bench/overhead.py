"""What a run spends outside its steps: python -m tests.bench.overhead [RUN]

Reads the ledger of RUN, or trains the demo with a tenth of its images in a temporary folder. Every figure is a ratio of
times of one and the same run, or a wait between two of its stages. Bars: steps at least 95 % of the last stage's wall
time (on a GPU: of the host's), waiting for data under 2 %, at most 1 s from a stage to the next in a shared group.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace

from gradine.configs.schema import load
from gradine.pipeline import driver
from gradine.pipeline.run_dir import RunDir


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


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print_table(RunDir.existing(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            print_table(short_demo(temporary))
