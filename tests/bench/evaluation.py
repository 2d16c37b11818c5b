"""What an evaluation takes from a training beside it: python -m tests.bench.evaluation [ROUNDS]

Full-width networks at 32 px, one training worker of one thread. A round trains the same steps twice, as runs of their
own, once alone and once while another process, at the evaluator's priority and with one thread too, evaluates a stored
checkpoint again and again. Two cores are what they need; which comes first alternates. Bar: at least 0.95 of the
throughput without. Others on the machine make single ratios noisy: the median of the rounds is what counts.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gradine.configs.schema import Run, dump, load
from gradine.pipeline import driver, evaluations
from gradine.pipeline.cluster import connected
from gradine.stages import commits
from tests.bench.cluster import of_run, settings


def evaluate_for_ever(config: str, checkpoint: str) -> None:
    """Prints a line before the first, when everything is imported."""
    from gradine.stages.evaluate import evaluate

    os.nice(10)  # as an Evaluator has it
    print("begins", flush=True)
    while True:
        evaluate(load(config), checkpoint)


@contextmanager
def evaluator(run: Run, checkpoint: str) -> Iterator[None]:
    config = Path(run.runs).parent / "evaluator.yaml"
    config.write_text(dump(run))
    command = [sys.executable, "-m", "tests.bench.evaluation", "evaluate", str(config), checkpoint]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}) as it:
        assert it.stdout
        if it.stdout.readline() != "begins\n":
            raise SystemExit("the evaluator did not begin")
        try:
            yield
            if it.poll() is not None:
                raise SystemExit("the evaluator ended: nothing was measured beside it")
        finally:
            it.kill()


def main(rounds: int) -> None:
    evaluations.Evaluations.start = lambda *_: None  # type: ignore[method-assign, assignment]
    with tempfile.TemporaryDirectory() as folder, connected(settings(folder, 1, 0)):
        run = settings(folder, 1, 0)
        trained = driver.train(run, shard_if_needed=True)
        checkpoint = commits.find(commits.location_of(run, trained.path))[0][0].path
        ratios = []
        for number in range(rounds):
            alone, beside = settings(folder, 1, 2 * number + 1), settings(folder, 1, 2 * number + 2)
            alone_s = of_run(alone) if number % 2 == 0 else 0.0
            with evaluator(run, checkpoint):
                beside_s = of_run(beside)
            alone_s = alone_s or of_run(alone)
            ratios.append(alone_s / beside_s)
            print(f"round {number + 1}: alone {alone_s:.2f} s a step, beside an evaluation {beside_s:.2f}, "
                  f"throughput {ratios[-1]:.3f}", flush=True)
        print(f"beside an evaluation: {statistics.median(ratios):.3f} of the throughput alone (bar 0.95)")


if __name__ == "__main__":
    if sys.argv[1:2] == ["evaluate"]:
        evaluate_for_ever(*sys.argv[2:])
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
