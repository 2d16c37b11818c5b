"""Claims about the choice of precision and memory format: a rule on times, a measurement, what a run keeps of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gradine.configs.schema import Run, UserError, dump, from_dict, load
from gradine.pipeline import commands, driver, evaluations, preflight
from gradine.pipeline.group import Group
from gradine.pipeline.run_dir import RunDir
from gradine.pipeline.session import shares_of_cores
from gradine.stages import commits, formats
from gradine.stages.formats import Format, chosen, fastest, measure
from gradine.stages.loop import run_stage
from gradine.stages.memory import OutOfMemory

HALF_LAST, HALF = Format("bfloat16", True), Format("bfloat16", False)
FULL_LAST, FULL = Format("float32", True), Format("float32", False)
ALL = (HALF_LAST, HALF, FULL_LAST, FULL)
OPEN = {"training.precision": "auto", "training.channels_last": None}


def took(*seconds: float) -> dict[Format, float]:
    return dict(zip(ALL, seconds, strict=True))


# ---- The rule


@pytest.mark.parametrize(("seconds", "wins"), [
    ((1.0, 1.0, 1.0, 1.0), HALF_LAST),
    ((1.0, 0.96, 0.97, 0.951), HALF_LAST),  # none is 5 % faster
    ((1.0, 1.2, 2.0, 0.94), FULL),
    ((1.0, 0.94, 0.92, 0.93), HALF),  # the others do not beat that by 5 % again
    ((1.0, 0.94, 0.80, 0.79), FULL_LAST),
    ((float("inf"), 3.0, float("inf"), 2.9), HALF),
])
def test_the_first_format_that_none_beats_by_five_percent_is_taken(seconds: tuple[float, ...], wins: Format) -> None:
    assert fastest(took(*seconds)) == wins


def test_a_person_is_told_the_choice_with_its_reason() -> None:
    event = {"formats": [list(each) for each in (HALF_LAST, FULL_LAST, FULL)], "seconds": [0.4201, None, 0.81],
             "reason": ""}
    choice, seconds, why = chosen(json.loads(json.dumps(event)))
    assert str(choice) == "bfloat16, channels last"
    assert why == "0.42 s a step; float32 0.81 s; float32, channels last no memory"
    assert seconds == {"bfloat16, channels last": 0.4201, "float32, channels last": None, "float32": 0.81}


# ---- The measurement


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Format]]:
    """Steps that take as long as a test says, or find no memory, on a machine with bfloat16; -> those asked for."""

    def make(seconds: dict[Format, float], has_bfloat16: bool = True) -> list[Format]:
        asked: list[Format] = []

        def step(state: Any, shares: Any, moment: Any, rules: Any, reduce: Any) -> float:
            weight = state.generator.blocks["4"].conv.weight
            last = not weight.is_contiguous()
            assert last == weight.is_contiguous(memory_format=torch.channels_last)
            asked.append(Format("bfloat16" if rules.dtype == torch.bfloat16 else "float32", last))
            if seconds[asked[-1]] == float("inf"):
                raise MemoryError
            return seconds[asked[-1]]

        monkeypatch.setattr(formats, "undisturbed_step", step)
        monkeypatch.setattr(formats, "has_bfloat16", lambda _: has_bfloat16)
        return asked

    return make


def found(run: Run, stage: int = 0) -> dict[str, Any]:
    (event,) = measure(run, stage)
    return event


def test_formats_take_turns_after_a_first_step_each(tiny_run: Callable[..., Run], machine: Any) -> None:
    asked = machine(took(0.2, 0.19, 0.22, 0.21))
    event = found(tiny_run(OPEN))
    assert asked == [*ALL] * 6
    assert event["formats"] == [*ALL]
    assert event["seconds"] == pytest.approx([0.2, 0.19, 0.22, 0.21])


def test_a_format_far_behind_is_left_and_long_steps_are_measured_once(tiny_run: Callable[..., Run],
                                                                       machine: Any) -> None:
    asked = machine(took(0.1, 0.2, 0.1, 0.2))
    found(tiny_run(OPEN))
    assert asked == [*ALL] * 2 + [HALF_LAST, FULL_LAST] * 4
    asked = machine(took(10.0, 11.0, 30.0, 30.0))
    assert chosen(found(tiny_run(OPEN)))[0] == HALF_LAST
    assert asked == [*ALL, HALF_LAST, HALF]


def test_only_what_the_settings_leave_open_is_measured(tiny_run: Callable[..., Run], machine: Any) -> None:
    asked = machine(took(0.2, 0.2, 0.2, 0.1))
    assert chosen(found(tiny_run({**OPEN, "training.precision": "float32"})))[0] == FULL
    assert set(asked) == {FULL_LAST, FULL}
    asked = machine(took(0.2, 0.2, 0.2, 0.1))
    assert chosen(found(tiny_run({**OPEN, "stages.0.channels_last": True})))[0] == HALF_LAST
    assert set(asked) == {HALF_LAST, FULL_LAST}


def test_bfloat16_is_no_candidate_where_torch_would_emulate_it(tiny_run: Callable[..., Run], machine: Any) -> None:
    asked = machine(took(0.1, 0.1, 0.2, 0.3), has_bfloat16=False)
    assert chosen(found(tiny_run(OPEN)))[0] == FULL_LAST
    assert HALF not in asked
    assert HALF_LAST not in asked
    event = found(tiny_run({**OPEN, "training.channels_last": False}))
    assert chosen(event) == (FULL, {}, "all that this machine and the settings leave")


def test_deterministic_runs_are_not_measured_by_time(tiny_run: Callable[..., Run], machine: Any) -> None:
    asked = machine(took(9.0, 1.0, 1.0, 1.0))
    run = tiny_run({**OPEN, "training.deterministic": True})
    assert chosen(found(run))[0] == HALF_LAST
    machine(took(9.0, 1.0, 1.0, 1.0), has_bfloat16=False)
    assert chosen(found(run))[0] == FULL_LAST
    assert asked == []


def test_a_format_without_memory_is_ruled_out_and_all_without_are_the_stages_own(tiny_run: Callable[..., Run],
                                                                                  machine: Any) -> None:
    inf = float("inf")
    asked = machine(took(0.1, 0.1, inf, inf))
    event = found(tiny_run(OPEN))
    assert asked.count(FULL) == 1
    assert event["seconds"][2:] == [None, None]
    assert chosen(event)[0] == HALF_LAST
    machine(took(inf, inf, inf, inf))
    with pytest.raises(OutOfMemory) as caught:
        found(tiny_run(OPEN))
    assert caught.value.micro_batch == 8


def test_the_slowest_worker_counts() -> None:
    other = torch.tensor([[0.3, 0.0]])
    both = SimpleNamespace(device="cpu", gather=lambda mine: torch.cat([mine, other]))
    assert formats.slowest(both, 0.2, 1.0) == pytest.approx([0.3, 1.0])


def test_measuring_changes_nothing_of_what_is_trained_after_it(tiny_run: Callable[..., Run], tmp_path: Path) -> None:
    ends = []
    for name, first in (("plain", False), ("measured", True)):
        torch.manual_seed(3)
        if first:
            assert all(seconds > 0 for seconds in found(tiny_run(OPEN))["seconds"])
        after = torch.rand(3).tolist()
        (*_, saved, _) = run_stage(tiny_run(), 0, None, tmp_path / name)
        ends.append((after, {file: content for file, content in commits.read(saved["path"]).items()
                             if file.endswith("safetensors")}))
    assert ends[0] == ends[1]


def test_a_worker_that_is_asked_to_stop_leaves_nothing_chosen(tiny_run: Callable[..., Run], machine: Any,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    asked = machine(took(0.1, 0.1, 0.1, 0.1))
    monkeypatch.setattr(formats, "asked", lambda: len(asked) == 3)
    assert list(measure(tiny_run(OPEN), 0)) == []
    assert len(asked) == 3


# ---- What a run keeps of it


@pytest.fixture(scope="module")
def measured_once(module_run: Callable[..., Run], ray_cluster: Any) -> Iterator[RunDir]:
    """A run of two workers that measured its two stages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluations.Evaluations, "start", lambda *_: None)
        yield driver.train(module_run({**OPEN, "name": "open", "stages.*.workers": 2, "stages.*.cpus": 0.5}), False)


