"""A run from its command to its report: locks, what is to be done, shards, and a session of training."""

from __future__ import annotations

import functools
import json
import os
import platform
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path

import yaml

from gradine import __version__
from gradine.configs.schema import EnvironmentFault, Run, UserError, from_dict, load
from gradine.pipeline import plan as planning
from gradine.pipeline.cluster import connected
from gradine.pipeline.display import Display
from gradine.pipeline.evaluations import measured
from gradine.pipeline.jobs import refuse_relative, relative_paths
from gradine.pipeline.lock import Held, InUse, lease
from gradine.pipeline.places import refuse_unplaceable
from gradine.pipeline.report import write_report
from gradine.pipeline.run_dir import RunDir
from gradine.pipeline.session import Session, keep_settings, say_goodbye
from gradine.pipeline.shards import absolute_location, refuse_other_settings, shard, source_of, summary_line
from gradine.pipeline.signals import Deadline, Signals, Stopped
from gradine.pipeline.sources import locate
from gradine.pipeline.summary import Teller
from gradine.stages import checkpoint, commits
from gradine.stages.commits import Checkpoint, Term, location_of
from gradine.stages.data import data_digest, has_level, read_index
from gradine.stages.store import Store, is_remote, write_atomic

QUEUE_LOOK_S = 5.0  # between two tries of a run that waits for its turn


def run_folder(run: Run) -> RunDir:
    return RunDir(Path(run.runs) / run.name)


