"""Runs the plan: stages on worker groups, retries, evaluations beside the training, the ledger."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

from gradine import __version__
from gradine.configs.schema import EnvironmentFault, Run, UserError, dump, load
from gradine.pipeline import plan as planning
from gradine.pipeline.cluster import Group, connected, one_line, refuse_unplaceable
from gradine.pipeline.display import Board, Display, duration
from gradine.pipeline.evaluations import Evaluations
from gradine.pipeline.report import write_report
from gradine.pipeline.run_dir import RunDir
from gradine.pipeline.shards import absolute_location, refuse_other_settings, shard, source_of, summary_line
from gradine.pipeline.sources import locate
from gradine.stages import checkpoint, growth
from gradine.stages.data import data_digest, has_level
from gradine.stages.store import Store, is_remote, write_atomic

FAILURES_WITHOUT_PROGRESS = 3


def run_folder(run: Run) -> RunDir:
    return RunDir(Path(run.runs) / run.name)


def absolute(run: Run) -> Run:
    """Paths that hold in every process, whatever folder it runs in."""
    data = replace(run.data, shards=absolute_location(run.data.shards),
                   cache_dir=absolute_location(run.data.cache_dir, home=False))  # each node has a home of its own
    return replace(run, data=data, runs=str(Path(run.runs).expanduser().absolute()))


def settle(run: Run, folder: RunDir) -> tuple[Run, planning.Plan]:
    """The run as it will be trained, and its plan; the folder is only read. UserError for what cannot be resumed."""
    run = absolute(run)
    stored = load(folder.config) if folder.config.is_file() else None
    found, damaged = checkpoint.find(folder.checkpoints)
    if run.resume == "fresh" and folder.config.is_file():
        raise UserError(f"resume=fresh wants an empty run folder, {folder.path} is not. Use resume=auto to go on, or "
                        "another name=.")
    run = planning.resolved(run, os.cpu_count() or 1, stored)
    branches = [str(line["resolution"]) for line in folder.lines("ledger.jsonl") if line["event"] == "branch"]
    last_branch = branches[-1] if branches else None
    if stored:
        branching_at = int(run.resume) if planning.starts_branch(run, last_branch) else None
        planning.refuse_changes(run, stored, branching_at)
    while True:
        plan = planning.make_plan(run, found, last_branch)
        if plan.start is None:
            break
        try:
            checkpoint.read(plan.start.path)
            break
        except checkpoint.Damaged as error:
            damaged.append(str(error))
            found.remove(plan.start)
    if damaged:
        plan = replace(plan, reason=plan.reason + "".join(f"; passed over: {line}" for line in damaged))
    return run, plan


def train(run: Run, shard_if_needed: bool, display: Display | None = None) -> RunDir:
    """Shards (if asked), every stage, evaluations and the report. Safe to call again after any interruption."""
    folder = run_folder(run)
    with folder.locked():
        run, plan = settle(run, folder)
        whole = all(has_level(run.data, stage.resolution) for stage in run.stages)
        if whole:
            refuse_other_settings(run.data)
        if not whole and shard_if_needed:
            locate(run.data.source)
        elif not whole:
            raise UserError(f"data.shards={run.data.shards!r} lacks levels of this run. Make them with gradine shard, "
                            "or use gradine run, which makes what is missing.")
        with display or Display(run) as shown, connected(run) as resources:
            started = time.monotonic()
            folder.record("start", gradine=__version__, command=" ".join(sys.argv), host=socket.gethostname(),
                          cores=os.cpu_count(), versions=versions(), resources=resources)
            refuse_unplaceable(run, plan, resources)
            if shard_if_needed:
                make_shards(run, folder, shown, whole)
            open_run(run, folder, plan, shown)
            session = Session(run, folder, shown)
            try:
                session.train(plan)
                session.evaluations.finish()
            except (UserError, EnvironmentFault) as error:
                folder.record("stopped", reason=str(error))
                raise
            finally:
                session.board.close()
            folder.record("end", seconds=round(time.monotonic() - started, 1))
        report = write_report(folder)
        shown.say(f"report: {report}", "bold green")
    return folder


def open_run(run: Run, folder: RunDir, plan: planning.Plan, shown: Display) -> None:
    """Before the first step: leftovers removed, a branch's past moved aside, settings and data pinned."""
    for orphan in (*checkpoint.remove_orphans(folder.checkpoints), *checkpoint.remove_orphans(folder.path)):
        shown.say(f"removed {orphan}, left by a save that was cut short", "yellow")
    pin_data(run, folder)
    aside = supersede(folder, plan) if plan.branch else None
    if run.init_from and not folder.initial.exists() and not plan.start:
        copy_initial(run, folder, shown)
    write_atomic(folder.config, dump(run).encode())
    if aside:  # recorded last: until then the same command branches again
        folder.record("branch", resolution=plan.branch, images_seen=plan.images_seen,
                      superseded=str(aside.relative_to(folder.path)))
    where = plan.start.name if plan.start else "nothing"
    folder.record("resume", images_seen=plan.images_seen, start=plan.start.name if plan.start else None,
                  reason=plan.reason)
    shown.say(f"resume: from {where} ({plan.reason}){'' if plan.stages else '; nothing is left to train'}")


