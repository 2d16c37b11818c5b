"""A few real steps of a stage on noise for images, as one of its workers: what they take in memory and time.

For `gradine preflight`. State, rules and reduction are those of `loop.run_stage`; no shards are read, no file written.
"""

from __future__ import annotations

import functools
import math
import operator
import socket
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gradine.configs.schema import Run
from gradine.stages import checkpoint, growth
from gradine.stages.data import noise
from gradine.stages.loop import (
    initial_state,
    new_accelerator,
    new_networks,
    new_state,
    peak_memory_mb,
    use_threads,
)
from gradine.stages.losses import penalty_divisor
from gradine.stages.memory import LiveBytes, out_of_memory_named, room_gb
from gradine.stages.step import Reduce, Rules, Share, TrainState, train_step

CPU = torch.device("cpu")
REPEAT_S, MOST_REPEATS = 4.0, 50  # of the steps after the first: the median of short ones, one alone of long ones
COPIES_TO_WRITE = 2  # of the file that a save is at, beside the copied state: each tensor's bytes, then all in one


def surroundings(run: Run, stage: int) -> dict[str, Any]:
    """This worker's host, and the GB its step may take there (of its GPU, if it trains on one). Before `trial`."""
    device = torch.device("cuda") if run.stages[stage].gpus and torch.cuda.is_available() else CPU
    return {"host": socket.gethostname(), "room_gb": room_gb(device)}


def trial(run: Run, stage: int) -> dict[str, float]:
    """`seconds` of a step after the first, the process's peak `memory_mb`, `gpu_mb` (0 on a CPU), `checkpoint_bytes`.

    The step is the mean over the stage's images: in a fade it takes longer than after it.
    In a process that did nothing else before: its peak is this stage's. Raises OutOfMemory, and EnvironmentFault where
    the worker is not what the stage asks for.
    """
    setting = run.stages[stage]
    with out_of_memory_named(setting):
        accelerator = new_accelerator(setting.gpus == 0, setting.workers)
        use_threads(setting)
        torch.use_deterministic_algorithms(run.training.deterministic)
        device, workers = accelerator.device, accelerator.num_processes
        state = initial_state(run, stage, None, device, None)
        reduce = functools.partial(accelerator.reduce, reduction="sum") if workers > 1 else None
        precision, _ = run.format_of(setting)
        rules = Rules.of(run, setting.batch_size, penalty_divisor(run, setting.resolution), precision)
        phases = moments(run, stage)
        shares = [share.to(device) for share in noise(run, stage, accelerator.process_index, workers)]
        train_step(state, shares, phases[0][0], rules, reduce)  # untimed: what it allocates stays
        saved = checkpoint.tensors_of(state, copy=run.checkpoints.background)  # as while a save is written beside it

        def once() -> list[float]:
            return [timed_step(state, shares, moment, rules, reduce) for moment, _ in phases]

        rounds = [once()]
        mean = accelerator.reduce(torch.tensor(sum(rounds[0]), device=device), reduction="mean").item()  # all do alike
        rounds += [once() for _ in range(int(min(MOST_REPEATS, REPEAT_S / mean)))]
        typical, images = [statistics.median(times) for times in zip(*rounds, strict=True)], [n for _, n in phases]
        sizes = [sum(tensor.nbytes for tensor in part.values()) for part in saved.values()]
        memory_mb = peak_memory_mb(CPU) + run.checkpoints.background * COPIES_TO_WRITE * max(sizes) / 1e6
        gpu_mb = peak_memory_mb(device) if device.type == "cuda" else 0.0
        return {"seconds": sum(map(operator.mul, typical, images)) / sum(images), "memory_mb": memory_mb,
                "gpu_mb": gpu_mb, "checkpoint_bytes": sum(sizes)}


def step_memory_gb(run: Run, stage: int) -> float:
    """GB of device memory at the peak of a worker's step, as a GPU's allocator counts it; nothing is computed.

    Not in it: what kernels take for themselves while they run (cuDNN's workspaces), the CUDA context, and the
    allocator's own rounding of large blocks. Counted after a step, so that gradients and moments are there.
    """
    setting = run.stages[stage]
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        state = new_state(run, *new_networks(run, stage), torch.zeros(2))
        rules = Rules.of(run, setting.batch_size, penalty_divisor(run, setting.resolution), run.format_of(setting)[0])
        shares, reduce = noise(run, stage, 0, setting.workers), Tensor.clone if setting.workers > 1 else None
        for _ in range(2):
            live.peak = 0
            train_step(state, shares, first_moment(run, stage), rules, reduce)
    return live.peak / 1e9


def timed_step(state: TrainState, shares: list[Share], moment: growth.Moment, rules: Rules,
               reduce: Reduce | None) -> float:
    """Trains one step. -> seconds"""
    began = clock(shares[0].mix.device)
    train_step(state, shares, moment, rules, reduce)
    return clock(shares[0].mix.device) - began


def undisturbed_step(state: TrainState, shares: list[Share], moment: growth.Moment, rules: Rules,
                     reduce: Reduce | None) -> float:
    """Trains one step. -> seconds it would take alone on its cores: on a CPU its processor seconds over its threads."""
    if shares[0].mix.device.type == "cuda":
        return timed_step(state, shares, moment, rules, reduce)
    began = time.process_time()
    train_step(state, shares, moment, rules, reduce)
    return (time.process_time() - began) / torch.get_num_threads()


def moments(run: Run, stage: int) -> list[tuple[growth.Moment, float]]:
    """A moment of each kind of step of the stage, the heaviest first, and the images such steps show: of a fade its
    middle, when both branches are computed; with turns of G and with a penalty, where not every step has them."""
    schedule, training = growth.schedule(run), run.training
    cycle = math.lcm(training.penalty_every, training.d_steps)
    steps: dict[tuple[bool, bool], list[int]] = {}  # of a cycle, by whether they have a turn of G, and a penalty
    for step in range(cycle):
        turn, penalised = step % training.d_steps == training.d_steps - 1, step % training.penalty_every == 0
        steps.setdefault((turn, penalised), []).append(step)
    kinds = []
    for phase in (phase for phase in schedule.phases if phase.stage == stage):
        first = replace(growth.at(schedule, phase.start), alpha=0.5 if phase.kind == "fade" else 1.0)
        kinds += [(replace(first, images_seen=phase.start + alike[0] * phase.batch_size),
                   (phase.end - phase.start) * len(alike) / cycle) for _, alike in sorted(steps.items(), reverse=True)]
    return kinds


def first_moment(run: Run, stage: int) -> growth.Moment:
    """The middle of the stage's fade, at a turn of G; alpha 1 where nothing fades."""
    return moments(run, stage)[0][0]


def clock(device: torch.device) -> float:
    """Seconds, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
