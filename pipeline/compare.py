"""Runs side by side: only figures that were measured alike stand in one table, and the rest is named with its reason.

Two figures differ beyond chance where their 95 % intervals do not overlap. No figure is computed here, and what is
not comparable is never shown as if it were: another count or other features alone move a distance.

Runs that differ by their seed alone are one recipe, a column with the mean over its seeds and their standard deviation.
Recipes are told apart by seeds only over the same seeds and as many images; one is better where its every seed is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev

from gradine.configs.schema import FEATURES, Run, UserError, as_dict, flatten, load, require
from gradine.pipeline.figures import ALIKE, Row, better, figure_text, interval_text, label, latest, order
from gradine.pipeline.plan import FORMAT, SAFE, SAFE_OF_A_STAGE
from gradine.pipeline.run_dir import RunDir
from gradine.stages import growth
from gradine.stages.store import write_atomic

Trained = tuple[tuple[str, str], ...]  # every setting that decides what is trained, but for the seed


@dataclass(frozen=True)
class Side:
    """One run: its rows by metric, of one checkpoint."""

    run: str  # as it is called in the table
    path: str  # as it was given
    rows: dict[str, Row]
    seed: int
    trained: Trained

    @property
    def any(self) -> Row:
        return next(iter(self.rows.values()))


@dataclass(frozen=True)
class Recipe:
    """A column: one run, or runs that differ by their seed alone."""

    name: str
    runs: list[int]  # which sides, by rising seed


@dataclass(frozen=True)
class Line:
    """One metric: the rows to show, one a run."""

    metric: str
    rows: list[Row]

    def of(self, recipe: Recipe) -> list[Row]:
        return [self.rows[run] for run in recipe.runs]

    def over_seeds(self, recipe: Recipe) -> tuple[float, float]:
        """Mean, and the standard deviation of a sample (n - 1), of two runs or more."""
        values = [row["value"] for row in self.of(recipe)]
        return fmean(values), stdev(values)

    def best(self, recipes: list[Recipe]) -> int | None:
        """Which recipe is better than every other one; None if none is, or it cannot be said.

        Of single runs: beyond chance, by their intervals. Of several seeds: its worst seed than the others' best.
        """
        seeds = len(recipes[0].runs) > 1
        spans = [_span(self.of(recipe)) if seeds else self.of(recipe)[0]["interval"] for recipe in recipes]
        if better(self.metric) is None or len(recipes) < 2 or not all(spans):
            return None
        for number, (low, high) in enumerate(spans):
            others = spans[:number] + spans[number + 1:]
            lower = better(self.metric) == "lower"
            if all(high < other[0] if lower else low > other[1] for other in others):
                return number
        return None


def compare_runs(paths: Sequence[Path], checkpoint: str = "", resolution: int = 0, as_json: bool = False,
                 picture: Path | None = None) -> str:
    """The table, or with `as_json` the same for programs; also as a `picture`, a PNG file. UserError if the runs were
    not measured alike.

    Of each run the checkpoint of this name, else its newest measured stage end at `resolution`, by default the highest
    one at which every run has one.
    """
    require(picture is None or picture.suffix.lower() == ".png",
            f"--picture {picture}: a picture is written as PNG. Give it a name that ends in .png.")
    require(len(paths) > 1, f"gradine compare wants two runs or more; it got {', '.join(map(str, paths))}.")
    require(not (checkpoint and resolution), f"--checkpoint={checkpoint} and --stage={resolution} both choose a "
                                             "checkpoint. Give one of them.")
    folders = [RunDir.existing(path) for path in paths]
    measured = [[row for row in latest(folder.lines("metrics.jsonl")) if not row["failed"]] for folder in folders]
    runs = [load(folder.config) for folder in folders]
    if checkpoint:
        chosen = [of_checkpoint(path, rows, checkpoint) for path, rows in zip(paths, measured, strict=True)]
    else:
        chosen = stage_ends(paths, measured, runs, resolution)
    names = [folder.path.name for folder in folders]
    names = names if len(set(names)) == len(names) else [str(path) for path in paths]
    sides = [Side(name, str(path), {row["metric"]: row for row in rows}, run.training.seed, trained_by(run))
             for name, path, rows, run in zip(names, paths, chosen, runs, strict=True)]
    recipes = by_recipe(sides)
    lines, left_out = lined_up(sides)
    if picture:
        from gradine.pipeline import compare_picture  # matplotlib takes a second

        samples = [folders[recipe.runs[0]].samples / _grid_of(sides[recipe.runs[0]]) for recipe in recipes]
        write_atomic(picture, compare_picture.draw(sides, recipes, lines, samples))
    if as_json:
        return json.dumps(as_data(sides, recipes, lines, left_out), indent=2)
    return as_text(sides, recipes, lines, left_out)


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


# Which runs are one recipe -------------------------------------------------------------------------------------------


def trained_by(run: Run) -> Trained:
    """Without what may differ between a run and its resumption, and the formats that each machine measured."""
    open_formats = [name for name, is_open in zip(
        FORMAT, (run.training.precision == "auto", run.training.channels_last is None), strict=True) if is_open]
    of_a_stage = (*SAFE_OF_A_STAGE, *open_formats)
    return tuple((key, str(value)) for key, value in sorted(flatten(as_dict(run)).items())
                 if key not in ("name", "training.seed") and not key.startswith((*SAFE, "checkpoints."))
                 and not (key.startswith("stages.") and key.endswith(tuple(f".{name}" for name in of_a_stage))))


def by_recipe(sides: list[Side]) -> list[Recipe]:
    """The columns in the order given. UserError for several seeds that are not the same in all, or of other lengths."""
    groups: dict[Trained, list[int]] = {}
    for number, side in enumerate(sides):
        groups.setdefault(side.trained, []).append(number)
    if all(len({sides[run].seed for run in runs}) == 1 for runs in groups.values()):
        return [Recipe(side.run, [number]) for number, side in enumerate(sides)]
    recipes = []
    for runs in groups.values():
        runs = sorted(runs, key=lambda run: sides[run].seed)
        for one, two in pairwise(runs):
            require(sides[one].seed != sides[two].seed,
                    f"{sides[one].path} and {sides[two].path} are one recipe, both with training.seed="
                    f"{sides[one].seed}: a mean over seeds has each once. Leave one out.")
        recipes.append(Recipe(_common_name([sides[run].run for run in runs]), runs))
    if len({recipe.name for recipe in recipes}) < len(recipes):
        recipes = [Recipe(sides[recipe.runs[0]].run, recipe.runs) for recipe in recipes]
    first = recipes[0]
    for other in recipes:
        mine, theirs = ([sides[run].seed for run in recipe.runs] for recipe in (first, other))
        require(mine == theirs,
                f"{first.name} has seeds {_listed(mine)} and {other.name} {_listed(theirs)}: recipes of several seeds "
                "compare over the same ones. Run those that lack (name=NEW training.seed=N), or leave the others out.")
        seen = sides[first.runs[0]].any["images_seen"]
        for run in other.runs:
            require(sides[run].any["images_seen"] == seen,
                    f"{sides[first.runs[0]].path} saw {seen:,} images and {sides[run].path} "
                    f"{sides[run].any['images_seen']:,}: recipes of several seeds compare after as many. Set their "
                    "stages' images so, or name a checkpoint that all have with --checkpoint.")
    return recipes


def _common_name(names: list[str]) -> str:
    """`dcgan-seed0`, `dcgan-seed1` -> `dcgan`."""
    bare = {re.sub(r"[-_. ]*(seed|s)?[-_. ]*\d+$", "", name) for name in names}
    return min(bare) if len(names) > 1 and len(bare) == 1 and min(bare) else names[0]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _span(rows: list[Row]) -> list[float]:
    """The lowest and the highest value."""
    values = [row["value"] for row in rows]
    return [min(values), max(values)]


def _grid_of(side: Side) -> str:
    """The file of its samples, in samples/."""
    return f"r{side.any['resolution']:04d}-{side.any['images_seen']:09d}.png"


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


def as_text(sides: list[Side], recipes: list[Recipe], lines: list[Line], left_out: list[tuple[str, str]]) -> str:
    """An aligned table: metrics down, recipes across."""
    sign = {"lower": "↓", "higher": "↑", None: " "}
    first = [sides[recipe.runs[0]] for recipe in recipes]
    seeds = len(recipes[0].runs)
    table = [["", "", "images", *(recipe.name for recipe in recipes)],
             ["checkpoint", "", "", *(side.any["checkpoint"] for side in first)],
             ["images seen", "", "", *(f"{side.any['images_seen']:,}" for side in first)]]
    if seeds > 1:
        table.append(["seeds", "", "", *(_listed([sides[run].seed for run in recipe.runs]) for recipe in recipes)])
    for line in lines:
        count, best = line.rows[0]["count"], line.best(recipes)
        table.append([label(line.metric), sign[better(line.metric)], "" if count is None else f"{count:,}",
                      *(_cell(line, recipe, number == best) for number, recipe in enumerate(recipes))])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    text = [f"{sides[0].any['resolution']} px"]
    text += ["  ".join([cells[0].ljust(widths[0]), cells[1].ljust(widths[1]), cells[2].rjust(widths[2]),
                        *(cell.ljust(width) for cell, width in zip(cells[3:], widths[3:], strict=True))]).rstrip()
             for cells in table]
    legend = "↓ lower is better, ↑ higher. "
    legend += f"Mean of {seeds} seeds ± their standard deviation" if seeds > 1 else "In brackets the 95 % interval"
    if any(line.best(recipes) is not None for line in lines):
        legend += ("; * its worst seed is better than every other recipe's best" if seeds > 1 else
                   "; * better than every other run's: the intervals do not overlap")
    text += ["", f"{legend}."] if lines else ["", "No metric has a value in all of these runs."]
    unsure = [label(line.metric) for line in lines if any(row["data"] is None for row in line.rows)]
    if unsure:
        text.append(f"Older rows do not say which reals they are of: {', '.join(unsure)}.")
    text += [f"Left out: {label(metric)}: {reason}." for metric, reason in left_out]
    return "\n".join(text)


def _cell(line: Line, recipe: Recipe, best: bool) -> str:
    if len(recipe.runs) > 1:
        return " ± ".join(map(figure_text, line.over_seeds(recipe))) + " *" * best
    row = line.rows[recipe.runs[0]]
    interval = interval_text(row)
    return f"{figure_text(row['value'])} {f'[{interval}]' if interval else '(no interval)'}{' *' * best}"


def as_data(sides: list[Side], recipes: list[Recipe], lines: list[Line], left_out: Iterable[tuple[str, str]]
            ) -> dict[str, object]:
    """The same as plain data: `best` is the index of a recipe, null where none is better; `figures` are of the runs."""
    shown = ("value", "interval", "floor", "untrained", "reals")
    return {
        "resolution": sides[0].any["resolution"],
        "runs": [{"run": side.path, **{key: side.any[key] for key in ("checkpoint", "images_seen", "seed")}}
                 for side in sides],
        "recipes": [{"recipe": recipe.name, "runs": [sides[run].path for run in recipe.runs],
                     "seeds": [sides[run].seed for run in recipe.runs]} for recipe in recipes],
        "metrics": [{"metric": line.metric, "better": better(line.metric),
                     **{key: line.rows[0][key] for key in ("count", "features", "features_digest", "data")},
                     "figures": [{key: row[key] for key in shown} for row in line.rows],
                     "over_seeds": [dict(zip(("mean", "deviation"), line.over_seeds(recipe), strict=True))
                                    for recipe in recipes if len(recipe.runs) > 1],
                     "best": line.best(recipes)}
                    for line in lines],
        "left_out": [{"metric": metric, "reason": reason} for metric, reason in left_out]}
