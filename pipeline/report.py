"""One HTML page of a run, from its folder alone: pictures, metrics, curves, times, what went wrong.

The page is one file without script or outside address: pictures are data URIs, curves inline SVG that follows the
page's light or dark colors. What is missing leaves a gap with a word of explanation, so the page can be written at
any moment of a run. Names, reasons and paths come from outside: the template escapes them.
"""

from __future__ import annotations

import base64
import io
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
import yaml
from markupsafe import Markup
from PIL import Image

from gradine.configs.schema import Run, dump, from_dict, require
from gradine.pipeline import figures
from gradine.pipeline.figures import DASH, figure_text
from gradine.pipeline.run_dir import RunDir
from gradine.stages import growth
from gradine.stages.store import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Line = dict[str, Any]  # of ledger.jsonl or metrics.jsonl
COLUMNS = 8  # of a grid
LARGE_ROWS, PAIR_ROWS = 8, 4  # of a grid: as many as are shown large, and beside the reals
CLASS_ROWS = 16  # of both at most, where each row is a class
LARGE_PX, PAIR_PX = 1024, 768  # width a picture is reduced to: nine stages stay below about 8 MB
REJECTED_SHOWN, EVENTS_SHOWN, ALARMS_SHOWN = 20, 100, 20


def write_report(run_dir: RunDir) -> Path:
    """Writes <run folder>/report.html and returns its path. UserError if the folder holds no readable config.yaml."""
    require(run_dir.config.is_file(), f"{run_dir.path} is no run folder: it has no {run_dir.config.name}. "
                                      "Give the path of a run, e.g. runs/<name>.")
    run = from_dict(yaml.safe_load(run_dir.config.read_text()))
    ledger, history = run_dir.lines("ledger.jsonl"), run_dir.history()
    plan = growth.schedule(run)
    reached = max((line["images_seen"] for line in history if "images_seen" in line), default=0)
    spans = [(start, min(end, reached)) for start, end in map(plan.stage_span, range(len(run.stages)))]
    stages = [stage_facts(run, index, span, history) for index, span in enumerate(spans)]
    rows = figures.latest(run_dir.lines("metrics.jsonl"), fullest=True)
    results = [result for stage, span in zip(run.stages, spans, strict=True)
               if (result := stage_result(run_dir, rows, stage.resolution, span, run.network.classes))]
    distances = [row for result in results if (row := result.metrics.get("swd"))]
    ticks = [line for line in history if line["event"] == "tick"]
    page = template("report.html.jinja").render(
        run=run, reached=reached, end=plan.end, seconds=working_seconds(ledger), stages=stages, results=results,
        hero=newest_samples(results, run.network.classes), panels=curves(ticks, plan, reached),
        distance=distance_by_stage(distances),
        course=distances_over_checkpoints(rows, spans, run, plan, reached),
        final=next((row for row in reversed(distances) if row["value"] is not None), None),
        shards=_last(ledger, "shards"), rejected=rejected(run), rejected_shown=REJECTED_SHOWN,
        alarms=[line for line in ledger if line["event"] == "alarm"], alarms_shown=ALARMS_SHOWN,
        events=events(ledger, ticks), events_shown=EVENTS_SHOWN, settings=dump(run), start=_last(ledger, "start"),
        written=time.time(), figures=figures)
    write_atomic(run_dir.report, page.encode(errors="replace"))  # a file name may hold bytes that are no UTF-8
    return run_dir.report


def working_seconds(ledger: Iterable[Line]) -> float:
    """Wall time of all sessions, each from its start to its end, or to its last sign of life if it was killed."""
    total = began = last = 0.0
    running = False
    for line in ledger:
        if line["event"] == "start":
            total, began, running = total + last - began, line["time"], True
        if running:
            last = line["time"]
        running = running and line["event"] != "end"
    return total + last - began


# Stages ------------------------------------------------------------------------------------------------------------


