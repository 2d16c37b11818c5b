"""The `gradine` commands: parse, load the configuration, call one function.

Imports that take time are made inside the commands: `gradine --help` answers within a second.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE}
RIGHTS = {errno.EACCES, errno.EPERM}

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
                  help="Train progressively grown GANs from a folder of images. A kimg is 1,000 real images shown.")

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or a bundled recipe such as `demo`.")]
Settings = Annotated[list[str] | None, typer.Argument(
    metavar="[KEY=VALUE]...", help="Settings that override the file's, e.g. stages.*.workers=2.")]
TakeOver = Annotated[bool, typer.Option(
    "--take-over", help="Take a run on a shared disk from a process that cannot be reached: its later saves are void.")]
Until = Annotated[str, typer.Option(
    "--until", metavar="HH:MM", help="End in time for the next HH:MM by the local clock, with a checkpoint written "
    "by then, and exit with 0: the same command goes on the next night.")]
Queue = Annotated[bool, typer.Option(
    "--queue", help="Wait while another process has this run, until --until at most; without it, that is refused.")]
Folder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, e.g. runs/demo.")]
ExploreOut = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Default: RUN/explore/WHAT.")]
ExploreCheckpoint = Annotated[str, typer.Option("--checkpoint", help="Name of a checkpoint; default: the newest.")]
Job = Annotated[str, typer.Argument(metavar="RUN", help="The name of a run, or the id of one of its jobs.")]
Address = Annotated[str, typer.Option(help="URL of the cluster's dashboard; default: RAY_API_SERVER_ADDRESS, else "
                                           "RAY_ADDRESS if it is a URL, else http://127.0.0.1:8265.")]


@app.command()
def run(config: Config, settings: Settings = None,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the plan, like `gradine plan`.")] = False,
        take_over: TakeOver = False, until: Until = "", queue: Queue = False) -> None:
    """Shard if needed, train, evaluate, report. The same command again resumes.

    However it ends, RUN/nights/ gets a page of what happened; GRADINE_WEBHOOK, a URL, is told too if it is set.
    """
    if dry_run:
        plan(config, settings)
    else:
        _train(config, settings, True, take_over, until, queue)


@app.command()
def train(config: Config, settings: Settings = None, take_over: TakeOver = False, until: Until = "",
          queue: Queue = False) -> None:
    """Like `run`, on shards that exist already."""
    _train(config, settings, False, take_over, until, queue)


@app.command()
def plan(config: Config, settings: Settings = None,
         nodes: Annotated[str, typer.Option(
             metavar="NODESxWORKERS", help="Also predict each stage on a cluster, e.g. 8x4: 8 nodes with room for 4 "
             "workers each.")] = "") -> None:
    """Print what `run` would do: stages, images, batches, workers, memory, time, where it resumes."""
    from gradine.configs.schema import load
    from gradine.pipeline.commands import print_plan

    print_plan(load(config, settings or ()), nodes)


@app.command()
def preflight(config: Config, settings: Settings = None) -> None:
    """Run one real step of EVERY stage on its workers: memory, images/s and hours, before a run. Writes nothing."""
    from gradine.configs.schema import load
    from gradine.pipeline.preflight import print_preflight

    print_preflight(load(config, settings or ()))


@app.command()
def shard(arguments: Annotated[list[str], typer.Argument(
              metavar="SOURCE OUT [KEY=VALUE]", help="Where the images are: a folder, zip, tar, WebDataset, "
              "Parquet, IDX, s3://, gs:// or http(s)://. Where the shards go. Settings of `data`, e.g. crop=tile.")],
          resolution: Annotated[int, typer.Option(help="Pixels per side of the top level, a power of two.")] = 1024,
          resume: Annotated[bool, typer.Option(
              "--resume", help="Only OUT is given: go on from its source with its settings.")] = False,
          add: Annotated[bool, typer.Option(
              "--add", help="Append images that SOURCE has gained; shards that are there stay as they are.")] = False,
          address: Annotated[str, typer.Option(help="Ray cluster; empty starts one here.")] = "") -> None:
    """Make per-resolution WebDataset shards of SOURCE in OUT; a second time makes only what is missing."""
    from gradine.pipeline.commands import shard_images

    settings = [text for text in arguments if text.partition("=")[0].isidentifier() and "=" in text]
    shard_images([text for text in arguments if text not in settings], settings, resolution, resume, add, address)


@app.command()
def inspect(shards: Annotated[str, typer.Argument(help="Location of a set of shards.")],
            resolution: Annotated[int, typer.Option(help="Level of the contact sheet; 0: the one nearest to 128.")] = 0,
            sheet: Annotated[Path, typer.Option(help="Where the contact sheet goes.")] = Path("contact.png")) -> None:
    """Check every shard's digest; show counts, sizes, classes, what was rejected and why, and a contact sheet."""
    from gradine.pipeline.inspect import inspect_shards

    inspect_shards(shards, resolution, sheet)


