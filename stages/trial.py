"""A few real steps of a stage on noise for images, as one of its workers: what they take in memory and time.

For `gradine preflight`. State, rules and reduction are those of `loop.run_stage`; no shards are read, no file written.
"""

from __future__ import annotations

import functools
import os
import socket
import statistics
import time
from dataclasses import replace
from typing import Any

import torch

from gradine.configs.schema import Run
from gradine.stages import checkpoint, growth
from gradine.stages.loop import initial_state, new_accelerator, peak_memory_mb
from gradine.stages.losses import penalty_divisor
from gradine.stages.memory import out_of_memory_named, room_gb
from gradine.stages.step import Reduce, Rules, Share, TrainState, train_step

CPU = torch.device("cpu")
REPEAT_S = 4.0  # time for up to four more steps: the median of short ones, one alone of long ones


def surroundings(run: Run, stage: int) -> dict[str, Any]:
    """This worker's host, and the GB its step may take there (of its GPU, if it trains on one). Before `trial`."""
    device = torch.device("cuda") if run.stages[stage].gpus and torch.cuda.is_available() else CPU
    return {"host": socket.gethostname(), "room_gb": room_gb(device)}


def trial(run: Run, stage: int) -> dict[str, float]:
    """`seconds` of a step after the first, the process's peak `memory_mb`, `gpu_mb` (0 on a CPU), `checkpoint_bytes`.

    In a process that did nothing else before: its peak is this stage's. Raises OutOfMemory, and EnvironmentFault where
    the worker is not what the stage asks for.
    """
    setting = run.stages[stage]
    with out_of_memory_named(setting):
        accelerator = new_accelerator(setting.gpus == 0, setting.workers)
        torch.set_num_threads(setting.threads or max(1, (os.cpu_count() or 1) // setting.workers))
        torch.use_deterministic_algorithms(run.training.deterministic)
        device, workers = accelerator.device, accelerator.num_processes
        state = initial_state(run, stage, None, device, None)
        reduce = functools.partial(accelerator.reduce, reduction="sum") if workers > 1 else None
        rules = Rules.of(run, setting.batch_size, penalty_divisor(run, setting.resolution))
        moment = first_moment(run, stage)
        shares = [share.to(device) for share in noise(run, stage, accelerator.process_index, workers)]
        train_step(state, shares, moment, rules, reduce)  # untimed: what it allocates stays
        saved = checkpoint.tensors_of(state, copy=run.checkpoints.background)  # as while a save is written beside it
        times = [timed_step(state, shares, moment, rules, reduce)]
        mean = accelerator.reduce(torch.tensor(times[0], device=device), reduction="mean").item()  # all repeat alike
        times += [timed_step(state, shares, moment, rules, reduce) for _ in range(int(min(4, REPEAT_S / mean)))]
        size = sum(tensor.nbytes for part in saved.values() for tensor in part.values())
        gpu_mb = peak_memory_mb(device) if device.type == "cuda" else 0.0
        return {"seconds": statistics.median(times), "memory_mb": peak_memory_mb(CPU), "gpu_mb": gpu_mb,
                "checkpoint_bytes": size}


def timed_step(state: TrainState, shares: list[Share], moment: growth.Moment, rules: Rules,
               reduce: Reduce | None) -> float:
    """Trains one step. -> seconds"""
    began = clock(shares[0].mix.device)
    train_step(state, shares, moment, rules, reduce)
    return clock(shares[0].mix.device) - began


def first_moment(run: Run, stage: int) -> growth.Moment:
    """The middle of the stage's fade, when both branches are computed; alpha 1 where nothing fades."""
    schedule = growth.schedule(run)
    moment = growth.at(schedule, schedule.stage_span(stage)[0])
    return replace(moment, alpha=0.5) if moment.phase.kind == "fade" else moment


def noise(run: Run, stage: int, rank: int, workers: int) -> list[Share]:
    """One worker's shares of one step, with random pixels for reals."""
    setting, random = run.stages[stage], torch.Generator().manual_seed(growth.random_seed(run.training.seed, "trial"))
    size, latent = setting.resolution, run.network.latent_size

    def share(rows: int) -> Share:
        reals = torch.randint(0, 256, (rows, run.data.channels, size, size), dtype=torch.uint8, generator=random)
        critic, generator = (torch.randn(rows, latent, generator=random) for _ in range(2))
        mirrored, mix = (torch.rand(rows, generator=random) for _ in range(2))
        return Share(reals, mirrored < 0.5, critic, generator, mix)

    return [share(len(rows)) for rows in growth.micro_batches(setting, rank, workers)]


def clock(device: torch.device) -> float:
    """Seconds, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
