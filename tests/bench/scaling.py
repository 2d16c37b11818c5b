"""What `gradine plan --nodes` assumes, measured on one machine: python -m tests.bench.scaling

1. One sum of a gradient vector over two processes on gloo and loopback, beside the time the model gives its bytes.
2. A step at 32 px, full width, on one thread: images in one micro-batch or two, then on two processes.
3. The same batch on one worker of one thread, then on two, by turns: bar 1.85 times the images/s from 32 px up.
Wall and processor seconds are both shown: on a machine that others use too, the second are the ones to compare.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from gradine.configs.schema import from_dict, load
from gradine.stages import growth
from gradine.stages.data import noise
from gradine.stages.loop import initial_state
from gradine.stages.losses import penalty_divisor
from gradine.stages.step import Rules, train_step
from gradine.stages.trial import first_moment

FLOATS = (1, 65_536, 1 << 20, 6_556_163, 20_719_628, 23_079_115)  # the last three: generators to 4, 32 and 1024 px
REPEATS, ROUNDS = 7, 3
STAGE_32 = 3  # its index in the full recipe


def join(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=2)


def sums(rank: int, port: int) -> None:
    join(rank, port)
    for count in FLOATS:
        vector, times = torch.ones(count), []
        for _ in range(REPEATS):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(vector)
            times.append(time.perf_counter() - began)
        if rank == 0:
            took = statistics.median(times)
            print(f"sum of {count:>10,} floats over 2: median {took * 1e3:9.3f} ms, best {min(times) * 1e3:9.3f} ms, "
                  f"{4 * count / took / 1e9:6.3f} GB/s", flush=True)
    dist.destroy_process_group()


def step(rank: int, port: int, batch: int, micro: int, workers: int) -> None:
    if workers > 1:
        join(rank, port)
    torch.set_num_threads(1)
    run = load("celebahq1024", ["data.source=x", "stages.*.gpus=0"])
    setting = replace(run.stages[STAGE_32], batch_size=batch, micro_batch=micro, workers=workers, threads=1)
    run = replace(run, stages=[*run.stages[:STAGE_32], setting, *run.stages[STAGE_32 + 1:]])
    state = initial_state(run, STAGE_32, None, torch.device("cpu"), None)
    rules = Rules.of(run, batch, penalty_divisor(run, setting.resolution))
    shares, spent = noise(run, STAGE_32, rank, workers), [0.0]

    def reduce(vector: torch.Tensor) -> torch.Tensor:
        began = time.perf_counter()
        dist.all_reduce(vector)
        spent[0] += time.perf_counter() - began
        return vector

    wall, used, summed = [], [], []
    for number in range(3):  # the first one is not counted
        spent[0], began, began_cpu = 0.0, time.perf_counter(), time.process_time()
        train_step(state, shares, first_moment(run, STAGE_32), rules, reduce if workers > 1 else None)
        if number:
            wall.append(time.perf_counter() - began)
            used.append(time.process_time() - began_cpu)
            summed.append(spent[0])
    if rank == 0:
        macs = 18 * growth.macs_per_image(run.network, 32) * batch / workers / 1e9
        print(f"32 px, batch {batch} as {workers} x {batch // workers // micro} x {micro}: wall {min(wall):6.2f} s, "
              f"processor {min(used):6.2f} s, of it in sums (waiting included) {min(summed):5.2f} s, "
              f"{macs / (min(wall) - min(summed)):5.1f} GMAC/s a worker", flush=True)
    if workers > 1:
        dist.destroy_process_group()


def by_turns(rank: int, port: int, resolution: int, batch: int, precision: str) -> None:
    """Worker 0 trains the batch alone while the other waits; both train half of it each, apart; both share it."""
    join(rank, port)
    spent = [0.0]

    def reduce(vector: torch.Tensor) -> torch.Tensor:
        began = time.perf_counter()
        dist.all_reduce(vector)
        spent[0] += time.perf_counter() - began
        return vector

    def of(workers: int) -> tuple[Any, ...]:
        stages = [{"resolution": size, "batch_size": batch, "workers": workers}
                  for size in (resolution // 2, resolution)]
        run = from_dict({"name": "bench", "data": {"source": "none", "shards": "none"}, "stages": stages,
                         "training": {"precision": precision, "channels_last": True}})
        return (initial_state(run, 1, None, torch.device("cpu"), None), noise(run, 1, rank % workers, workers),
                first_moment(run, 1), Rules.of(run, batch, 1))

    whole, half = of(1), of(2)
    sides = {"alone": [*whole, None], "apart": [*half, None], "shared": [*half, reduce]}
    times: dict[str, list[float]] = {"sums": [], **{name: [] for name in sides}}
    for _ in range(1 + ROUNDS):
        spent[0] = 0.0
        for name, arguments in sides.items():
            dist.barrier()
            began = time.perf_counter()
            if rank == 0 or name != "alone":
                train_step(*arguments)
            dist.barrier()
            times[name].append(time.perf_counter() - began)
        times["sums"].append(spent[0])
    if rank == 0:
        median = {name: statistics.median(each[1:]) for name, each in times.items()}  # the first is not counted
        ratios = [alone / shared for alone, shared in zip(times["alone"][1:], times["shared"][1:], strict=True)]
        print(f"{resolution} px, {precision}, batch {batch}: two workers are {median['alone'] / median['shared']:.2f} "
              f"times one ({min(ratios):.2f} to {max(ratios):.2f}; bar 1.85), {median['alone'] / median['apart']:.2f} "
              f"without sums; {median['alone']:.2f} s alone, {median['shared']:.2f} s shared, of it "
              f"{median['sums']:.2f} s in sums, waiting included", flush=True)
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    processes.spawn(sums, (free_port(),), nprocs=2)
    for batch, micro, workers in ((4, 4, 1), (8, 4, 1), (8, 8, 1), (8, 4, 2)):
        processes.spawn(step, (free_port(), batch, micro, workers), nprocs=workers)
    for resolution, batch in ((32, 16), (64, 8)):
        for precision in ("float32", "bfloat16"):
            processes.spawn(by_turns, (free_port(), resolution, batch, precision), nprocs=2)
