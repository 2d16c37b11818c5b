"""What the commands besides `run` do: the printed plan, shards alone, and all that is made from a run afterwards."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from gradine.configs.schema import Cluster, Data, Run, UserError, is_power_of_two, load, require
from gradine.pipeline import plan as planning
from gradine.pipeline.cluster import connected
from gradine.pipeline.display import duration
from gradine.pipeline.driver import run_folder, settle
from gradine.pipeline.run_dir import RunDir
from gradine.stages import checkpoint


def print_plan(run: Run) -> None:
    """The stages as a table, then where training would go on and why. Writes nothing."""
    console = Console(highlight=False)
    folder = run_folder(run)
    run, plan = settle(run, folder)
    rows = planning.table(run, plan, measured_rates(folder.history()))
    shown = Table(title=f"{run.name}: {run.final_resolution}px in {folder.path}", title_justify="left")
    for heading in ("px", "fade kimg", "hold kimg", "batch", "lr", "workers (most)", "micro-batch x threads", "GB/worker",
                    "time", "state"):
        shown.add_column(heading, justify="right", no_wrap=heading == "px")
    for row in rows:
        guess = "" if row["measured"] or not row["left"] else "~"
        shown.add_row(str(row["resolution"]), f"{row['fade_images'] / 1000:g}", f"{row['hold_images'] / 1000:g}",
                      str(row["batch_size"]), f"{row['learning_rate']:g}", f"{row['workers']} ({row['most_workers']})",
                      f"{row['micro_batch']} x {row['threads']} {row['device']}", f"~{row['memory_gb']:.2f}",
                      f"{guess}{duration(row['hours'] * 3600)}", row["state"])
    console.print(shown)
    console.print(f"resume: from {plan.start.name if plan.start else 'nothing'} ({plan.reason})")
    groups = 1 + sum(not planning.same_group(a, b) for a, b in zip(run.stages, run.stages[1:], strict=False))
    evaluation = run.evaluation
    console.print(f"{groups} worker group(s); evaluation at each {evaluation.when}'s end on "
                  f"{f'{evaluation.gpus:g} GPU' if evaluation.gpus else f'{evaluation.cpus:g} CPU, niced'}, "
                  f"at most {evaluation.count:,} images")
    console.print(f"~ guessed from {planning.ASSUMED_GMACS['cpu']:g} GMAC/s per core, {planning.ASSUMED_GMACS['gpu']:,.0f} "
                  "per GPU; times of stages this run has trained are its own")


def measured_rates(history: Iterable[dict[str, Any]]) -> dict[int, float]:
    """Images/s by resolution: the median of a run's own ticks."""
    ticks: dict[int, list[float]] = {}
    for line in history:
        if line["event"] == "tick" and line["images_per_s"]:
            ticks.setdefault(line["resolution"], []).append(line["images_per_s"])
    return {size: sorted(rates)[len(rates) // 2] for size, rates in ticks.items()}


def shard_images(data: Data, resolution: int, address: str) -> None:
    """Shards on a Ray, with a progress bar and a summary."""
    from gradine.configs.schema import Stage
    from gradine.pipeline.shards import locate, shard

    require(resolution >= 4 and is_power_of_two(resolution),
            f"--resolution={resolution} must be a power of two from 4 up, e.g. 256.")
    locate(data.source)
    alone = Run(name="shards", data=data, stages=[Stage(resolution=4, cpus=1)], ray=Cluster(address=address))
    with connected(alone), Progress() as bar:
        task = bar.add_task("sharding", total=None)
        summary = shard(data, resolution, lambda done, total: bar.update(task, completed=done, total=total))
    print(f"{summary['images']:,} images in {summary['shards']} shards per level, {summary['made']} slices made now, "
          f"{summary['bytes'] / 1e6:.1f} MB in {data.shards}; {summary['classes']} classes; {summary['rejected']} rejected"
          f"{' (see rejected.jsonl)' if summary['rejected'] else ''}, {summary['ignored']} other files ignored")


def chosen(path: Path, name: str) -> tuple[RunDir, Run, checkpoint.Checkpoint, dict[str, bytes]]:
    """A run folder, its settings, and a verified checkpoint of it: by name, else the newest valid one."""
    folder = RunDir.existing(path)
    run = load(folder.config)
    found, damaged = checkpoint.find(folder.checkpoints)
    if name:
        found = [c for c in found if c.name == name]
        require(bool(found), f"{path} has no checkpoint {name!r}. Look into {folder.checkpoints}.")
    for candidate in reversed(found):
        try:
            return folder, run, candidate, checkpoint.read(candidate.path)
        except checkpoint.Damaged as error:
            damaged.append(str(error))
    raise UserError(f"{path} has no valid checkpoint{': ' + '; '.join(damaged) if damaged else ' yet'}.")


def evaluate_run(path: Path, name: str) -> None:
    from gradine.pipeline.driver import evaluation_line
    from gradine.pipeline.report import write_report
    from gradine.stages.evaluate import evaluate

    folder, run, of, _ = chosen(path, name)
    rows = evaluate(run, of.path, str(folder.path), threads=max(1, int(run.evaluation.cpus)))
    for row in rows:
        folder.append("metrics.jsonl", row)
    print(evaluation_line(of, rows))
    print(f"report: {write_report(folder)}")


def sample_run(path: Path, out: Path, count: int, seed: int, name: str) -> None:
    import torch
    from PIL import Image

    from gradine.stages.generate import draw_latents, generate, grid, load_average, save_png

    folder, run, of, files = chosen(path, name)
    generator = load_average(run, files)
    images = torch.cat(list(generate(generator, draw_latents(run, "sample", count, seed))))
    for number, image in enumerate(images):
        save_png(Image.fromarray(image.permute(1, 2, 0).numpy()), out / f"seed{seed}-{number:05d}.png")
    save_png(grid(images), out / f"seed{seed}-grid.png")
    print(f"{count} images of {of.resolution}px from {folder.path.name}/{of.name}, seed {seed}, in {out}")


def export_run(path: Path, out: Path | None, name: str) -> None:
    from gradine.stages.generate import export

    folder, run, of, files = chosen(path, name)
    for written in export(run, files, out or folder.path / "export"):
        print(f"{written} ({written.stat().st_size / 1e6:.1f} MB)")
