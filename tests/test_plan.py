"""Claims about the plan.

The run: 4 px holds 0..80; 8 px fades 80..160 and holds to 240; 16 px fades to 320 and holds to 400.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from gradine.configs.schema import Run, UserError, as_dict, assign, from_dict
from gradine.pipeline.plan import (
    ASSUMED_GMACS,
    Plan,
    make_plan,
    memory_gb,
    refuse_changes,
    resolved,
    same_group,
    seconds_left,
    table,
)
from gradine.stages.commits import Checkpoint


def run_of(changes: dict[str, Any] | None = None, sizes: tuple[int, ...] = (4, 8, 16), **top: Any) -> Run:
    raw: dict[str, Any] = {
        "name": "t", "data": {"source": "in", "shards": "out"}, **top,
        "network": {"latent_size": 8, "fmap_base": 64, "fmap_max": 8},
        "stages": [{"resolution": size, "fade_images": 80, "hold_images": 80, "batch_size": 8, "threads": 2}
                   for size in sizes]}
    for path, value in (changes or {}).items():
        assign(raw, path, value)
    return from_dict(raw)


def at(images_seen: int, resolution: int, stage_end: bool = False) -> Checkpoint:
    path = f"checkpoints/r{resolution:04d}-hold-{images_seen:09d}"
    return Checkpoint(path, resolution, "hold", images_seen, stage_end)


END4, END8, END16 = at(80, 4, True), at(240, 8, True), at(400, 16, True)


# ---- Where a run goes on


@pytest.mark.parametrize(("found", "stages"), [
    ([], (0, 1, 2)),
    ([at(40, 4)], (0, 1, 2)),  # from the middle of the first
    ([END4], (1, 2)),  # at a boundary
    ([END4, at(88, 8)], (1, 2)),
    ([END4, at(160, 8)], (1, 2)),  # where a fade ends is no boundary of stages
    ([END4, at(232, 8)], (1, 2)),
    ([END4, END8], (2,)),
    ([END4, END8, at(248, 16)], (2,)),
    ([END4, END8, END16], ()),  # at the end
])
def test_auto_goes_on_from_the_newest_with_the_stages_that_are_left(found: list[Checkpoint],
                                                                   stages: tuple[int, ...]) -> None:
    plan = make_plan(run_of(), found)
    assert plan.start == (found[-1] if found else None)
    assert plan.images_seen == (found[-1].images_seen if found else 0)
    assert plan.stages == stages
    assert (plan.superseded, plan.branch) == ((), None)


def test_fresh_wants_an_empty_folder_and_says_what_it_found() -> None:
    assert make_plan(run_of(resume="fresh"), []).stages == (0, 1, 2)
    with pytest.raises(UserError, match=r"2 checkpoints, the newest r0008-hold-000000240.*resume=auto") as caught:
        make_plan(run_of(resume="fresh"), [END4, END8])
    assert "\n" not in str(caught.value)


def test_a_resolution_branches_at_the_end_of_the_stage_before_and_leaves_the_later_ones_behind() -> None:
    found = [at(40, 4), END4, at(160, 8), at(200, 8), END8, at(248, 16)]
    plan = make_plan(run_of(resume="8"), found)
    assert (plan.start, plan.images_seen, plan.stages, plan.branch) == (END4, 80, (1, 2), 8)
    assert list(plan.superseded) == found[2:]
    assert "8px" in plan.reason
    plan = make_plan(run_of(resume="16"), found)
    assert (plan.start, plan.images_seen, plan.stages, plan.branch) == (END8, 240, (2,), 16)
    assert list(plan.superseded) == found[5:]


def test_the_same_command_again_continues_its_branch_and_branch_new_starts_over() -> None:
    found = [END4, at(160, 8)]
    plan = make_plan(run_of(resume="8"), found, last_branch="8")
    assert (plan.start, plan.stages, plan.superseded, plan.branch) == (found[1], (1, 2), (), None)
    plan = make_plan(run_of(resume="8", branch="new"), found, last_branch="8")
    assert (plan.start, plan.superseded, plan.branch) == (END4, (found[1],), 8)
    plan = make_plan(run_of(resume="8"), found, last_branch="16")  # the last branch was another one
    assert (plan.start, plan.branch) == (END4, 8)
    assert make_plan(run_of(resume="auto"), found, last_branch="8").start == found[1]


@pytest.mark.parametrize("found", [[], [at(40, 4)], [at(80, 4)], [at(72, 4, True)], [at(80, 16, True)], [END8],
                                   [END4, at(160, 8)]])
def test_a_resolution_without_the_end_of_the_stage_before_is_refused_naming_what_there_is(
        found: list[Checkpoint]) -> None:
    resume, needs = ("16", "8px stage (240 images)") if found[:1] == [END4] else ("8", "4px stage (80 images)")
    with pytest.raises(UserError) as caught:
        make_plan(run_of(resume=resume), found)
    said = str(caught.value)
    ends = ", ".join(c.name for c in found if c.stage_end) or "none"
    for part in (f"resume={resume}", needs, f"found: {ends}.", "resume=auto"):
        assert part in said
    assert "\n" not in said


@pytest.mark.parametrize("stranger", [at(80, 8), at(248, 8), at(72, 16), at(400, 32), at(408, 16)])
def test_a_checkpoint_that_lies_in_no_stage_of_the_schedule_is_refused(stranger: Checkpoint) -> None:
    with pytest.raises(UserError, match="does not lie in its stage") as caught:
        make_plan(run_of(), [stranger])
    assert stranger.name in str(caught.value)


def test_stages_of_other_lengths_round_up_to_whole_batches() -> None:
    run = run_of({"stages.0.hold_images": 81, "stages.1.fade_images": 0})  # 4 px ends at 88, 8 px holds to 168
    assert make_plan(run, [at(88, 4, True)]).stages == (1, 2)
    assert make_plan(run, [at(168, 8, True)]).stages == (2,)
    with pytest.raises(UserError, match="does not lie"):
        make_plan(run, [at(240, 8, True)])


# ---- What may change when a run goes on


SAFE = {"resume": "8", "branch": "new", "stages.1.threads": 4,
        "tick_images": 5, "runs": "elsewhere", "checkpoints.keep": 7,
        "checkpoints.every_images": 40, "checkpoints.best": "frechet_pixels16",
        "checkpoints.pin": ["r0004-hold-000000040"], "checkpoints.background": False, "checkpoints.retry_s": 1.0,
        "evaluation.count": 100, "evaluation.when": "end", "ray.address": "auto",
        "data.source": "moved", "data.shards": "moved", "data.cache_gb": 0.5, "data.cache_dir": "/tmp",
        "data.max_rejected_share": 0.5, "data.download_gb": 1.0, "data.deadline_s": 5.0,
        "stages.1.workers": 2, "stages.1.micro_batch": 4, "stages.1.cpus": 2.0, "stages.1.gpus": 1.0,
        "training.compile": True, "training.recompute_from": 8}
UNSAFE = {"training.seed": 1, "training.precision": "bfloat16", "training.channels_last": True, "training.beta2": 0.9,
          "training.mirror": False, "training.penalty_every": 2, "stages.1.precision": "bfloat16",
          "stages.0.channels_last": True, "training.average_half_life": 5,
          "network.latent_size": 16, "network.fmap_max": 4,
          "data.crop": "none", "data.labels": "none", "data.shard_images": 7, "data.channels": 1, "data.crop_seed": 1,
          "data.small": "pad", "data.background": "black", "data.encoding": "jpeg", "data.sampling": "balanced",
          "stages.0.batch_size": 16, "stages.2.hold_images": 160, "stages.1.learning_rate": 0.5,
          "stages.1.fade_images": 0, "init_from": "x", "checkpoints.location": "s3://bucket/elsewhere"}


@pytest.mark.parametrize("key", SAFE)
def test_a_setting_that_changes_nothing_that_is_trained_may_change(key: str) -> None:
    refuse_changes(run_of({key: SAFE[key]}), run_of())


@pytest.mark.parametrize("key", UNSAFE)
def test_a_setting_that_changes_what_is_trained_is_refused_with_its_key_and_both_values(key: str) -> None:
    run, stored = run_of({key: UNSAFE[key]}), run_of()
    tree: Any = as_dict(stored)
    for part in key.split("."):
        tree = tree[int(part) if part.isdigit() else part]
    with pytest.raises(UserError) as caught:
        refuse_changes(run, stored)
    assert f"\n  {key}: {tree} -> {UNSAFE[key]}\n" in str(caught.value)
    assert "resume=RESOLUTION branch=new" in str(caught.value)


def test_every_change_is_listed_one_line_a_key() -> None:
    run = run_of({"training.seed": 3, "stages.0.batch_size": 16, "stages.*.workers": 2, "data.cache_gb": 0.0})
    with pytest.raises(UserError) as caught:
        refuse_changes(run, run_of())
    assert str(caught.value).splitlines()[1:-1] == ["  stages.0.batch_size: 8 -> 16", "  training.seed: 0 -> 3"]


def test_a_branch_may_change_its_own_stages_and_training_and_nothing_before() -> None:
    stored = run_of()
    refuse_changes(run_of({"stages.1.batch_size": 16, "stages.2.hold_images": 8, "training.seed": 1}), stored, 8)
    refuse_changes(run_of({"stages.2.hold_images": 8}), stored, 16)
    refuse_changes(run_of(sizes=(4, 8, 16, 32)), stored, 16)
    refuse_changes(run_of(sizes=(4, 8)), stored, 8)
    for changes, branch, key in (({"stages.1.batch_size": 16}, 16, "stages.1.batch_size"),
                                 ({"stages.0.hold_images": 8}, 8, "stages.0.hold_images"),
                                 ({"network.fmap_max": 4}, 8, "network.fmap_max"),
                                 ({"data.crop": "none"}, 8, "data.crop")):
        with pytest.raises(UserError, match=key):
            refuse_changes(run_of(changes), stored, branch)


def test_stages_added_or_taken_away_without_a_branch_are_refused() -> None:
    with pytest.raises(UserError, match=r"stages\.3\.resolution: not set -> 32"):
        refuse_changes(run_of(sizes=(4, 8, 16, 32)), run_of())
    with pytest.raises(UserError, match=r"stages\.2\.resolution: 16 -> not set"):
        refuse_changes(run_of(sizes=(4, 8)), run_of())


# ---- What is written out


def test_threads_and_micro_batch_are_written_out_from_cores_and_shares() -> None:
    run = resolved(run_of({"stages.*.threads": 0, "stages.0.workers": 2, "stages.1.micro_batch": 4}), cores=6)
    assert [(stage.threads, stage.micro_batch) for stage in run.stages] == [(3, 4), (6, 4), (6, 8)]
    assert resolved(run_of({"stages.*.threads": 0, "stages.0.workers": 2}), cores=1).stages[0].threads == 1


def test_a_resume_elsewhere_keeps_the_threads_and_micro_batch_the_run_was_started_with() -> None:
    given = run_of({"stages.*.threads": 0, "stages.*.batch_size": 16})
    stored = resolved(replace(given, stages=[replace(stage, micro_batch=4) for stage in given.stages]), cores=3)
    again = resolved(given, cores=64, stored=stored)
    assert [(stage.threads, stage.micro_batch) for stage in again.stages] == [(3, 4)] * 3
    refuse_changes(again, stored)
    wished = resolved(run_of({"stages.*.threads": 5, "stages.*.micro_batch": 8, "stages.*.batch_size": 16}), 64, stored)
    assert [(stage.threads, stage.micro_batch) for stage in wished.stages] == [(5, 8)] * 3  # asked for is asked for


def test_a_micro_batch_that_no_longer_divides_a_share_gives_way() -> None:
    stored = resolved(run_of({"stages.*.batch_size": 16}), cores=2)  # 16 each
    halved = run_of({"stages.*.batch_size": 16, "stages.*.workers": 2})
    assert [stage.micro_batch for stage in resolved(halved, 2, stored).stages] == [8, 8, 8]


def test_consecutive_stages_share_a_group_exactly_if_their_resources_are_equal() -> None:
    stage = run_of().stages[1]
    assert same_group(stage, replace(stage, resolution=16, batch_size=16, micro_batch=4, learning_rate=0.1))
    for change in ({"workers": 2}, {"cpus": 2.0}, {"gpus": 1.0}, {"threads": 1}):
        assert not same_group(stage, replace(stage, **change))


# ---- Hours and seconds. Multiply-accumulates by hand, 8 channels throughout:

MACS = {4: 8 * 8 * 16 + 8 * 8 * 9 * 16 + 8 * 3 * 16}  # latent to 4x4, one convolution, to RGB
MACS[8] = 8 * 8 * 16 + 8 * 8 * 9 * 16 + 2 * 8 * 8 * 9 * 64 + 8 * 3 * 64
MACS[16] = 8 * 8 * 16 + 8 * 8 * 9 * 16 + 2 * 8 * 8 * 9 * (64 + 256) + 8 * 3 * 256


def row_of(plan: Plan, measured: dict[int, float], run: Run | None = None) -> list[dict[str, Any]]:
    return table(run or run_of(), plan, measured)


def test_the_table_says_what_is_left_of_each_stage_and_its_state() -> None:
    for found, left, states in (
            ([], [80, 160, 160], ["to run"] * 3),
            ([at(40, 4)], [40, 160, 160], ["from the middle", "to run", "to run"]),
            ([END4], [0, 160, 160], ["done", "to run", "to run"]),
            ([END4, at(200, 8)], [0, 40, 160], ["done", "from the middle", "to run"]),
            ([END4, END8, END16], [0, 0, 0], ["done"] * 3)):
        rows = row_of(make_plan(run_of(), found), {})
        assert [row["left"] for row in rows] == left
        assert [row["state"] for row in rows] == states
        assert [row["fade_images"] for row in rows] == [0, 80, 80]
        assert [row["resolution"] for row in rows] == [4, 8, 16]


def test_hours_are_images_left_over_the_measured_rate() -> None:
    rows = row_of(make_plan(run_of(), [END4, at(200, 8)]), {8: 0.5, 4: 100.0})
    assert [row["measured"] for row in rows] == [True, True, False]
    assert rows[0]["hours"] == 0
    assert rows[1]["hours"] == pytest.approx(40 / 0.5 / 3600)


def test_hours_without_a_measurement_are_the_work_over_an_assumed_speed_of_the_units() -> None:
    """A step costs 18 generator passes an image: 4 for G's update, 12 for D's, 2 for the penalty's second backward."""
    run = run_of({"stages.1.workers": 2, "stages.2.gpus": 1.0})
    rows = row_of(make_plan(run, []), {}, run)
    for row, images, speed in zip(rows, (80, 160, 160), (2 * ASSUMED_GMACS["cpu"], 2 * 2 * ASSUMED_GMACS["cpu"],
                                                         ASSUMED_GMACS["gpu"]), strict=True):
        assert row["hours"] == pytest.approx(images * 18 * MACS[row["resolution"]] / (speed * 1e9) / 3600)
    assert [row["device"] for row in rows] == ["cpu", "cpu", "gpu"]