def stage_facts(run: Run, index: int, span: tuple[int, int], history: list[Line]) -> dict[str, Any]:
    """A row of the table of stages; None where the ledger does not say (yet)."""
    setting, (start, seen) = run.stages[index], span
    own = [line for line in history if line.get("resolution") == setting.resolution]
    rates = [line["images_per_s"] for line in own if line["event"] == "tick" and line["images_per_s"] is not None]
    done = _last(own, "stage_end") or {}
    wall = done.get("wall_s")
    return {
        "resolution": setting.resolution, "batch": setting.batch_size, "workers": setting.workers,
        "fade": setting.fade_images if index else 0, "hold": setting.hold_images, "seen": max(0, seen - start),
        "wall_s": wall, "save_s": done.get("save_s"), "rate": float(np.median(rates)) if rates else None,
        "step_share": done["step_s"] / wall if wall else None, "data_share": done["data_s"] / wall if wall else None,
        "resumed": any(line["event"] == "resume" and start < line["images_seen"] < seen for line in history)}


@dataclass(frozen=True)
class Result:
    """What one stage's last evaluation left: pictures and metric rows, either of which may be missing."""

    resolution: int
    metrics: dict[str, Line]  # in the order in which they are read
    samples: Path | None = None
    images_seen: int | None = None  # of the samples
    fakes: Picture | None = None
    reals: Picture | None = None
    strip: Picture | None = None  # the first latents, in one row
    tiles: int = 0  # of the strip
    neighbors: Picture | None = None  # fakes, and below each the training image nearest to it
    neighbors_seen: int | None = None


