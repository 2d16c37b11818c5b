"""Claims about saving beside the training: what is written is what was handed over, and nothing fails unheard."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from gradine.configs.schema import EnvironmentFault, from_dict
from gradine.stages import checkpoint, commits
from gradine.stages.checkpoint import Saver
from gradine.stages.commits import Fenced, Term
from gradine.stages.loop import initial_state
from gradine.stages.step import TrainState
from gradine.stages.watch import NonFinite
from tests.test_checkpoint import CPU, RUN, everything, info, step, trained

Event = dict[str, Any]
END = {**info(), "stage_end": True}


class Disk:
    """Stands for `commit`: holds each until it is let through, and fails those it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate, self.asked = threading.Semaphore(0), threading.Semaphore(0)
        self.failures: Iterator[BaseException | None] = itertools.repeat(None)
        self.written: list[int] = []
        monkeypatch.setattr(checkpoint, "commit", self.commit)

    def commit(self, location: Any, name: str, files: Any, term: Term) -> str:
        self.asked.release()
        assert self.gate.acquire(timeout=60)
        if failure := next(self.failures):
            raise failure
        self.written.append(int(name.rsplit("-", 1)[1]))
        return f"{location}/{name}"

    def let(self, number: int = 1) -> None:
        for _ in range(number):
            self.gate.release()

    def wait_until_asked(self) -> None:
        assert self.asked.acquire(timeout=60)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.fixture
def saver(disk: Disk) -> Iterator[Saver]:
    yield from saving("nowhere")


def saving(location: Any, term: Term | None = None, **settings: Any) -> Iterator[Saver]:
    run = dataclasses.replace(RUN, checkpoints=dataclasses.replace(RUN.checkpoints, **settings))
    saver = Saver(run, str(location), term or Term())
    yield saver
    closing = threading.Thread(target=saver.close, daemon=True)  # so that a close that hangs fails
    closing.start()
    closing.join(30)
    assert not saver.thread.is_alive()


def at(images: int) -> TrainState:
    state = trained(steps=0)
    state.images_seen = images
    return state


def kinds(events: Iterator[Event]) -> list[tuple[str, int]]:
    return [(event["event"], event["images_seen"]) for event in events]


def fault_of(saver: Saver) -> tuple[list[Event], BaseException]:
    events = []
    try:
        for event in saver.events():
            events.append(event)
    except BaseException as error:
        return events, error
    raise AssertionError("no fault")


def test_a_newer_state_takes_the_place_of_the_one_that_waits_and_the_events_say_so_in_order(
        disk: Disk, saver: Saver) -> None:
    saver.save(at(100), info())
    disk.wait_until_asked()
    for images in (110, 120, 130):
        saver.save(at(images), info())
    disk.let(2)
    saver.wait()
    assert disk.written == [100, 130]
    happened = list(saver.events())
    assert kinds(iter(happened)) == [("save_left_out", 110), ("save_left_out", 120), ("checkpoint", 100),
                                     ("checkpoint", 130)]
    assert happened[0]["reason"] == "the one before was still being written when the next was due"
    assert happened[2]["path"] == "nowhere/r0008-fade-000000100"
    assert list(saver.events()) == []


def test_the_state_at_a_stages_end_is_never_left_out(disk: Disk, saver: Saver) -> None:
    saver.save(at(100), info())
    disk.wait_until_asked()
    saver.save(at(110), END)
    saver.save(at(120), info())
    disk.let(3)
    saver.wait()
    assert disk.written == [100, 110, 120]
    assert [event["stage_end"] for event in saver.events()] == [False, True, False]


def test_after_a_failure_a_newer_state_is_written_and_the_old_one_not_any_more(disk: Disk) -> None:
    disk.failures = itertools.chain([OSError(5, "Input/output error")], itertools.repeat(None))
    for saver in saving("nowhere", retry_s=3600):
        saver.save(at(100), info())
        disk.wait_until_asked()
        saver.save(at(110), info())
        disk.let(2)
        saver.wait(hurry=True)
        assert disk.written == [110]
        assert kinds(saver.events()) == [("save_failed", 100), ("checkpoint", 110)]
        assert saver.failures == 0


def test_after_a_failure_the_state_at_a_stages_end_is_tried_again(disk: Disk) -> None:
    disk.failures = itertools.chain([OSError(5, "Input/output error")] * 2, itertools.repeat(None))
    for saver in saving("nowhere", retry_s=0):
        saver.save(at(100), END)
        disk.let(3)
        saver.wait()
        assert disk.written == [100]
        assert kinds(saver.events()) == [("save_failed", 100), ("save_failed", 100), ("checkpoint", 100)]


