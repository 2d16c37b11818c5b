"""What `gradine compare --picture` draws: a chart per metric, recipes down, and below them what each recipe makes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from PIL import Image

from gradine.pipeline.figures import better, label
from gradine.pipeline.report import opened, top_of

if TYPE_CHECKING:
    from gradine.pipeline.compare import Line, Recipe, Side

MOST_BYTES = 200_000
PANELS = 3  # charts, and samples, beside each other
SAMPLE_ROWS = 3  # of a grid
COLORS = ("#3b6ea5", "#c2693d", "#5b8c5a", "#8a5a83", "#a8893a", "#4f8f99")
WIDTH, PANEL, ROW = 9.0, 0.75, 0.22  # inches: of all, of a chart without its recipes, of a recipe in it


def draw(sides: list[Side], recipes: list[Recipe], lines: list[Line], samples: list[Path]) -> bytes:
    """PNG of less than 200 kB. `samples`: the grid of each recipe's first seed; one that is missing leaves a gap."""
    charts = -(-len(lines) // PANELS)
    grids = [cut(grid, sides[0].any["resolution"]) if (grid := opened(path)) else None for path in samples]
    columns = min(PANELS, len(grids))
    tallest = max((grid.height / grid.width for grid in grids if grid), default=0)
    of_charts = charts * (PANEL + ROW * len(recipes))
    of_samples = -(-len(grids) // columns) * (WIDTH / columns * tallest + 0.3) if tallest else 0.01
    figure = Figure(figsize=(WIDTH, of_charts + of_samples + 0.4), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[of_charts + 0.4, of_samples], squeeze=False).flat
    draw_charts(upper, sides, recipes, lines, charts)
    if tallest:
        panels = lower.subplots(-(-len(grids) // columns), columns, squeeze=False).flat
        for axes, recipe, grid in zip(panels, recipes, grids, strict=False):
            axes.set_title(recipe.name, fontsize=9)
            if grid:
                axes.imshow(grid)
        for axes in lower.axes:
            axes.set_axis_off()
    return smallest(figure)


def cut(grid: Image.Image, resolution: int) -> Image.Image:
    """The first rows of a grid; a plot of points as it is."""
    return top_of(grid, SAMPLE_ROWS * resolution) if resolution > 1 else grid


def draw_charts(figure: SubFigure, sides: list[Side], recipes: list[Recipe], lines: list[Line], rows: int) -> None:
    seeds, any_row = len(recipes[0].runs), sides[0].any
    bars = f"dots: {seeds} seeds, bar: their mean ± standard deviation" if seeds > 1 else "bar: 95 % interval"
    figure.suptitle(f"{any_row['resolution']} px · {bars} · ◆ the best · gray: noise floor, or the reals' own",
                    fontsize=9)
    if not lines:
        return
    panels = figure.subplots(rows, PANELS, squeeze=False, sharey=True)
    for number, axes in enumerate(panels.flat):
        if number < len(lines):
            draw_line(axes, recipes, lines[number])
            axes.tick_params(labelsize=8, length=0)
            axes.spines[["top", "right", "left"]].set_visible(False)
        else:
            axes.set_axis_off()
    first: Axes = panels[0, 0]
    first.set_yticks(range(len(recipes)), [recipe.name for recipe in recipes])
    first.set_ylim(len(recipes) - 0.4, -0.6)  # the first recipe on top


def draw_line(axes: Axes, recipes: list[Recipe], line: Line) -> None:
    sign = {"lower": " ↓", "higher": " ↑", None: ""}[better(line.metric)]
    best = line.best(recipes)
    axes.set_title(label(line.metric) + sign, fontsize=8.5, loc="left")
    axes.locator_params(axis="x", nbins=4)
    beside = [row[name] for row in line.rows for name in ("floor", "reals") if row[name] is not None]
    if beside:
        axes.axvline(sum(beside) / len(beside), color="#bbbbbb", linewidth=1)
    for place, recipe in enumerate(recipes):
        rows, color = line.of(recipe), COLORS[place % len(COLORS)]
        middle = rows[0]["value"]
        low, high = rows[0]["interval"] or (middle, middle)
        if len(rows) > 1:
            middle, deviation = line.over_seeds(recipe)
            low, high = middle - deviation, middle + deviation
            axes.plot([row["value"] for row in rows], [place] * len(rows), ".", color=color, alpha=0.5, markersize=6)
        axes.plot([low, high], [place, place], color=color, linewidth=2, solid_capstyle="butt")
        axes.plot([middle], [place], "D" if place == best else "|", color=color, markersize=6 if place == best else 11)


def smallest(figure: Figure) -> bytes:
    """As sharp as its bytes allow: 256 colors, and fewer dots where samples are as noise."""
    content = b""
    for dpi in (110, 80, 55, 35):
        drawn, reduced = io.BytesIO(), io.BytesIO()
        figure.savefig(drawn, format="png", dpi=dpi)
        Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(reduced, "PNG", optimize=True)
        content = reduced.getvalue()
        if len(content) < MOST_BYTES:
            break
    return content