@pytest.fixture
def again(measured_once: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Run, RunDir]]:
    """A copy of that run as it was inside its second stage, and as a user gives it again: open, but for changes.

    It must not be measured.
    """
    monkeypatch.setattr(evaluations.Evaluations, "start", lambda *_: None)
    monkeypatch.setattr(Group, "formats", lambda *_, **__: pytest.fail("measured again"))
    path = Path(shutil.copytree(measured_once.path, tmp_path / "runs" / "open"))
    for late in path.glob("checkpoints/r0008-hold-*"):
        shutil.rmtree(late)

    def make(**changes: Any) -> tuple[Run, RunDir]:
        run = load(measured_once.config, [f"{key.replace('__', '.')}={value}" for key, value in changes.items()])
        stages = [replace(stage, precision="", channels_last=None) for stage in run.stages]
        run = replace(run, runs=str(path.parent), stages=stages)
        return run, driver.run_folder(run)

    return make


def formats_of(run: Run) -> list[Format]:
    return [Format(*run.format_of(stage)) for stage in run.stages]  # type: ignore[arg-type]


def noted(folder: RunDir) -> list[Format]:
    lines = [line for line in folder.lines("ledger.jsonl") if line["event"] == "format"]
    assert [line["resolution"] for line in lines] == [4, 8]
    return [Format(line["precision"], line["channels_last"]) for line in lines]