@app.command()
def evaluate(folder: Folder,
             settings: Annotated[list[str] | None, typer.Argument(
                 metavar="[KEY=VALUE]...", help="Settings of `evaluation`, e.g. inception=FILE floor=false.")] = None,
             checkpoint: Annotated[str, typer.Option(help="Name of a checkpoint; default: the newest.")] = "",
             stage: Annotated[int, typer.Option(metavar="RESOLUTION", help="The newest one of this stage.")] = 0,
             metrics: Annotated[str, typer.Option(
                 metavar="NAME,...", help="Instead of evaluation.metrics, e.g. swd,fd,neighbors.")] = "",
             features: Annotated[str, typer.Option(
                 metavar="NAME,...", help="Instead of evaluation.features, e.g. pixels,lite0.")] = "",
             count: Annotated[int, typer.Option(help="Instead of evaluation.count: images per set at most.")] = 0,
             address: Annotated[str, typer.Option(help="Ray cluster to do it on; empty: here.")] = "") -> None:
    """Measure a checkpoint of RUN now, and add the figures to its metrics and report. The run may be training."""
    from gradine.pipeline.commands import evaluate_run

    lists = {"metrics": f"[{metrics}]" * bool(metrics), "features": f"[{features}]" * bool(features),
             "count": f"{count or ''}"}
    changes = [f"{name}={value}" for name, value in lists.items() if value]
    evaluate_run(folder, checkpoint, stage, [*(settings or ()), *changes], address)


@app.command()
def compare(folders: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Run folders.")],
            checkpoint: Annotated[str, typer.Option(help="Of this name, in each run.")] = "",
            stage: Annotated[int, typer.Option(
                metavar="RESOLUTION", help="Default: the highest whose end all runs have measured.")] = 0,
            as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
            picture: Annotated[Path | None, typer.Option(
                metavar="FILE.png", help="Also draw it, with samples of each.")] = None) -> None:
    """Put the figures of runs side by side; refuses what was not measured alike. Runs that differ by training.seed
    alone are one recipe: its mean over seeds, with their standard deviation.
    """
    from gradine.pipeline.compare import compare_runs

    typer.echo(compare_runs(folders, checkpoint, stage, as_json, picture))


@app.command()
def sample(folder: Folder,
           out: Annotated[Path, typer.Option(help="Folder for the PNGs and their grid.")],
           count: Annotated[int, typer.Option(min=1)] = 64,
           seed: Annotated[int, typer.Option(help="The same seed gives the same images.")] = 0,
           checkpoint: Annotated[str, typer.Option(help="Name of a checkpoint; default: the newest.")] = "") -> None:
    """Write COUNT images that the averaged generator of RUN makes."""
    from gradine.pipeline.commands import sample_run

    sample_run(folder, out, count, seed, checkpoint)


explore = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(explore, name="explore", subcommand_metavar="WHAT [OPTIONS]...")


@explore.callback()
def exploring(context: typer.Context, folder: Folder) -> None:
    """Look into what the averaged generator of RUN has learnt; `gradine explore RUN WHAT --help` tells the options.

    An image is named SEED:INDEX, e.g. 7:3 for image 3 of `gradine sample RUN --seed 7`; INDEX alone is of seed 0.
    """
    context.obj = folder


@explore.command()
def interpolate(context: typer.Context,
                seeds: Annotated[str, typer.Option(help="Images with commas between them, e.g. 1,2,7:3.")],
                steps: Annotated[int, typer.Option(min=2, help="Images of a strip.")] = 16,
                video: Annotated[bool, typer.Option("--video/--no-video", help="Also an mp4 through them.")] = True,
                out: ExploreOut = None, checkpoint: ExploreCheckpoint = "") -> None:
    """Strips from each image to the next along great circles, and a video."""
    from gradine.pipeline import explore

    explore.interpolate(context.obj, seeds, steps, video, out, checkpoint)


