"""`gradine preflight`: one real step of every stage before a run, on the workers that will train it.

Reads no shards and writes nothing. What does not fit in memory is tried again with smaller micro-batches; where none
fits, a line says what would. GB are 1e9 bytes.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gradine.configs.combinations import coupling
from gradine.configs.schema import EnvironmentFault, Run, Stage, UserError
from gradine.pipeline import plan as planning
from gradine.pipeline.cluster import connected, one_line
from gradine.pipeline.display import duration
from gradine.pipeline.driver import run_folder, settle
from gradine.pipeline.group import Group
from gradine.pipeline.places import refuse_unplaceable
from gradine.pipeline.run_dir import warn
from gradine.stages import growth
from gradine.stages.formats import chosen, measure
from gradine.stages.memory import allocator_error, smaller_micro_batch
from gradine.stages.store import is_remote
from gradine.stages.trial import surroundings, trial

USABLE = 0.9  # of the room there is: an estimate that fills it does not fit
SIGN_OF_LIFE_S = 10.0
TENSORS_SAVED = 7  # per weight: generator, discriminator, average, and Adam's two moments of the first two


@dataclass(frozen=True)
class Row:
    """What a stage's step took; without `seconds`, why no micro-batch fits."""

    index: int  # into run.stages
    stage: Stage  # with the micro-batch that fits, or the smallest there is
    asked: int  # the micro-batch of the configuration
    images: int  # reals the stage shows
    seconds: float = 0.0  # of one step, on its slowest worker
    memory_gb: float = 0.0  # peak of a worker's process
    gpu_gb: float = 0.0  # peak of its GPU's allocator
    checkpoint_bytes: int = 0
    lacks: str = ""

    @property
    def images_per_s(self) -> float:
        return self.stage.batch_size / self.seconds

    @property
    def hours(self) -> float:
        return self.images / self.images_per_s / 3600

    @property
    def note(self) -> str:
        """The setting that makes the stage fit; nothing if it does as it is."""
        micro = self.stage.micro_batch
        return "no micro-batch fits" if self.lacks else f"stages.{self.index}.micro_batch={micro}" * (
            micro != self.asked)


def print_preflight(run: Run) -> None:
    """The table, a row as soon as it is known. EnvironmentFault (exit code 3) at its end if a stage does not fit."""
    settle(run, run_folder(run))  # refuses, where the run itself would be, before anything is printed
    sizes = f"{run.stages[0].resolution} to {run.final_resolution}px"
    print(f"{run.name}: a step of each stage, {sizes}, on random images\n")
    print("   px  batch  workers  micro  GB peak  GPU GB   s/step  images/s          time  to add", flush=True)
    run, rows = preflight(run, lambda row: print(line_of(row), flush=True))
    hours = sum(row.hours for row in rows if not row.lacks)
    beside = run.evaluation.gpus or run.evaluation.cpus
    kind = "GPU" if run.evaluation.gpus else "CPU"
    unknown = ", without the stages that do not fit" if any(row.lacks for row in rows) else ""
    print(f"""
total    {duration(hours * 3600)} of steps{unknown}; start of workers, reading and saving come on top
measure  an evaluation beside training takes its own share: {beside:g} {kind}, up to {run.evaluation.memory_gb:g} GB \
of its host
GB peak  a worker's process{", with a second copy of the state for the save beside it" * run.checkpoints.background}""")
    if line := disk_line(run, rows):
        print(line)
    if lacking := [row.lacks for row in rows if row.lacks]:
        raise EnvironmentFault(" | ".join(lacking))


def line_of(row: Row) -> str:
    stage = row.stage
    head = f"{stage.resolution:>5}{stage.batch_size:>7}{stage.workers:>9}{stage.micro_batch:>7}"
    if row.lacks:
        return f"{head}{'-':>9}{'-':>8}{'-':>9}{'-':>10}{'-':>14}  {row.note}"
    gpu = f"{row.gpu_gb:.2f}" if row.gpu_gb else "-"
    return (f"{head}{row.memory_gb:>9.2f}{gpu:>8}{row.seconds:>9.3g}{row.images_per_s:>10.4g}"
            f"{duration(row.hours * 3600):>14}  {row.note}").rstrip()


