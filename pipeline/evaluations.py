"""Evaluations: Ray tasks beside the training, which never waits for them."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable
from typing import Any

from gradine.configs.schema import EnvironmentFault, Run
from gradine.pipeline.cluster import cancel, one_line, worker_environment
from gradine.pipeline.display import Board, Display
from gradine.pipeline.places import evaluation_fits
from gradine.pipeline.run_dir import RunDir
from gradine.stages import commits, growth
from gradine.stages.commits import location_of

LEAST_SPREAD = 0.25  # of the fakes' variance over the reals': below it diversity collapses
LEAST_COVERAGE = 0.3  # of the best before it: below it too
KNOWN_COVERAGE = 0.5  # of the reals: a run that covered fewer so far can not be told to have lost them
MOST_WAITING = 4  # checkpoints inside stages
JUDGED_AFTER = 4  # half-lives of the averaged generator since the stage's fade


class Evaluations:
    """Those of one session: started on stored checkpoints, taken in when they end."""

    def __init__(self, run: Run, folder: RunDir, shown: Display, board: Board) -> None:
        self.run, self.folder, self.shown, self.board = run, folder, shown, board
        self.running: dict[Any, tuple[commits.Checkpoint, float]] = {}
        self.waiting: list[commits.Checkpoint] = []
        self.tried: set[str] = set()  # names of all that this session has started

    def pending(self) -> set[str]:
        """Names of the checkpoints that wait or are being measured: retention must leave them."""
        return {of.name for of in self.waiting} | {of.name for of, _ in self.running.values()}

    def start_missing(self) -> None:
        """Stage ends on disk that have no figures yet, e.g. because the last session was killed while measuring."""
        measured = {row["checkpoint"] for row in self.folder.lines("metrics.jsonl")} | self.tried
        for found in commits.find(location_of(self.run, self.folder.path))[0]:
            if found.stage_end and found.name not in measured:
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
        import ray

        if self.running or not self.waiting:
            return
        of = self.waiting.pop(0)
        setting = self.run.evaluation
        threads = max(1, int(setting.cpus))
        task = ray.remote(num_cpus=setting.cpus, num_gpus=setting.gpus, max_retries=1)(evaluate_beside)
        placed = task.options(runtime_env=worker_environment(threads))
        ref = placed.remote(self.run, of.path, str(self.folder.path), threads)
        self.running[ref] = of, time.monotonic()

    def give_way(self) -> None:
        """Ends the one under way, to start again later: the training's workers found no place beside it."""
        import ray

        for ref in [*self.running]:
            if not ray.wait([ref], timeout=0)[0]:  # else it is done, and only to be collected
                ray.cancel(ref, force=True)
                of, _ = self.running.pop(ref)
                self.waiting.insert(0, of)
                self.shown.say(f"evaluation of {of.name} gives way to the training, and starts again later", "yellow")

    def close(self) -> None:
        """Ends the one under way: this session does not hear of it any more."""
        cancel(self.running)

    def collect(self, wait_s: float = 0.0) -> None:
        """Takes in the evaluations that ended. One that failed leaves a line with its reason; training goes on."""
        import ray

        if not self.running:
            self.start_next()
            return
        ready, _ = ray.wait(list(self.running), num_returns=1, timeout=wait_s)
        for ref in ready:
            of, began = self.running.pop(ref)
            rows, error = [], None
            try:
                rows = ray.get(ref)
            except Exception as failure:  # whatever an evaluator dies of, training does not
                error = one_line(failure, stop_for=())
            found = collapse(self.run, rows, self.folder.lines("metrics.jsonl"))
            for row in rows:
                self.folder.append("metrics.jsonl", row)
                self.board.metric(row)
            if found:
                self.folder.record("alarm", **found)
            self.folder.record("evaluation", checkpoint=of.name, resolution=of.resolution, images_seen=of.images_seen,
                               seconds=round(time.monotonic() - began, 1), error=error)
            if error:
                self.shown.say(f"evaluation of {of.name} failed ({error}); training goes on", "yellow")
            else:
                self.shown.say(figures_line(of, rows), "cyan")
            if found:
                self.shown.say(f"alarm, {found['alarm']}: {found['message']}", "bold yellow")
        self.start_next()

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


def evaluate_beside(run: Run, path: str, out: str, threads: int) -> list[dict[str, Any]]:
    """Body of the evaluation's Ray task: on a CPU it yields to the training."""
    from gradine.stages.evaluate import evaluate

    if not run.evaluation.gpus:
        os.nice(max(0, 10 - os.nice(0)))  # to 10, not by 10: Ray reuses the process, and may have niced it more
    return evaluate(run, path, out, threads)