@explore.command()
def arithmetic(context: typer.Context,
               plus: Annotated[str, typer.Option(metavar="A", help="E.g. smiling women: 1,4,9.")],
               minus: Annotated[str, typer.Option(metavar="B", help="E.g. women.")],
               plus_too: Annotated[str, typer.Option(metavar="C", help="E.g. men; may be left out.")] = "",
               out: ExploreOut = None, checkpoint: ExploreCheckpoint = "") -> None:
    """The image of mean z(A) - mean z(B) + mean z(C), below the three groups and their means."""
    from gradine.pipeline import explore

    explore.arithmetic(context.obj, (plus, minus, plus_too), out, checkpoint)


@explore.command()
def direction(context: typer.Context,
              classes: Annotated[str, typer.Option("--class", metavar="K,...", help="Numbers of classes, from 0.")],
              classifier: Annotated[str, typer.Option(
                  metavar="MODULE:FUNCTION", help="FUNCTION() gives a callable: images [N, C, R, R] in [-1, 1] -> "
                  "logits [N, K]; `discriminator`: that of a run with conditioning=auxiliary.")] = "",
              labels: Annotated[Path | None, typer.Option(
                  metavar="FILE", help="CSV of seed,label or JSON {seed: label}: from the mean of the others to that "
                  "of class K, instead of along the classifier's gradients.")] = None,
              steps: Annotated[int, typer.Option(min=1, help="At most, until the classifier says yes.")] = 100,
              reach: Annotated[float, typer.Option(
                  min=1e-6, help="Strips go so far both ways, in standard deviations of the latents.")] = 2,
              count: Annotated[int, typer.Option(min=1, help="Rows of a strip.")] = 8,
              seed: int = 0, out: ExploreOut = None, checkpoint: ExploreCheckpoint = "") -> None:
    """A direction in which images become class K, its strip, and what it does to the other classes."""
    from gradine.pipeline import explore

    explore.direction(context.obj, classifier, labels, classes, steps, reach, count, seed, out, checkpoint)


@explore.command()
def neighbours(context: typer.Context, count: Annotated[int, typer.Option(min=1, help="Samples.")] = 8,
               features: Annotated[str, typer.Option(
                   help="Near by these: pixels, lite0, ... as in evaluation.features.")] = "pixels",
               seed: int = 0, out: ExploreOut = None, checkpoint: ExploreCheckpoint = "") -> None:
    """Each sample beside the training images that are nearest to it."""
    from gradine.pipeline import explore

    explore.neighbours(context.obj, count, features, seed, out, checkpoint)


@explore.command()
def invert(context: typer.Context, images: Annotated[list[Path], typer.Argument(metavar="IMAGE...")],
           steps: Annotated[int, typer.Option(min=1, help="Of the optimiser.")] = 300,
           restarts: Annotated[int, typer.Option(min=1, help="Latents to start from; the best end counts.")] = 8,
           rate: Annotated[float, typer.Option(min=1e-6, help="Learning rate at the start.")] = 0.1,
           seed: int = 0, out: ExploreOut = None, checkpoint: ExploreCheckpoint = "") -> None:
    """Find latents whose images are nearest to IMAGE...; of autoencoders, by their encoder."""
    from gradine.pipeline import explore

    explore.invert(context.obj, images, steps, restarts, rate, seed, out, checkpoint)


@explore.command()
def traverse(context: typer.Context, rows: Annotated[int, typer.Option(min=1, help="Noise vectors.")] = 8,
             columns: Annotated[int, typer.Option(min=2, help="Values of a continuous code, from -2 to 2.")] = 9,
             seed: int = 0, out: ExploreOut = None, checkpoint: ExploreCheckpoint = "") -> None:
    """Sheets of all labels and codes: each row has its own noise, each column a value."""
    from gradine.pipeline import explore

    explore.traverse(context.obj, rows, columns, seed, out, checkpoint)


@explore.command()
def game(context: typer.Context, out: ExploreOut = None) -> None:
    """For a run of points: each checkpoint as a frame, and all of them as a video."""
    from gradine.pipeline import explore

    explore.game(context.obj, out)


