"""Evaluations: Ray actors beside the training, which never waits for them; alarms and best checkpoints from them."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradine.configs.schema import FORMER_METRICS, EnvironmentFault, Run
from gradine.pipeline import scaling
from gradine.pipeline.cluster import SECONDS_TO_CANCEL, one_line, worker_environment
from gradine.pipeline.display import Board, Display
from gradine.pipeline.figures import figures_line
from gradine.pipeline.places import evaluation_fits
from gradine.pipeline.run_dir import RunDir
from gradine.stages import commits, growth
from gradine.stages.commits import location_of

if TYPE_CHECKING:
    from gradine.stages.evaluate import Evaluated

Row = dict[str, Any]
LEAST_SPREAD = 0.25  # of the fakes' variance over the reals': below it diversity collapses
LEAST_COVERAGE = 0.3  # of the best before it: below it too
LEAST_MODES = 0.75  # of those of a known mixture
KNOWN_COVERAGE = 0.5  # of the reals: a run that covered fewer so far can not be told to have lost them
MOST_COPIES = 0.25  # of the fakes, where 0.01 are expected: above it the training images are learned by heart
FEWEST_TO_COPY, FEWEST_COPIES = 50, 100  # reals and fakes; healthy ones reached 0.21 of fewer (docs/metrics.md)
MOST_WAITING = 4  # checkpoints inside stages
JUDGED_AFTER = 4  # half-lives of the averaged generator since the stage's fade


class Evaluator:
    """An actor: a process of its own, which ends whatever it hangs in. On a CPU it yields to the training."""

    def evaluate(self, run: Run, path: str, threads: int) -> Evaluated:
        from gradine.stages.evaluate import evaluate

        if not run.evaluation.gpus:
            os.nice(10)
        return evaluate(run, path, threads)


def evaluator(run: Run) -> tuple[Any, int]:
    """A new one with a place as run.evaluation asks for it, and its threads."""
    import ray

    setting = run.evaluation
    threads = max(1, int(setting.cpus))
    actor = ray.remote(num_cpus=setting.cpus, num_gpus=setting.gpus, max_restarts=0)(Evaluator)
    return actor.options(runtime_env=worker_environment(threads)).remote(), threads


@dataclass
class Measuring:
    """One under way."""

    of: commits.Checkpoint
    actor: Any
    ready: Any  # a ref that is there once it has a place
    began: float
    placed: bool = False


class Evaluations:
    """Those of one session: started on stored checkpoints, taken in when they end."""

    def __init__(self, run: Run, folder: RunDir, shown: Display, board: Board) -> None:
        self.run, self.folder, self.shown, self.board = run, folder, shown, board
        self.running: dict[Any, Measuring] = {}
        self.waiting: list[commits.Checkpoint] = []
        self.tried: set[str] = set()  # names of all that this session has started
        self.again: set[str] = set()  # of those whose evaluator died, and got another one

    def pending(self) -> set[str]:
        """Names of the checkpoints that wait or are being measured: retention must leave them."""
        return {of.name for of in self.waiting} | {each.of.name for each in self.running.values()}

    def start_missing(self) -> None:
        """Stage ends on disk that have no figures yet, e.g. because the last session was killed while measuring."""
        done = measured(self.folder.history()) | self.tried
        for found in commits.find(location_of(self.run, self.folder.path))[0]:
            if found.stage_end and found.name not in done:
                self.start(found)

    def start(self, of: commits.Checkpoint) -> None:
        """Now, or when the one before it has ended: more than one would take the places of the training's workers."""
        self.tried.add(of.name)
        self.waiting.append(of)
        late = [one for one in self.waiting if not one.stage_end]
        for left_out in late[:-MOST_WAITING]:  # else they, and the checkpoints kept for them, pile up
            self.waiting.remove(left_out)
            self.shown.say(f"{left_out.name} is not measured: measuring takes longer than the time between checkpoints",
                           "yellow")
        self.start_next()

    def start_next(self) -> None:
        if self.running or not self.waiting:
            return
        of = self.waiting.pop(0)
        actor, threads = evaluator(self.run)
        placed = actor.__ray_ready__.remote()  # asked first: an actor answers in turn, and this one may never finish
        ref = actor.evaluate.remote(self.run, of.path, threads)
        self.running[ref] = Measuring(of, actor, placed, time.monotonic())

    def give_way(self) -> None:
        """Ends the one under way, to start again later: the training's workers found no place beside it."""
        import ray

        for ref, each in [*self.running.items()]:
            if not ray.wait([ref], timeout=0)[0]:  # else it is done, and only to be collected
                ray.kill(each.actor)
                del self.running[ref]
                self.waiting.insert(0, each.of)
                self.shown.say(f"evaluation of {each.of.name} gives way to the training, and starts again later",
                               "yellow")

    def close(self) -> None:
        """Ends the one under way, and waits until it has: an answer that meets Ray's own end aborts this process."""
        import ray

        for each in self.running.values():
            ray.kill(each.actor)
        if self.running:
            ray.wait([*self.running], num_returns=len(self.running), timeout=SECONDS_TO_CANCEL)

    def collect(self, wait_s: float = 0.0) -> None:
        """Takes in the evaluations that ended. One that failed leaves a line with its reason; training goes on."""
        import ray

        if self.running:
            ready, _ = ray.wait(list(self.running), num_returns=1, timeout=wait_s)
            for ref in ready:
                self.take(ref, self.running.pop(ref))
            self.end_late()
        self.start_next()

    def take(self, ref: Any, ended: Measuring) -> None:
        """The figures of one that ended, or the reason that there are none."""
        import ray

        try:
            found = ray.get(ref)
        except ray.exceptions.RayActorError as death:  # its node went, or it was killed
            reason = one_line(death, stop_for=())
            if ended.of.name not in self.again:
                self.again.add(ended.of.name)
                self.waiting.insert(0, ended.of)
                self.shown.say(f"the evaluator of {ended.of.name} died ({reason}); another one starts", "yellow")
            else:
                self.failed(ended, reason)
            return
        except Exception as failure:  # whatever an evaluation fails of, training does not
            self.failed(ended, one_line(failure, stop_for=()))
            return
        ray.kill(ended.actor)
        self.folder.keep_pictures(found.pictures)
        told = alarms(self.run, found.rows, self.folder.lines("metrics.jsonl"))
        self.folder.append("metrics.jsonl", *found.rows)
        for row in found.rows:
            self.board.metric(row)
        for alarm in told:
            self.folder.record("alarm", **alarm)
        self.record(ended, None)
        self.shown.say(figures_line(ended.of, found.rows), "cyan")
        for note in found.notes:
            self.shown.say(f"{ended.of.resolution:>5}px {note}", "yellow")
        for alarm in told:
            self.shown.say(f"alarm, {alarm['alarm']}: {alarm['message']}", "bold yellow")

    def end_late(self) -> None:
        """One that takes longer than it may, whatever it hangs in; waiting for a place is not held against it."""
        import ray

        for ref, each in [*self.running.items()]:
            if not each.placed and ray.wait([each.ready], timeout=0)[0]:
                each.placed, each.began = True, time.monotonic()
            most = deadline_s(self.run, each.of.resolution)
            if each.placed and time.monotonic() - each.began > most:
                ray.kill(each.actor)
                del self.running[ref]
                self.failed(each, f"took longer than evaluation.deadline_s={most:g}")

    def failed(self, ended: Measuring, reason: str) -> None:
        """Rows without values say why; the next session tries again."""
        of = ended.of
        self.folder.append("metrics.jsonl", *(
            {"metric": metric, "value": None, "reason": reason, "failed": True, "interval": None, "floor": None,
             "untrained": None, "reals": None, "parts": None, "features": None, "features_digest": None, "count": 0,
             "resolution": of.resolution, "checkpoint": of.name, "images_seen": of.images_seen,
             "seed": self.run.training.seed, "data": None, "seconds": round(time.monotonic() - ended.began, 2)}
            for metric in self.run.evaluation.distances() or self.run.evaluation.metrics))
        self.record(ended, reason)
        self.shown.say(f"evaluation of {of.name} failed ({reason}); training goes on", "yellow")

    def record(self, ended: Measuring, error: str | None) -> None:
        of = ended.of
        self.folder.record("evaluation", checkpoint=of.name, resolution=of.resolution, images_seen=of.images_seen,
                           seconds=round(time.monotonic() - ended.began, 1), error=error)

    def finish(self) -> None:
        """Waits for the evaluations still running; with evaluation.when=end they only start now."""
        import ray

        self.start_missing()
        if self.pending():
            self.shown.say(f"trained; still to be measured: {', '.join(sorted(self.pending()))}")
        fitted = time.monotonic()
        while self.running or self.waiting:
            self.collect(wait_s=1.0)
            if evaluation_fits(self.run, ray.nodes()):
                fitted = time.monotonic()
            elif time.monotonic() - fitted > self.run.ray.group_timeout_s:
                names, asked = ", ".join(sorted(self.pending())), self.run.evaluation
                raise EnvironmentFault(f"{names} cannot be measured: no node with evaluation.cpus={asked.cpus:g} and "
                                       f".gpus={asked.gpus:g} is left. The training is done; the same command measures "
                                       "once there is one.")


