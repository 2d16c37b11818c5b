"""One stage of training, from a checkpoint to the checkpoint at its end, as one of `workers` processes.

Plain data in, plain data out: settings and paths come in, events (dicts) come out, rank 0's, and each rank's pulses for
a driver that watches over them. Runs the same in a test, under torchrun and in a Ray actor: rank and world size are
those of the environment, as Accelerate reads them.
"""

from __future__ import annotations

import functools
import gc
import math
import os
import resource
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor

from gradine.configs.schema import EnvironmentFault, Run, Stage
from gradine.stages import checkpoint, commits, growth
from gradine.stages.checkpoint import Saver
from gradine.stages.commits import Term, location_of
from gradine.stages.compiling import compiled
from gradine.stages.data import Images, batches, data_digest, labels_of, opened, prefetch
from gradine.stages.dcgan import DcganDiscriminator
from gradine.stages.families import AnyDiscriminator, AnyGenerator, new_discriminator, new_generator
from gradine.stages.latents import one_hot
from gradine.stages.losses import penalty_divisor
from gradine.stages.memory import forget, out_of_memory_named
from gradine.stages.networks import initialise, recompute
from gradine.stages.points import PointSet
from gradine.stages.pulse import PULSE_S, Pulse
from gradine.stages.step import Objectives, Rules, TrainState, begin_phase, new_optimizer, prepare_reals, train_step
from gradine.stages.stopping import StopFlag, asked, listening
from gradine.stages.watch import Alarms, Watch

Event = dict[str, Any]
TICKS_PER_PHASE = 200


def run_stage(run: Run, stage: int, start: str | None, out: str | Path, initial: str | None = None,
              term: Term | None = None, pulses: bool = False) -> Iterator[Event]:
    """Trains run.stages[stage] from checkpoint `start` to the stage's end, saving below the run folder `out`.

    start: a checkpoint inside this stage (goes on exactly there), or at the end of the stage before (grows), or None
    for the first stage. initial: a checkpoint of another run, whose weights new layers take where names match.
    term: the right to commit, and the ranges of images whose steps update nothing.
    A format that is still open is float32, contiguous: whoever wants the fastest has it measured before (formats.py).
    Yields events, JSON-ready, as they happen: `note`, `tick`, `alarm`, `checkpoint`, `save_failed`, `save_left_out`,
    and at last `stage_end` or, after a SIGTERM to any rank, `stopped`. Ranks above 0 yield none of these.
    pulses: every rank also yields, at most once a second, a `pulse` (pulse.py).
    Raises NonFinite and OutOfMemory, which going on from a checkpoint in another way may mend.
    """
    clock = Stopwatch()
    term = term or Term(skipped=commits.describe(start).skipped if start else ())
    try:
        with listening(), out_of_memory_named(run.stages[stage]):
            yield from _run_stage(run, stage, start, out, initial, term, clock, pulses)
    except Exception as error:
        error.add_note(f"stage {run.stages[stage].resolution}px, after images_seen={clock.images_seen:,}")
        raise