def absolute(run: Run) -> Run:
    """Paths that hold in every process, whatever folder it runs in. UserError for relative ones in a Ray job."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    if job.get("runtime_env", {}).get("working_dir"):  # a copy for this job, which the source may have come with
        refuse_relative({key: path for key, path in relative_paths(run).items() if key != "data.source"})
    data = replace(run.data, shards=absolute_location(run.data.shards),
                   cache_dir=absolute_location(run.data.cache_dir, home=False))  # each node has a home of its own
    location = run.checkpoints.location
    kept = replace(run.checkpoints, location=absolute_location(location) if location else "")
    held_out, inception = (path and absolute_location(path) for path in (run.evaluation.held_out,
                                                                        run.evaluation.inception))
    evaluation = replace(run.evaluation, held_out=held_out, inception=inception)
    return replace(run, data=data, checkpoints=kept, evaluation=evaluation,
                   runs=str(Path(run.runs).expanduser().absolute()))


def settle(run: Run, folder: RunDir) -> tuple[Run, planning.Plan]:
    """The run as it will be trained, and its plan; the folder is only read. UserError for what cannot be resumed."""
    run = absolute(run)
    stored = kept_settings(run, folder)
    location = location_of(run, folder.path)
    found, damaged = commits.find(location)
    if run.resume == "fresh" and folder.config.is_file():
        raise UserError(f"resume=fresh wants an empty run folder, {folder.path} is not. Use resume=auto to go on, or "
                        "another name=.")
    ledger = folder.lines("ledger.jsonl")
    run = planning.resolved(planning.within_memory(run, ledger), os.cpu_count() or 1, stored)
    run = planning.as_measured(run, ledger)
    branches = [str(line["resolution"]) for line in ledger if line["event"] == "branch"]
    last_branch = branches[-1] if branches else None
    if stored:
        branching_at = int(run.resume) if planning.starts_branch(run, last_branch) else None
        planning.refuse_changes(run, planning.as_measured(stored, ledger), branching_at)
    while True:
        try:
            plan = planning.make_plan(run, found, last_branch)
        except UserError as error:
            raise UserError("; passed over: ".join([str(error), *damaged])) from None
        if plan.start is None:
            break
        try:
            state = commits.state_of(commits.read(plan.start.path)["state.json"])
            if not plan.start.stage_end and "precision" in state:  # the ledger may be new where checkpoints are not
                run = planning.as_measured(run, [{"event": "format", **state}])
            break
        except commits.Damaged as error:
            damaged.append(str(error))
            found.remove(plan.start)
    if plan.start is None and run.resume != "fresh":
        commits.refuse_all_lost(found, damaged, location)
    if damaged:
        plan = replace(plan, reason=plan.reason + "".join(f"; passed over: {line}" for line in damaged))
    return run, plan


def train(run: Run, shard_if_needed: bool, display: Display | None = None, take_over: bool = False,
          deadline: Deadline | None = None, queue: bool = False) -> RunDir:
    """Shards (if asked), every stage, evaluations and the report. Safe to call again after any interruption.

    Raises Stopped after SIGTERM, Ctrl-C or in time for the deadline; a stage that trained has then ended with a
    checkpoint. However it ends, it is told: in nights/ and to a webhook.
    """
    folder = run_folder(run)
    teller, turn = Teller(run, folder, deadline), Turn(queue, deadline, run.ray.grace_s)
    with teller.whatever_happens(), holding(run, folder, take_over, turn) as held, teller.whatever_happens():
        teller.hold()
        run, plan = settle(run, folder)
        if is_complete(run, folder, plan):
            (display or Display(run)).say(f"all {plan.images_seen:,} images are trained and measured: nothing is left "
                                          f"to do. report: {folder.report}", "bold green")
            return folder
        if run.evaluation.held_out:
            unseen = replace(run.data, shards=run.evaluation.held_out)
            for stage in run.stages:
                read_index(unseen, stage.resolution)  # or UserError
        whole = all(has_level(run.data, stage.resolution) for stage in run.stages)
        if whole:
            if run.data.points.kind == "none":
                refuse_other_settings(run.data)
            pinned_data(run, folder, plan.start)
        if not whole and shard_if_needed:
            locate(run.data.source)
        elif not whole:
            raise UserError(f"data.shards={run.data.shards!r} lacks levels of this run. Make them with gradine shard, "
                            "or use gradine run, which makes what is missing.")
        with (display or Display(run) as shown, Signals(deadline, run.ray.grace_s).heard() as signals,
              connected(run) as resources):
            signals.listen()
            started = time.monotonic()
            folder.tell = functools.partial(shown.say, style="yellow")
            folder.record("start", gradine=__version__, command=" ".join(sys.argv), host=socket.gethostname(),
                          cores=os.cpu_count(), versions=versions(), resources=resources)
            try:
                refuse_unplaceable(run, plan, folder.tell)
                warn_of_features(run, folder)
                if shard_if_needed and run.data.points.kind == "none":
                    make_shards(run, folder, shown, whole)
                term = open_run(run, folder, plan, shown)
                session = Session(run, folder, shown, signals, term, held)
                with closing(session.evaluations):
                    session.train(plan)
                    session.evaluations.finish()
                session.retire(session.schedule.end)  # what stayed only because it waited to be measured
            except (UserError, EnvironmentFault) as error:
                folder.record("stopped", reason=str(error))
                signals.forget_deadline()
                teller.tell(error)
                raise
            except KeyboardInterrupt:
                say_goodbye(folder, shown, signals)
                teller.tell(Stopped(signals.asked or signal.SIGINT))  # before Ray's end, which may take too long
                raise
            folder.record("end", seconds=round(time.monotonic() - started, 1))
        report = write_report(folder)
        shown.say(f"report: {report}", "bold green")
    return folder


class Turn:
    """What is done about a run that another process holds: it is waited for, or refused."""

    def __init__(self, waits: bool, deadline: Deadline | None, grace_s: float) -> None:
        self.waits, self.deadline, self.grace_s, self.said = waits, deadline, grace_s, False

    def wait(self, busy: InUse) -> None:
        """A while. Stopped where there would be no time left to train in."""
        if not self.waits:
            raise busy
        left = self.deadline.seconds_left() - self.grace_s if self.deadline else QUEUE_LOOK_S
        if left <= 0:
            assert self.deadline
            reason = f"until {self.deadline.text}, when {busy.fact} still: nothing was trained here"
            print(reason, flush=True)
            raise Stopped(signal.SIGALRM, reason)
        if not self.said:
            print(f"{busy.fact}: waiting for its end", flush=True)
        self.said = True
        time.sleep(min(QUEUE_LOOK_S, left))


@contextmanager
def holding(run: Run, folder: RunDir, take_over: bool, turn: Turn) -> Iterator[list[Held]]:
    """The locks of the run folder and, if they lie elsewhere, of its checkpoints."""
    with ExitStack() as stack:
        held: list[Held] = []
        while not held:
            try:
                held = [stack.enter_context(folder.locked(take_over))]
                if run.checkpoints.location:
                    held.append(stack.enter_context(lease(location_of(absolute(run), folder.path), take_over)))
            except InUse as busy:
                stack.close()
                held = []
                turn.wait(busy)
        yield held


def is_complete(run: Run, folder: RunDir, plan: planning.Plan) -> bool:
    """Whether all of it was trained, measured and reported before, with these very settings."""
    if plan.stages or not folder.report.is_file() or kept_settings(run, folder) != run:
        return False
    found = commits.find(location_of(run, folder.path))[0]
    done = measured(folder.history())
    return bool(found) and done >= {one.name for one in found if one.stage_end}


def warn_of_features(run: Run, folder: RunDir) -> None:
    """Now, not days later: whoever starts the run can mend it."""
    from gradine.stages.features import Unavailable, open_network

    for name in run.evaluation.features:
        try:
            open_network(name, run.evaluation, run.data.cache_dir, "cpu")
        except Unavailable as reason:
            folder.tell(f"figures of the features {name} will be empty: {reason}")


def open_run(run: Run, folder: RunDir, plan: planning.Plan, shown: Display) -> Term:
    """Before the first step: data and settings pinned, a branch's past moved aside, a term begun, leftovers removed."""
    location = location_of(run, folder.path)
    pin_data(run, folder, plan.start)
    aside = supersede(folder, plan) if plan.branch else None
    if run.init_from and not folder.initial.exists() and not plan.start:
        copy_initial(run, folder, shown)
    before = commits.newest_term(location)
    skipped = {*(before.skipped if before else ()), *(plan.start.skipped if plan.start else ())}
    if plan.branch:
        skipped = {(first, min(last, plan.images_seen)) for first, last in skipped if first < plan.images_seen}
    term = Term()
    if plan.stages:  # else nothing is committed
        term = commits.begin_term(location, plan.start, tuple(sorted(skipped)))
    keep_settings(run, folder)
    if aside:  # recorded last: until then the same command branches again
        folder.record("branch", resolution=plan.branch, images_seen=plan.images_seen,
                      superseded=str(aside.relative_to(folder.path)))
    if unknown := set(run.checkpoints.pin) - {one.name for one in commits.find(location)[0]}:
        shown.say(f"checkpoints.pin names no checkpoint there is yet: {', '.join(sorted(unknown))}", "yellow")
    for orphan in (*commits.remove_orphans(location), *commits.remove_orphans(folder.path)):
        shown.say(f"removed {orphan}, left by a save that was cut short", "yellow")
    where = plan.start.name if plan.start else "nothing"
    folder.record("resume", images_seen=plan.images_seen, start=plan.start.name if plan.start else None,
                  reason=plan.reason, term=term.number)
    shown.say(f"resume: from {where} ({plan.reason}){'' if plan.stages else '; nothing is left to train'}")
    return term


