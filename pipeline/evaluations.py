"""Evaluations: Ray tasks beside the training, which never waits for them."""

from __future__ import annotations

import os
import time
from typing import Any

from gradine.configs.schema import Run
from gradine.pipeline.cluster import one_line, worker_environment
from gradine.pipeline.display import Board, Display
from gradine.pipeline.run_dir import RunDir
from gradine.stages import checkpoint


class Evaluations:
    """Those of one session: started on stored checkpoints, taken in when they end."""

    def __init__(self, run: Run, folder: RunDir, shown: Display, board: Board) -> None:
        self.run, self.folder, self.shown, self.board = run, folder, shown, board
        self.running: dict[Any, tuple[checkpoint.Checkpoint, float]] = {}
        self.waiting: list[checkpoint.Checkpoint] = []

    def start_missing(self) -> None:
        """Stage ends on disk that have no figures yet, e.g. because the last session was killed while measuring."""
        measured = {row["checkpoint"] for row in self.folder.lines("metrics.jsonl")}
        for found in checkpoint.find(self.folder.checkpoints)[0]:
            if found.stage_end and found.name not in measured:
                self.start(found)

    def start(self, of: checkpoint.Checkpoint) -> None:
        """Now, or when the one before it has ended: more than one would take the places of the training's workers."""
        self.waiting.append(of)
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

    def collect(self, wait_s: float = 0.0) -> None:
        """Takes in the evaluations that ended. One that failed leaves a line with its reason; training goes on."""
        import ray

        if not self.running:
            return
        ready, _ = ray.wait(list(self.running), num_returns=1, timeout=wait_s)
        for ref in ready:
            of, began = self.running.pop(ref)
            rows, error = [], None
            try:
                rows = ray.get(ref)
            except Exception as failure:  # whatever an evaluator dies of, training does not
                error = one_line(failure, stop_for=())
            for row in rows:
                self.folder.append("metrics.jsonl", row)
                self.board.metric(row)
            self.folder.record("evaluation", checkpoint=of.name, resolution=of.resolution, images_seen=of.images_seen,
                               seconds=round(time.monotonic() - began, 1), error=error)
            if error:
                self.shown.say(f"evaluation of {of.name} failed ({error}); training goes on", "yellow")
            else:
                self.shown.say(figures_line(of, rows), "cyan")
        self.start_next()

    def finish(self) -> None:
        """Waits for the evaluations still running; with evaluation.when=end they only start now."""
        if self.run.evaluation.when == "end":
            self.start_missing()
        while self.running or self.waiting:
            self.collect(wait_s=1.0)


def evaluate_beside(run: Run, path: str, out: str, threads: int) -> list[dict[str, Any]]:
    """Body of the evaluation's Ray task: on a CPU it yields to the training."""
    from gradine.stages.evaluate import evaluate

    if not run.evaluation.gpus:
        os.nice(max(0, 10 - os.nice(0)))  # to 10, not by 10: Ray reuses the process, and may have niced it more
    return evaluate(run, path, out, threads)


def figures_line(of: checkpoint.Checkpoint, rows: list[dict[str, Any]]) -> str:
    figures = []
    for row in rows:
        if row["value"] is not None:
            beside = [f"{name} {row[name]:.4g}" for name in ("floor", "untrained", "reals") if row[name] is not None]
            figures.append(f"{row['metric']} {row['value']:.4g} ({', '.join(beside)}; {row['count']} images)")
    return f"{of.resolution:>5}px measured: {', '.join(figures)}"