def _run_stage(run: Run, stage: int, start: str | None, out: str | Path, initial: str | None, term: Term,
               clock: Stopwatch, pulses: bool) -> Iterator[Event]:
    setting, schedule = run.stages[stage], growth.schedule(run)
    accelerator = new_accelerator(setting.gpus == 0, setting.workers)
    use_threads(setting)
    torch.use_deterministic_algorithms(run.training.deterministic)
    precision, channels_last = run.format_of(setting)
    rules = Rules.of(run, setting.batch_size, penalty_divisor(run, setting.resolution), precision)
    forget(accelerator.device)  # the stage before it in this process
    state = initial_state(run, stage, start, accelerator.device, initial)
    workers = accelerator.num_processes
    pulse = Pulse(pulses, setting.batch_size, state.images_seen, device=accelerator.device.type == "cuda")
    yield from pulse.beat("setup")
    pulse.at("agree")
    refuse_unequal_starts(accelerator, state)
    pulse.at("setup")
    reduce = pulse.without(functools.partial(accelerator.reduce, reduction="sum")) if workers > 1 else None
    objectives, note = compiled(run, stage, state, rules) if run.training.compile else (Objectives(), "")
    info = {"resolution": setting.resolution, "data": data_digest(run.data, setting.resolution),
            "skipped": term.skipped, "workers": workers, "micro_batch": setting.micro_batch,
            "threads": torch.get_num_threads(), "channels_last": bool(channels_last),
            "precision": "bfloat16" if rules.dtype == torch.bfloat16 else "float32"}
    newest: dict[str, Tensor] = {}  # of each figure, for not every step has all of them
    end, last_saved = schedule.stage_span(stage)[1], state.images_seen
    watch, alarms = Watch(setting.batch_size, state.images_seen, state.masked.tolist()), Alarms.of(run, stage)
    with ExitStack() as closes:
        images = closes.enter_context(closing(opened(run.data, setting.resolution, torch.get_num_threads())))
        give_reference(run, state, images, start)
        ahead = batches(run, stage, images, state.images_seen, accelerator.process_index, workers)
        if accelerator.device.type == "cuda":
            ahead = ([share.pinned() for share in shares] for shares in ahead)
        source = prefetch(pulse.making(ahead, lambda: images.decoding_s), run.data.prefetch, patience_s=PULSE_S)
        closes.callback(source.close)  # type: ignore[attr-defined]  # a generator has it
        stop = closes.enter_context(closing(StopFlag(workers)))
        saver = Saver(run, location_of(run, out), term) if accelerator.is_main_process else None
        if saver:
            closes.enter_context(closing(saver))
        clock.seconds["setup"] = time.perf_counter() - clock.started
        if saver:
            yield from ({"event": "note", "resolution": setting.resolution, "text": text}
                        for text in (*images.notes, note) if text)
        while state.images_seen < end and not stop.agreed():
            moment = growth.at(schedule, state.images_seen)
            if moment.starts_phase:
                begin_phase(state, run)
            with clock.measure("data"):
                batch = yield from pulse.next_of(source)
                shares = [share.to(accelerator.device) for share in batch]
            with clock.measure("step"), pulse.step():
                if any(first <= moment.images_seen < last for first, last in term.skipped):
                    state.images_seen += moment.phase.batch_size
                    seen = {}
                else:
                    seen = newest = {**newest, **train_step(state, shares, moment, rules, reduce, objectives)}
            before, now = moment.images_seen, state.images_seen
            clock.images_seen = now
            tick = run.tick_images or max(1, moment.phase.images // TICKS_PER_PHASE)
            if before // tick != now // tick or now in (moment.phase.end, end):  # on every rank: sums over all of them
                with clock.measure("log"):
                    pulse.at("log")
                    counted = {**seen, "non_finite": non_finite_count(state)}
                    pulse.at("reduce")
                    summed = accelerator.reduce(torch.stack(list(counted.values())), reduction="sum")
                    figures = dict(zip(counted, summed.tolist(), strict=True))
                    masked = state.masked.tolist()
                    watch.look(now, masked, math.ceil(figures.pop("non_finite") / workers))
                if accelerator.is_main_process and figures:  # none inside a range that is skipped
                    event = {"event": "tick", "resolution": setting.resolution, "phase": moment.phase.kind,
                             "alpha": moment.alpha, "learning_rate": moment.learning_rate, "images_seen": now,
                             "images_per_s": clock.rate(now), "masked": masked, **figures}
                    yield event
                    yield from ({"event": "alarm", **alarm} for alarm in alarms.look(event))
            if saver:
                if now == end or before // run.checkpoints.every_images != now // run.checkpoints.every_images:
                    with clock.measure("save"):
                        pulse.at("write")
                        if not run.checkpoints.background:
                            yield from pulse.beat("write")  # nothing is heard from here until it is written
                        saver.save(state, {**info, "phase": moment.phase.kind, "stage_end": now == end})
                        last_saved = now
                yield from saver.events()
            pulse.stepped(now)
            yield from pulse.beat("step")
        stopped = state.images_seen < end
        if saver:
            with clock.measure("save"):
                pulse.at("save")
                if stopped and last_saved != state.images_seen:
                    saver.save(state, {**info, "phase": moment.phase.kind, "stage_end": False})
                while not saver.wait(hurry=stopped or asked(), timeout=PULSE_S):
                    yield from pulse.beat("save")  # a SIGTERM that comes now leaves no time for pauses between tries
            yield from saver.events()
    if accelerator.is_main_process:
        yield {"event": "stopped" if stopped else "stage_end", "resolution": setting.resolution,
               "images_seen": state.images_seen, "peak_memory_mb": peak_memory_mb(accelerator.device), **clock.totals()}


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


def use_threads(stage: Stage) -> None:
    """As many as the stage gives each worker, else this worker's part of the cores."""
    torch.set_num_threads(stage.threads or max(1, (os.cpu_count() or 1) // stage.workers))


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
    resolution = run.stages[stage].resolution
    layout = torch.channels_last if run.format_of(run.stages[stage])[1] else torch.contiguous_format
    made = new_networks(run, stage)
    for net, role in zip(made, ("generator", "discriminator", "generator"), strict=True):
        initialise(net, run.training.seed, role)
        net.to(device, memory_format=layout)  # type: ignore[call-overload]
    state = new_state(run, *made, torch.zeros(2, device=device), growth.schedule(run).stage_span(stage)[0])
    if initial:
        files = commits.read(initial)
        checkpoint.refuse_other_channels(run, files)
        checkpoint.grow(state, files)
    if start:
        files = commits.read(start)
        info = commits.state_of(files["state.json"])
        if info["resolution"] == resolution:
            checkpoint.restore(state, files)
        else:
            checkpoint.grow(state, files)
            state.masked.copy_(torch.tensor(info["masked"]))
            before = checkpoint.load_tensors(files, "optimizers")
            if state.augmentation is not None and "augmentation" in before:  # D overfits on as it did
                state.augmentation.copy_(before["augmentation"])
    return state


def give_reference(run: Run, state: TrainState, images: Images | PointSet, start: str | None) -> None:
    """To a discriminator with virtual batch norm its fixed batch of reals: the run's first ones."""
    if run.network.layers.discriminator_norm != "virtual" or start:
        return
    critic, device = cast("DcganDiscriminator", state.discriminator), state.masked.device
    assert critic.reference is not None
    ids = images.sampler(run.training.seed)(0, len(critic.reference))
    pixels, whole = torch.from_numpy(images.pixels(ids)).to(device), torch.zeros(len(ids), dtype=torch.bool)
    classes = run.network.classes
    labels = one_hot(labels_of(images, classes)[ids], classes).to(device) if classes else None
    critic.set_reference(prepare_reals(pixels, whole.to(device), 1.0), labels)


def new_networks(run: Run, stage: int) -> tuple[AnyGenerator, AnyDiscriminator, AnyGenerator]:
    """Generator, discriminator and average of a stage, not initialised."""
    sizes = run.network, run.stages[stage].resolution, stage > 0, run.data.channels
    generator, discriminator, average = new_generator(*sizes), new_discriminator(*sizes), new_generator(*sizes)
    for network in (generator, discriminator) if run.training.recompute_from else ():
        recompute(network, run.training.recompute_from)
    return generator, discriminator, average.requires_grad_(False)


def new_state(run: Run, generator: AnyGenerator, discriminator: AnyDiscriminator, average: AnyGenerator,
              masked: Tensor, images_seen: int = 0) -> TrainState:
    state = TrainState(generator, discriminator, average, new_optimizer(generator, run),
                       new_optimizer(discriminator, run, "discriminator"), masked, images_seen)
    begin_phase(state, run)
    if run.training.augment == "adaptive":
        state.augmentation = torch.zeros_like(masked[0])
    return state


def non_finite_count(state: TrainState) -> Tensor:
    """How many weights, moments and averages hold a NaN or infinity, left on the device."""
    tensors = [tensor for part in checkpoint.parts_of(state).values() for tensor in part.values()]
    # A sum in float64 is finite if and only if all its float32 are; it takes a quarter of the time of looking at each.
    sums = torch.stack([tensor.sum(dtype=torch.float64) for tensor in tensors])
    return (~torch.isfinite(sums)).sum().to(torch.float32)


class Stopwatch:
    """Where a stage's wall time goes: seconds by name, and the rate since the last look."""

    def __init__(self) -> None:
        self.started = self.looked = time.perf_counter()
        self.seconds: dict[str, float] = {"step": 0.0, "data": 0.0, "log": 0.0, "save": 0.0}
        self.images: int | None = None
        self.images_seen = 0

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
        self.clock.seconds[self.name] += time.perf_counter() - self.began
