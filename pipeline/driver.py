"""Runs the plan: stages on worker groups, retries, evaluations beside the training, the ledger."""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from gradine import __version__
from gradine.configs.schema import CrashLoop, Diverged, EnvironmentFault, Run, UserError, dump, load, redacted
from gradine.pipeline import plan as planning
from gradine.pipeline.cluster import Group, connected, one_line, refuse_unplaceable
from gradine.pipeline.display import Board, Display, duration
from gradine.pipeline.evaluations import Evaluations, best_checkpoints
from gradine.pipeline.lock import Held, lease
from gradine.pipeline.report import write_report
from gradine.pipeline.run_dir import RunDir
from gradine.pipeline.shards import absolute_location, refuse_other_settings, shard, source_of, summary_line
from gradine.pipeline.signals import Signals, Stopped
from gradine.pipeline.sources import locate
from gradine.stages import checkpoint, commits, growth
from gradine.stages.commits import Checkpoint, Term, location_of
from gradine.stages.data import Images, data_digest, has_level
from gradine.stages.memory import OutOfMemory, smaller_micro_batch
from gradine.stages.store import Store, is_remote, write_atomic
from gradine.stages.watch import NonFinite

FAILURES_WITHOUT_PROGRESS = 3
ROLL_BACKS = 3  # of one run's lineage


def run_folder(run: Run) -> RunDir:
    return RunDir(Path(run.runs) / run.name)


def absolute(run: Run) -> Run:
    """Paths that hold in every process, whatever folder it runs in."""
    data = replace(run.data, shards=absolute_location(run.data.shards),
                   cache_dir=absolute_location(run.data.cache_dir, home=False))  # each node has a home of its own
    location = run.checkpoints.location
    kept = replace(run.checkpoints, location=absolute_location(location) if location else "")
    return replace(run, data=data, checkpoints=kept, runs=str(Path(run.runs).expanduser().absolute()))


def settle(run: Run, folder: RunDir) -> tuple[Run, planning.Plan]:
    """The run as it will be trained, and its plan; the folder is only read. UserError for what cannot be resumed."""
    run = absolute(run)
    stored = load(folder.config) if folder.config.is_file() else None
    found, damaged = commits.find(location_of(run, folder.path))
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
            commits.read(plan.start.path)
            break
        except commits.Damaged as error:
            damaged.append(str(error))
            found.remove(plan.start)
    if damaged:
        plan = replace(plan, reason=plan.reason + "".join(f"; passed over: {line}" for line in damaged))
    return run, plan


def train(run: Run, shard_if_needed: bool, display: Display | None = None, take_over: bool = False) -> RunDir:
    """Shards (if asked), every stage, evaluations and the report. Safe to call again after any interruption.

    Raises Stopped after SIGTERM or Ctrl-C; training has then ended with a checkpoint.
    """
    folder = run_folder(run)
    with holding(run, folder, take_over) as held:
        run, plan = settle(run, folder)
        whole = all(has_level(run.data, stage.resolution) for stage in run.stages)
        if whole:
            refuse_other_settings(run.data)
            pinned_data(run, folder)
        if not whole and shard_if_needed:
            locate(run.data.source)
        elif not whole:
            raise UserError(f"data.shards={run.data.shards!r} lacks levels of this run. Make them with gradine shard, "
                            "or use gradine run, which makes what is missing.")
        with display or Display(run) as shown, Signals().heard() as signals, connected(run) as resources:
            signals.listen()
            started = time.monotonic()
            folder.tell = functools.partial(shown.say, style="yellow")
            folder.record("start", gradine=__version__, command=" ".join(sys.argv), host=socket.gethostname(),
                          cores=os.cpu_count(), versions=versions(), resources=resources)
            try:
                refuse_unplaceable(run, plan, resources)
                if shard_if_needed:
                    make_shards(run, folder, shown, whole)
                term = open_run(run, folder, plan, shown)
                session = Session(run, folder, shown, signals, term, held)
                try:
                    session.train(plan)
                    session.evaluations.finish()
                    session.retire(session.schedule.end)  # what stayed only because it waited to be measured
                finally:
                    session.board.close()
            except (UserError, EnvironmentFault) as error:
                folder.record("stopped", reason=str(error))
                raise
            except KeyboardInterrupt:
                name = signal.Signals(signals.asked or signal.SIGINT).name
                folder.record("stopped", reason=name)
                shown.say(f"stopped by {name}; the same command goes on", "yellow")
                raise
            folder.record("end", seconds=round(time.monotonic() - started, 1))
        report = write_report(folder)
        shown.say(f"report: {report}", "bold green")
    return folder