def test_failures_count_in_a_row_alone(disk: Disk) -> None:
    failure = OSError(5, "Input/output error")
    disk.failures = itertools.cycle([failure, failure, None])
    disk.let(99)
    for saver in saving("nowhere", retry_s=0):
        for images in (100, 110, 120):
            saver.save(at(images), info())
            saver.wait()
        assert [event.get("failures") for event in saver.events()] == [1, 2, None] * 3


def test_in_the_foreground_a_save_returns_when_it_is_durable(tmp_path: Path) -> None:
    for saver in saving(tmp_path, background=False):
        saver.save(trained(), info())
        (event,) = list(saver.events())
        assert event["event"] == "checkpoint"
        assert commits.read(event["path"])


def test_in_the_background_a_save_returns_before_it_is_written(disk: Disk, saver: Saver) -> None:
    saver.save(at(100), info())
    disk.wait_until_asked()
    assert list(saver.events()) == []
    disk.let()
    saver.wait()
    assert kinds(saver.events()) == [("checkpoint", 100)]


@pytest.mark.parametrize("channels_last", [False, True])
def test_what_is_written_is_the_state_as_it_was_handed_over_though_training_goes_on(
        channels_last: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor, also of one element or one channel, where a layout needs no copy."""
    raw = dataclasses.asdict(RUN)
    run = from_dict({**raw, "training": {**raw["training"], "channels_last": channels_last}})
    state = initial_state(run, 1, None, CPU, None)
    step(state, 1, 0)
    before = {name: tensor.clone() for name, tensor in everything(state).items()}
    written, go = checkpoint.write, threading.Event()
    monkeypatch.setattr(checkpoint, "write", lambda *arguments: go.wait(60) and written(*arguments))
    for saver in saving(tmp_path):
        saver.save(state, info())
        for number in (1, 2):
            step(state, 1, number)
        for tensor in everything(state).values():
            tensor.detach().fill_(7)
        go.set()
        saver.wait()
        (event,) = list(saver.events())
    files = commits.read(event["path"])
    for role in ("generator", "discriminator", "average"):
        for name, tensor in safetensors.torch.load(files[f"{role}.safetensors"]).items():
            assert torch.equal(tensor, before[f"{role}.{name}"]), name
    again = everything(initial_state(run, 1, event["path"], CPU, None))
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.items())


def test_a_state_that_is_not_finite_is_never_committed_and_ends_the_stage_at_once(tmp_path: Path) -> None:
    state = trained()
    with torch.no_grad():
        next(state.average.parameters()).view(-1)[0] = torch.inf
    for saver in saving(tmp_path, retry_s=0):
        saver.save(state, info())
        saver.wait()
        events, fault = fault_of(saver)
        assert events == []
        assert isinstance(fault, NonFinite)
        assert list(tmp_path.iterdir()) == []


def test_a_holder_that_was_fenced_commits_nothing_and_ends_at_once(tmp_path: Path) -> None:
    mine = commits.begin_term(tmp_path, None)
    commits.begin_term(tmp_path, None)
    for saver in saving(tmp_path, mine, retry_s=0):
        saver.save(trained(), info())
        saver.wait()
        events, fault = fault_of(saver)
        assert events == []
        assert isinstance(fault, Fenced)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["term-000001.json", "term-000002.json"]


@pytest.mark.parametrize("error", [KeyError("a bug"), MemoryError(), EnvironmentFault("the store is gone")])
def test_whatever_ends_the_thread_is_raised_where_training_looks(error: Exception, disk: Disk) -> None:
    disk.failures = itertools.repeat(error)
    disk.let(9)
    for saver in saving("nowhere", retry_s=0):
        saver.save(at(100), info())
        saver.wait()
        _, fault = fault_of(saver)
        _, again = fault_of(saver)
        assert again is fault
        assert fault is error or fault.__cause__ is error  # SaveFault: after three of what another try may mend


def test_a_disk_too_full_for_the_folder_itself_is_told_as_failed(
        disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.failures = itertools.repeat(OSError(28, "No space left on device"))
    disk.let(9)
    for saver in saving(tmp_path / "not" / "there", retry_s=0):
        saver.save(at(100), info())
        saver.wait()
        events, fault = fault_of(saver)
        assert [event["event"] for event in events] == ["save_failed"] * 3
        assert "are free" in str(fault)


def test_closing_ends_the_wait_for_the_next_try_and_leaves_unwritten_what_waits(disk: Disk) -> None:
    disk.failures = itertools.repeat(OSError(5, "Input/output error"))
    for saver in saving("nowhere", retry_s=3600):
        saver.save(at(100), info())
        disk.let()
        while not (events := list(saver.events())):
            time.sleep(0.005)
        assert kinds(iter(events)) == [("save_failed", 100)]
    saver.wait()  # returns, though nothing is written any more
    assert disk.written == []
