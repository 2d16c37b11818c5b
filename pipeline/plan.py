"""What is still to run, from which checkpoint, and why. Pure: settings and what is on disk in, a plan out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gradine.configs.combinations import coupling
from gradine.configs.schema import Run, Stage, UserError, as_dict, flatten
from gradine.stages import growth
from gradine.stages.commits import Checkpoint

# Settings that may differ between a run and its resumption: they change what is kept and shown, not what is trained.
SAFE = ("resume", "preset", "branch", "tick_images", "runs", "evaluation.", "ray.",
        "checkpoints.every_images", "checkpoints.keep", "checkpoints.best", "checkpoints.pin", "checkpoints.background",
        "checkpoints.retry_s",
        "data.source", "data.shards", "data.cache_gb", "data.cache_dir", "data.max_rejected_share",
        "data.download_gb", "data.deadline_s", "data.prefetch", "training.compile", "training.recompute_from")
# the order of sums, not what is summed
SAFE_OF_A_STAGE = ("workers", "min_workers", "placement", "micro_batch", "threads", "cpus", "gpus")
FORMAT = ("precision", "channels_last")
MACS_PER_IMAGE_AND_STEP = 18  # of one forward: G 1 + 3, D 3 + 1 + 4 + 4 + 2 (penalty's second backward included)
# In float32, of one network's weights: both networks and their moments and gradients, the average, and scaled copies.
WEIGHTS_KEPT = 10
MAPS_KEPT = 6  # of D's feature maps of a batch: it sees three at once, and the penalty keeps their gradients
ASSUMED_GMACS = {"cpu": 60.0, "gpu": 6_000.0}  # a second, per core or GPU, where nothing was measured yet


@dataclass(frozen=True)
class Plan:
    start: Checkpoint | None  # where training goes on; None: from nothing
    images_seen: int
    stages: tuple[int, ...]  # indices still to run, the first of them perhaps from its middle
    superseded: tuple[Checkpoint, ...]  # what a branch leaves behind
    branch: int | None  # resolution of a branch that starts now
    reason: str


def make_plan(run: Run, found: Sequence[Checkpoint], last_branch: str | None = None) -> Plan:
    """Where `run` goes on, given its checkpoints (by images seen) and the resolution it last branched at.

    Raises UserError for a resume that is not possible.
    """
    schedule = growth.schedule(run)
    if run.resume == "fresh":
        if found:
            raise UserError(f"resume=fresh wants an empty run folder, this one has {len(found)} checkpoints, the "
                            f"newest {found[-1].name}. Use resume=auto to go on, or another name=.")
        return _plan(run, schedule, None, "fresh start, as asked")
    if not starts_branch(run, last_branch) and (found or run.resume == "auto"):
        if not found:
            return _plan(run, schedule, None, "no checkpoint yet")
        return _plan(run, schedule, found[-1], f"newest of {len(found)} checkpoints")
    index = [stage.resolution for stage in run.stages].index(int(run.resume))
    boundary = schedule.stage_span(index)[0]
    before = run.stages[index - 1].resolution
    starts = [c for c in found if c.stage_end and c.resolution == before and c.images_seen == boundary]
    if not starts:
        have = ", ".join(c.name for c in found if c.stage_end) or "none"
        raise UserError(f"resume={run.resume} needs the checkpoint at the end of the {before}px stage "
                        f"({boundary:,} images), which is not there. Ends of stages found: {have}. Use resume=auto.")
    later = tuple(c for c in found if c.images_seen > boundary)
    plan = _plan(run, schedule, starts[0], f"branch at {run.resume}px, leaving {len(later)} later checkpoints")
    return replace(plan, superseded=later, branch=int(run.resume))


def starts_branch(run: Run, last_branch: str | None) -> bool:
    """Whether `run` leaves what was trained from a resolution on; given again, it goes on with that branch."""
    return run.resume not in ("auto", "fresh") and (run.resume != last_branch or run.branch == "new")


def _plan(run: Run, schedule: growth.Schedule, start: Checkpoint | None, reason: str) -> Plan:
    seen = start.images_seen if start else 0
    if start and not any(seen == p.end or p.start < seen < p.end for p in schedule.phases
                         if p.resolution == start.resolution):
        raise UserError(f"checkpoint {start.name} does not lie in its stage of this configuration's schedule. "
                        "Resume with the configuration the run was started with.")
    stages = tuple(i for i in range(len(run.stages)) if schedule.stage_span(i)[1] > seen)
    return Plan(start, seen, stages, (), None, reason)


def resolved(run: Run, cores: int, stored: Run | None = None) -> Run:
    """The run with `threads` and `micro_batch` written out: part of what is computed, so a resume keeps them.

    So are precision and memory format, where `stored` has them and the given settings leave them open.
    """
    training, stages = run.training, []
    if stored and training.precision == "auto":
        training = replace(training, precision=stored.training.precision)
    if stored and training.channels_last is None:
        training = replace(training, channels_last=stored.training.channels_last)
    for index, stage in enumerate(run.stages):
        kept = stored.stages[index] if stored and index < len(stored.stages) else None
        share = stage.batch_size // stage.workers
        same_batch = kept is not None and kept.batch_size == stage.batch_size and share % kept.micro_batch == 0
        micro = kept.micro_batch if kept and same_batch else share
        own = int(stage.cpus) if stage.cpus > 1 else max(1, cores // stage.workers)
        threads = kept.threads if kept and kept.workers == stage.workers else own
        stages.append(replace(stage, threads=stage.threads or threads, micro_batch=stage.micro_batch or micro))
    run = replace(run, stages=stages, training=training)
    for index, kept in enumerate(stored.stages[:len(stages)] if stored else ()):
        run = run.with_format(index, kept.precision, kept.channels_last)
    return run


def as_measured(run: Run, ledger: Sequence[dict[str, Any]]) -> Run:
    """The run with the formats that were measured for its stages before, newest first, where its settings say none."""
    for line in reversed(ledger):
        for index, stage in enumerate(run.stages):
            if line["event"] == "format" and line["resolution"] == stage.resolution:
                run = run.with_format(index, line["precision"], line["channels_last"])
    return run


def within_memory(run: Run, ledger: Iterable[dict[str, Any]]) -> Run:
    """The run with what memory forced upon it so far, wherever the given settings are those that did not fit."""
    for line in ledger:
        if line["event"] == "micro_batch":
            stages = [replace(stage, micro_batch=line["now"]) if (stage.resolution, stage.micro_batch)
                      == (line["resolution"], line["was"]) else stage for stage in run.stages]
            run = replace(run, stages=stages)
        elif line["event"] == "less_ahead" and line["was"] == [run.data.prefetch, run.checkpoints.background]:
            run = with_less_ahead(run)
    return run


def with_less_ahead(run: Run) -> Run:
    """The run with the least kept in memory beside the training: one batch ahead, no copy of the state for a save."""
    return replace(run, data=replace(run.data, prefetch=1), checkpoints=replace(run.checkpoints, background=False))


def refuse_changes(run: Run, stored: Run, branching_at: int | None = None) -> None:
    """UserError with a line per key if `run` would train something else than `stored`, the run it resumes.

    A new branch may change what comes after it: its stages, and what training uses in them.
    """
    was, now = flatten(as_dict(stored)), flatten(as_dict(run))
    changed = [key for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key)
               and not _may_change(key, run, branching_at)]
    if changed:
        lines = "".join(f"\n  {key}: {was.get(key, 'not set')} -> {now.get(key, 'not set')}" for key in changed)
        raise UserError(f"run {run.name!r} was started with other settings:{lines}\nTake them back, give the run "
                        "another name=, or branch off where they take effect with resume=RESOLUTION branch=new.")


def _may_change(key: str, run: Run, branching_at: int | None) -> bool:
    if key.startswith(SAFE):
        return True
    if key.startswith("stages."):
        _, index, setting = key.split(".")
        resolution = run.stages[0].resolution * 2 ** int(index)
        # nothing uses the format of a stage before the branch any more
        return setting in SAFE_OF_A_STAGE or (branching_at is not None
                                              and (resolution >= branching_at or setting in FORMAT))
    return branching_at is not None and key.startswith("training.")


def same_group(a: Stage, b: Stage) -> bool:
    """Whether two consecutive stages can share one group of workers."""
    return all(getattr(a, name) == getattr(b, name) for name in (
        "workers", "min_workers", "placement", "cpus", "gpus", "threads"))


def worker_counts(stage: Stage) -> list[int]:
    """How many workers a stage may have, most first: each takes whole micro-batches, as large as with the most."""
    fewest, micro = stage.min_workers or stage.workers, stage.micro_batch or stage.batch_size // stage.workers
    return [count for count in range(stage.workers, fewest - 1, -1) if stage.batch_size % (count * micro) == 0]


def with_workers(run: Run, index: int, count: int) -> Run:
    """The run as a stage that got so many workers trains it: the same micro-batches, hence nearly the same sums."""
    stage = replace(run.stages[index], workers=count, min_workers=0)
    return replace(run, stages=[*run.stages[:index], stage, *run.stages[index + 1:]])


def memory_gb(run: Run, stage: Stage) -> float:
    """Rough device memory of one worker's step, at its peak, without what the process and its libraries take.

    Within a quarter of what `trial.step_memory_gb` counts.
    """
    weights = growth.parameters(run.network, stage.resolution, run.data.channels) * 4
    micro = stage.micro_batch or stage.batch_size // stage.workers
    width = 2 if run.format_of(stage)[0] == "bfloat16" else 4
    maps = _maps_at_the_peak(run, stage.resolution) * micro * width
    return (WEIGHTS_KEPT * weights + MAPS_KEPT * maps) / 1e9


def _maps_at_the_peak(run: Run, resolution: int) -> int:
    """Floats of D's feature maps of one image: all before the backward, or what it makes again for one block."""
    if run.network.kind == "mlp":
        return run.network.mlp.depth * run.network.mlp.width + run.data.channels * resolution**2
    floats = {size: growth.channels(run.network, size) * size**2 for size in growth.resolutions(resolution)}
    maps = {size: own + growth.channels(run.network, max(4, size // 2)) * size**2 for size, own in floats.items()}
    again = [size for size in floats if 0 < run.training.recompute_from <= size]  # these keep their input alone
    before = sum(floats[size] if size in again else maps[size] for size in floats)
    return max(before, *(maps[size] + sum(floats[later] for later in again if later >= size) for size in again), 0)


def macs_per_image(run: Run, resolution: int) -> int:
    return growth.macs_per_image(run.network, resolution, run.data.channels)


def table(run: Run, plan: Plan, measured: dict[int, float]) -> list[dict[str, Any]]:
    """A row per stage for `gradine plan`: `measured` holds images/s by resolution from this run's own ledger."""
    schedule = growth.schedule(run)
    rows = []
    for index, stage in enumerate(run.stages):
        first, last = schedule.stage_span(index)
        left = max(0, last - max(first, plan.images_seen))
        device = "gpu" if stage.gpus else "cpu"
        units = stage.workers * (max(1.0, stage.gpus) if stage.gpus else max(1, stage.threads))
        step_macs = MACS_PER_IMAGE_AND_STEP * macs_per_image(run, stage.resolution)
        rate = measured.get(stage.resolution) or ASSUMED_GMACS[device] * 1e9 * units / step_macs
        rows.append({
            "resolution": stage.resolution, "batch_size": stage.batch_size, "learning_rate": stage.learning_rate,
            "workers": stage.workers, "most_workers": 1 if coupling(run) else stage.batch_size // growth.group_size(
                stage.batch_size),
            "micro_batch": stage.micro_batch, "threads": stage.threads, "device": device,
            "precision": run.format_of(stage)[0],
            "fade_images": stage.fade_images if index else 0, "hold_images": stage.hold_images, "left": left,
            "memory_gb": memory_gb(run, stage), "hours": left / rate / 3600, "measured": stage.resolution in measured,
            "state": "done" if not left else "from the middle" if left < last - first else "to run"})
    return rows


def seconds_left(run: Run, images_seen: int, rates: dict[int, float]) -> float:
    """Time to the end of the run: measured images/s where there are any, else scaled from the nearest by the work."""
    schedule = growth.schedule(run)
    total = 0.0
    for index, stage in enumerate(run.stages):
        left = growth.images_between(schedule.phases, images_seen, schedule.end, index)
        if not left:
            continue
        if not rates:
            return math.nan
        known = min(rates, key=lambda size: abs(math.log2(size / stage.resolution)))
        work = macs_per_image(run, stage.resolution) / macs_per_image(run, known)
        total += left * work / rates[known]
    return total
