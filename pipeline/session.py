"""A driver's work on a run: stages on worker groups, retries, retention, evaluations beside them."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import time
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from gradine.configs.combinations import coupling
from gradine.configs.schema import CrashLoop, Diverged, EnvironmentFault, Run, dump, redacted
from gradine.pipeline import plan as planning
from gradine.pipeline.cluster import one_line
from gradine.pipeline.display import Board, Display, duration
from gradine.pipeline.evaluations import Evaluations, best_checkpoints
from gradine.pipeline.group import STOP_TO_GROW, Group, HostMemory, living_nodes
from gradine.pipeline.lock import Held
from gradine.pipeline.run_dir import RunDir
from gradine.pipeline.signals import Signals, Stopped
from gradine.stages import commits, growth
from gradine.stages.commits import Checkpoint, Term, location_of
from gradine.stages.data import opened
from gradine.stages.memory import OutOfMemory, smaller_micro_batch
from gradine.stages.store import Store, write_atomic
from gradine.stages.watch import NonFinite

FAILURES_WITHOUT_PROGRESS = 3
ROLL_BACKS = 3  # of one run's lineage
SECONDS_TO_LEAVE = 10.0  # for Ray's end after a signal, once a checkpoint is written


class NodeLeaves(RuntimeError):
    """A worker was asked to stop, and not by us. All wrote a checkpoint; they go on elsewhere."""


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
        self.growing = False  # the workers were asked to stop, to go on with more
        self.growing_from = 0  # how many they were
        self.grew_not_on: frozenset[str] = frozenset()  # the nodes on which a group that could grow did not
        self.asked_at = math.inf  # when the workers were told to stop
        self.last_tick = self.furthest = 0
        self.errors: list[str] = []  # since the furthest checkpoint so far
        self.valid: set[str] = set()  # checkpoints that this session has read to their end
        session = sum(line["event"] == "start" for line in folder.lines("ledger.jsonl"))
        board = folder.path / "tensorboard" / f"session-{session}"  # one each: a resume may go over the same images
        self.board = Board(board, folder.tell)
        self.evaluations = Evaluations(run, folder, shown, self.board)

    def train(self, plan: planning.Plan) -> None:
        """Every stage of the plan; a failed one goes on from the newest valid checkpoint."""
        start, stages, self.furthest = plan.start, list(plan.stages), plan.images_seen
        try:
            while stages:
                try:
                    start = self.stage(stages[0], start)
                    if start.images_seen == self.schedule.stage_span(stages[0])[1]:
                        stages.pop(0)
                    if start.images_seen > self.furthest:
                        self.furthest, self.errors = start.images_seen, []
                except Exception as error:
                    reason = one_line(error)
                    self.end_group()
                    if self.signals.asked:  # while it started, before it listened to signals; or no save succeeded
                        self.shown.say(f"stage ended with: {reason}; the newest checkpoint stands", "yellow")
                        raise Stopped(self.signals.asked) from error
                    with self.signals.gently():  # what is decided gets to the disk
                        start = self.recover(error, reason, stages[0])
                    seen = start.images_seen if start else 0
                    stages = [i for i in range(len(self.run.stages)) if self.schedule.stage_span(i)[1] > seen]
        except KeyboardInterrupt:
            say_goodbye(self.folder, self.shown, self.signals)
            raise
        finally:
            self.end_group()

    def recover(self, error: Exception, reason: str, index: int) -> Checkpoint | None:
        """Begins a new term from the newest valid checkpoint, and returns that. CrashLoop after too many failures."""
        self.refuse_if_lost()  # or this would fence off whoever has the run now
        start = self.newest()
        seen, where = (start.images_seen, start.name) if start else (0, "the beginning")
        if seen > self.furthest:
            self.furthest, self.errors = seen, []
        self.errors.append(str(error))
        self.folder.record("retry", reason=reason, failures=len(self.errors))
        if self.mend(error, index, seen):
            self.errors.pop()  # what is done otherwise from now on has not failed yet
        self.shown.say(f"stage failed: {reason}; resuming from {where} ({len(self.errors)} of "
                       f"{FAILURES_WITHOUT_PROGRESS} failures without progress)", "yellow")
        if len(self.errors) >= FAILURES_WITHOUT_PROGRESS:
            raise CrashLoop(f"training failed {len(self.errors)} times without progress since {where}, last: {reason}. "
                            f"What is known of it is in {self.keep_evidence()}. The same command resumes once the "
                            "cause is mended.") from error
        self.refuse_if_lost()
        self.term = commits.begin_term(self.location, start, self.term.skipped)
        commits.remove_orphans(self.location)
        self.folder.record("resume", images_seen=seen, start=start.name if start else None, reason=reason,
                           term=self.term.number)
        return start

    def stage(self, index: int, start: Checkpoint | None) -> Checkpoint:
        """Trains one stage to its end, or until there is room for more workers; returns the checkpoint it came to.

        An EnvironmentFault of a worker is not retried.
        """
        group = self.join_group(index)
        self.settle_format(index, group)
        self.folder.record("stage_start", resolution=self.run.stages[index].resolution, workers=group.count,
                           images_seen=start.images_seen if start else 0)
        self.shown.say(f"{self.run.stages[index].resolution:>5}px {shares_of_cores(self.run, index, group.count)}")
        initial = str(self.folder.initial) if self.folder.initial.exists() else None
        if self.run.evaluation.when != "end":  # also of a stage whose end was written, but not heard of
            self.evaluations.start_missing()
        run = planning.with_workers(self.run, index, group.count)
        arguments = (run, index, start.path if start else None, str(self.folder.path), initial, self.term)
        final = start
        with self.signals.gently():
            for event in group.events(*arguments, idle=self.look_around):
                if event["event"] == "checkpoint" and not event["stage_end"]:
                    self.grow(index)  # before an evaluation of it takes the room that there is
                final = self.take(event) or final
        assert final is not None, "a stage ends with a checkpoint"
        if self.growing:  # its workers were asked to stop, and would stop the next stage
            self.end_group()
            self.folder.record("resume", images_seen=final.images_seen, start=final.name,
                               reason="there is room for more workers", term=self.term.number)
        return final

    def settle_format(self, index: int, group: Group) -> None:
        """What is open of a stage's format is measured by its workers, and kept: it is part of what is computed."""
        from gradine.stages.formats import chosen

        stage, found = self.run.stages[index], None
        if not self.run.is_open(stage):
            return
        run = planning.with_workers(self.run, index, group.count)
        with self.signals.gently():
            for event in group.formats(run, index, str(self.folder.path), idle=self.look_around):
                found = event if event["event"] == "formats" else found
        if found is None and self.signals.asked:
            raise Stopped(self.signals.asked)
        if found is None:
            raise NodeLeaves("a worker was asked to stop (SIGTERM): its node may be going away")
        choice, seconds, reason = chosen(found)
        self.run = self.run.with_format(index, *choice)
        keep_settings(self.run, self.folder)
        self.folder.record("format", resolution=stage.resolution, precision=choice.precision,
                           channels_last=choice.channels_last, seconds=seconds, reason=reason)
        self.shown.say(f"{stage.resolution:>5}px {choice} ({reason})")

    def take(self, event: dict[str, Any]) -> Checkpoint | None:
        """Records and shows an event of the stage; the checkpoint, if it is of one."""
        self.relay_stop()
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
            self.shown.say(f"{size:>5}px stopped at {event['images_seen']:,} images")
            if not self.signals.asked and not self.growing:
                raise NodeLeaves("a worker was asked to stop (SIGTERM): its node may be going away")
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
        self.refuse_if_lost()
        try:
            found = commits.find(self.location)[0]
            counting = {one.name for one in found}
            rows = [row for row in self.folder.lines("metrics.jsonl") if row["checkpoint"] in counting]
            best = best_checkpoints(rows, self.run.checkpoints.best)
            pinned = {*self.run.checkpoints.pin, *best, *self.evaluations.pending()}
            if retired := commits.retire(self.location, self.run.checkpoints.keep, now, pinned, self.valid, found):
                self.folder.record("retired", checkpoints=retired)
        except (OSError, EnvironmentFault) as error:
            self.shown.say(f"old checkpoints could not be deleted: {error}; training goes on", "yellow")

    def look_around(self) -> None:
        """About once a second while a stage trains."""
        self.refuse_if_lost()
        self.relay_stop()
        self.evaluations.collect()
        if time.monotonic() - self.asked_at > self.run.ray.grace_s:
            self.shown.say(f"no checkpoint within ray.grace_s={self.run.ray.grace_s:g}; the last one stands", "red")
            raise Stopped(self.signals.asked)

    def refuse_if_lost(self) -> None:
        """EnvironmentFault if another process has the run by now."""
        if lost := next((one.lost for one in self.held if one.lost), None):
            raise EnvironmentFault(f"{lost}. This process ends; what it has trained since does not count.")

    def relay_stop(self) -> None:
        """Tells the workers, once, that the driver was asked to stop."""
        if self.signals.asked and self.group and self.asked_at == math.inf:
            self.asked_at = time.monotonic()
            once_more = "; once more ends at once" * (self.signals.asked != signal.SIGALRM)
            self.shown.say(f"{self.signals.reason}: writing a checkpoint, then ending{once_more}", "yellow")
            self.group.ask_to_stop()

    def mend(self, error: Exception, index: int, seen: int) -> bool:
        """Does what may mend it: leaves images out, takes fewer at once. -> whether the failure does not count."""
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, NonFinite):
            self.leave_out(cause, seen)
        elif isinstance(cause, HostMemory) and planning.with_less_ahead(self.run) != self.run:
            self.keep_less_ahead(cause, index)
        elif isinstance(cause, HostMemory | OutOfMemory):
            self.take_fewer(cause, index)
        return isinstance(cause, NonFinite | OutOfMemory | NodeLeaves)  # a host may have run out for another's sake

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

    def keep_less_ahead(self, error: HostMemory, index: int) -> None:
        """Fewer batches and no second state wait in the memory of hosts from now on; kept in config.yaml."""
        was = [self.run.data.prefetch, self.run.checkpoints.background]
        self.run = planning.with_less_ahead(self.run)
        keep_settings(self.run, self.folder)
        self.folder.record("less_ahead", resolution=self.run.stages[index].resolution, was=was, reason=str(error))
        self.shown.say("out of memory on a host: from now on data.prefetch=1 and checkpoints.background=false instead "
                       f"of {was[0]} and {str(was[1]).lower()}; any other values given are taken", "yellow")

    def take_fewer(self, error: OutOfMemory | HostMemory, index: int) -> None:
        """The stage's next smaller micro-batch, kept in config.yaml; batch and stddev groups stay."""
        stage = self.run.stages[index]
        micro = None if coupling(self.run) else smaller_micro_batch(stage)
        if micro is None:
            from gradine.pipeline.preflight import no_room  # which itself asks this module where a run stands

            raise EnvironmentFault(f"{error}. {no_room(self.run, index)}") from error
        stages = [replace(each, micro_batch=micro) if each is stage else each for each in self.run.stages]
        self.run = replace(self.run, stages=stages)
        keep_settings(self.run, self.folder)
        self.folder.record("micro_batch", resolution=stage.resolution, was=stage.micro_batch, now=micro,
                           reason=str(error))
        self.shown.say(f"{stage.resolution:>5}px out of memory: micro_batch {stage.micro_batch} -> {micro}, the batch "
                       f"of {stage.batch_size} stays", "yellow")

    def keep_evidence(self) -> Path:
        """crashes/<n>/: the settings, each failure with its stack, and the images that came next."""
        folder = self.folder.numbered("crashes")
        folder.mkdir(parents=True)
        shutil.copy2(self.folder.config, folder / "config.yaml")
        for count, text in enumerate(self.errors, 1):
            plain = re.sub(r"\x1b\[[\d;]*m", "", text)  # without Ray's colours
            (folder / f"failure-{count}.txt").write_text(redacted(plain))
        moment = growth.at(self.schedule, min(self.last_tick, self.schedule.end - 1))
        data = replace(self.run.data, cache_gb=0)  # order alone is asked for
        with suppress(Exception), closing(opened(data, moment.phase.resolution)) as images:
            ids = images.sampler(self.run.training.seed)(self.last_tick, 4 * moment.phase.batch_size)
            (folder / "images.json").write_text(json.dumps({"images_seen": self.last_tick, "ids": ids.tolist()}))
        return folder

    def join_group(self, index: int) -> Group:
        """The workers of a stage: those of the stage before, if they are as it wants them, else new ones."""
        setting = self.run.stages[index]
        before = self.growing_from
        if (self.group and self.grouped_for is not None and planning.same_group(
                self.run.stages[self.grouped_for], setting) and self.group.count in planning.worker_counts(setting)):
            if not self.could_grow(index):
                return self.group
            before = self.group.count
        self.end_group()
        self.growing_from = 0
        began = time.monotonic()
        self.group, self.grouped_for = Group(self.run, index, self.crowded), index
        count, nodes = self.group.count, self.group.nodes()
        if count <= before:
            self.grew_not_on = living_nodes()
        self.folder.record("group", workers=count, wanted=setting.workers, nodes=nodes,
                           seconds=round(time.monotonic() - began, 2))
        if count < setting.workers or len(set(nodes)) > 1:
            fewer = f" of the {setting.workers} it may have" * (count < setting.workers)
            self.shown.say(f"{setting.resolution:>5}px trains with {count} workers{fewer}, on {', '.join(nodes)}")
        return self.group

    def crowded(self, text: str) -> None:
        """There is no place for a stage's workers: an evaluation may have it."""
        self.shown.say(text, "yellow")
        self.evaluations.give_way()

    def end_group(self) -> None:
        self.growing = False
        if self.group:
            self.group.end()
            self.group = None

    def could_grow(self, index: int) -> bool:
        """Whether there seems to be room for more workers; where that was found wrong, not before the nodes change."""
        return (self.group is not None and self.grew_not_on != living_nodes()
                and self.group.could_grow(self.run.stages[index]))

    def grow(self, index: int) -> None:
        """Has a stage with fewer workers than it may have stop after a step, once there is room for more of them."""
        if self.group and not self.growing and not self.signals.asked and self.could_grow(index):
            self.growing, self.growing_from = True, self.group.count
            self.shown.say(f"{self.run.stages[index].resolution:>5}px there is room for more workers: going on with "
                           "them from the next checkpoint", "cyan")
            self.group.ask_to_stop(STOP_TO_GROW)

    def newest(self) -> Checkpoint | None:
        newest, damaged = commits.newest_valid(commits.find(self.location)[0])
        for line in damaged:
            self.shown.say(f"passed over: {line}", "yellow")
        return newest[0] if newest else None