@app.command()
def export(folder: Folder,
           out: Annotated[Path | None, typer.Option(help="Default: RUN/export.")] = None,
           checkpoint: Annotated[str, typer.Option(help="Name of a checkpoint; default: the newest.")] = "") -> None:
    """Write the averaged generator as safetensors and as a torch.export program that runs without gradine."""
    from gradine.pipeline.commands import export_run

    export_run(folder, out, checkpoint)


@app.command()
def report(folder: Folder) -> None:
    """Write RUN/report.html from the run's ledger, metrics and samples."""
    from gradine.pipeline.report import write_report
    from gradine.pipeline.run_dir import RunDir

    typer.echo(f"report: {write_report(RunDir.existing(folder))}")


@app.command()
def submit(config: Config, settings: Settings = None, address: Address = "",
           detach: Annotated[bool, typer.Option("--detach", help="Do not wait for its end.")] = False,
           take_over: TakeOver = False, until: Until = "", queue: Queue = False) -> None:
    """`run` as a job of a Ray cluster, with the code that is installed here; prints its log, ends with its exit code.

    Ctrl-C only stops looking. The nodes' image needs what gradine depends on, not gradine. --until is by this machine's
    clock. Secrets (GRADINE_WEBHOOK, AWS_...) do not travel: the nodes have them in their own environment.
    """
    from gradine.pipeline import jobs
    from gradine.pipeline.signals import Deadline

    if until:
        Deadline.next(until, time.time())  # or it would be refused only there
    options = [*(["--until", until] if until else []), *["--queue"][:queue], *["--take-over"][:take_over]]
    sys.exit(jobs.submit(config, settings or [], options, address, detach))


@app.command()
def status(wanted: Annotated[str, typer.Argument(metavar="[RUN]", help="A run's name, or a job's id.")] = "",
           address: Address = "") -> None:
    """List gradine's jobs on a cluster: since when, how long, and how they ended or what they said last."""
    from gradine.pipeline import jobs

    jobs.status(wanted, address)


@app.command()
def logs(wanted: Job, follow: Annotated[bool, typer.Option("--follow", help="Until the job ends, or Ctrl-C.")] = False,
         address: Address = "") -> None:
    """Print what the newest job of a run has printed."""
    from gradine.pipeline import jobs

    jobs.show_log(wanted, follow, address)


@app.command()
def stop(wanted: Job, address: Address = "") -> None:
    """Ask a run's job to end with a checkpoint, wait for that, and say what became of it."""
    from gradine.pipeline import jobs

    jobs.stop(wanted, address)


@app.command()
def version() -> None:
    """Print gradine's version."""
    from gradine import __version__

    typer.echo(__version__)


def _train(config: str, settings: list[str] | None, shard_if_needed: bool, take_over: bool, until: str,
           queue: bool) -> None:
    from gradine.configs.schema import load
    from gradine.pipeline.signals import Deadline, Stopped

    deadline = Deadline.next(until, time.time()) if until else None
    checked = load(config, settings or ())
    from gradine.pipeline.driver import train as train_run  # torch: after what a typo is refused by

    try:
        train_run(checked, shard_if_needed, take_over=take_over, deadline=deadline, queue=queue)
    except Stopped as stop:
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:  # before the driver listens
        sys.exit(130)


def main() -> None:
    """Exit codes: 0 done, or ended in time for --until, 2 wrong input, 3 a fault of the machine or cluster, 4
    checkpoints cannot be written, 5 the same failure three times, 6 not finite after all roll-backs, 130 Ctrl-C, 143
    SIGTERM (both, and --until, with a checkpoint if a stage was training)."""
    from gradine.configs.schema import EnvironmentFault, UserError, redacted

    try:
        app()
    except (UserError, EnvironmentFault) as error:
        print(f"gradine: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else error.exit_code)
    except OSError as error:
        if error.errno not in DISK | RIGHTS:  # of those a person can mend nothing: the stack says where we are wrong
            raise
        print(f"gradine: {redacted(_reason(error))}. Mend that; the same command then goes on.", file=sys.stderr)
        sys.exit(3)


def _reason(error: OSError) -> str:
    if error.errno in RIGHTS and error.filename is not None:
        path = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
        return f"{path}: uid {os.geteuid()} lacks the right to use it so ({error.strerror})"
    return str(error)


if __name__ == "__main__":
    main()