def supersede(folder: RunDir, plan: planning.Plan) -> Path:
    """Moves what came after the branch point to superseded/<n>/, by rename; nothing is deleted. -> that folder."""
    number = next(n for n in range(1, 10**6) if not (folder.superseded / str(n)).exists())
    aside = folder.superseded / str(number)
    (aside / "checkpoints").mkdir(parents=True)
    (aside / "samples").mkdir()
    shutil.copy2(folder.config, aside / "config.yaml")
    metrics = folder.path / "metrics.jsonl"
    if metrics.is_file():
        shutil.copy2(metrics, aside / "metrics.jsonl")
        kept = [row for row in folder.lines("metrics.jsonl") if row["images_seen"] <= plan.images_seen]
        write_atomic(metrics, "".join(json.dumps(row) + "\n" for row in kept).encode())
    for later in plan.superseded:
        Path(later.path).rename(aside / "checkpoints" / later.name)
    for sample in folder.samples.glob("r*-[0-9]*.png"):
        if int(sample.stem.split("-")[1]) > plan.images_seen:
            sample.rename(aside / "samples" / sample.name)
    return aside


def copy_initial(run: Run, folder: RunDir, shown: Display) -> None:
    """Keeps the newest valid checkpoint of `init_from` in the run folder: later stages draw new layers from it."""
    found, _ = checkpoint.find(RunDir(run.init_from).checkpoints)
    newest, _ = checkpoint.newest_valid(found)
    if newest is None:
        raise UserError(f"init_from={run.init_from!r} holds no valid checkpoint. Give the folder of a run, e.g. "
                        "runs/NAME.")
    source, files = newest
    checkpoint.refuse_other_channels(run, files)
    checkpoint.commit(folder.path, folder.initial, files)
    shown.say(f"weights start from {source.path}")


def pin_data(run: Run, folder: RunDir) -> None:
    """The levels a run trains on never change under it. UserError if they did."""
    digests = {str(stage.resolution): data_digest(run.data, stage.resolution) for stage in run.stages}
    for line in folder.lines("ledger.jsonl"):
        for size, digest in line.get("digests", {}).items():
            if digests.get(size, digest) != digest:
                raise UserError(f"the {size}px shards in {run.data.shards} are not those run {run.name!r} was started "
                                "with. Put these back, or give the run another name=.")
    folder.record("data", digests=digests)