def shares_of_cores(run: Run, index: int, workers: int) -> str:
    """`2 workers x 1 thread for steps, as many for decoding, which yield to them; evaluation beside it on ...`."""
    stage, evaluation = run.stages[index], run.evaluation
    many = "s" * (stage.threads > 1)
    place = f"{evaluation.gpus:g} GPU" if evaluation.gpus else f"{evaluation.cpus:g} niced CPU"
    beside = "after training" if evaluation.when == "end" else f"beside it on {place}"
    return (f"{workers} worker{'s' * (workers > 1)} x {stage.threads} thread{many} for steps, as many for decoding, "
            f"which yield to them; evaluation {beside}")


def keep_settings(run: Run, folder: RunDir) -> None:
    """config.yaml in the run folder, and beside checkpoints that lie elsewhere: a resume there compares with it."""
    write_atomic(folder.config, dump(run).encode())
    if run.checkpoints.location:
        Store(location_of(run, folder.path)).write("config.yaml", dump(run).encode())


def say_goodbye(folder: RunDir, shown: Display, signals: Signals) -> None:
    """Once, before anything is shut down that may hang."""
    if signals.leaving is None:
        folder.record("stopped", reason=signals.reason)
        shown.say(f"stopped: {signals.reason}; the same command goes on", "yellow")
        signals.leave_within(SECONDS_TO_LEAVE)
