"""What the commands besides `run` do: the printed plan, shards alone, and all that is made from a run afterwards."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.progress import Progress

from gradine.configs.schema import (
    Cluster,
    EnvironmentFault,
    Run,
    Stage,
    UserError,
    is_power_of_two,
    load,
    require,
    shard_settings,
    with_evaluation,
)
from gradine.pipeline import plan as planning
from gradine.pipeline import scaling
from gradine.pipeline.cluster import SECONDS_TO_CANCEL, connected, one_line
from gradine.pipeline.display import duration
from gradine.pipeline.driver import absolute, run_folder, settle
from gradine.pipeline.evaluations import deadline_s, evaluator
from gradine.pipeline.figures import figures_line
from gradine.pipeline.places import evaluation_fits
from gradine.pipeline.report import write_report
from gradine.pipeline.run_dir import RunDir
from gradine.pipeline.shards import SHAPING, shard, source_of, summary_line
from gradine.pipeline.sources import locate
from gradine.stages import commits
from gradine.stages.commits import location_of
from gradine.stages.data import has_level, read_index
from gradine.stages.store import Store

if TYPE_CHECKING:
    from gradine.stages.evaluate import Evaluated


def print_plan(run: Run, nodes: str = "") -> None:
    """The stages as a table, then where training would go on and why, and on `nodes` how fast. Writes nothing."""
    folder, cluster, asked = run_folder(run), scaling.Nodes.of(nodes) if nodes else None, run
    run, plan = settle(run, folder)
    print(f"{run.name}: {run.stages[0].resolution} to {run.final_resolution}px in {folder.path}\n")
    print("   px  fade  hold kimg  batch    rate  workers  micro  threads      precision      GB           time  state")
    rows = planning.table(run, plan, measured_rates(folder.history()))
    for row in rows:
        guess = "" if row["measured"] or not row["left"] else "~"
        print(f"{row['resolution']:>5}{row['fade_images'] / 1000:>6g}{row['hold_images'] / 1000:>11g}"
              f"{row['batch_size']:>7}{row['learning_rate']:>8g}{row['workers']:>5} of {row['most_workers']:<3}"
              f"{row['micro_batch']:>4}{row['threads']:>5} {row['device']}{row['precision']:>11}"
              f"{row['memory_gb']:>8.2g}{guess + duration(row['hours'] * 3600):>15}  {row['state']}")
    groups = 1 + sum(not planning.same_group(a, b) for a, b in itertools.pairwise(run.stages))
    evaluation = run.evaluation
    moments = {"end": "after training", "stage": "at each stage's end", "checkpoint": "at each checkpoint"}
    place = f"{evaluation.gpus:g} GPU" if evaluation.gpus else f"{evaluation.cpus:g} niced CPU"
    print(f"""
resume   from {plan.start.name if plan.start else 'nothing'} ({plan.reason})
groups   {groups}: stages with equal workers, cpus, gpus and threads share one
measure  {moments[evaluation.when]} on {place}, at most \
{evaluation.count:,} images
workers  of at most one per minibatch-stddev group; micro: images per forward pass; GB: rough, per worker
auto     the faster precision and memory format, measured by the workers before the stage's first step
~        guessed from {planning.ASSUMED_GMACS['cpu']:g} GMAC/s per core, {planning.ASSUMED_GMACS['gpu']:,.0f} per GPU; \
without ~ from this run's own speed""")
    if cluster:
        sizes = [stage.resolution for stage in run.stages]
        levels = scaling.levels_of(run, {size: read_index(run.data, size) for size in sizes
                                         if run.data.points.kind == "none" and has_level(run.data, size)})
        found = scaling.predictions(run, asked, cluster, [row["left"] for row in rows], levels,
                                    scaling.Measured.of(folder.history()))
        print(f"\n{scaling.page(found, cluster)}")


