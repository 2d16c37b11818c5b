"""Runs side by side: only figures that were measured alike stand in one table, and the rest is named with its reason.

Two figures differ beyond chance where their 95 % intervals do not overlap. Nothing is computed here, and what is
not comparable is never shown as if it were: another count or other features alone move a distance.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradine.configs.schema import FEATURES, Run, UserError, load, require
from gradine.pipeline.figures import ALIKE, Row, better, figure_text, interval_text, label, latest, order
from gradine.pipeline.run_dir import RunDir
from gradine.stages import growth


@dataclass(frozen=True)
class Side:
    """One run: its rows by metric, of one checkpoint."""

    run: str  # as it is called in the table
    path: str  # as it was given
    rows: dict[str, Row]

    @property
    def any(self) -> Row:
        return next(iter(self.rows.values()))


@dataclass(frozen=True)
class Line:
    """One metric: the rows to show, one a run."""

    metric: str
    rows: list[Row]

    @property
    def best(self) -> int | None:
        """Which row is better than every other one beyond chance; None if none is, or it cannot be said."""
        lower = better(self.metric) == "lower"
        spans = [row["interval"] for row in self.rows]
        if better(self.metric) is None or not all(spans):
            return None
        for number, (low, high) in enumerate(spans):
            others = spans[:number] + spans[number + 1:]
            if all(high < other[0] if lower else low > other[1] for other in others):
                return number
        return None


def compare_runs(paths: Sequence[Path], checkpoint: str = "", resolution: int = 0, as_json: bool = False) -> str:
    """The table, or with `as_json` the same for programs. UserError if the runs were not measured alike.

    Of each run the checkpoint of this name, else its newest measured stage end at `resolution`, by default the highest
    one at which every run has one.
    """
    require(len(paths) > 1, f"gradine compare wants two runs or more; it got {', '.join(map(str, paths))}.")
    require(not (checkpoint and resolution), f"--checkpoint={checkpoint} and --stage={resolution} both choose a "
                                             "checkpoint. Give one of them.")
    folders = [RunDir.existing(path) for path in paths]
    measured = [[row for row in latest(folder.lines("metrics.jsonl")) if not row["failed"]] for folder in folders]
    if checkpoint:
        chosen = [of_checkpoint(path, rows, checkpoint) for path, rows in zip(paths, measured, strict=True)]
    else:
        chosen = stage_ends(paths, measured, [load(folder.config) for folder in folders], resolution)
    names = [folder.path.name for folder in folders]
    names = names if len(set(names)) == len(names) else [str(path) for path in paths]
    sides = [Side(name, str(path), {row["metric"]: row for row in rows})
             for name, path, rows in zip(names, paths, chosen, strict=True)]
    lines, left_out = lined_up(sides)
    return as_text(sides, lines, left_out) if not as_json else json.dumps(as_data(sides, lines, left_out), indent=2)


# Which rows ----------------------------------------------------------------------------------------------------------


def of_checkpoint(path: Path, rows: list[Row], name: str) -> list[Row]:
    found = [row for row in rows if row["checkpoint"] == name]
    require(bool(found), f"{path} has no figures of {name}. Run: gradine evaluate {path} --checkpoint {name}")
    return found


def stage_ends(paths: Sequence[Path], measured: list[list[Row]], runs: list[Run], resolution: int) -> list[list[Row]]:
    """Each run's rows of its newest measured stage end at one resolution."""
    by_size = []
    for rows, run in zip(measured, runs, strict=True):
        plan = growth.schedule(run)
        ends = {stage.resolution: plan.stage_span(index)[1] for index, stage in enumerate(run.stages)}
        by_size.append({size: [row for row in rows if (row["resolution"], row["images_seen"]) == (size, seen)]
                        for size, seen in ends.items()})
    sizes = [{size for size, rows in of_run.items() if rows} for of_run in by_size]
    common = set.intersection(*sizes)
    if resolution:
        for path, there in zip(paths, sizes, strict=True):
            require(resolution in there, f"{path} has no figures of the end of its {resolution} px stage. Run: gradine "
                                         f"evaluate {path} --stage {resolution}, once that has ended.")
    elif not common:
        told = "; ".join(f"{path} {', '.join(map(str, sorted(there))) or 'none'}"
                         for path, there in zip(paths, sizes, strict=True))
        raise UserError(f"no resolution has its end measured in all runs ({told}). Measure one with gradine evaluate "
                        "RUN --stage RESOLUTION, or name a checkpoint with --checkpoint.")
    size = resolution or max(common)
    return [[row for row in of_run[size] if row["checkpoint"] == of_run[size][-1]["checkpoint"]] for of_run in by_size]


# Whether they compare ------------------------------------------------------------------------------------------------


def lined_up(sides: list[Side]) -> tuple[list[Line], list[tuple[str, str]]]:
    """The metrics that all runs have a value of, and those that some have not, each with the reason.

    UserError for the first one that was measured differently.
    """
    lines, left_out = [], []
    for metric in sorted({metric for side in sides for metric in side.rows}, key=order):
        lacking = [(side, side.rows.get(metric)) for side in sides
                   if metric not in side.rows or side.rows[metric]["value"] is None]
        if lacking:
            left_out.append((metric, "; ".join(f"{side.run} {_why(row)}" for side, row in lacking)))
            continue
        for side in sides:
            refuse_unlike(metric, sides[0], side)
        rows = [side.rows[metric] for side in sides]
        copying = metric.startswith("copy_rate")
        against = [row["parts"] if copying else (row["parts"] or {}).get("held_out") for row in rows]
        if (copying or metric == "discriminator") and any(each != against[0] for each in against):
            left_out.append((metric, "judged against other held-out images"))
        else:
            lines.append(Line(metric, rows))
    return lines, left_out