def test_a_gray_run_has_less_work_and_fewer_weights_by_two_of_three_values_of_each_pixel() -> None:
    """The last layer is 8 wide here: 2 * 8 multiplications less a pixel, and 2 * 9 weights of 10 floats each."""
    rgb, gray = run_of(), run_of({"data.channels": 1})
    for of_rgb, of_gray in zip(row_of(make_plan(rgb, []), {}, rgb), row_of(make_plan(gray, []), {}, gray), strict=True):
        size = of_rgb["resolution"]
        assert of_gray["hours"] / of_rgb["hours"] == pytest.approx((MACS[size] - 16 * size**2) / MACS[size])
        assert of_rgb["memory_gb"] - of_gray["memory_gb"] == pytest.approx(18 * 10 * 4 / 1e9)
    assert seconds_left(gray, 240, {8: 4.0}) == pytest.approx(160 / 4 * (MACS[16] - 4096) / (MACS[8] - 1024))


def test_the_most_workers_of_a_stage_is_its_number_of_stddev_groups() -> None:
    run = run_of({"stages.0.batch_size": 2, "stages.1.batch_size": 4, "stages.2.batch_size": 64})
    assert [row["most_workers"] for row in row_of(make_plan(run, []), {}, run)] == [1, 1, 16]


def test_a_stage_whose_batch_stays_in_one_piece_has_one_worker_at_most() -> None:
    run = run_of({"stages.*.batch_size": 64, "training.feature_matching": True})
    assert {row["most_workers"] for row in row_of(make_plan(run, []), {}, run)} == {1}


