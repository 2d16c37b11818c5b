"""One stage of training, from a checkpoint to the checkpoint at its end, as one of `workers` processes.

Plain data in, plain data out: settings and paths come in, events (dicts) come out, rank 0's only. Runs the same in a
test, under torchrun and in a Ray actor: rank and world size are those of the environment, as Accelerate reads them.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import resource
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState

from gradine.configs.schema import EnvironmentFault, Run
from gradine.stages import checkpoint, growth
from gradine.stages.data import Images, batches, data_digest, prefetch
from gradine.stages.losses import penalty_divisor
from gradine.stages.networks import Discriminator, Generator, initialise
from gradine.stages.step import Rules, TrainState, new_adam, train_step

Event = dict[str, Any]
TICKS_PER_PHASE = 200
MASKED_IN_A_ROW = 20


def run_stage(run: Run, stage: int, start: str | None, out: str | Path, initial: str | None = None) -> Iterator[Event]:
    """Trains run.stages[stage] from checkpoint `start` to the stage's end, saving below `out`/checkpoints.

    start: a checkpoint inside this stage (goes on exactly there), or at the end of the stage before (grows), or None
    for the first stage. initial: a checkpoint of another run, whose weights new layers take where names match.
    Yields `tick`, `checkpoint` and `stage_end` events, JSON-ready, as they happen; ranks above 0 yield nothing.
    """
    clock = Stopwatch()
    setting, schedule = run.stages[stage], growth.schedule(run)
    accelerator = new_accelerator(setting.gpus == 0, setting.workers)
    torch.set_num_threads(setting.threads or max(1, (os.cpu_count() or 1) // setting.workers))
    torch.use_deterministic_algorithms(run.training.deterministic)
    state = initial_state(run, stage, start, accelerator.device, initial)
    workers = accelerator.num_processes
    refuse_unequal_starts(accelerator, state)
    reduce = functools.partial(accelerator.reduce, reduction="sum") if workers > 1 else None
    rules = Rules.of(run, setting.batch_size, penalty_divisor(run, setting.resolution))
    images = Images(run.data, setting.resolution, decode_threads=torch.get_num_threads())
    ahead = batches(run, stage, images, state.images_seen, accelerator.process_index, workers)
    if accelerator.device.type == "cuda":
        ahead = ([share.pinned() for share in shares] for shares in ahead)
    source = prefetch(ahead)
    info = {"resolution": setting.resolution, "data": data_digest(run.data, setting.resolution),
            "workers": workers, "micro_batch": setting.micro_batch, "threads": torch.get_num_threads()}
    end = schedule.stage_span(stage)[1]
    watch = Watch(setting.batch_size, state.images_seen, state.skipped.tolist())
    clock.seconds["setup"] = time.perf_counter() - clock.started
    with closing(images), closing(source):  # type: ignore[type-var]  # a generator has close()
        while state.images_seen < end:
            moment = growth.at(schedule, state.images_seen)
            if moment.starts_phase:
                state.generator_adam, state.discriminator_adam = (
                    new_adam(net, run) for net in (state.generator, state.discriminator))
            with clock.measure("data"):
                shares = [share.to(accelerator.device) for share in next(source)]
            with clock.measure("step"):
                seen = train_step(state, shares, moment, rules, reduce)
            before, now = moment.images_seen, state.images_seen
            tick = run.tick_images or max(1, moment.phase.images // TICKS_PER_PHASE)
            ticks = before // tick != now // tick or now in (moment.phase.end, end)
            if ticks:  # on every rank: the figures are sums over all of them
                with clock.measure("log"):
                    summed = accelerator.reduce(torch.stack(list(seen.values())), reduction="sum")
                    figures = dict(zip(seen, summed.tolist(), strict=True))
                    watch.look(now, state.skipped.tolist())
            if not accelerator.is_main_process:
                continue
            if ticks:
                yield {"event": "tick", "resolution": setting.resolution, "phase": moment.phase.kind,
                       "alpha": moment.alpha, "learning_rate": moment.learning_rate, "images_seen": now,
                       "images_per_s": clock.rate(now), "skipped": state.skipped.tolist(), **figures}
            if now == end or before // run.checkpoints.every_images != now // run.checkpoints.every_images:
                with clock.measure("save"):
                    path = checkpoint.save(Path(out) / "checkpoints", state,
                                           {**info, "phase": moment.phase.kind, "stage_end": now == end})
                    retired = checkpoint.retire(path.parent, run.checkpoints.keep, now)
                yield {"event": "checkpoint", "path": str(path), "images_seen": now, "stage_end": now == end,
                       "resolution": setting.resolution, "phase": moment.phase.kind, "retired": retired,
                       "seconds": clock.last}
    if accelerator.is_main_process:
        yield {"event": "stage_end", "resolution": setting.resolution, "images_seen": end,
               "peak_memory_mb": peak_memory_mb(accelerator.device), **clock.totals()}


def new_accelerator(cpu: bool, workers: int) -> Accelerator:
    """The process group of this stage's workers. EnvironmentFault if Accelerate sees another number of them."""
    accelerator = Accelerator(cpu=cpu, mixed_precision="no")
    if accelerator.num_processes != workers:
        raise EnvironmentFault(f"Accelerate sees {accelerator.num_processes} processes, the stage has {workers} "
                               "workers: each would train alone. Start as many processes, by gradine or torchrun.")
    if not cpu and accelerator.device.type != "cuda":
        raise EnvironmentFault("the stage asks for gpus, but torch sees no CUDA device in its worker. Install a CUDA "
                               "build of torch, or set stages.*.gpus=0.")
    return accelerator


