"""What happened in one session of a run, on one page: nights/<start>.html, and posted to a webhook if there is one.

`night_of` is pure: the lines a session added to the ledger, and its rows of metrics.jsonl, become facts; the page and
the post show those. Neither ever changes how the session ends: what cannot be written or posted is one line.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from gradine.configs.schema import EnvironmentFault, Run, UserError, redacted
from gradine.pipeline import figures, report, webhook
from gradine.pipeline.display import duration
from gradine.pipeline.plan import seconds_left
from gradine.pipeline.report import Picture
from gradine.pipeline.run_dir import RunDir, lineage
from gradine.pipeline.signals import Deadline, Stopped, exit_code_of
from gradine.stages import growth
from gradine.stages.store import write_atomic

Line = dict[str, Any]  # of ledger.jsonl or metrics.jsonl
TROUBLE_SHOWN, ALARMS_SHOWN, FIGURES_SHOWN, STAGES_SHOWN = 5, 2, 4, 5  # the newest, so that it stays one page
TEXT_SHOWN = 150  # letters of a reason
PICTURE_ROWS, PICTURE_PX = 4, 448  # of a grid: two take less than 300 kB, whatever they show


@dataclass(frozen=True)
class Outcome:
    """How a session ended. result: `done`, `stopped` as it was asked to, `refused` before it worked, or `failed`."""

    result: str
    exit_code: int
    reason: str = ""


def outcome_of(error: BaseException | None, until: str = "") -> Outcome:
    """until: the words for a stop by the deadline."""
    match error:
        case None:
            return Outcome("done", 0)
        case Stopped():
            number = int(error.args[0])
            reason = until if number == signal.SIGALRM else signal.Signals(number).name
            return Outcome("stopped", exit_code_of(number), error.args[1] if len(error.args) > 1 else reason)
        case KeyboardInterrupt():
            return Outcome("stopped", 130, "SIGINT")
        case UserError():
            return Outcome("refused", 2, str(error))
        case EnvironmentFault():
            return Outcome("failed", error.exit_code, str(error))
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return Outcome("failed", 3 if isinstance(error, OSError) else 1, redacted(line)[:TEXT_SHOWN])


# Facts ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageOfNight:
    resolution: int
    first: int  # images seen
    last: int
    seconds: float  # in which it trained, repeats after failures included
    rate: float | None  # images/s, median of its ticks
    workers: str  # `2`, or `1, then 2`
    nodes: str


@dataclass(frozen=True)
class Best:
    metric: str
    resolution: int
    was: float | None  # None: the first figure at this resolution
    now: float
    checkpoint: str


@dataclass(frozen=True)
class Night:
    run: str
    outcome: Outcome
    began: float  # unix time
    ended: float
    first: int  # images seen, when it began
    last: int
    kept: int  # the newest checkpoint's: from there the next session goes on
    end: int  # of the run
    left_s: float  # NaN: unknown
    command: str = ""
    stages: list[StageOfNight] = field(default_factory=list)
    retries: list[Line] = field(default_factory=list)
    trouble: list[tuple[float, str, str]] = field(default_factory=list)  # time, kind, text; retries among them
    alarms: list[Line] = field(default_factory=list)
    masked: tuple[int, int] = (0, 0)  # updates of the discriminator and the generator
    checkpoints: list[str] = field(default_factory=list)
    best: list[Best] = field(default_factory=list)
    measured: list[tuple[str, dict[str, Line]]] = field(default_factory=list)  # checkpoint, its rows by metric


def night_of(run: Run, ledger: list[Line], mark: int, rows: list[Line], outcome: Outcome, began: float,
             ended: float) -> Night:
    """The facts of the session that added ledger[mark:]. rows: all of metrics.jsonl."""
    earlier, lines = lineage(ledger[:mark]), ledger[mark:]
    now = lineage(lines)
    resumes = [line["images_seen"] for line in lines if line["event"] == "resume"] or [reached(earlier)]
    kept = [line["images_seen"] for line in now if line["event"] == "checkpoint"]
    last = max(resumes[-1], reached(now))
    measured = [line["checkpoint"] for line in lines if line["event"] == "evaluation" and not line["error"]]
    rows = figures.latest(rows, fullest=True)
    own = [row for row in rows if row["checkpoint"] in measured]
    stages = stages_of(lines, now)
    return Night(
        run.name, outcome, began, ended, resumes[0], last, max([resumes[-1], *kept]), growth.schedule(run).end,
        left_s=seconds_left(run, last, {stage.resolution: stage.rate for stage in stages if stage.rate}),
        command=next((line["command"] for line in reversed(ledger) if line["event"] == "start"), ""),
        stages=stages, retries=[line for line in lines if line["event"] == "retry"],
        trouble=[event for event in report.events(lines, []) if event[1] not in ("resume", "branch", "stopped")],
        alarms=[line for line in lines if line["event"] == "alarm"],
        masked=masked_since(lineage(ledger), resumes[0]),
        checkpoints=[Path(line["path"]).name for line in lines if line["event"] == "checkpoint"],
        best=new_best(rows, own),
        measured=[(name, {row["metric"]: row for row in own if row["checkpoint"] == name})
                  for name in dict.fromkeys(measured)])


def reached(lines: Iterable[Line]) -> int:
    """The most images seen of any step that these lines tell of."""
    kinds = ("tick", "checkpoint", "stopped", "stage_end")
    return max((line.get("images_seen", 0) for line in lines if line["event"] in kinds), default=0)


def stages_of(lines: list[Line], kept: list[Line]) -> list[StageOfNight]:
    """kept: of `lines`, those of the lineage."""
    stages = []
    for size in dict.fromkeys(line["resolution"] for line in lines if line["event"] == "stage_start"):
        starts = [line for line in lines if line["event"] == "stage_start" and line["resolution"] == size]
        rates = [line["images_per_s"] for line in lines
                 if line["event"] == "tick" and line["resolution"] == size and line["images_per_s"]]
        first = min(line["images_seen"] for line in starts)
        stages.append(StageOfNight(
            size, first, max(first, reached(line for line in kept if line.get("resolution") == size)),
            seconds_in(size, lines), float(np.median(rates)) if rates else None,
            _in_turn(line["workers"] for line in starts), _in_turn(_nodes(lines, size))))
    return stages


def seconds_in(size: int, lines: list[Line]) -> float:
    """From each start of this stage to the last sign of its life."""
    total, since, last = 0.0, None, 0.0
    for line in lines:
        if line["event"] == "stage_start":
            total += last - since if since is not None else 0.0
            since, last = (line["time"],) * 2 if line["resolution"] == size else (None, 0.0)
        elif since is not None and line.get("resolution") == size and line["event"] != "evaluation":
            last = line["time"]
    return total + (last - since if since is not None else 0.0)


def _nodes(lines: list[Line], size: int) -> Iterator[int]:
    """How many nodes each group of workers was on that trained this stage."""
    there = 1
    for line in lines:
        if line["event"] == "group":
            there = len(set(line.get("nodes", ()))) or 1
        elif line["event"] == "stage_start" and line["resolution"] == size:
            yield there


def _in_turn(values: Iterable[int]) -> str:
    """1, 1, 2 -> `1, then 2`."""
    told: list[int] = []
    for value in values:
        if [value] != told[-1:]:
            told.append(value)
    return ", then ".join(map(str, told))


def masked_since(history: list[Line], first: int) -> tuple[int, int]:
    """Updates left out since `first` images because they were not finite. Ticks count them from the run's start."""
    counts = [(line["images_seen"], line["masked"]) for line in history if line["event"] == "tick" and "masked" in line]
    before = [masked for seen, masked in counts if seen <= first][-1:] or [[0, 0]]
    after = [masked for _, masked in counts][-1:] or before
    discriminator, generator = (int(now - then) for now, then in zip(after[0], before[0], strict=True))
    return max(0, discriminator), max(0, generator)


