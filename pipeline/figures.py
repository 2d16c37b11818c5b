"""How the rows of metrics.jsonl read: what a metric is called, which way is better, in which order, in how many words.

A metric's name is its kind and, where it needs them, its features: `fd_lite0_224`. With the features of Inception the
field has names of its own: `fid`, `kid_clean`. Rows of older versions become those of this one in `current`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradine.configs.schema import FORMER_METRICS, INCEPTION_METRICS

if TYPE_CHECKING:
    from gradine.stages.commits import Checkpoint

Row = dict[str, Any]  # of metrics.jsonl


@dataclass(frozen=True)
class Kind:
    words: str
    better: str | None  # `lower`, `higher`, None: neither way by itself
    group: str


DISTANCE, VARIETY, COPIES, PLAYERS = ("Distance to the reals", "Fidelity and diversity", "Copies of training images",
                                      "The discriminator")
KINDS = {  # in the order in which they are read
    "swd": Kind("SWD", "lower", DISTANCE),
    "fd": Kind("Fréchet distance", "lower", DISTANCE),
    "kid": Kind("KID", "lower", DISTANCE),
    "class_fd": Kind("Fréchet distance, class by class", "lower", DISTANCE),
    "reconstruction": Kind("Reconstruction error", "lower", DISTANCE),
    "mean_error": Kind("Error of the mean", "lower", DISTANCE),
    "covariance_error": Kind("Error of the covariance", "lower", DISTANCE),
    "is": Kind("Inception score", "higher", DISTANCE),
    "precision": Kind("Precision", "higher", VARIETY),
    "recall": Kind("Recall", "higher", VARIETY),
    "density": Kind("Density", "higher", VARIETY),
    "coverage": Kind("Coverage", "higher", VARIETY),
    "ms_ssim": Kind("MS-SSIM of pairs", None, VARIETY),  # that of the reals is right; noise has less
    "spread": Kind("Spread", None, VARIETY),  # 1 is right
    "duplicates": Kind("Duplicates", "lower", VARIETY),
    "path_length": Kind("Path length", "lower", VARIETY),
    "modes": Kind("Modes found", "higher", VARIETY),
    "high_quality": Kind("Fakes close to a mode", "higher", VARIETY),
    "copy_rate": Kind("Copy rate", "lower", COPIES),
    "discriminator": Kind("Accuracy of the discriminator", None, PLAYERS),
    "optimal_discriminator": Kind("Farthest from the optimal discriminator", "lower", PLAYERS),
    "class_accuracy": Kind("Fakes of the class asked for, to the discriminator", "higher", PLAYERS),
}
FEATURE_WORDS = {"pixels16": "pixels at 16 px", "lite0_224": "lite0 at 224 px", "lite0_128": "lite0 at 128 px",
                 "inception": "Inception", "inception_clean": "Inception, antialiased"}
STRENGTH = ["inception", "inception_clean", "lite0_224", "lite0_128"]  # then functions of one's own, and pixels last
NUMBERS = ("value", "floor", "untrained", "reals")
MISSING: Row = dict.fromkeys((*NUMBERS, "reason", "interval", "parts", "features_digest", "count", "seed", "data",
                              "seconds"))
ALIKE = ("resolution", "count", "features_digest", "data")  # what two rows of a metric share if they compare
SAID = {"swd", "fd", "kid", "class_fd", "reconstruction", "mean_error", "covariance_error", "coverage", "spread",
        "ms_ssim", "modes", "high_quality", "copy_rate", "optimal_discriminator", "class_accuracy"}  # on a line
REASON_SHOWN, REASONS_SHOWN = 90, 2  # letters of a reason on a line, and reasons


# Rows ----------------------------------------------------------------------------------------------------------------


def current(row: Row) -> Row:
    """A row of any version with every key of this one, under its present name. What is not finite is None."""
    now = {**MISSING, "failed": False, **row, "metric": FORMER_METRICS.get(row["metric"], row["metric"])}
    now.setdefault("features", split(now["metric"])[1] or None)
    now["parts"] = now["parts"] or row.get("levels")
    for name in NUMBERS:
        if now[name] is not None and not math.isfinite(now[name]):
            now[name] = None
            if name == "value":
                now["reason"] = "not finite"
    return now


def latest(rows: Iterable[Row], fullest: bool = False) -> list[Row]:
    """Of each checkpoint and metric the newest row, in the present form; one without a value does not replace one, nor,
    if `fullest`, one of fewer images one of more.

    Of a checkpoint with rows of an evaluation that worked, those of one that failed as a whole say nothing.
    """
    found: dict[tuple[str, str], Row] = {}
    rows = [current(row) for row in rows]
    worked = {row["checkpoint"] for row in rows if not row["failed"]}
    for row in rows:
        key = row["checkpoint"], row["metric"]
        if row["failed"] and row["checkpoint"] in worked:
            continue
        before = found.get(key, row)
        if fullest and before["value"] is not None and (row["count"] or 0) < (before["count"] or 0):
            continue
        if row["value"] is not None or before["value"] is None:
            found.pop(key, None)  # to the end: the order is that of writing
            found[key] = row
    return [*found.values()]


def alike(one: Row, other: Row) -> bool:
    """Whether the values of two rows compare: of one metric, measured in the same way."""
    return all(one[key] == other[key] for key in ("metric", *ALIKE))


def strongest(rows: Iterable[Row]) -> str:
    """The features by which the rows' Fréchet distances, those with a value, say most; `` without any."""
    found = {features for row in rows if row["value"] is not None
             for kind, features in [split(row["metric"])] if kind in ("fd", "class_fd")}
    return min(found, key=_weakness, default="")