def stage_result(run_dir: RunDir, rows: list[Line], resolution: int, span: tuple[int, int], classes: int = 0
                 ) -> Result | None:
    """Of files and rows inside the stage's span: those of a branch that was given up may lie beyond it.

    Shown is the last checkpoint of which an evaluation worked. Points, of 1 px, have a plot instead of a grid.
    """
    own = [row for row in rows if row["resolution"] == resolution and span[0] < row["images_seen"] <= span[1]]
    shown = max(own, key=lambda row: (not row["failed"], row["images_seen"]), default={"checkpoint": None})
    metrics = {row["metric"]: row for row in sorted(own, key=lambda row: figures.order(row["metric"]))
               if row["checkpoint"] == shown["checkpoint"]}
    beside = opened(run_dir.samples / f"r{resolution:04d}-reals.png")
    seen, path, grid = newest_picture(run_dir, resolution, span, "")
    neighbors_seen, _, neighbors = newest_picture(run_dir, resolution, span, "-neighbors")
    nearest = embed(neighbors, LARGE_PX) if neighbors else None
    if grid is None:
        found = Result(resolution, metrics, neighbors=nearest, neighbors_seen=neighbors_seen)
        return found if metrics or nearest else None
    if resolution == 1:
        return Result(resolution, metrics, path, seen)
    tiles = min(COLUMNS, max(1, grid.width // resolution))
    strip = grid.crop((0, 0, tiles * resolution, resolution))
    fakes, reals = (embed(top_of(image, rows_of(classes, PAIR_ROWS) * resolution), PAIR_PX) if image else None
                    for image in (grid, beside))
    return Result(resolution, metrics, path, seen, fakes, reals, embed(strip, LARGE_PX), tiles, nearest,
                  neighbors_seen)


def newest_picture(run_dir: RunDir, resolution: int, span: tuple[int, int], kind: str
                   ) -> tuple[int, Path, Image.Image] | tuple[None, None, None]:
    """(images seen, file, picture) of samples/r<resolution>-<images seen><kind>.png; Nones without a whole one."""
    files = {int(number): path for path in run_dir.samples.glob(f"r{resolution:04d}-*{kind}.png")
             if (number := path.stem.partition("-")[2].removesuffix(kind)).isdecimal()}
    seen = max((seen for seen in files if span[0] < seen <= span[1]), default=None)
    picture = opened(files[seen]) if seen is not None else None
    return (seen, files[seen], picture) if seen is not None and picture else (None, None, None)


def newest_samples(results: list[Result], classes: int = 0) -> tuple[Result, Picture] | None:
    """The newest stage with samples, and these as large as the page has them."""
    for result in reversed(results):
        if result.samples and (grid := opened(result.samples)):
            shown = grid if result.resolution == 1 else top_of(grid, rows_of(classes, LARGE_ROWS) * result.resolution)
            return result, embed(shown, LARGE_PX)
    return None


def rows_of(classes: int, usual: int) -> int:
    """How many of a grid's rows are shown."""
    return min(classes, CLASS_ROWS) or usual


# Pictures ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    uri: str
    width: int  # of the embedded file
    height: int


def embed(image: Image.Image, most: int) -> Picture:
    """The very pixels as PNG, or, wider than `most`, reduced to it as JPEG."""
    buffer = io.BytesIO()
    if image.width <= most:
        image.save(buffer, kind := "png")
    else:
        height = max(1, round(image.height * most / image.width))
        image = image.resize((most, height), Image.Resampling.LANCZOS, reducing_gap=2.0)
        image.save(buffer, kind := "jpeg", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode()
    return Picture(f"data:image/{kind};base64,{data}", image.width, image.height)


def top_of(image: Image.Image, height: int) -> Image.Image:
    return image.crop((0, 0, image.width, min(image.height, height)))


def opened(path: Path) -> Image.Image | None:
    """A grid as RGB; None for a missing or torn file."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError):  # Pillow calls a broken PNG a SyntaxError
        return None


# Curves ------------------------------------------------------------------------------------------------------------

# Colors that matplotlib writes and the page's style sheet replaces, so that one drawing is right by day and by night.
INK, MUTED, LINE, FADE = "#00000a", "#00000b", "#00000c", "#00000d"
SERIES = ("#00001a", "#00001b", "#00001c")
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", FADE: "fade", **dict(zip(SERIES, "abc", strict=True))}


@dataclass(frozen=True)
class Panel:
    title: str
    series: tuple[str, ...]  # names in ticks, in the order of SERIES
    log: bool
    meaning: str
    svg: str = ""
    beyond: int = 0  # points outside the axis


PANELS = (
    Panel("Losses", ("loss_d", "loss_g"), False, "Of the discriminator and the generator, with all their terms."),
    Panel("Reconstruction", ("reconstruction",), True, "Mean squared error of what comes back from the latents."),
    Panel("Divergence", ("divergence",), False, "In nats: what the latents of an image tell beyond the prior; at 0 "
                                                "nothing."),
    Panel("Scores", ("score_real", "score_fake"), False, "Mean score of reals and fakes; their gap estimates how far "
                                                         "apart the discriminator sees them."),
    Panel("Penalty and gradient norm", ("penalty", "gradient_norm"), True, "The norm is what the penalty pulls to its "
                                                                           "target."),
    Panel("Class and code", ("classification", "information"), False, "In nats: how wrong the discriminator is about "
                                                                      "them."),
    Panel("Gradient of the generator", ("gradient_g",), True, "Its largest entry; where it vanishes, nothing "
                                                              "is learned."),
    Panel("Augmentation", ("augmentation",), False, "Probability that an image is changed before the discriminator "
                                                    "sees it."),
    Panel("Speed", ("images_per_s",), True, "Images per second, waits and checkpoints included."),
)


def curves(ticks: list[Line], plan: growth.Schedule, reached: int) -> list[Panel]:
    """Each panel over images seen, of what the run has: series without a single finite point are left out."""
    drawn = []
    for panel in PANELS:
        known = {name: (x, y) for name in panel.series for x, y in [_finite(ticks, name, panel.log)] if x.size}
        if known:
            figure, axes = _figure(panel.log)
            for color, (x, y) in zip(SERIES, known.values(), strict=False):
                _plot(axes, x, y, color)
            beyond = _limit(axes, np.concatenate([y for _, y in known.values()]), panel.log)
            _mark_stages(axes, plan, reached)
            drawn.append(Panel(panel.title, (*known,), panel.log, panel.meaning, _svg(figure, panel.title), beyond))
    return drawn


def distance_by_stage(rows: list[Line]) -> Markup | None:
    """Each stage's SWD between its noise floor and its untrained value."""
    names = ("value", "floor", "untrained")
    values = {name: np.array([row[name] for row in rows], float) for name in names}
    if not any(np.any(value > 0) for value in values.values()):
        return None
    figure, axes = _figure(log=True)
    for name, color, style in zip(names, SERIES, ("o-", "s:", "^--"), strict=True):
        axes.plot(range(len(rows)), np.where(values[name] > 0, values[name], np.nan), style, color=color, markersize=5)
    axes.set_xticks(range(len(rows)), [str(row["resolution"]) for row in rows])
    axes.margins(x=0.08)
    shown = np.concatenate([value[value > 0] for value in values.values()])
    axes.set_ylim(shown.min() / 2, shown.max() * 2)
    return _svg(figure, "SWD by stage")


@dataclass(frozen=True)
class Course:
    metrics: list[str]  # in the order of SERIES
    svg: str


def distances_over_checkpoints(rows: list[Line], spans: list[tuple[int, int]], run: Run, plan: growth.Schedule,
                               reached: int) -> Course | None:
    """Of each stage a line for each distance, where a stage has several measured checkpoints."""
    metrics = figures.distances_of(rows)
    lines: list[tuple[str, list[Line]]] = []
    for stage, (first, last) in zip(run.stages, spans, strict=True):
        own = sorted((row for row in rows if row["resolution"] == stage.resolution and row["value"] is not None
                      and row["value"] > 0 and first < row["images_seen"] <= last), key=lambda row: row["images_seen"])
        for metric in metrics:  # those measured as the stage's last one was
            newest = next((row for row in reversed(own) if row["metric"] == metric), None)
            lines.append((metric, [row for row in own if newest and figures.alike(row, newest)]))
    if all(len(of_stage) < 2 for _, of_stage in lines):
        return None
    figure, axes = _figure(log=True)
    for metric, of_stage in lines:
        axes.plot([row["images_seen"] for row in of_stage], [row["value"] for row in of_stage], "o-", markersize=4,
                  linewidth=1.3, color=SERIES[metrics.index(metric)])
    _mark_stages(axes, plan, reached)
    return Course(metrics, _svg(figure, "Distances over checkpoints"))


def _figure(log: bool) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(5.6, 2.7))
    axes = figure.add_axes((0.105, 0.1, 0.88, 0.79))
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}") if log else EngFormatter(sep=""))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.tick_params(which="both", length=0, labelsize=9, labelcolor=MUTED)
    axes.spines[:].set_visible(False)
    return figure, axes


def _finite(ticks: list[Line], name: str, positive: bool) -> tuple[np.ndarray, np.ndarray]:
    x = np.array([tick["images_seen"] for tick in ticks], float)
    y = np.array([tick.get(name) for tick in ticks], float)
    keep = np.isfinite(y) & ((y > 0) | (not positive))
    return x[keep], y[keep]


def _plot(axes: Axes, x: np.ndarray, y: np.ndarray, color: str, most: int = 400) -> None:
    """A line; of more than `most` points, the means of `most` runs of neighbours within their range."""
    runs = [run for run in np.array_split(np.arange(len(x)), most) if run.size]
    means = [y[run].mean() for run in runs]
    centres = [x[run].mean() for run in runs]
    if len(x) > most:
        axes.fill_between(centres, [y[run].min() for run in runs], [y[run].max() for run in runs], color=color,
                          alpha=0.2, linewidth=0)
    axes.plot(centres, means, color=color, linewidth=1.3, marker="." if len(x) < 30 else None, markersize=4)


def _limit(axes: Axes, values: np.ndarray, log: bool) -> int:
    """Lets single spikes run out of the axis, so that the rest can be read. -> how many points lie beyond it."""
    values = np.log10(values) if log else values
    low, high = np.percentile(values, [0.5, 99.5])
    room = 0.3 * (high - low) + (0.3 if log else 0.0)
    low, high = low - room, high + room
    if low < high:
        axes.set_ylim(*(10.0 ** np.array([low, high]) if log else (low, high)))
    return int(np.sum((values < low) | (values > high)))


def _mark_stages(axes: Axes, plan: growth.Schedule, reached: int) -> None:
    """Fades shaded, a line where a stage starts, its resolution above if there is room."""
    axes.set_xlim(0, max(1, reached))
    above = axes.get_xaxis_transform()
    for phase in plan.phases:
        end = min(phase.end, reached)
        if phase.start < reached and phase.kind == "fade":
            axes.axvspan(phase.start, end, color=FADE, linewidth=0)
    for index in sorted({phase.stage for phase in plan.phases}):
        start, end = plan.stage_span(index)
        if start < reached:
            axes.axvline(start, color=MUTED, linewidth=0.7)
        if (min(end, reached) - start) > 0.06 * reached:
            resolution = next(phase.resolution for phase in plan.phases if phase.stage == index)
            axes.text((start + min(end, reached)) / 2, 1.03, f"{resolution} px", transform=above, ha="center",
                      fontsize=9, color=MUTED)


def _svg(figure: Figure, label: str) -> Markup:
    """Inline SVG with the page's own fonts and colors, and none of the addresses an SVG file opens with."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "gradine"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"^.*?<svg[^>]*(viewBox=\"[^\"]*\")[^>]*>|<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->",
                 lambda match: f'<svg {match[1]} role="img" aria-label="{label}">' if match[1] else "",
                 buffer.getvalue(), flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # the same in every drawing; those of clips and markers are hashes
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    return Markup(svg)


# What an operator wants to know --------------------------------------------------------------------------------------


def rejected(run: Run) -> list[Line]:
    """Every line of <shards>/rejected.jsonl; [] if there is none."""
    return RunDir(run.data.shards).lines("rejected.jsonl")


def events(ledger: list[Line], ticks: list[Line]) -> list[tuple[float, str, str]]:
    """(unix time, kind, text) of what did not go straight on, of all sessions, in the order it happened."""
    return sorted([*_interruptions(ledger), *_masked(ticks)])


def _interruptions(ledger: list[Line]) -> Iterable[tuple[float, str, str]]:
    for line in ledger:
        match line["event"]:
            case "retry":
                yield line["time"], "retry", f"failure {line['failures']}: {line['reason']}"
            case "resume":
                yield line["time"], "resume", f"from {line['images_seen']:,} images: {line['reason']}"
            case "branch":
                text = f"new branch of {line['resolution']} px from {line['images_seen']:,} images"
                yield line["time"], "branch", f"{text}; superseded: {line['superseded']}"
            case "stopped" if "reason" in line:
                yield line["time"], "stopped", line["reason"]
            case "roll_back":
                yield line["time"], "rolled back", (f"from {line['last']:,} to {line['first']:,} images, which update "
                                                    f"nothing since: {line['reason']}")
            case "micro_batch":
                yield line["time"], "out of memory", (f"{line['resolution']} px: micro_batch {line['was']} -> "
                                                      f"{line['now']}: {line['reason']}")
            case "less_ahead":
                yield line["time"], "out of memory", f"less is kept ahead from now on: {line['reason']}"
            case "group" if line["workers"] < line.get("wanted", 0):
                yield line["time"], "fewer workers", (f"{line['workers']} of {line['wanted']} had a place, on "
                                                      f"{', '.join(line['nodes'])}")
            case "save_failed":
                yield line["time"], "save failed", (f"checkpoint at {line['images_seen']:,} images, {line['failures']} "
                                                    f"in a row: {line['reason']}")
            case "evaluation" if line["error"]:
                yield line["time"], "evaluation failed", f"{line['checkpoint']}: {line['error']}"


def _masked(ticks: list[Line]) -> Iterable[tuple[float, str, str]]:
    """Per stage, the updates left out because they were not finite. The ticks count them from the run's start."""
    before = (0, 0)
    by_stage = {tick["resolution"]: tick for tick in ticks}  # the last one counts
    for resolution, tick in by_stage.items():
        masked = tick["masked"] if "masked" in tick else tick["skipped"]  # the older name
        discriminator, generator = (now - then for now, then in zip(masked, before, strict=True))
        before = masked
        if discriminator > 0 or generator > 0:
            yield (tick["time"], "masked updates", f"{resolution} px: {discriminator:.0f} of the discriminator, "
                                                    f"{generator:.0f} of the generator were not finite")


def _last(lines: list[Line], event: str) -> Line | None:
    return next((line for line in reversed(lines) if line["event"] == event), None)


# Template ------------------------------------------------------------------------------------------------------------

def template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(figure=figure_text, label=figures.label, duration=duration, percent=percent, clock=clock,
                               count=count)
    return environment.get_template(name)


def count(value: int | None) -> str:
    return DASH if value is None else f"{value:,}"


def percent(share: float | None) -> str:
    return DASH if share is None else f"{share:.1%}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return DASH
    size, unit = next((pair for pair in ((3600, "h"), (60, "min")) if seconds >= pair[0]), (1, "s"))
    return f"{seconds / size:.3g} {unit}"


def clock(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(unix_s))