@contextmanager
def holding(run: Run, folder: RunDir, take_over: bool) -> Iterator[list[Held]]:
    """The locks of the run folder and, if they lie elsewhere, of its checkpoints."""
    with ExitStack() as stack:
        held = [stack.enter_context(folder.locked(take_over))]
        if run.checkpoints.location:
            held.append(stack.enter_context(lease(location_of(absolute(run), folder.path), take_over)))
        yield held


def open_run(run: Run, folder: RunDir, plan: planning.Plan, shown: Display) -> Term:
    """Before the first step: data and settings pinned, a branch's past moved aside, a term begun, leftovers removed."""
    location = location_of(run, folder.path)
    pin_data(run, folder)
    aside = supersede(folder, plan) if plan.branch else None
    if run.init_from and not folder.initial.exists() and not plan.start:
        copy_initial(run, folder, shown)
    write_atomic(folder.config, dump(run).encode())
    if aside:  # recorded last: until then the same command branches again
        folder.record("branch", resolution=plan.branch, images_seen=plan.images_seen,
                      superseded=str(aside.relative_to(folder.path)))
    before = commits.newest_term(location)
    skipped = {*(before.skipped if before else ()), *(plan.start.skipped if plan.start else ())}
    kept = sorted(each for each in skipped if not plan.branch or each[0] < plan.images_seen)
    term = commits.begin_term(location, plan.start, tuple(kept)) if plan.stages else Term()  # else nothing is committed
    for orphan in (*commits.remove_orphans(location), *commits.remove_orphans(folder.path)):
        shown.say(f"removed {orphan}, left by a save that was cut short", "yellow")
    where = plan.start.name if plan.start else "nothing"
    folder.record("resume", images_seen=plan.images_seen, start=plan.start.name if plan.start else None,
                  reason=plan.reason, term=term.number)
    shown.say(f"resume: from {where} ({plan.reason}){'' if plan.stages else '; nothing is left to train'}")
    return term


def supersede(folder: RunDir, plan: planning.Plan) -> Path:
    """Moves what came after the branch point to superseded/<n>/, by rename; nothing is deleted. -> that folder.

    Checkpoints in an object store stay where they are: they are of a term that this one goes back behind.
    """
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
    for later in (each for each in plan.superseded if not is_remote(each.path)):
        Path(later.path).rename(aside / "checkpoints" / later.name)
    for sample in folder.samples.glob("r*-[0-9]*.png"):
        if int(sample.stem.split("-")[1]) > plan.images_seen:
            sample.rename(aside / "samples" / sample.name)
    return aside


def copy_initial(run: Run, folder: RunDir, shown: Display) -> None:
    """Keeps the newest valid checkpoint of `init_from` in the run folder: later stages draw new layers from it."""
    other = RunDir.existing(run.init_from)
    found, _ = commits.find(location_of(load(other.config), other.path))
    newest, _ = commits.newest_valid(found)
    if newest is None:
        raise UserError(f"init_from={run.init_from!r} holds no valid checkpoint. Give the folder of a run, e.g. "
                        "runs/NAME.")
    source, files = newest
    checkpoint.refuse_other_channels(run, files)
    commits.commit(folder.path, folder.initial.name, files.items())
    shown.say(f"weights start from {source.path}")


def pin_data(run: Run, folder: RunDir) -> None:
    """The levels a run trains on never change under it. UserError if they did."""
    folder.record("data", digests=pinned_data(run, folder))