def test_memory_grows_with_what_must_be_held() -> None:
    run = run_of({"stages.*.batch_size": 16})
    stage = run.stages[2]
    base = memory_gb(run, stage)
    assert 0 < memory_gb(run, replace(stage, micro_batch=4)) < memory_gb(run, replace(stage, micro_batch=8)) < base
    assert memory_gb(run, run.stages[1]) < base
    assert memory_gb(run_of({"stages.*.batch_size": 16, "training.precision": "bfloat16"}), stage) < base


def test_the_seconds_left_are_the_images_left_over_the_rates() -> None:
    rates = {4: 80.0, 8: 16.0, 16: 4.0}
    for seen, expected in ((0, 80 / 80 + 160 / 16 + 160 / 4), (40, 40 / 80 + 10 + 40), (80, 50), (200, 40 / 16 + 40),
                           (396, 1), (400, 0)):
        assert seconds_left(run_of(), seen, rates) == pytest.approx(expected)


def test_a_stage_without_a_rate_takes_the_nearest_ones_by_the_work() -> None:
    expected = 160 / 16 + 160 / (16 * MACS[8] / MACS[16])
    assert seconds_left(run_of(), 80, {4: 80.0, 8: 16.0}) == pytest.approx(expected)
    assert seconds_left(run_of(), 0, {16: 4.0}) == pytest.approx(
        80 / (4 * MACS[16] / MACS[4]) + 160 / (4 * MACS[16] / MACS[8]) + 40)


def test_without_any_rate_the_seconds_left_are_unknown_unless_none_are() -> None:
    assert math.isnan(seconds_left(run_of(), 0, {}))
    assert seconds_left(run_of(), 400, {}) == 0