def measured(history: Iterable[Row]) -> set[str]:
    """Names of the checkpoints whose evaluation ended well, by the ledger: rows may be of a look at one metric."""
    return {line["checkpoint"] for line in history if line["event"] == "evaluation" and not line["error"]}


def deadline_s(run: Run, resolution: int) -> float:
    """After which an evaluation is taken for hung: as set, else an hour or four times what is predicted."""
    return run.evaluation.deadline_s or max(3600.0, 4 * scaling.evaluation_s(run, resolution, None))


# Alarms --------------------------------------------------------------------------------------------------------------


def alarms(run: Run, rows: list[Row], earlier: Iterable[Row]) -> list[Row]:
    """What the rows of one checkpoint tell a person to look at, `earlier` being the rows that the run has of others."""
    return [found for found in (collapse(run, rows, earlier), memorised(run, rows)) if found]


def collapse(run: Run, rows: Iterable[Row], earlier: Iterable[Row]) -> Row | None:
    """The alarm of fakes that are too much alike or too few different ones. None if all is well, or unknown.

    Not judged until the average had 4 half-lives of alpha = 1, which then have 94% of its weights' say. Before, it
    blends weights that never trained together; and in a fade the figures are those of an alpha not trained yet. Both
    made healthy runs show spreads and coverages below 0.1. Trained stages showed spreads of 0.7 to 0.9.
    """
    known = [row for row in rows if row["value"] is not None and settled(run, row)]
    spread = next((row for row in known if row["metric"] == "spread_pixels16"), None)  # the bound is that of pixels
    covered = sorted((row for row in known if row["metric"].startswith("coverage_")),
                     key=lambda row: row["metric"] != "coverage_pixels16")
    modes = next((row for row in known if row["metric"] == "modes"), None)  # of points, whose density is known
    if modes and (found := lost_modes(modes)):
        return alarm("collapsing diversity", modes, found)
    if spread and (found := too_alike(spread)):
        return alarm("collapsing diversity", spread, found)
    if covered and (found := too_few(covered[0], best_coverage(run, covered[0], earlier))):
        return alarm("collapsing diversity", covered[0], found)
    return None