def new_best(rows: list[Line], own: list[Line]) -> list[Best]:
    """Where one of the session's `own` rows is lower than every other one of its metric and resolution that was
    measured alike: of SWD and of the Fréchet distance of the strongest features."""
    found = []
    rows, own = [row for row in rows if row["value"] is not None], [row for row in own if row["value"] is not None]
    for metric in figures.distances_of(own):
        for size in sorted({row["resolution"] for row in own}):
            now = min((row for row in own if (row["metric"], row["resolution"]) == (metric, size)),
                      key=lambda row: row["value"], default=None)
            if now is None:
                continue
            was = min((row["value"] for row in rows if row not in own and figures.alike(row, now)), default=None)
            if was is None or now["value"] < was:
                found.append(Best(metric, size, was, now["value"], now["checkpoint"]))
    return found


# Words ---------------------------------------------------------------------------------------------------------------


def headline(night: Night) -> str:
    match night.outcome.result:
        case "done" if not night.stages:
            return "all was trained before; nothing was left to train"
        case "done":
            return "trained to its end"
        case "stopped":
            asked = "as asked, " if night.outcome.exit_code == 0 else "by "
            return f"stopped {asked}{night.outcome.reason}"
    return f"{night.outcome.result} with exit code {night.outcome.exit_code}"