def collapse(run: Run, rows: Iterable[dict[str, Any]], earlier: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The alarm of an evaluation whose fakes are too much alike or too few different ones, `earlier` being the rows
    that the run has of other checkpoints. None if all is well, or unknown.

    Not judged until the average had 4 half-lives of alpha = 1, which then have 94% of its weights' say. Before, it
    blends weights that never trained together; and in a fade the figures are those of an alpha not trained yet. Both
    made healthy runs show spreads and coverages below 0.1. Trained stages showed spreads of 0.7 to 0.9.
    """
    row = next((row for row in rows if row.get("spread") is not None), None)
    if row is None or not settled(run, row):
        return None
    found = too_alike(row) or too_few(row, best_coverage(run, row, earlier))
    if not found:
        return None
    seen, size = row["images_seen"], row["resolution"]
    return {"alarm": "collapsing diversity", "figure": found["figure"], "value": row[found["figure"]],
            "bound": found["bound"], "images_seen": seen, "resolution": size,
            "rule": f"{found['rule']}, from {JUDGED_AFTER} half-lives of the average into a hold on",
            "message": f"{size}px after {seen:,} images: the generated images are {found['what']}. "
                       "Look at the samples; if diversity is lost, go on from before with a lower learning rate: "
                       "resume=RESOLUTION branch=new stages.<n>.learning_rate=..."}


def too_alike(row: dict[str, Any]) -> dict[str, Any] | None:
    """By spread, which sees one image repeated: k clearly different ones keep (k - 1) / k of the variance."""
    if row["spread"] >= LEAST_SPREAD:
        return None
    return {"figure": "spread", "bound": LEAST_SPREAD,
            "rule": f"the fakes' pixels vary at least {LEAST_SPREAD} times as much as the reals'",
            "what": f"too much alike: their pixels vary {row['spread']:.3g} times as much as those of the reals, "
                    f"expected {LEAST_SPREAD} or more"}


def too_few(row: dict[str, Any], best: float) -> dict[str, Any] | None:
    """By coverage, held against the `best` before: k images come near some 6 k reals. It sees k up to 12 of 271 reals,
    about 100 of 2,000, and of 24 no more than spread does.

    What reals cover of reals is no bound: generators too young or too small covered none at spreads of 0.6 to 2.
    """
    if best < KNOWN_COVERAGE or row["coverage"] >= LEAST_COVERAGE * best:
        return None
    return {"figure": "coverage", "bound": LEAST_COVERAGE * best,
            "rule": f"the fakes come near at least {LEAST_COVERAGE} times as many reals as at the run's best before, "
                    f"where that was {KNOWN_COVERAGE} of them or more",
            "what": f"too few different ones: they come near {row['coverage']:.1%} of {row['coverage_count']:,} reals, "
                    f"after {best:.1%} at best, expected {LEAST_COVERAGE * best:.1%} or more"}


def settled(run: Run, row: dict[str, Any]) -> bool:
    """Whether the row's averaged generator is of weights that trained together at alpha = 1."""
    holds = {phase.resolution: phase.start for phase in growth.schedule(run).phases if phase.kind == "hold"}
    return row["images_seen"] - holds.get(row["resolution"], math.inf) >= JUDGED_AFTER * run.training.average_half_life


def best_coverage(run: Run, row: dict[str, Any], earlier: Iterable[dict[str, Any]]) -> float:
    """Of the rows before this one, 0 without any: at its resolution, or at all if its stage ended with it, which
    stages that ended well did at 0.46 and more. Sooner one was at 0.1 and rising, 1,000 images after a short fade.

    Rows of fewer images stay out, since they cover more; so do all if this row has none.
    """
    ended = row["images_seen"] in (phase.end for phase in growth.schedule(run).phases if phase.kind == "hold")
    count = row.get("coverage_count") or math.inf
    return max((each["coverage"] for each in earlier if (each.get("coverage_count") or 0) >= count
                and each["images_seen"] < row["images_seen"] and (ended or each["resolution"] == row["resolution"])),
               default=0.0)


def best_checkpoints(rows: Iterable[dict[str, Any]], metric: str) -> set[str]:
    """Rows of metrics.jsonl -> the checkpoint with the lowest `metric` at each resolution; of equal ones the earlier.

    Rows without a value, or with one that is not finite, say nothing.
    """
    best: dict[int, dict[str, Any]] = {}
    for row in rows:
        if row["metric"] == metric and row["value"] is not None and math.isfinite(row["value"]):
            so_far = best.get(row["resolution"], row)
            best[row["resolution"]] = min(so_far, row, key=lambda each: (each["value"], each["images_seen"]))
    return {row["checkpoint"] for row in best.values()}


def figures_line(of: commits.Checkpoint, rows: list[dict[str, Any]]) -> str:
    figures = []
    for row in rows:
        if row["value"] is not None:
            beside = [f"{name} {row[name]:.4g}" for name in ("floor", "untrained", "reals") if row[name] is not None]
            figures.append(f"{row['metric']} {row['value']:.4g} ({', '.join(beside)}; {row['count']} images)")
    return f"{of.resolution:>5}px measured: {', '.join(figures)}"