def memorised(run: Run, rows: Iterable[Row]) -> Row | None:
    """The alarm of fakes nearer to training images than other reals are: by any features, since each sees other copies
    (docs/metrics.md).
    """
    told = [row for row in rows if row["metric"].startswith("copy_rate") and row["value"] is not None
            and row["value"] > MOST_COPIES and row["count"] >= FEWEST_COPIES and settled(run, row)
            and (row["parts"]["held_out"] or row["parts"]["searched"]) >= FEWEST_TO_COPY]
    if not told:
        return None
    most = max(told, key=lambda row: row["value"])
    return alarm("memorised training images", most, {
        "bound": MOST_COPIES, "rule": f"at most {MOST_COPIES:.0%} of the fakes are nearer to a training image than 1% "
                                      "of other reals are",
        "what": f"{most['value']:.1%} of the generated images are nearer to a training image than 1% of other "
                "reals are", "remedy": "Look at samples/*-neighbors.png; more images, or fewer steps, may help."})


def alarm(name: str, row: Row, found: Row) -> Row:
    seen, size = row["images_seen"], row["resolution"]
    return {"alarm": name, "figure": row["metric"], "value": row["value"], "bound": found["bound"],
            "images_seen": seen, "resolution": size,
            "rule": f"{found['rule']}, from {JUDGED_AFTER} half-lives of the average into a hold on",
            "message": f"{size}px after {seen:,} images: {found['what']}. {found['remedy']}"}