def pinned_data(run: Run, folder: RunDir) -> dict[str, str]:
    """The digest of each level; UserError if the run was started with others."""
    digests = {str(stage.resolution): data_digest(run.data, stage.resolution) for stage in run.stages}
    for line in folder.lines("ledger.jsonl"):
        for size, digest in line.get("digests", {}).items():
            if digests.get(size, digest) != digest:
                raise UserError(f"the {size}px shards in {run.data.shards} are not those run {run.name!r} was started "
                                "with. Put these back, or give the run another name=.")
    return digests


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

    def __init__(self, run: Run, folder: RunDir, shown: Display, signals: Signals, term: Term,
                 held: list[Held]) -> None:
        self.run, self.folder, self.shown, self.signals, self.term, self.held = (
            run, folder, shown, signals, term, held)
        self.location = location_of(run, folder.path)
        self.schedule = growth.schedule(run)
        self.group: Group | None = None
        self.grouped_for: int | None = None
        self.asked_at = math.inf  # when the workers were told to stop
        self.last_tick = 0
        session = sum(line["event"] == "start" for line in folder.lines("ledger.jsonl"))
        board = folder.path / "tensorboard" / f"session-{session}"  # one each: a resume may go over the same images
        self.board = Board(board, folder.tell)
        self.evaluations = Evaluations(run, folder, shown, self.board)

    def train(self, plan: planning.Plan) -> None:
        """Every stage of the plan; a failed one goes on from the newest valid checkpoint."""
        if self.run.evaluation.when != "end":
            self.evaluations.start_missing()
        start, failures, furthest = plan.start, 0, plan.images_seen
        stages, errors = list(plan.stages), list[str]()
        try:
            while stages:
                try:
                    start = self.stage(stages[0], start)
                    stages.pop(0)
                    failures = 0
                except Exception as error:
                    reason = one_line(error)
                    self.end_group()
                    if self.signals.asked:  # while it started, before it listened to signals; or no save succeeded
                        self.shown.say(f"stage ended without a checkpoint: {reason}; the last one stands", "yellow")
                        raise Stopped(self.signals.asked) from error
                    start = self.newest()
                    seen = start.images_seen if start else 0
                    failures = 1 if seen > furthest else failures + 1
                    furthest = max(furthest, seen)
                    errors = [*errors, str(error)][-failures:]
                    self.folder.record("retry", reason=reason, failures=failures)
                    mended = self.mend(error, stages[0], seen)
                    failures -= mended  # what is done otherwise from now on has not failed yet
                    where = start.name if start else "the beginning"
                    self.shown.say(f"stage failed: {reason}; resuming from {where} "
                                   f"({failures} of {FAILURES_WITHOUT_PROGRESS} failures without progress)", "yellow")
                    if failures >= FAILURES_WITHOUT_PROGRESS:
                        raise CrashLoop(
                            f"training failed {failures} times without progress since {where}, last: {reason}. What "
                            f"is known of it is in {self.keep_evidence(errors)}. The same command resumes once the "
                            "cause is mended.") from error
                    stages = [i for i in range(len(self.run.stages)) if self.schedule.stage_span(i)[1] > seen]
                    self.term = commits.begin_term(self.location, start, self.term.skipped)
                    self.folder.record("resume", images_seen=seen, start=start.name if start else None, reason=reason,
                                       term=self.term.number)
        finally:
            self.end_group()

    def stage(self, index: int, start: Checkpoint | None) -> Checkpoint:
        """Trains one stage to its end; returns its final checkpoint. An EnvironmentFault of a worker is not retried."""
        setting = self.run.stages[index]
        self.join_group(index)
        assert self.group
        self.folder.record("stage_start", resolution=setting.resolution, workers=setting.workers,
                           images_seen=start.images_seen if start else 0)
        initial = str(self.folder.initial) if self.folder.initial.exists() else None
        arguments = (self.run, index, start.path if start else None, str(self.folder.path), initial, self.term)
        final = start
        with self.signals.gently():
            for event in self.group.events(*arguments, idle=self.look_around):
                final = self.take(event) or final
        assert final is not None, "a stage ends with a checkpoint"
        return final

    def take(self, event: dict[str, Any]) -> Checkpoint | None:
        """Records and shows an event of the stage; the checkpoint, if it is of one."""
        self.folder.record(**event)
        size, kind = event["resolution"], event["event"]
        if kind == "tick":
            self.last_tick = event["images_seen"]
            self.shown.tick(event)
            self.board.tick(event)
        elif kind == "checkpoint":
            return self.kept(Checkpoint(*(event[key] for key in (
                "path", "resolution", "phase", "images_seen", "stage_end", "term"))))
        elif kind == "note":
            self.shown.say(f"{size:>5}px {event['text']}", "yellow")
        elif kind == "alarm":
            self.shown.say(f"{size:>5}px ALARM {event['message']}", "red")
        elif kind == "save_failed":
            self.shown.say(f"{size:>5}px checkpoint at {event['images_seen']:,} images could not be written: "
                           f"{event['reason']} ({event['failures']} in a row); training goes on", "red")
        elif kind == "save_left_out":
            self.shown.say(f"{size:>5}px no checkpoint at {event['images_seen']:,} images: {event['reason']}", "yellow")
        elif kind == "stage_end":
            share = event["step_s"] / event["wall_s"]
            self.shown.say(f"{size:>5}px done in {duration(event['wall_s'])}: {share:.1%} of it in "
                           f"steps, {event['data_s'] / event['wall_s']:.1%} waiting for data")
        elif kind == "stopped":
            self.shown.say(f"{size:>5}px stopped at {event['images_seen']:,} images, with a checkpoint")
            if not self.signals.asked:
                raise RuntimeError("a worker was asked to stop (SIGTERM): its node may be going away")
        return None

    def kept(self, new: Checkpoint) -> Checkpoint:
        """Has `new` measured, if it is its turn, and older ones retired."""
        when = self.run.evaluation.when
        if when == "checkpoint" or (when == "stage" and new.stage_end):
            self.evaluations.start(new)
        self.retire(new.images_seen)
        return new

    def retire(self, now: int) -> None:
        """Deletes older checkpoints up to images_seen `now`: never one that is best or pinned, or may become best."""
        best = best_checkpoints(self.folder.lines("metrics.jsonl"), self.run.checkpoints.best)
        pinned = {*self.run.checkpoints.pin, *best, *self.evaluations.pending()}
        try:
            if retired := commits.retire(self.location, self.run.checkpoints.keep, now, pinned):
                self.folder.record("retired", checkpoints=retired)
        except (OSError, EnvironmentFault) as error:
            self.shown.say(f"old checkpoints could not be deleted: {error}; training goes on", "yellow")

    def look_around(self) -> None:
        """About once a second while a stage trains."""
        if lost := next((one.lost for one in self.held if one.lost), None):
            raise EnvironmentFault(f"{lost}. This process ends; what it has trained since does not count.")
        self.evaluations.collect()
        if self.signals.asked and self.group and self.asked_at == math.inf:
            self.asked_at = time.monotonic()
            self.shown.say(f"{signal.Signals(self.signals.asked).name}: writing a checkpoint, then ending; once more "
                           "ends at once", "yellow")
            self.group.ask_to_stop()
        if time.monotonic() - self.asked_at > self.run.ray.grace_s:
            self.shown.say(f"no checkpoint within ray.grace_s={self.run.ray.grace_s:g}; the last one stands", "red")
            raise Stopped(self.signals.asked)

    def mend(self, error: Exception, index: int, seen: int) -> bool:
        """Whether the next try does something else: leaves images out, or takes fewer at once."""
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, NonFinite):
            self.leave_out(cause, seen)
        elif isinstance(cause, OutOfMemory):
            self.take_fewer(cause, index)
        return isinstance(cause, NonFinite | OutOfMemory)

    def leave_out(self, error: NonFinite, seen: int) -> None:
        """The images since the checkpoint that training goes back to update nothing when it passes them again."""
        if len(self.term.skipped) >= ROLL_BACKS:
            left = ", ".join(f"{first:,} to {last:,}" for first, last in self.term.skipped)
            raise Diverged(f"{error}, and the run was rolled back {ROLL_BACKS} times before (images left out: {left}). "
                           "Branch off an earlier stage with a lower learning rate: resume=RESOLUTION branch=new "
                           "stages.<n>.learning_rate=...")
        window = seen, error.images_seen
        self.term = replace(self.term, skipped=(*self.term.skipped, window))
        self.folder.record("roll_back", first=window[0], last=window[1], reason=str(error))
        self.shown.say(f"rolled back from {window[1]:,} to {window[0]:,} images, which will update nothing "
                       f"({len(self.term.skipped)} of {ROLL_BACKS} roll-backs)", "red")

    def take_fewer(self, error: OutOfMemory, index: int) -> None:
        """The stage's next smaller micro-batch, kept in config.yaml; batch and stddev groups stay."""
        stage = self.run.stages[index]
        micro = smaller_micro_batch(stage)
        if micro is None:
            from gradine.pipeline.preflight import no_room  # which itself asks this module where a run stands

            raise EnvironmentFault(f"{error}. {no_room(self.run, index)}") from error
        stages = [replace(each, micro_batch=micro) if each is stage else each for each in self.run.stages]
        self.run = replace(self.run, stages=stages)
        write_atomic(self.folder.config, dump(self.run).encode())
        self.folder.record("micro_batch", resolution=stage.resolution, was=stage.micro_batch, now=micro,
                           reason=str(error))
        self.shown.say(f"{stage.resolution:>5}px out of memory: micro_batch {stage.micro_batch} -> {micro}, the batch "
                       f"of {stage.batch_size} stays", "yellow")

    def keep_evidence(self, errors: list[str]) -> Path:
        """crashes/<n>/: the settings, each failure with its stack, and the images that came next."""
        number = next(n for n in range(1, 10**6) if not (self.folder.path / "crashes" / str(n)).exists())
        folder = self.folder.path / "crashes" / str(number)
        folder.mkdir(parents=True)
        shutil.copy2(self.folder.config, folder / "config.yaml")
        for count, text in enumerate(errors, 1):
            plain = re.sub(r"\x1b\[[\d;]*m", "", text)  # without Ray's colours
            (folder / f"failure-{count}.txt").write_text(redacted(plain))
        moment = growth.at(self.schedule, min(self.last_tick, self.schedule.end - 1))
        with suppress(Exception), closing(Images(self.run.data, moment.phase.resolution)) as images:
            ids = images.sampler(self.run.training.seed)(self.last_tick, 4 * moment.phase.batch_size)
            (folder / "images.json").write_text(json.dumps({"images_seen": self.last_tick, "ids": ids.tolist()}))
        return folder

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

    def newest(self) -> Checkpoint | None:
        newest, damaged = commits.newest_valid(commits.find(self.location)[0])
        for line in damaged:
            self.shown.say(f"passed over: {line}", "yellow")
        return newest[0] if newest else None


def versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("torch", "ray", "accelerate", "torchmetrics", "numpy", "pillow", "simplejpeg")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