def kept_settings(run: Run, folder: RunDir) -> Run | None:
    """What the run was started with: from its folder, else from where its checkpoints lie; None for a new one."""
    if folder.config.is_file():
        return load(folder.config)
    if not run.checkpoints.location:
        return None
    try:
        return from_dict(yaml.safe_load(Store(location_of(run, folder.path)).read("config.yaml")))
    except FileNotFoundError:
        return None


def supersede(folder: RunDir, plan: planning.Plan) -> Path:
    """Moves what came after the branch point to superseded/<n>/, by rename; nothing is deleted. -> that folder.

    Checkpoints outside the run folder stay where they are: they are of a term that this one goes back behind.
    """
    aside = folder.numbered("superseded")
    (aside / "checkpoints").mkdir(parents=True)
    (aside / "samples").mkdir()
    shutil.copy2(folder.config, aside / "config.yaml")
    metrics = folder.path / "metrics.jsonl"
    if metrics.is_file():
        shutil.copy2(metrics, aside / "metrics.jsonl")
        kept = [row for row in folder.lines("metrics.jsonl") if row["images_seen"] <= plan.images_seen]
        write_atomic(metrics, "".join(json.dumps(row) + "\n" for row in kept).encode())
    for later in (each for each in plan.superseded if Path(each.path).is_relative_to(folder.path)):
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


def pin_data(run: Run, folder: RunDir, start: Checkpoint | None) -> None:
    """The levels a run trains on never change under it. UserError if they did."""
    folder.record("data", digests=pinned_data(run, folder, start))


def pinned_data(run: Run, folder: RunDir, start: Checkpoint | None) -> dict[str, str]:
    """The digest of each level; UserError if the run was started with others."""
    digests = {str(stage.resolution): data_digest(run.data, stage.resolution) for stage in run.stages}
    known = [line.get("digests", {}) for line in folder.lines("ledger.jsonl")]
    if start:  # a ledger may be new where checkpoints are not
        known.append({str(start.resolution): commits.state_of(Store(start.path).read("state.json"))["data"]})
    for line in known:
        for size, digest in line.items():
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


def versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("torch", "ray", "accelerate", "torchmetrics", "numpy", "pillow", "simplejpeg")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