def _why(row: Row | None) -> str:
    return f"has none: {row['reason'] or 'no reason given'}" if row else "did not measure it"


def refuse_unlike(metric: str, one: Side, other: Side) -> None:
    """UserError unless the two rows of this metric were measured with the same count, features and reals."""
    for side in (one, other):
        row = side.rows[metric]
        unknown = [key for key in ("features_digest", "data") if row["features"] and row[key] is None]
        require(not unknown, f"{metric} of {side.path} does not say what it was measured with ({', '.join(unknown)} "
                             f"missing): its row is of an older gradine. Run: {_again(side, row)}")
    mine, theirs = one.rows[metric], other.rows[metric]
    for key in ALIKE:
        if mine[key] == theirs[key]:
            continue
        older = next((side for side in (one, other) if side.rows[metric][key] is None), None)
        if older:
            way = f"Run: {_again(older, older.rows[metric])}"
        elif key == "count":
            larger = max(one, other, key=lambda side: side.rows[metric]["count"])
            way = f"Run: {_again(larger, larger.rows[metric])} --count {min(mine['count'], theirs['count'])}"
        elif key == "features_digest":
            way = f"Measure both by the same weights: {_again(one, mine)}; {_again(other, theirs)}"
        else:
            way = "Only runs on the same shards compare, at one resolution."
        raise UserError(f"{metric} cannot be compared: {key} is {_shown(mine[key])} in {one.path} and "
                        f"{_shown(theirs[key])} in {other.path}. {way}")


def _again(side: Side, row: Row) -> str:
    """The command that measures this row anew."""
    settings = {suffix: setting for setting, suffix in FEATURES.items()}
    features = f" --features {settings[row['features']]}" if row["features"] in settings else ""
    return f"gradine evaluate {side.path} --checkpoint {row['checkpoint']}{features}"


def _shown(value: object) -> str:
    if isinstance(value, str):
        return f"{value[:12]}…" if len(value) > 12 else value
    return f"{value:,}" if isinstance(value, int) else "unknown"


# What is shown -------------------------------------------------------------------------------------------------------


def as_text(sides: list[Side], lines: list[Line], left_out: list[tuple[str, str]]) -> str:
    """An aligned table: metrics down, runs across."""
    sign = {"lower": "↓", "higher": "↑", None: " "}
    table = [["", "", "images", *(side.run for side in sides)],
             ["checkpoint", "", "", *(side.any["checkpoint"] for side in sides)],
             ["images seen", "", "", *(f"{side.any['images_seen']:,}" for side in sides)]]
    for line in lines:
        count = line.rows[0]["count"]
        table.append([label(line.metric), sign[better(line.metric)], "" if count is None else f"{count:,}",
                      *(_cell(row, number == line.best) for number, row in enumerate(line.rows))])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    text = [f"{sides[0].any['resolution']} px"]
    text += ["  ".join([cells[0].ljust(widths[0]), cells[1].ljust(widths[1]), cells[2].rjust(widths[2]),
                        *(cell.ljust(width) for cell, width in zip(cells[3:], widths[3:], strict=True))]).rstrip()
             for cells in table]
    legend = "↓ lower is better, ↑ higher. In brackets the 95 % interval"
    if any(line.best is not None for line in lines):
        legend += "; * better than every other run's: the intervals do not overlap"
    text += ["", f"{legend}."] if lines else ["", "No metric has a value in all of these runs."]
    unsure = [label(line.metric) for line in lines if any(row["data"] is None for row in line.rows)]
    if unsure:
        text.append(f"Older rows do not say which reals they are of: {', '.join(unsure)}.")
    text += [f"Left out: {label(metric)}: {reason}." for metric, reason in left_out]
    return "\n".join(text)


def _cell(row: Row, best: bool) -> str:
    interval = interval_text(row)
    return f"{figure_text(row['value'])} {f'[{interval}]' if interval else '(no interval)'}{' *' * best}"


def as_data(sides: list[Side], lines: list[Line], left_out: Iterable[tuple[str, str]]) -> dict[str, object]:
    """The same as plain data: `best` is the index of a run, null where no run is better beyond chance."""
    shown = ("value", "interval", "floor", "untrained", "reals")
    return {
        "resolution": sides[0].any["resolution"],
        "runs": [{"run": side.path, **{key: side.any[key] for key in ("checkpoint", "images_seen", "seed")}}
                 for side in sides],
        "metrics": [{"metric": line.metric, "better": better(line.metric),
                     **{key: line.rows[0][key] for key in ("count", "features", "features_digest", "data")},
                     "figures": [{key: row[key] for key in shown} for row in line.rows], "best": line.best}
                    for line in lines],
        "left_out": [{"metric": metric, "reason": reason} for metric, reason in left_out]}