def preflight(run: Run, shown: Callable[[Row], object] = str) -> tuple[Run, list[Row]]:
    """The run as it would be trained, and a row per stage; `shown` gets each when it is known.

    Every stage is tried, whatever became of those before: what the smaller ones take says how far a run could go.
    """
    run, plan = settle(run, run_folder(run))
    rows = []
    with connected(run):
        refuse_unplaceable(run, replace(plan, stages=tuple(range(len(run.stages)))), warn)
        for index in range(len(run.stages)):
            rows.append(measured(run, index))
            shown(rows[-1])
    return run, rows


def measured(run: Run, index: int) -> Row:
    """A stage's row, with the largest micro-batch that fits."""
    first, last = growth.schedule(run).stage_span(index)
    asked = run.stages[index].micro_batch
    while True:
        stage = run.stages[index]
        row = Row(index, stage, asked, last - first)
        took, reason, room, sharing = tried(run, index)
        if took:
            worst = {name: max(worker[name] for worker in took) for name in took[0]}
            return replace(row, seconds=worst["seconds"], memory_gb=worst["memory_mb"] / 1e3,
                           gpu_gb=worst["gpu_mb"] / 1e3, checkpoint_bytes=int(worst["checkpoint_bytes"]))
        smaller = None if coupling(run) else smaller_micro_batch(stage)
        if smaller is None:
            saved = growth.parameters(run.network, stage.resolution, run.data.channels) * 4 * TENSORS_SAVED
            return replace(row, checkpoint_bytes=saved, lacks=what_would_fit(run, index, room, sharing, reason))
        run = with_stage(run, index, micro_batch=smaller)


def tried(run: Run, index: int) -> tuple[list[dict[str, float]], str, float, int]:
    """-> what the step took by worker, else nothing and why memory ran out; GB there for a worker, who share them."""
    room, sharing = 0.0, 1
    # A new group even where a run would keep the last stage's: a process remembers its own peak for good, and the
    # memory that an allocator keeps from an earlier try would be missing in this one.
    group = Group(run, index)
    try:
        room, sharing = room_of(group, run, index)
        run = group.run
        if run.is_open(run.stages[index]):  # as a run has it measured by these very workers, before its first step
            choice, _, _ = chosen(group.call(measured_format, run, index)[0][0])
            run = run.with_format(index, *choice)
        return group.call(trial, run, index), "", room, sharing
    except Exception as error:
        if reason := shortage(error) or shortage(death_behind(group, error)):
            return [], reason, room, sharing
        if isinstance(error, UserError | EnvironmentFault):
            raise
        resolution = run.stages[index].resolution
        raise EnvironmentFault(f"stage {resolution}px: its first step failed: {one_line(error)}") from error
    finally:
        group.end()


def measured_format(run: Run, index: int) -> list[dict[str, Any]]:
    """In a worker: rank 0's answer holds one event."""
    return [*measure(run, index)]


def shortage(error: Exception) -> str:
    """Why memory ran out in a worker, on one line; "" if `error` says something else."""
    from ray.exceptions import OutOfMemoryError, RayActorError

    cause = getattr(error, "cause", None) or error  # Ray wraps what a task raised
    if allocator_error(cause):
        return one_line(error, stop_for=())
    if isinstance(error, OutOfMemoryError):
        return "Ray ended a worker because its node ran low on memory"
    if isinstance(error, RayActorError):  # on Linux a host out of memory is seldom told by the allocator
        return "a worker died, as they do where the kernel finds no more memory"
    return ""


def death_behind(group: Group, error: Exception) -> Exception:
    """The death of a worker, if that is why another one raised `error`: peers meet its broken connection first."""
    import ray
    from ray.exceptions import RayActorError

    signs = [worker.call.remote(os.getpid) for worker in group.workers]  # one that waits for its peers gives none
    for sign in ray.wait(signs, num_returns=len(signs), timeout=SIGN_OF_LIFE_S)[0]:
        try:
            ray.get(sign)
        except RayActorError as death:
            return death
    return error


def no_room(run: Run, index: int) -> str:
    """What would fit, for a stage whose smallest micro-batch found no memory in a run; its workers tell the room."""
    group = Group(run, index)
    try:
        return what_would_fit(run, index, *room_of(group, run, index))
    finally:
        group.end()


