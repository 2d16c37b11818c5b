"""What a session of training decides, without Ray: what stays, who may go on, what is remembered."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gradine.configs.schema import EnvironmentFault, Run, UserError
from gradine.pipeline import driver
from gradine.pipeline.display import Display
from gradine.pipeline.evaluations import Measuring
from gradine.pipeline.group import send_signal, task_on
from gradine.pipeline.plan import within_memory
from gradine.pipeline.run_dir import RunDir
from gradine.pipeline.session import Session, keep_settings
from gradine.pipeline.signals import Signals, Stopped
from gradine.stages import commits


def committed(folder: RunDir, images_seen: int, stage_end: bool = False, term: commits.Term | None = None) -> str:
    """A checkpoint of no weights at all, which retention does not ask for. -> its name"""
    info = {"schema": 2, "resolution": 8, "phase": "fade", "images_seen": images_seen, "stage_end": stage_end,
            "masked": [0, 0], "skipped": [], "data": "0"}
    files = {name: json.dumps(info).encode() if name == "state.json" else b"" for name in commits.FILES}
    return Path(commits.commit(folder.checkpoints, f"r0008-fade-{images_seen:09d}", files.items(), term)).name


@pytest.fixture
def session(tiny_run: Callable[..., Run]) -> Session:
    run = tiny_run({"checkpoints.keep": 1})
    folder = driver.run_folder(run)
    folder.path.mkdir(parents=True)
    return Session(run, folder, Display(run), Signals(), commits.begin_term(folder.checkpoints, None), [])


def there(session: Session) -> list[str]:
    return [one.name for one in commits.find(session.location)[0]]


def test_the_best_that_counts_stays_though_one_that_no_longer_counts_was_better(session: Session) -> None:
    names = [committed(session.folder, seen, term=session.term) for seen in (88, 96, 104, 112)]
    void = committed(session.folder, 120, term=session.term)
    term = commits.begin_term(session.location, commits.find(session.location)[0][3])
    last = committed(session.folder, 128, term=term)
    for name, value in ((names[0], 5.0), (names[1], 3.0), (void, 1.0)):
        session.folder.append("metrics.jsonl", {"metric": "swd", "value": value, "resolution": 8, "checkpoint": name,
                                                "images_seen": 0})
    session.retire(128)
    assert there(session) == [names[1], last]


def test_whoever_lost_the_run_begins_no_term_deletes_nothing_and_ends(session: Session) -> None:
    kept = [committed(session.folder, seen, term=session.term) for seen in (88, 96, 104)]
    session.held.append(SimpleNamespace(lost="run folder x was taken over by pid 7"))  # type: ignore[arg-type]
    for act in (lambda: session.recover(RuntimeError("its workers failed"), "reason", 1), lambda: session.retire(104)):
        with pytest.raises(EnvironmentFault, match="taken over by pid 7"):
            act()
    assert there(session) == kept
    assert list(commits.terms(session.location)) == [session.term.number]


def test_checkpoints_that_wait_to_be_measured_do_not_pile_up_and_a_stages_end_is_never_left_out(
        session: Session) -> None:
    session.evaluations.running[object()] = Measuring(
        commits.Checkpoint("r0004-x", 4, "hold", 8, True), None, None, 0.0)
    for seen in range(8, 80, 8):
        session.evaluations.start(commits.Checkpoint(f"{seen}", 8, "fade", seen, stage_end=seen == 16))
    assert [one.images_seen for one in session.evaluations.waiting] == [16, 48, 56, 64, 72]


def test_f22_a_micro_batch_that_did_not_fit_is_not_tried_again_though_the_command_asks_for_it(
        tiny_run: Callable[..., Run]) -> None:
    """The ledger of a run whose micro-batch was halved twice"""
    ledger = [{"event": "micro_batch", "resolution": 8, "was": 16, "now": 8}, {"event": "tick"},
              {"event": "micro_batch", "resolution": 8, "was": 8, "now": 4}]
    for given, used in ((16, 4), (8, 4), (4, 4), (0, 0)):
        run = tiny_run({"stages.*.batch_size": 16, "stages.*.micro_batch": given})
        assert [stage.micro_batch for stage in within_memory(run, ledger).stages] == [given, used]


def test_f11_settings_are_compared_where_the_checkpoints_lie_though_the_run_folder_is_new(
        tiny_run: Callable[..., Run], tmp_path: Path) -> None:
    """Another seed, in a run folder that is new beside checkpoints that are not"""
    run = driver.absolute(tiny_run({"checkpoints.location": str(tmp_path / "kept")}))
    run, _ = driver.settle(run, RunDir(tmp_path / "first" / "tiny"))
    (tmp_path / "first" / "tiny").mkdir(parents=True)
    keep_settings(run, RunDir(tmp_path / "first" / "tiny"))
    elsewhere = replace(run, runs=str(tmp_path / "second"))
    assert driver.settle(elsewhere, driver.run_folder(elsewhere))[1].start is None
    changed = replace(elsewhere, training=replace(run.training, seed=7))
    with pytest.raises(UserError, match=r"training.seed: 0 -> 7"):
        driver.settle(changed, driver.run_folder(changed))


def test_f15_a_worker_on_another_node_is_told_by_a_task_there(ray_cluster: Any) -> None:
    """SIGTERM to the driver of a group without a worker on its own node"""
    here = ray_cluster.get_runtime_context().get_node_id()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as worker:
        ray_cluster.get(task_on(here, send_signal, worker.pid, signal.SIGTERM))
        assert worker.wait(30) == -signal.SIGTERM


def test_one_signal_that_comes_twice_at_once_is_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    quits: list[int] = []
    monkeypatch.setattr(os, "kill", lambda _, number: quits.append(number))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    clock = iter([100.0, 100.2, 102.0])
    monkeypatch.setattr("gradine.pipeline.signals.time.monotonic", lambda: next(clock))
    signals = Signals()
    with pytest.raises(Stopped):
        signals._hear(signal.SIGTERM, None)
    signals._hear(signal.SIGTERM, None)
    assert quits == []
    signals._hear(signal.SIGTERM, None)
    assert quits == [signal.SIGTERM]