def test_the_choice_stands_in_ledger_settings_and_every_checkpoint(measured_once: RunDir) -> None:
    choices = noted(measured_once)
    for line in measured_once.lines("ledger.jsonl"):
        if line["event"] == "format":
            least = min(line["seconds"].values())
            name = f"{line['precision']}{', channels last' if line['channels_last'] else ''}"
            assert 0 < least <= line["seconds"][name] <= least / 0.95
            assert f"{line['seconds'][name]:.2g} s a step" in line["reason"]
    assert formats_of(load(measured_once.config)) == choices
    found, _ = commits.find(measured_once.checkpoints)
    assert {one.resolution for one in found} == {4, 8}
    for one in found:
        state = json.loads((Path(one.path) / "state.json").read_text())
        assert Format(state["precision"], state["channels_last"]) == choices[one.resolution // 8]


def test_a_resume_with_other_workers_takes_the_choice_and_measures_nothing(again: Any) -> None:
    run, folder = again(**{"stages.*.workers": 1})
    choices = noted(folder)
    driver.train(run, False)
    end = commits.find(folder.checkpoints)[0][-1]
    state = json.loads((Path(end.path) / "state.json").read_text())
    assert (end.images_seen, state["workers"], state["precision"], state["channels_last"]) == (240, 1, *choices[1])
    assert noted(folder) == choices


@pytest.mark.parametrize("lost", ["ledger", "settings", "both"])
def test_the_choice_is_found_in_the_ledger_the_settings_or_the_newest_checkpoint(lost: str, again: Any) -> None:
    run, folder = again()
    choices = noted(folder)
    if lost in ("ledger", "both"):
        kept = [line for line in (folder.path / "ledger.jsonl").read_text().splitlines() if '"format"' not in line]
        (folder.path / "ledger.jsonl").write_text("\n".join([*kept, ""]))
    if lost in ("settings", "both"):
        folder.config.write_text(dump(run))
    settled, plan = driver.settle(run, folder)
    assert plan.stages == (1,)
    assert formats_of(settled)[1] == choices[1]
    assert settled.is_open(settled.stages[0]) == (lost == "both")  # it is done


def test_a_branch_has_the_same_choice_unless_its_settings_say_otherwise(again: Any) -> None:
    run, folder = again(resume=8)
    settled, plan = driver.settle(run, folder)
    assert plan.branch == 8
    assert formats_of(settled) == noted(folder)
    other = "float32" if noted(folder)[1].precision == "bfloat16" else "bfloat16"
    run, folder = again(resume=8, training__precision=other)
    settled, plan = driver.settle(run, folder)
    assert settled.format_of(settled.stages[1])[0] == other
    run, folder = again(training__precision=other)
    with pytest.raises(UserError, match=f"training.precision: auto -> {other}"):
        driver.settle(run, folder)


def test_the_plan_tells_precisions_and_auto_where_none_is_measured_yet(again: Any,
                                                                     capsys: pytest.CaptureFixture[str]) -> None:
    run, folder = again()
    commands.print_plan(run)
    head, *rows = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert "precision" in head
    assert [row.split()[11] for row in rows] == [choice.precision for choice in noted(folder)]
    commands.print_plan(replace(run, name="new"))
    rows = capsys.readouterr().out.split("\n\n")[1].splitlines()[1:]
    assert [row.split()[11] for row in rows] == ["auto", "auto"]


def test_a_run_from_before_formats_were_measured_goes_on_with_what_it_had(tmp_path: Path) -> None:
    """Its config.yaml says float32 and false, which were the defaults; the same command now says auto and null."""
    for release in (Path(__file__).parent / "releases").glob("schema*"):
        path = Path(shutil.copytree(release, tmp_path / release.name))
        old = load(path / "config.yaml")
        run = replace(old, runs=str(path.parent), name=path.name,
                      training=replace(old.training, precision="auto", channels_last=None))
        folder = driver.run_folder(run)
        folder.config.write_text(dump(replace(driver.absolute(replace(run, training=old.training)))))
        settled, _ = driver.settle(run, folder)
        assert formats_of(settled) == [FULL, FULL]


def test_a_stages_start_tells_how_the_cores_are_shared(tiny_run: Callable[..., Run]) -> None:
    run = tiny_run({"stages.1.threads": 4, "evaluation.when": "end"})
    assert shares_of_cores(run, 1, 2) == ("2 workers x 4 threads for steps, as many for decoding, which yield to them; "
                                          "evaluation after training")
    assert shares_of_cores(tiny_run(), 0, 1) == ("1 worker x 1 thread for steps, as many for decoding, which yield to "
                                                 "them; evaluation beside it on 1 niced CPU")


def test_preflight_tries_a_stage_in_the_format_that_its_workers_measure(tiny_run: Callable[..., Run],
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    class Workers:
        def __init__(self, run: Run, _: int) -> None:
            self.run = run

        def call(self, function: Any, run: Run, index: int) -> list[Any]:
            asked = run.format_of(run.stages[index])
            return [{"surroundings": {"host": "here", "room_gb": 8.0},
                     "measured_format": [{"formats": [HALF, FULL], "seconds": [2.0, 1.0], "reason": ""}],
                     "trial": {"format": asked}}[function.__name__]]

        def end(self) -> None:
            pass

    monkeypatch.setattr(preflight, "Group", Workers)
    assert preflight.tried(tiny_run(OPEN), 1)[0] == [{"format": FULL}]
    given = tiny_run({**OPEN, "stages.1.precision": "bfloat16", "stages.1.channels_last": True})
    assert preflight.tried(given, 1)[0] == [{"format": HALF_LAST}]


def test_an_open_format_is_float32_and_contiguous_where_no_driver_measured(tiny_run: Callable[..., Run],
                                                                          tmp_path: Path) -> None:
    (*_, saved, _) = run_stage(tiny_run(OPEN), 0, None, tmp_path)
    state = json.loads((Path(saved["path"]) / "state.json").read_text())
    assert (state["precision"], state["channels_last"]) == ("float32", False)


def test_a_stage_may_have_a_format_of_its_own() -> None:
    raw = {"name": "t", "data": {"source": "in", "shards": "out"}, "training": {"precision": "float32"},
           "stages": [{"resolution": 4}, {"resolution": 8, "precision": "bfloat16", "channels_last": True}]}
    run = from_dict(raw)
    assert [run.format_of(stage) for stage in run.stages] == [("float32", None), ("bfloat16", True)]
    assert [run.is_open(stage) for stage in run.stages] == [True, False]
