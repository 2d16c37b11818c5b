"""Claims about how figures read: names, lines and comparisons, on rows and run folders made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gradine.configs.schema import UserError, dump, from_dict
from gradine.pipeline import figures
from gradine.pipeline.compare import compare_runs
from gradine.pipeline.run_dir import RunDir

Row = dict[str, Any]
LITE0, PIXELS, REALS = "a" * 64, "b" * 64, "c" * 64


def row(metric: str, value: float | None, **facts: Any) -> Row:
    features = figures.split(metric)[1] or None
    digest = {None: None, "pixels16": PIXELS}.get(features, LITE0)
    return {"metric": metric, "value": value, "reason": None, "interval": None, "floor": None, "untrained": None,
            "reals": None, "parts": None, "features": features, "features_digest": digest, "count": 5000,
            "resolution": 8, "checkpoint": "r0008-hold-000000300", "images_seen": 300, "seed": 0, "data": REALS,
            "seconds": 1.0, **facts}


OLD = {"metric": "frechet_pixels16", "value": 9.0, "reason": None, "levels": None, "floor": 0.5, "untrained": 20.0,
       "reals": None, "spread": 0.7, "coverage": 0.6, "coverage_count": 271, "resolution": 8, "seed": 0, "count": 271,
       "checkpoint": "r0008-hold-000000300", "images_seen": 300, "seconds": 0.7}


# ---- Rows and names


def test_a_row_of_an_older_version_gets_its_present_name_and_every_key() -> None:
    now = figures.current(OLD)
    assert now["metric"] == "fd_pixels16"
    assert (now["features"], now["features_digest"], now["data"], now["interval"]) == ("pixels16", None, None, None)
    swd = figures.current({**OLD, "metric": "swd", "levels": {"4": 3.0}})
    assert (swd["parts"], swd["features"]) == ({"4": 3.0}, None)
    assert set(now) >= set(row("swd", 1.0))


def test_a_row_of_this_version_stays_as_it_is() -> None:
    for each in (row("fid", 1.0, parts={"a": 1}, interval=[0.5, 1.5]), row("swd", None, reason="too few")):
        assert figures.current(each) == {**each, "failed": False}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_no_value_and_says_so(value: float) -> None:
    now = figures.current(row("swd", value, floor=value))
    assert (now["value"], now["floor"], now["reason"]) == (None, None, "not finite")


def test_of_a_metric_measured_twice_the_newest_value_counts_and_a_null_replaces_none() -> None:
    again = row("swd", 11.0)
    assert figures.latest([row("swd", 12.0), OLD, again, row("fd_pixels16", None, reason="died")]) == [
        figures.current(OLD), figures.current(again)]
    assert [each["reason"] for each in figures.latest([row("swd", None, reason="1"), row("swd", None, reason="2")])
            ] == ["2"]


def test_an_evaluation_that_failed_as_a_whole_is_forgotten_once_one_worked() -> None:
    failed = [row(metric, None, reason="it hung", failed=True) for metric in ("swd", "fd_pixels16")]
    elsewhere = row("swd", None, failed=True, checkpoint="r0008-fade-000000200")
    found = figures.latest([*failed, row("swd", 12.0), elsewhere, *failed])
    assert [(each["metric"], each["value"], each["checkpoint"][6:10]) for each in found] == [
        ("swd", 12.0, "hold"), ("swd", None, "fade")]


@pytest.mark.parametrize(("metric", "kind", "features", "label", "better"), [
    ("swd", "swd", "", "SWD", "lower"),
    ("fd_lite0_224", "fd", "lite0_224", "Fréchet distance, lite0 at 224 px", "lower"),
    ("fd_pixels16", "fd", "pixels16", "Fréchet distance, pixels at 16 px", "lower"),
    ("class_fd_lite0_224", "class_fd", "lite0_224", "Fréchet distance, class by class, lite0 at 224 px", "lower"),
    ("fd_my_own", "fd", "my_own", "Fréchet distance, my_own", "lower"),
    ("fid", "fd", "inception", "FID", "lower"),
    ("fid_clean", "fd", "inception_clean", "FID, antialiased", "lower"),
    ("kid", "kid", "inception", "KID", "lower"),
    ("kid_clean", "kid", "inception_clean", "KID, antialiased", "lower"),
    ("kid_lite0_128", "kid", "lite0_128", "KID, lite0 at 128 px", "lower"),
    ("is", "is", "inception", "Inception score", "higher"),
    ("coverage_inception", "coverage", "inception", "Coverage, Inception", "higher"),
    ("recall_inception_clean", "recall", "inception_clean", "Recall, Inception, antialiased", "higher"),
    ("copy_rate_lite0_224", "copy_rate", "lite0_224", "Copy rate, lite0 at 224 px", "lower"),
    ("path_length_pixels16", "path_length", "pixels16", "Path length, pixels at 16 px", "lower"),
    ("ms_ssim", "ms_ssim", "", "MS-SSIM of pairs", None),
    ("spread_pixels16", "spread", "pixels16", "Spread, pixels at 16 px", None),
    ("discriminator", "discriminator", "", "Accuracy of the discriminator", None),
    ("of_tomorrow", "of_tomorrow", "", "of_tomorrow", None)])
def test_every_metric_has_a_name_and_a_direction(metric: str, kind: str, features: str, label: str,
                                                 better: str | None) -> None:
    assert figures.split(metric) == (kind, features)
    assert (figures.label(metric), figures.better(metric)) == (label, better)


def test_metrics_are_read_distances_first_and_of_each_kind_the_strongest_features_first() -> None:
    read = ["swd", "fid", "fd_lite0_224", "fd_your_own", "fd_pixels16", "kid", "kid_pixels16", "is",
            "precision_pixels16", "coverage_lite0_128", "coverage_pixels16", "ms_ssim", "copy_rate_pixels16",
            "discriminator", "of_tomorrow"]
    assert sorted({*read}, key=figures.order) == read


def test_the_strongest_features_are_those_of_a_distance_that_has_a_value() -> None:
    rows = [row("fd_pixels16", 1.0), row("fd_lite0_224", 2.0), row("fid", None), row("coverage_inception", 0.5)]
    assert figures.strongest(rows) == "lite0_224"
    assert figures.distances_of([*rows, row("swd", 1.0)]) == ["swd", "fd_lite0_224"]
    assert figures.strongest([row("swd", 1.0)]) == ""


# ---- The line


OF: Any = SimpleNamespace(resolution=32)


def test_twenty_rows_are_one_line_of_the_strongest_features() -> None:
    rows = [row("swd", 42.125, floor=2.5, untrained=232.0, interval=[41.0, 43.0]),
            row("ms_ssim", 0.27, reals=0.31, count=900), row("discriminator", 0.5),
            *(row(f"{kind}_{features}", value, floor=0.5, untrained=99.0)
              for features, value in (("pixels16", 8.0), ("lite0_224", 0.25))
              for kind in ("fd", "spread", "kid", "precision", "recall", "density", "coverage", "duplicates",
                           "copy_rate"))]
    assert len(rows) == 21
    assert figures.figures_line(OF, rows) == (
        "   32px measured: swd 42.12 (floor 2.5, untrained 232, 5,000 images), "
        "fd_lite0_224 0.25 (floor 0.5, untrained 99, 5,000 images), "
        "kid_lite0_224 0.25 (floor 0.5, untrained 99, 5,000 images), "
        "coverage 0.25, ms_ssim 0.27 (reals 0.31), spread 0.25, copy_rate 0.25")


def test_the_line_of_other_runs_says_what_they_are_measured_by() -> None:
    conditional = [row("class_fd_pixels16", 9.0, floor=1.0), row("class_accuracy", 0.5, reals=0.75)]
    assert figures.figures_line(OF, [*conditional, row("reconstruction", 0.25)]) == (
        "   32px measured: class_fd_pixels16 9 (floor 1, 5,000 images), reconstruction 0.25 (5,000 images), "
        "class_accuracy 0.5 (reals 0.75)")


def test_nulls_are_told_with_at_most_two_reasons() -> None:
    rows = [row("swd", 1.0, count=None), row("ms_ssim", None, reason="defined from 64 px up"),
            *(row(f"{kind}_lite0_224", None, reason="no weights.\nRun " + 60 * "pip ") for kind in ("fd", "kid", "is")),
            row("path_length_pixels16", None)]
    (line,) = figures.figures_line(OF, rows).splitlines()
    told = line.partition("; null: ")[2]
    assert line.startswith("   32px measured: swd 1; null: ms_ssim (defined from 64 px up), ")
    assert "fd_lite0_224 and 2 more (no weights. Run pip" in told
    assert told.endswith("…), and 1 others")
    assert len(line) < 220


def test_an_evaluation_that_failed_is_a_line_too() -> None:
    assert figures.figures_line(OF, [row("swd", None, reason="it hung", failed=True)]) == (
        "   32px measured: nothing; null: swd (it hung)")
    assert figures.figures_line(OF, [OLD]).startswith("   32px measured: fd_pixels16 9 (floor 0.5, untrained 20, 271")


def test_parts_are_read_as_text_whatever_their_depth() -> None:
    assert figures.parts_text(row("swd", 1.0, parts={"16": 6.5, "32": 8.0})) == "16 px: 6.5, 32 px: 8"
    assert figures.parts_text(row("class_fd_lite0_224", 1.0, parts={"0": 6.5, "boot": None})) == "0: 6.5"
    table = {"held_out": {"taken_for_real": 0.25, "mean": None}, "searched": 900}
    assert figures.parts_text(row("discriminator", 1.0, parts=table)) == (
        "held out taken for real: 0.25, searched: 900")


# ---- Runs side by side


def run_of(folder: Path, name: str, *rows: Row) -> Path:
    """A run of 4 and 8 px, whose stages end at 100 and at 300 images."""
    stages = [{"resolution": size, "fade_images": 100, "hold_images": 100, "batch_size": 4} for size in (4, 8)]
    run = RunDir(folder / name)
    run.path.mkdir(parents=True)
    run.config.write_text(dump(from_dict({"name": name, "data": {"source": "a", "shards": "b"}, "stages": stages})))
    for each in rows:
        run.append("metrics.jsonl", each)
    return run.path


def compared(*paths: Path, **how: Any) -> Any:
    return json.loads(compare_runs(paths, as_json=True, **how))


def test_two_runs_stand_side_by_side_with_their_intervals(tmp_path: Path) -> None:
    table = compare_runs([
        run_of(tmp_path, "long", row("swd", 42.0, interval=[41.0, 43.0]), row("is", 3.0, interval=[2.5, 3.5]),
               row("ms_ssim", 0.25, interval=[0.24, 0.26])),
        run_of(tmp_path, "short", row("swd", 50.0, interval=[47.5, 52.5]), row("is", 2.0, interval=[1.5, 2.75]),
               row("ms_ssim", 0.5))])
    assert table.splitlines() == [
        "8 px",
        "                     images  long                  short",
        "checkpoint                   r0008-hold-000000300  r0008-hold-000000300",
        "images seen                  300                   300",
        "SWD               ↓   5,000  42 [41 to 43] *       50 [47.5 to 52.5]",
        "Inception score   ↑   5,000  3 [2.5 to 3.5]        2 [1.5 to 2.75]",
        "MS-SSIM of pairs      5,000  0.25 [0.24 to 0.26]   0.5 (no interval)",
        "",
        "↓ lower is better, ↑ higher. In brackets the 95 % interval; * better than every other run's: the intervals do "
        "not overlap."]


@pytest.mark.parametrize(("metric", "spans", "best"), [
    ("swd", [(1, 2), (3, 4)], 0), ("swd", [(3, 4), (1, 2), (5, 6)], 1), ("swd", [(1, 3), (2, 4)], None),
    ("swd", [(1, 2), (2, 3)], None), ("swd", [(1, 2), (5, 6), (1.5, 3)], None), ("swd", [(1, 2), None], None),
    ("precision_lite0_224", [(1, 2), (3, 4)], 1), ("precision_lite0_224", [(1, 3), (2, 4)], None),
    ("ms_ssim", [(1, 2), (3, 4)], None), ("discriminator", [(1, 2), (3, 4)], None)])
def test_the_best_is_marked_only_where_no_other_interval_overlaps(
        metric: str, spans: list[Any], best: int | None, tmp_path: Path) -> None:
    runs = [run_of(tmp_path, f"run{n}", row(metric, 1.0, interval=span)) for n, span in enumerate(spans)]
    (line,) = compared(*runs)["metrics"]
    assert line["best"] == best


DIFFERENT = [
    ({"count": 2000}, "count is 5,000 in", "evaluate {one} --checkpoint r0008-hold-000000300 --features lite0 --count "
                                           "2000"),
    ({"features_digest": "d" * 64}, "features_digest is aaaaaaaaaaaa… in", "Measure both by the same weights"),
    ({"data": "e" * 64}, "data is cccccccccccc… in", "Only runs on the same shards compare"),
    ({"features_digest": None}, "features_digest missing", "gradine evaluate {two} --checkpoint r0008-hold-000000300"),
    ({"data": None}, "data missing", "gradine evaluate {two} --checkpoint r0008-hold-000000300 --features lite0")]


@pytest.mark.parametrize(("fact", "says", "way"), DIFFERENT, ids=lambda each: "")
@pytest.mark.parametrize("with_third", [False, True], ids=["two", "three"])
def test_what_was_not_measured_alike_is_refused_in_one_line(fact: Row, says: str, way: str, with_third: bool,
                                                            tmp_path: Path) -> None:
    one, alike = (run_of(tmp_path, name, row("swd", 1.0), row("fd_lite0_224", 1.0)) for name in ("one", "alike"))
    two = run_of(tmp_path, "two", row("swd", 1.0), row("fd_lite0_224", 1.0, **fact))
    with pytest.raises(UserError) as refused:
        compare_runs([one, alike, two] if with_third else [one, two])
    message = str(refused.value)
    assert message.startswith("fd_lite0_224 ")
    for part in (says, way.format(one=one, two=two), str(two)):
        assert part in message
    assert "\n" not in message


def test_other_resolutions_under_one_name_are_refused(tmp_path: Path) -> None:
    one = run_of(tmp_path, "one", row("swd", 1.0, checkpoint="x"))
    two = run_of(tmp_path, "two", row("swd", 1.0, checkpoint="x", resolution=4))
    with pytest.raises(UserError, match="swd cannot be compared: resolution is 8 in .* and 4 in"):
        compare_runs([one, two], checkpoint="x")


def test_old_rows_compare_by_swd_alone_and_say_that_their_reals_are_unknown(tmp_path: Path) -> None:
    swd = {**OLD, "metric": "swd", "levels": {"8": 9.0}}
    runs = [run_of(tmp_path, name, swd) for name in ("one", "two")]
    assert "Older rows do not say which reals they are of: SWD." in compare_runs(runs)
    with pytest.raises(UserError, match="fd_pixels16 of .* older gradine.*gradine evaluate .*--features pixels"):
        compare_runs([run_of(tmp_path, name, swd, OLD) for name in ("three", "four")])
    newer = run_of(tmp_path, "newer", row("swd", 8.0, count=271))
    with pytest.raises(UserError, match="data is unknown in .*one and cccc.* Run: gradine evaluate .*one "):
        compare_runs([runs[0], newer])


def test_a_metric_that_not_all_have_is_named_with_the_reason(tmp_path: Path) -> None:
    one = run_of(tmp_path, "one", row("swd", 1.0), row("kid", 1.0), row("ms_ssim", 0.5))
    two = run_of(tmp_path, "two", row("swd", 1.0), row("ms_ssim", None, reason="defined from 64 px up", count=0))
    assert compared(one, two)["left_out"] == [
        {"metric": "kid", "reason": "two did not measure it"},
        {"metric": "ms_ssim", "reason": "two has none: defined from 64 px up"}]
    text = compare_runs([one, two])
    assert "Left out: KID: two did not measure it.\n" in text
    assert [line["metric"] for line in compared(one, two)["metrics"]] == ["swd"]


def test_copy_rates_judged_against_other_images_do_not_compare(tmp_path: Path) -> None:
    one, two, three = (run_of(tmp_path, name, row("copy_rate_pixels16", 0.1, parts={"searched": 900, "held_out": held}))
                       for name, held in (("one", 0), ("two", 0), ("three", 50)))
    assert [line["metric"] for line in compared(one, two)["metrics"]] == ["copy_rate_pixels16"]
    assert compared(one, three)["left_out"] == [
        {"metric": "copy_rate_pixels16", "reason": "judged against other held-out images"}]


def test_by_default_the_highest_stage_end_that_all_have_measured_is_compared(tmp_path: Path) -> None:
    four = {"resolution": 4, "images_seen": 100, "checkpoint": "r0004-hold-000000100"}
    inside = {"images_seen": 280, "checkpoint": "r0008-hold-000000280"}
    one = run_of(tmp_path, "one", row("swd", 1.0, **four), row("swd", 2.0), row("swd", 3.0, **inside))
    two = run_of(tmp_path, "two", row("swd", 4.0, **four), row("swd", 5.0, **inside))
    both = run_of(tmp_path, "both", row("swd", 6.0, **four), row("swd", 7.0), row("swd", 8.0))

    def values(*runs: Path, **how: Any) -> list[float]:
        return [figure["value"] for figure in compared(*runs, **how)["metrics"][0]["figures"]]

    assert values(one, two) == [1.0, 4.0]
    assert values(one, both) == [2.0, 8.0]  # of one measured twice the newest
    assert values(one, both, resolution=4) == [1.0, 6.0]
    assert values(one, two, checkpoint=inside["checkpoint"]) == [3.0, 5.0]
    assert compared(one, both)["runs"][0] == {"run": str(one), "checkpoint": "r0008-hold-000000300",
                                              "images_seen": 300, "seed": 0}


@pytest.mark.parametrize(("how", "says"), [
    ({"resolution": 8}, "two has no figures of the end of its 8 px stage. Run: gradine evaluate"),
    ({"checkpoint": "r0008-fade-000000150"}, "one has no figures of r0008-fade-000000150. Run: gradine evaluate"),
    ({}, "no resolution has its end measured in all runs"),
    ({"resolution": 8, "checkpoint": "x"}, "both choose")])
def test_what_is_not_measured_is_named_with_the_command_that_measures_it(
        how: dict[str, Any], says: str, tmp_path: Path) -> None:
    one = run_of(tmp_path, "one", row("swd", 1.0))
    two = run_of(tmp_path, "two", row("swd", None, failed=True, reason="it hung"))
    with pytest.raises(UserError, match=says):
        compare_runs([one, two], **how)


def test_one_run_is_no_comparison(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two runs or more"):
        compare_runs([run_of(tmp_path, "one")])
