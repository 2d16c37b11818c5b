"""How fast a checkpoint is verified, and what an asynchronous save costs a training step. By hand, on a quiet machine:

    python -m tests.bench.checkpoint

1. `read` of 650 MB of random floats in four files, page cache warm: MB/s, and the ratio to reading alone; bar 500 MB/s.
2. Full-width networks of 256 px on the CPU, steps with and without a save in the background in one process:
   (the steps with a save - those without) / one step. Bar: 1.0.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch

from gradine.configs.schema import from_dict
from gradine.stages import commits, growth
from gradine.stages.checkpoint import Saver
from gradine.stages.commits import Term
from gradine.stages.loop import initial_state
from gradine.stages.step import Rules, Share, TrainState, train_step

FLOATS = {"generator": 23_100_000, "discriminator": 23_100_000, "average": 23_100_000, "optimizers": 92_400_000}
BATCH, STEPS, REPEATS = 4, 1, 4


def verified_read(folder: Path) -> tuple[float, float]:
    """(MB/s of commits.read, of reading alone), the best of five each, taken in turn."""
    rng = np.random.default_rng(0)
    info = {"schema": commits.SCHEMA, "resolution": 1024, "phase": "hold", "images_seen": 0, "stage_end": False,
            "masked": [0, 0], "skipped": []}
    files = [(f"{part}.safetensors", safetensors.numpy.save({"weight": rng.random(count, dtype=np.float32)}))
             for part, count in FLOATS.items()]
    path = Path(commits.commit(folder, "r1024-hold-000000000", [*files, ("state.json", json.dumps(info).encode())]))
    total = sum(len(content) for _, content in files) / 1e6
    del files
    times: dict[str, list[float]] = {"verified": [], "plain": []}
    for _ in range(5):
        for name, ask in (("plain", lambda: [file.read_bytes() for file in path.iterdir()]),
                          ("verified", lambda: commits.read(path))):
            began = time.perf_counter()
            ask()
            times[name].append(time.perf_counter() - began)
    return total / min(times["verified"]), total / min(times["plain"])


def cost_of_a_save(folder: Path) -> tuple[float, float, float]:
    """(seconds of a step, added seconds per save, seconds until it is durable), medians over rounds taken in turn."""
    run = from_dict({"name": "bench", "data": {"source": "none", "shards": "none"},
                     "stages": [{"resolution": 4 * 2**n, "batch_size": BATCH} for n in range(7)]})
    state = initial_state(run, 6, None, torch.device("cpu"), None)
    moment, rules = growth.at(growth.schedule(run), state.images_seen), Rules.of(run, BATCH, 1)
    reals = torch.randint(0, 256, (BATCH, 3, 256, 256), dtype=torch.uint8)
    share = Share(reals, torch.rand(BATCH) < 0.5, torch.randn(BATCH, 512), torch.randn(BATCH, 512), torch.rand(BATCH))
    info = {"resolution": 256, "phase": "fade", "stage_end": False, "skipped": []}
    saver = Saver(run, str(folder), Term())

    def steps(state: TrainState, save: bool) -> float:
        began = time.perf_counter()
        if save:
            saver.save(state, info)
        for _ in range(STEPS):
            train_step(state, [share], moment, rules)
        return time.perf_counter() - began

    steps(state, save=False)  # warm up
    steps(state, save=True)
    saver.wait()
    plain, saving, durable = [], [], []
    for _ in range(REPEATS):
        plain.append(steps(state, save=False))
        saving.append(steps(state, save=True))
        saver.wait()
        durable += [event["seconds"] for event in saver.events() if event["event"] == "checkpoint"]
    saver.close()
    return statistics.median(plain) / STEPS, statistics.median(saving) - statistics.median(plain), durable[-1]


if __name__ == "__main__":
    torch.set_num_threads(os.cpu_count() or 1)
    print("load average", os.getloadavg())
    with tempfile.TemporaryDirectory() as place:
        verified, plain = verified_read(Path(place))
    print(f"verified read {verified:,.0f} MB/s, plain {plain:,.0f} MB/s, ratio {verified / plain:.2f}; bar 500 MB/s")
    with tempfile.TemporaryDirectory() as place:
        step, added, durable = cost_of_a_save(Path(place))
    print(f"step {step:.2f} s, a save adds {added:.2f} s = {added / step:.2f} steps, bar 1.0; "
          f"it is durable after {durable:.1f} s")
    print("load average", os.getloadavg())