def room_of(group: Group, run: Run, index: int) -> tuple[float, int]:
    """GB there are for each worker of the group, and how many share their host's."""
    around: list[dict[str, Any]] = group.call(surroundings, run, index)
    hosts = [worker["host"] for worker in around]
    sharing = 1 if run.stages[index].gpus else max(hosts.count(host) for host in hosts)
    return min(worker["room_gb"] for worker in around) / sharing, sharing


def what_would_fit(run: Run, index: int, room_gb: float, sharing: int = 1, reason: str = "") -> str:
    """One line for a stage whose smallest micro-batch had no place in a worker's `room_gb` GB.

    sharing: workers that share their host's memory, each with room_gb of it; 1 on GPUs. What it proposes is computed
    from planning.memory_gb, scaled so that the micro-batch that failed does not fit.
    """
    stage = run.stages[index]
    rough = planning.memory_gb(run, stage)
    scale = max(1.0, room_gb / rough)
    kind = "GPU" if stage.gpus else "host"
    micro = stage.micro_batch or stage.batch_size // stage.workers

    def fits(changed: Run, room: float = room_gb) -> bool:
        return scale * planning.memory_gb(changed, changed.stages[index]) <= USABLE * room

    found = [text for changes in alternatives(run)
             if (text := next((text for text, changed in changes if fits(changed)), ""))]
    fewer = (n for n in range(sharing - 1, 0, -1) if sharing == stage.workers and stage.workers % n == 0)
    found += [f"stages.{index}.workers={n} stages.{index}.micro_batch={micro}" for n in fewer
              if fits(run, room_gb * sharing / n)][:1]
    would = f"Would fit by that estimate: {', or '.join(found)}; or leave" if found else "Leave"
    return (f"stage {stage.resolution}px: no micro-batch fits{f' ({reason})' if reason else ''}. The smallest, "
            f"{micro}, needs roughly {scale * rough:.2g} GB a worker, {room_gb:.2g} GB of {kind} memory are there. "
            f"{would} this stage out, or give each worker {scale * rough / USABLE:.2g} GB.")


def alternatives(run: Run) -> Iterator[Iterator[tuple[str, Run]]]:
    """Ways to train in less memory, each from the least change to the most: overrides, and the run with them."""
    network, smallest = run.network, max(1, run.final_resolution // 2)

    def narrower(run: Run, name: str, smallest: int) -> Iterator[tuple[str, Run]]:
        width = getattr(network, name)
        step = max(1, width // 16)
        for value in range(width - step, smallest - 1, -step):
            width_set: dict[str, Any] = {name: value}
            yield f"network.{name}={value}", replace(run, network=replace(network, **width_set))

    yield narrower(run, "fmap_base", smallest)
    yield narrower(run, "fmap_max", 1)
    if run.training.precision == "float32":
        half, text = replace(run, training=replace(run.training, precision="bfloat16")), "training.precision=bfloat16"
        both = ((f"{text} {width}", narrow) for width, narrow in narrower(half, "fmap_base", smallest))
        yield itertools.chain([(text, half)], both)


def disk_line(run: Run, rows: list[Row]) -> str:
    """Whether the disk has room for the checkpoints a run keeps at its fullest; "" for an object store."""
    location = run.checkpoints.location or str(run_folder(run).path)
    if is_remote(location):
        return ""
    folder = Path(location).expanduser().absolute()
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    sizes = [row.checkpoint_bytes for row in rows]
    inside = run.checkpoints.keep + 1  # the newest is durable before the oldest goes
    needed, free = sum(sizes) + inside * max(sizes), shutil.disk_usage(there).free
    by_stage = ", ".join(f"{row.stage.resolution}px {row.checkpoint_bytes / 1e6:,.1f}" for row in rows)
    verdict = "disk    " if needed <= free else "WARNING  too little disk:"
    return (f"{verdict} {needed / 1e9:,.2f} GB for the ends of all stages and {inside} checkpoints inside one, "
            f"{free / 1e9:,.2f} GB free at {there}; MB each: {by_stage}")


def with_stage(run: Run, index: int, **changes: Any) -> Run:
    stages = list(run.stages)
    stages[index] = replace(stages[index], **changes)
    return replace(run, stages=stages)