def make_shards(run: Run, folder: RunDir, shown: Display, whole: bool) -> None:
    """Shards what is missing; a `whole` set is used as it is if its source is gone or far away."""
    began = time.monotonic()
    if whole:
        try:
            here = not is_remote(locate(run.data.source))
        except UserError:
            here = False
        if not here:
            shown.say(f"shards: {run.data.shards} is whole; its source {run.data.source} is not here to compare with")
            return

    def progress(done: int, total: int) -> None:
        if done and (done == total or not done % max(1, total // 10)):
            shown.say(f"shards: {done} of {total}")

    # levels above the run's own do no harm: a set made to 1024 px serves a run to 64
    made_to = source_of(Store(run.data.shards, run.data.deadline_s)).get("resolution", 0)
    summary = shard(run.data, max(run.final_resolution, made_to), progress)
    folder.record("shards", **summary, seconds=round(time.monotonic() - began, 1))
    shown.say(f"shards: {summary_line(summary, run.data.shards)}")


class Session:
    """One driver's work on a run: stages in order, evaluations beside them."""

    def __init__(self, run: Run, folder: RunDir, shown: Display) -> None:
        self.run, self.folder, self.shown = run, folder, shown
        self.schedule = growth.schedule(run)
        self.group: Group | None = None
        self.grouped_for: int | None = None
        session = sum(line["event"] == "start" for line in folder.lines("ledger.jsonl"))
        self.board = Board(folder.path / "tensorboard" / f"session-{session}")  # a resume may go over the same images
        self.evaluations = Evaluations(run, folder, shown, self.board)

    def train(self, plan: planning.Plan) -> None:
        """Every stage of the plan; a failed one goes on from the newest valid checkpoint."""
        if self.run.evaluation.when != "end":
            self.evaluations.start_missing()
        start, failures, furthest = plan.start, 0, plan.images_seen
        stages = list(plan.stages)
        try:
            while stages:
                try:
                    start = self.stage(stages[0], start)
                    stages.pop(0)
                    failures = 0
                except Exception as error:
                    reason = one_line(error)
                    self.end_group()
                    start = self.newest()
                    seen = start.images_seen if start else 0
                    failures = 1 if seen > furthest else failures + 1
                    furthest = max(furthest, seen)
                    stages = [i for i in range(len(self.run.stages)) if self.schedule.stage_span(i)[1] > seen]
                    self.folder.record("retry", reason=reason, failures=failures)
                    where = start.name if start else "the beginning"
                    self.shown.say(f"stage failed: {reason}; resuming from {where} "
                                   f"({failures} of {FAILURES_WITHOUT_PROGRESS} failures without progress)", "yellow")
                    if failures >= FAILURES_WITHOUT_PROGRESS:
                        raise EnvironmentFault(
                            f"training failed {failures} times without progress since {where}, last: {reason}. "
                            "The same command resumes once the cause is mended.") from error
                    self.folder.record("resume", images_seen=seen, start=start.name if start else None, reason=reason)
        finally:
            self.end_group()

    def stage(self, index: int, start: checkpoint.Checkpoint | None) -> checkpoint.Checkpoint:
        """Trains one stage to its end; returns its final checkpoint. An EnvironmentFault of a worker is not retried."""
        setting = self.run.stages[index]
        self.join_group(index)
        assert self.group
        self.folder.record("stage_start", resolution=setting.resolution, workers=setting.workers,
                           images_seen=start.images_seen if start else 0)
        initial = str(self.folder.initial) if self.folder.initial.exists() else None
        arguments = (self.run, index, start.path if start else None, str(self.folder.path), initial)
        final = start
        for event in self.group.events(*arguments, idle=self.evaluations.collect):
            self.folder.record(**event)
            if event["event"] == "tick":
                self.shown.tick(event)
                self.board.tick(event)
            elif event["event"] == "checkpoint":
                final = checkpoint.Checkpoint(*(event[key] for key in (
                    "path", "resolution", "phase", "images_seen", "stage_end")))
                when = self.run.evaluation.when
                if when == "checkpoint" or (when == "stage" and final.stage_end):
                    self.evaluations.start(final)
            elif event["event"] == "stage_end":
                share = event["step_s"] / event["wall_s"]
                self.shown.say(f"{setting.resolution:>5}px done in {duration(event['wall_s'])}: {share:.1%} of it in "
                               f"steps, {event['data_s'] / event['wall_s']:.1%} waiting for data")
        assert final is not None, "a stage ends with a checkpoint"
        return final

    def join_group(self, index: int) -> None:
        if self.group and self.grouped_for is not None and planning.same_group(
                self.run.stages[self.grouped_for], self.run.stages[index]):
            return
        self.end_group()
        began = time.monotonic()
        self.group, self.grouped_for = Group(self.run, index), index
        self.folder.record("group", workers=self.run.stages[index].workers, seconds=round(time.monotonic() - began, 2))

    def end_group(self) -> None:
        if self.group:
            self.group.end()
            self.group = None

    def newest(self) -> checkpoint.Checkpoint | None:
        newest, damaged = checkpoint.newest_valid(checkpoint.find(self.folder.checkpoints)[0])
        for line in damaged:
            self.shown.say(f"passed over: {line}", "yellow")
        return newest[0] if newest else None


def versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("torch", "ray", "accelerate", "torchmetrics", "numpy", "pillow", "simplejpeg")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