LOST_DIVERSITY = ("Look at the samples; if diversity is lost, go on from before with a lower learning rate: "
                  "resume=RESOLUTION branch=new stages.<n>.learning_rate=...")


def lost_modes(row: Row) -> Row | None:
    of = row["parts"]["of"]
    if row["value"] >= LEAST_MODES * of:
        return None
    return {"bound": LEAST_MODES * of, "rule": f"at least {LEAST_MODES:.0%} of the modes are found",
            "remedy": "Try training.loss=relativistic with training.penalty=r1+r2, or network.mlp.minibatch=stddev.",
            "what": f"the generated points lie at {row['value']:g} of {of} modes, expected {LEAST_MODES * of:g} or "
                    "more"}


def too_alike(row: Row) -> Row | None:
    """By spread, which sees one image repeated: k clearly different ones keep (k - 1) / k of the variance."""
    if row["value"] >= LEAST_SPREAD:
        return None
    return {"bound": LEAST_SPREAD, "remedy": LOST_DIVERSITY,
            "rule": f"the fakes' pixels vary at least {LEAST_SPREAD} times as much as the reals'",
            "what": f"the generated images are too much alike: their pixels vary {row['value']:.3g} times as much as "
                    f"those of the reals, expected {LEAST_SPREAD} or more"}


def too_few(row: Row, best: float) -> Row | None:
    """By coverage, held against the `best` before: k images come near some 6 k reals. It sees k up to 12 of 271 reals,
    about 100 of 2,000, and of 24 no more than spread does.

    What reals cover of reals is no bound: generators too young or too small covered none at spreads of 0.6 to 2.
    """
    if best < KNOWN_COVERAGE or row["value"] >= LEAST_COVERAGE * best:
        return None
    return {"bound": LEAST_COVERAGE * best, "remedy": LOST_DIVERSITY,
            "rule": f"the fakes come near at least {LEAST_COVERAGE} times as many reals as at the run's best before, "
                    f"where that was {KNOWN_COVERAGE} of them or more",
            "what": f"the generated images are too few different ones: they come near {row['value']:.1%} of "
                    f"{row['count']:,} reals, after {best:.1%} at best, expected {LEAST_COVERAGE * best:.1%} or more"}


def settled(run: Run, row: Row) -> bool:
    """Whether the row's averaged generator is of weights that trained together at alpha = 1."""
    holds = {phase.resolution: phase.start for phase in growth.schedule(run).phases if phase.kind == "hold"}
    return row["images_seen"] - holds.get(row["resolution"], math.inf) >= JUDGED_AFTER * run.training.average_half_life


def best_coverage(run: Run, row: Row, earlier: Iterable[Row]) -> float:
    """Of the rows before this one, 0 without any: at its resolution, or at all if its stage ended with it, which
    stages that ended well did at 0.46 and more. Sooner one was at 0.1 and rising, 1,000 images after a short fade.

    Rows of fewer images stay out, since they cover more; so do all if this row has none.
    """
    ended = row["images_seen"] in (phase.end for phase in growth.schedule(run).phases if phase.kind == "hold")
    return max((each["value"] for each in earlier if each["metric"] == row["metric"] and each["value"] is not None
                and each["count"] >= row["count"] and each["images_seen"] < row["images_seen"]
                and (ended or each["resolution"] == row["resolution"])), default=0.0)


def best_checkpoints(rows: Iterable[Row], metric: str) -> set[str]:
    """Rows of metrics.jsonl -> the checkpoint with the lowest `metric` at each resolution; of equal ones the earlier.

    Rows without a value, or with one that is not finite, say nothing; those of other counts, features or reals are not
    compared.
    """
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        name = FORMER_METRICS.get(row["metric"], row["metric"])
        if name == FORMER_METRICS.get(metric, metric) and row["value"] is not None and math.isfinite(row["value"]):
            key = tuple(row.get(name) for name in ("resolution", "count", "features_digest", "data"))
            so_far = best.get(key, row)
            best[key] = min(so_far, row, key=lambda each: (each["value"], each["images_seen"]))
    return {row["checkpoint"] for row in best.values()}