def paragraph(night: Night) -> str:
    """All that matters, to be read on a telephone."""
    said = [f"{night.run}: {headline(night)}."]
    if night.outcome.result in ("refused", "failed"):
        said.append(shortened(night.outcome.reason, 600).rstrip(".") + ".")
    share = night.last / night.end
    now = f", {night.last - night.first:,} of them in {duration(night.ended - night.began)}" * bool(night.stages)
    said.append(f"{night.last:,} of {night.end:,} images ({math.floor(100 * share)} %){now}.")
    if night.retries:
        plural = "retry" if len(night.retries) == 1 else "retries"
        reason = shortened(night.retries[-1]["reason"], 200).rstrip(".")
        said.append(f"{len(night.retries)} {plural}, the last after: {reason}.")
    if night.alarms:
        said.append(f"{len(night.alarms)} alarm{'s' * (len(night.alarms) > 1)}, the last: "
                    f"{shortened(night.alarms[-1]['message'], 200).rstrip('.')}.")
    said += [f"New best {figures.label(best.metric)} at {best.resolution} px: {best.now:.4g}, was {best.was:.4g}."
             for best in night.best if best.was is not None]
    return " ".join(said)


def shortened(text: str, most: int = TEXT_SHOWN) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[:most - 1].rstrip() + "…"


def way_on(night: Night) -> str:
    """The command that goes on, as it is typed."""
    program, _, rest = night.command.partition(" ")
    return f"{'python -m gradine.pipeline' if program.endswith('__main__.py') else 'gradine'} {rest}" if rest else ""


# Page ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sight:
    images_seen: int
    resolution: int
    picture: Picture


def sights(folder: RunDir, evaluations: list[Line], first: int) -> list[Sight]:
    """The first and last samples of a session; of one alone, the last before it and that one."""
    own = sorted({(line["images_seen"], line["resolution"]) for line in evaluations})
    if len(own) < 2:
        names = [path.stem[1:].partition("-") for path in folder.samples.glob("r*-[0-9]*.png")]
        earlier = [(int(seen), int(size)) for size, _, seen in names if seen.isdecimal() and int(seen) <= first]
        own = sorted({*sorted({*earlier} - {*own})[-1:], *own}) if own else []
    found = []
    for seen, size in dict.fromkeys([*own[:1], *own[-1:]]):
        if grid := report.opened(folder.samples / f"r{size:04d}-{seen:09d}.png"):
            found.append(Sight(seen, size, report.embed(report.top_of(grid, PICTURE_ROWS * size), PICTURE_PX)))
    return found