def in_two(rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """What a person reads first, of no features or of those that say most; and the same by the other features."""
    rows = [*rows]
    chosen = strongest(rows)
    others = [row for row in rows if chosen and split(row["metric"])[1] not in ("", chosen)]
    return [row for row in rows if row not in others], others


def distances_of(rows: Iterable[Row]) -> list[str]:
    """The metrics by which checkpoints are told apart: SWD and the Fréchet distance of the strongest features."""
    rows = [*rows]
    chosen = strongest(rows)
    return sorted({metric for row in rows if (metric := row["metric"]) == "swd" or split(metric) == ("fd", chosen)},
                  key=order)


# Names ---------------------------------------------------------------------------------------------------------------


def split(metric: str) -> tuple[str, str]:
    """`fd_lite0_224` -> `fd`, `lite0_224`; `fid_clean` -> `fd`, `inception_clean`; `swd` -> `swd`, ``."""
    for kind, name in INCEPTION_METRICS.items():
        if metric in (name, f"{name}_clean"):
            return kind, f"inception{metric.removeprefix(name)}"
    kind = next((kind for kind in KINDS if metric.startswith(f"{kind}_")), metric)
    return kind, metric.removeprefix(kind).removeprefix("_")


def label(metric: str) -> str:
    """`fd_lite0_224` -> `Fréchet distance, lite0 at 224 px`; a name that is not known stays as it is."""
    kind, features = split(metric)
    if kind not in KINDS:
        return metric
    if kind in INCEPTION_METRICS and features in ("inception", "inception_clean"):
        return ("FID" if kind == "fd" else KINDS[kind].words) + ", antialiased" * features.endswith("clean")
    return ", ".join(filter(None, [KINDS[kind].words, FEATURE_WORDS.get(features, features)]))


def better(metric: str) -> str | None:
    """`lower`, `higher`, or None where neither is better by itself, as with MS-SSIM, spread and the discriminator."""
    kind = KINDS.get(split(metric)[0])
    return kind.better if kind else None


def group(metric: str) -> str:
    """The heading it stands under."""
    kind = KINDS.get(split(metric)[0])
    return kind.group if kind else "Others"


def order(metric: str) -> tuple[Any, ...]:
    """Sorts metrics as one reads them: by kind, and of a kind by the features that say most."""
    kind, features = split(metric)
    return [*KINDS, kind].index(kind), kind, *_weakness(features)


def _weakness(features: str) -> tuple[int, str]:
    if features in STRENGTH:
        return STRENGTH.index(features), ""
    return len(STRENGTH) + (features == "pixels16"), features


# Words ---------------------------------------------------------------------------------------------------------------

DASH = "–"


def figure_text(value: float | None) -> str:
    """Four significant digits; a dash for None."""
    if value is None:
        return DASH
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def interval_text(row: Row) -> str:
    """`40.9 to 43.2`, `` without one."""
    return " to ".join(map(figure_text, row["interval"])) if row["interval"] else ""


def parts_text(row: Row) -> str:
    """`16 px: 6.5, 32 px: 8`, of SWD's levels; of tables of tables `held_out accepted: 0.4`."""
    unit = " px" if row["metric"] == "swd" else ""
    return ", ".join(f"{name}{unit}: {figure_text(value)}" for name, value in _flat(row["parts"] or {}))


def _flat(parts: dict[str, Any], above: str = "") -> Iterator[tuple[str, float | None]]:
    for name, value in parts.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name} ".replace("_", " "))
        elif isinstance(value, int | float):
            yield f"{above}{name}".replace("_", " "), value


def figures_line(of: Checkpoint, rows: Iterable[Row]) -> str:
    """An evaluation on a line: the distances with their floors, then diversity and copies, then what is null and why.

    Of several features those that say most speak; metrics.jsonl and the report have them all.
    """
    rows = [current(row) for row in rows]
    known = {row["metric"]: row for row in rows if row["value"] is not None}
    chosen = strongest(rows)
    said = []
    for metric in sorted(known, key=order):
        kind, features = split(metric)
        row = known[metric]
        if features not in ("", chosen) or kind not in SAID:
            continue
        beside = [f"{name} {figure_text(row[name])}" for name in ("floor", "untrained", "reals")
                  if row[name] is not None and (name == "reals" or group(metric) == DISTANCE)]
        if group(metric) == DISTANCE and row["count"] is not None:
            beside.append(f"{row['count']:,} images")
        about = f" ({', '.join(beside)})" if beside else ""
        said.append(f"{metric if group(metric) == DISTANCE else kind} {figure_text(row['value'])}{about}")
    why = _reasons(row for row in rows if row["count"])  # what is not defined at this resolution is no news
    return f"{of.resolution:>5}px measured: {', '.join(said) or 'nothing'}{f'; null: {why}' if why else ''}"


def _reasons(rows: Iterable[Row]) -> str:
    """`ms_ssim (defined from 64 px up)`: of each reason for a null the first metric, and how many more."""
    found = [*nulls(rows).items()]
    said = []
    for reason, metrics in found[:REASONS_SHOWN]:
        also = f" and {len(metrics) - 1} more" if len(metrics) > 1 else ""
        short = reason if len(reason) <= REASON_SHOWN else f"{reason[:REASON_SHOWN - 1].rstrip()}…"
        said.append(f"{metrics[0]}{also} ({short})")
    left = sum(len(metrics) for _, metrics in found[REASONS_SHOWN:])
    return ", ".join(said) + (f", and {left} others" if left else "")


def nulls(rows: Iterable[Row]) -> dict[str, list[str]]:
    """Reason -> the metrics that have no value for it."""
    by_reason: dict[str, list[str]] = {}
    for row in rows:
        if row["value"] is None:
            by_reason.setdefault(" ".join((row["reason"] or "no reason given").split()), []).append(row["metric"])
    return by_reason