def measured_rates(history: Iterable[dict[str, Any]]) -> dict[int, float]:
    """Images/s by resolution: the median of a run's own ticks."""
    ticks: dict[int, list[float]] = {}
    for line in history:
        if line["event"] == "tick" and line["images_per_s"]:
            ticks.setdefault(line["resolution"], []).append(line["images_per_s"])
    return {size: sorted(rates)[len(rates) // 2] for size, rates in ticks.items()}


def shard_images(locations: list[str], settings: list[str], resolution: int, resume: bool, add: bool,
                 address: str) -> None:
    """Shards on a Ray, with a progress bar and a summary."""
    require(len(locations) == (1 if resume else 2), "gradine shard wants SOURCE OUT, or OUT alone with --resume, and "
                                                    f"KEY=VALUE settings; it got {' '.join(locations) or 'nothing'}.")
    require(resolution >= 4 and is_power_of_two(resolution),
            f"--resolution={resolution} must be a power of two from 4 up, e.g. 256.")
    data = shard_settings(locations[0], locations[-1], settings)
    if resume:
        before = source_of(Store(data.shards))
        require(bool(before), f"{data.shards!r} holds no shards to go on with. Give SOURCE OUT without --resume.")
        resolution = before["resolution"]
        given = {text.partition("=")[0] for text in settings}
        as_made = {key: before[key] for key in SHAPING if key in before and key not in given}
        data = replace(data, source=before["source"], **as_made)
    locate(data.source)
    alone = Run(name="shards", data=data, stages=[Stage(resolution=4)], ray=Cluster(address=address))
    with connected(alone), Progress() as bar:
        task = bar.add_task("sharding", total=None)
        summary = shard(data, resolution, lambda done, total: bar.update(task, completed=done, total=total), add)
    print(summary_line(summary, data.shards))


def chosen(path: Path, name: str = "", resolution: int = 0
           ) -> tuple[RunDir, Run, commits.Checkpoint, dict[str, bytes]]:
    """A run folder, its settings, and a verified checkpoint of it: by name, else the newest valid one, if given of
    that resolution."""
    require(not (name and resolution), f"--checkpoint={name} and --stage={resolution} both choose a checkpoint. "
                                       "Give one of them.")
    folder = RunDir.existing(path)
    run = load(folder.config)
    location = location_of(run, folder.path)
    found, damaged = commits.find(location)
    if name:
        found = [c for c in found if c.name == name]
        require(bool(found), f"{path} has no checkpoint {name!r}. Look into {location}.")
    if resolution:
        sizes = sorted({c.resolution for c in found})
        found = [c for c in found if c.resolution == resolution]
        require(bool(found), f"{path} has no checkpoint of {resolution} px. Give --stage with one of: "
                             f"{', '.join(map(str, sizes)) or 'none yet'}.")
    newest, passed_over = commits.newest_valid(found)
    if newest is None:
        damaged += passed_over
        raise UserError(f"{path} has no valid checkpoint{': ' + '; '.join(damaged) if damaged else ' yet'}.")
    return folder, run, *newest


def evaluate_run(path: Path, name: str, resolution: int, changes: list[str], address: str) -> None:
    """Measures a checkpoint with `changes`, key=value, to the run's evaluation, here or on the cluster at `address`.

    The run may be training meanwhile: rows and pictures are only added, and neither lock nor ledger is touched.
    """
    folder, run, of, _ = chosen(path, name, resolution)
    run = with_evaluation(run, changes)
    measured = on_cluster(run, of, address) if address else measured_here(run, of.path)
    folder.keep_pictures(measured.pictures)
    folder.append("metrics.jsonl", *measured.rows)
    folder.close()
    print(figures_line(of, measured.rows))
    print(f"report: {write_report(folder)}")


def measured_here(run: Run, path: str) -> Evaluated:
    from gradine.stages.evaluate import evaluate

    return evaluate(run, path, threads=max(1, int(run.evaluation.cpus)))


def on_cluster(run: Run, of: commits.Checkpoint, address: str) -> Evaluated:
    """By an evaluator with evaluation.cpus and .gpus. EnvironmentFault if it cannot be placed, dies or is late."""
    run = absolute(replace(run, ray=replace(run.ray, address=address)))
    asked = run.evaluation
    with connected(run):
        import ray

        if not evaluation_fits(run, ray.nodes()):
            raise EnvironmentFault(f"no node at {address} has evaluation.cpus={asked.cpus:g} and .gpus={asked.gpus:g}. "
                                   "Leave --address out to measure here.")
        actor, threads = evaluator(run)
        placed = actor.__ray_ready__.remote()  # asked first: an actor answers in turn
        found = actor.evaluate.remote(run, of.path, threads)
        try:
            ray.get(placed)  # waiting for a place is not held against it
            return cast("Evaluated", ray.get(found, timeout=deadline_s(run, of.resolution)))
        except ray.exceptions.RayError as error:
            raise EnvironmentFault(f"{of.path} could not be measured at {address}: {one_line(error)}") from error
        finally:
            ray.kill(actor)
            ray.wait([found], timeout=SECONDS_TO_CANCEL)  # an answer that meets Ray's own end aborts this process


def sample_run(path: Path, out: Path, count: int, seed: int, name: str) -> None:
    import torch

    from gradine.stages.generate import draw_latents, generate, grid, load_average, picture, save_png

    folder, run, of, files = chosen(path, name)
    generator = load_average(run, files)
    images = torch.cat(list(generate(generator, draw_latents(run, "sample", count, seed))))
    for number, image in enumerate(images):
        save_png(picture(image), out / f"seed{seed}-{number:05d}.png")
    save_png(grid(images), out / f"seed{seed}-grid.png")
    print(f"{count} images of {of.resolution}px from {folder.path.name}/{of.name}, seed {seed}, in {out}")


def export_run(path: Path, out: Path | None, name: str) -> None:
    from gradine.stages.generate import export

    folder, run, _, files = chosen(path, name)
    for written in export(run, files, out or folder.path / "export"):
        print(f"{written} ({written.stat().st_size / 1e6:.1f} MB)")