def page(night: Night, pictures: list[Sight]) -> str:
    """One self-contained page. Names, reasons and paths come from outside: the template escapes them."""
    return report.template("summary.html.jinja").render(
        night=night, pictures=pictures, headline=headline(night), way_on=way_on(night), columns=columns(night),
        span=duration(night.ended - night.began),
        left=duration(night.left_s) if night.last < night.end else "", share=night.last / night.end,
        local=local, spell=duration, shortened=shortened,
        shown={"trouble": TROUBLE_SHOWN, "alarms": ALARMS_SHOWN, "figures": FIGURES_SHOWN, "stages": STAGES_SHOWN})


def columns(night: Night) -> list[str]:
    """The metrics that the table of figures has room for: of those with a value the distances, then what tells of
    variety and copies by the strongest features."""
    rows = [row for _, own in night.measured for row in own.values() if row["value"] is not None]
    chosen = figures.strongest(rows)
    wanted = [*figures.distances_of(rows), f"coverage_{chosen}", "ms_ssim", f"copy_rate_{chosen}"]
    return [metric for metric in wanted if any(row["metric"] == metric for row in rows)]


def local(unix_s: float, form: str = "%H:%M") -> str:
    return time.strftime(form, time.localtime(unix_s))


# Told once, however it ends ------------------------------------------------------------------------------------------


class Teller:
    """Of one session: writes its page while the run is held, and posts."""

    def __init__(self, run: Run, folder: RunDir, deadline: Deadline | None = None) -> None:
        self.run, self.folder, self.until = run, folder, f"until {deadline.text}" if deadline else ""
        self.began, self.mark, self.told = time.time(), -1, False  # mark: lines of the ledger before this session

    def hold(self) -> None:
        """From here on the run is this process's."""
        self.began, self.mark = time.time(), len(self.folder.lines("ledger.jsonl"))

    @contextmanager
    def whatever_happens(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.tell(error)
            raise
        self.tell(None)

    def tell(self, error: BaseException | None) -> None:
        """The first call counts."""
        interrupted = isinstance(error, KeyboardInterrupt) and not isinstance(error, Stopped)
        if self.told or (interrupted and self.mark < 0):
            return
        self.told = True
        try:
            self._tell(outcome_of(error, self.until))
        except Exception as failure:
            self.folder.tell(f"the summary of this session is not complete: {type(failure).__name__}: {failure}")

    def _tell(self, outcome: Outcome) -> None:
        ledger = self.folder.lines("ledger.jsonl")
        mark = self.mark if self.mark >= 0 else len(ledger)
        if outcome.result == "refused" and any(line["event"] in ("shards", "stage_start") for line in ledger[mark:]):
            outcome = replace(outcome, result="failed")  # wrong input that came to light hours later
        night = night_of(self.run, ledger, mark, self.folder.lines("metrics.jsonl"), outcome, self.began, time.time())
        lines, path = ledger[mark:], None
        if lines or (self.mark >= 0 and outcome.result == "failed"):  # else nothing was done, and nothing is written
            evaluations = [line for line in lines if line["event"] == "evaluation" and not line["error"]]
            path = self._write(page(night, sights(self.folder, evaluations, night.first)))
        webhook.post(message(night, path), self.folder.tell, in_haste=outcome.result == "stopped")

    def _write(self, text: str) -> Path | None:
        name = local(self.began, "%Y-%m-%d_%H-%M-%S")
        path = next(path for n in range(1, 10**6)
                    if not (path := self.folder.path / "nights" / f"{name}{f'-{n}' * (n > 1)}.html").exists())
        try:
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, text.encode(errors="replace"))
        except (OSError, EnvironmentFault) as error:
            self.folder.tell(f"{path} could not be written: {error}")
            return None
        return path


def message(night: Night, path: Path | None) -> dict[str, Any]:
    """What the webhook gets. `text` is what chats show."""
    text = paragraph(night) + (f" Summary: {path}" if path else "")
    return {"text": text, "run": night.run, "result": night.outcome.result, "exit_code": night.outcome.exit_code,
            "reason": night.outcome.reason, "images_seen": night.last, "images": night.end,
            "summary": str(path) if path else None, "retries": [line["reason"] for line in night.retries],
            "alarms": [line["message"] for line in night.alarms], "best": [asdict(best) for best in night.best]}