def refuse_unequal_starts(accelerator: Accelerator, state: TrainState) -> None:
    """EnvironmentFault if the workers hold different weights: their gradients would be summed all the same."""
    parameters = [p for net in (state.generator, state.discriminator, state.average) for p in net.parameters()]
    total = torch.stack([p.detach().double().abs().sum() for p in parameters]).sum()
    if len(set(accelerator.gather(total[None]).tolist())) > 1:
        raise EnvironmentFault("the workers of this stage start from different weights: not all see the same run "
                               "folder, or not the same versions of gradine and torch. Make these equal on all nodes.")


def leave_group() -> None:
    """Ends this process's group after its last stage, where the process then ends by itself (not in a Ray actor).

    Without it gloo's threads are torn down by the interpreter's exit: seen to abort 3 of 22 times, all work done.
    """
    gc.collect()  # what is left of the last stage holds the group
    PartialState().destroy_process_group()


def peak_memory_mb(device: torch.device) -> float:
    """The most this process has held: on the GPU by its allocator's count, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6  # Linux counts in kB


def initial_state(run: Run, stage: int, start: str | None, device: torch.device, initial: str | None) -> TrainState:
    """Fresh networks, then `initial`'s weights, then `start`'s: all of its state if it lies inside this stage."""
    resolution, fades = run.stages[stage].resolution, stage > 0
    layout = torch.channels_last if run.training.channels_last else torch.contiguous_format
    nets = [cls(run.network, resolution, fades, run.data.channels) for cls in (Generator, Discriminator, Generator)]
    for net, role in zip(nets, ("generator", "discriminator", "generator"), strict=True):
        initialise(net, run.training.seed, role)
        net.to(device, memory_format=layout)  # type: ignore[call-overload]
    generator, discriminator, average = nets
    average.requires_grad_(False)
    state = TrainState(generator, discriminator, average, new_adam(generator, run),  # type: ignore[arg-type]
                       new_adam(discriminator, run), torch.zeros(2, device=device),
                       growth.schedule(run).stage_span(stage)[0])
    if initial:
        files = checkpoint.read(initial)
        checkpoint.refuse_other_channels(run, files)
        checkpoint.grow(state, files)
    if start:
        files = checkpoint.read(start)
        info = json.loads(files["state.json"])
        if info["resolution"] == resolution:
            checkpoint.restore(state, files)
        else:
            checkpoint.grow(state, files)
            state.skipped.copy_(torch.tensor(info["skipped"]))
    return state


class Watch:
    """Stops a stage that stands still: 20 steps in a row whose updates of D, or of G, were all masked."""

    def __init__(self, batch_size: int, images_seen: int, skipped: list[float]) -> None:
        self.batch_size, self.since, self.before = batch_size, images_seen, skipped

    def look(self, images_seen: int, skipped: list[float]) -> None:
        """Raises EnvironmentFault; called at ticks, on every worker, with the counts all of them have."""
        steps = (images_seen - self.since) // self.batch_size
        masked = max(now - then for now, then in zip(skipped, self.before, strict=True))
        if masked < steps:
            self.since, self.before = images_seen, skipped
        elif steps >= MASKED_IN_A_ROW:
            raise EnvironmentFault(f"the last {steps} updates were all masked, their gradients are not finite: nothing "
                                   "is learned any more. Branch off an earlier stage with a lower learning rate: "
                                   "resume=RESOLUTION branch=new stages.<n>.learning_rate=...")


class Stopwatch:
    """Where a stage's wall time goes: seconds by name, and the rate since the last look."""

    def __init__(self) -> None:
        self.started = self.looked = time.perf_counter()
        self.seconds: dict[str, float] = {"step": 0.0, "data": 0.0, "log": 0.0, "save": 0.0}
        self.images: int | None = None
        self.last = 0.0

    def measure(self, name: str) -> _Measured:
        return _Measured(self, name)

    def rate(self, images_seen: int) -> float | None:
        """Images per second since the last call; None the first time."""
        now = time.perf_counter()
        rate = None if self.images is None else (images_seen - self.images) / (now - self.looked)
        self.images, self.looked = images_seen, now
        return rate

    def totals(self) -> dict[str, float]:
        wall = time.perf_counter() - self.started
        return {"wall_s": wall, **{f"{name}_s": seconds for name, seconds in self.seconds.items()}}


class _Measured:
    def __init__(self, clock: Stopwatch, name: str) -> None:
        self.clock, self.name = clock, name

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.clock.last = time.perf_counter() - self.began
        self.clock.seconds[self.name] += self.clock.last
