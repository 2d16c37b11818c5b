"""What Ray and Accelerate cost a step: python -m tests.bench.cluster [ROUNDS]

Full-width networks at 32 px. A round trains the same steps twice in a row, so that its ratio is of times close
together: as a run, and bare, which only loops over `train_step`. First with one worker, bare in one process; then with
two, bare under torchrun, where torch.distributed sums the gradients. Bar: at most 2 % more for each.

What a run spends on data, ticks, pulses and events between its first step and its last counts; starting and saving do
not. Others on the machine make single ratios noisy: the median of the rounds is what counts.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import torch
import torch.distributed as dist

from gradine.configs.schema import Run, dump, load
from gradine.pipeline import driver, evaluations
from gradine.pipeline.cluster import connected
from gradine.stages import growth, loop
from gradine.stages.data import Images, batches, prefetch
from gradine.stages.losses import penalty_divisor
from gradine.stages.step import Rules, train_step

STEPS = 5


def settings(folder: str, workers: int, number: int) -> Run:
    return load("demo", [
        f"runs={folder}/runs", f"name=run-{workers}-{number}", f"data.shards={folder}/shards",
        f"data.cache_dir={folder}", "network={latent_size: 512, fmap_base: 8192, fmap_max: 512}",
        "training.precision=float32", "training.channels_last=false", "evaluation.when=end",
        f"stages=[{{resolution: 32, hold_images: {4 * workers * STEPS}, batch_size: {4 * workers}, micro_batch: 4, "
        f"workers: {workers}, threads: 1}}]", "checkpoints.every_images=1000000", "evaluation.cpus=0"])


def bare(config: str) -> None:
    """The steps of a stage and nothing else, in one process or as one of torchrun's; prints the seconds of one."""
    run, workers = load(config), int(os.environ.get("WORLD_SIZE", 1))
    if workers > 1:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if workers > 1 else 0
    torch.set_num_threads(1)
    state = loop.initial_state(run, 0, None, torch.device("cpu"), None)
    rules = Rules.of(run, run.stages[0].batch_size, penalty_divisor(run, 32))

    def summed(gradients: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(gradients)
        return gradients

    with closing(Images(run.data, 32, 1)) as images:
        source = prefetch(batches(run, 0, images, 0, rank, workers))
        began = time.perf_counter()
        for _ in range(STEPS):
            train_step(state, next(source), growth.at(growth.schedule(run), state.images_seen), rules,
                       summed if workers > 1 else None)
        if rank == 0:
            print((time.perf_counter() - began) / STEPS)
        source.close()  # type: ignore[attr-defined]
    if workers > 1:
        dist.destroy_process_group()


def of_bare(run: Run) -> float:
    config = Path(run.runs).parent / f"{run.name}.yaml"
    config.write_text(dump(run))
    workers = run.stages[0].workers
    by = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"] if workers > 1 else []
    command = [sys.executable, *by, "-m", "tests.bench.cluster", "bare", str(config)]
    done = subprocess.run(command, text=True, capture_output=True, check=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    return float(done.stdout.splitlines()[-1])


def of_run(run: Run) -> float:
    folder = driver.train(run, shard_if_needed=True)
    end = next(line for line in folder.lines("ledger.jsonl") if line["event"] == "stage_end")
    return float(end["wall_s"] - end["setup_s"] - end["save_s"]) / STEPS


def main(rounds: int) -> None:
    evaluations.Evaluations.start = lambda *_: None  # type: ignore[method-assign, assignment]
    with tempfile.TemporaryDirectory() as folder, connected(settings(folder, 2, 0)):
        for workers in (1, 2):
            ratios = []
            for number in range(rounds):
                run = settings(folder, workers, number)
                whole, plain = of_run(run), of_bare(run)  # in this order: the run makes the shards and their cache
                ratios.append(whole / plain)
                print(f"{workers} workers, round {number + 1}: bare {plain:.2f} s a step, as a run {whole:.2f}, "
                      f"ratio {ratios[-1]:.3f}", flush=True)
            print(f"{workers} workers: {statistics.median(ratios):.3f} of "
                  f"{'a bare loop' if workers == 1 else 'torchrun with two'} (bar 1.02)")


if __name__ == "__main__":
    if sys.argv[1:2] == ["bare"]:
        bare(sys.argv[2])
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
