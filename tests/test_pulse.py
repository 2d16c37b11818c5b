"""What a worker says of itself while it runs, and what others see of it when it no longer does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from gradine.configs.schema import Run
from gradine.stages import loop, pulse
from gradine.stages.data import prefetch
from gradine.stages.pulse import Pulse, last_stacks, look_at, read_record
from tests.injected import wait_until

WORKER = '''
import ctypes, os, sys, threading, time
from gradine.stages import pulse

def decode_slowly():
    pulse.at("decode", "image 3 of shard 000001.tar of /set/r0008")
    {inside}

record = pulse.keep_record()
assert pulse.keep_record() == record
threading.Thread(target=decode_slowly, name="decode_0", daemon=True).start()
keeper = pulse.Pulse(True, 8, 120)
keeper.at("reduce")
os.write(1, record.encode() + b"\\n")
time.sleep(600)
'''


@contextmanager
def worker(folder: Path, inside: str = "time.sleep(600)") -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A process that keeps a record, and where."""
    code, environment = WORKER.format(inside=inside), {**os.environ, "TMPDIR": str(folder)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as process:
        try:
            assert process.stdout
            yield process, process.stdout.readline().decode().strip()
        finally:
            process.kill()


HOLDS_THE_LOCK = "time.sleep(0.5); os.write(1, b'now\\n'); ctypes.PyDLL(None).sleep(600)"


@pytest.mark.parametrize("fault", ["stopped", "lock held", "killed"])
def test_what_a_process_is_at_can_be_read_when_it_runs_no_more(tmp_path: Path, fault: str) -> None:
    with worker(tmp_path, HOLDS_THE_LOCK if fault == "lock held" else "time.sleep(600)") as (process, record):
        if fault == "lock held":
            assert process.stdout
            assert process.stdout.readline() == b"now\n"
        elif fault == "stopped":
            process.send_signal(signal.SIGSTOP)
            wait_until(lambda: look_at(process.pid, record).state == "T", "the process is stopped")
        else:
            process.kill()
            process.wait()
        sight = look_at(process.pid, record)
        assert sight.state == {"stopped": "T", "lock held": "S", "killed": ""}[fault]
        assert {(line.thread, line.doing, line.detail) for line in sight.lines} == {
            ("training", "reduce", "at 120 images"),
            ("decode_0", "decode", "image 3 of shard 000001.tar of /set/r0008")}
        assert all(0 <= line.seconds < 60 for line in sight.lines)
        stacks = last_stacks(process.pid, record)
        assert ("in decode_slowly" in stacks) == (fault != "killed")
        assert stacks.count("hread 0x") == (0 if fault == "killed" else 2)
        assert process.wait(30) == -signal.SIGKILL


def test_a_process_that_has_the_number_of_one_that_is_gone_is_left_alone(tmp_path: Path) -> None:
    with worker(tmp_path) as (_, record), worker(tmp_path) as (other, _):
        assert last_stacks(other.pid, record) == ""
        assert look_at(other.pid, record).state in "SR"  # neither stopped nor dead


def test_records_are_private_and_those_of_processes_that_are_gone_are_deleted_after_an_hour(tmp_path: Path) -> None:
    with worker(tmp_path) as (_, kept), worker(tmp_path) as (other, left):
        folder = Path(kept).parent
        assert folder.parent == tmp_path
        assert folder.stat().st_mode & 0o77 == 0
        hours_ago = time.time() - 7200
        for path in (kept, left):
            os.utime(path, (hours_ago, hours_ago))
        pulse.remove_left(folder)
        assert len([*folder.iterdir()]) == 4, "both are alive"
        other.kill()
        other.wait()
        pulse.remove_left(folder)
        assert sorted(str(path) for path in folder.iterdir()) == [kept, f"{kept}.stacks"]


def test_a_line_too_long_is_cut_and_a_thread_that_ended_its_work_has_none(tmp_path: Path) -> None:
    record = pulse.Record(tmp_path)
    record.write("decode_0", "decode", "é" * 500)
    record.write("decode_1", "decode", "image 1")
    record.write("decode_1", "", "")
    (line,) = read_record(record.path)
    assert (line.thread, line.doing) == ("decode_0", "decode")
    assert line.detail.startswith("é" * 100)


def test_without_room_for_a_record_training_goes_on_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(pulse, "_record", None)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert pulse.keep_record() == ""
    pulse.at("decode", "image 1")


# Pulses --------------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes only when told."""

    now = 0.0

    def mark(self) -> float:
        return self.now

    def passed(self, mark: float) -> bool:
        return True

    def between(self, first: float, last: float) -> float:
        return last - first


def test_a_steps_own_time_is_without_the_wait_for_other_ranks() -> None:
    keeper, clock = Pulse(True, 8, 8), Clock()
    keeper.clock = clock

    def wait_for_others(seconds: float) -> float:
        clock.now += seconds
        return seconds

    reduce = keeper.without(wait_for_others)
    for step in range(1, 49):
        with keeper.step():
            clock.now += 2.0
            assert reduce(10.0) == 10.0
            clock.now += 1.0
            reduce(100.0)
            clock.now += 0.5 if step % 2 else 0.25
        keeper.data_s = 4.0 if step % 4 == 0 else 0.0
        keeper.made_s += 6.0
        keeper.stepped(8 + 8 * step)
    (told,) = keeper.beat("step")
    # windows end at multiples of 128 images; that from 8 to 128 has but 15 steps, that after 384 is not whole
    assert told["windows"] == [[256, 3.5, 1.0, 6.0], [384, 3.5, 1.0, 6.0]]
    assert told["images_seen"] == 392


def test_pulses_come_at_once_for_what_is_new_and_else_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("gradine.stages.pulse.time.monotonic", lambda: now)
    keeper, told = Pulse(True, 8, 0), list[tuple[float, str]]()
    for tenth in range(40):
        now = 100 + tenth / 10
        told += [(round(now - 100, 1), event["doing"]) for event in keeper.beat("setup" if tenth < 5 else "step")]
    assert told == [(0.0, "setup"), (0.5, "step"), (1.5, "step"), (2.5, "step"), (3.5, "step")]
    assert not [*Pulse(False, 8, 0).beat("step")]


def test_while_a_batch_does_not_come_pulses_do() -> None:
    def slow() -> Iterator[int]:
        time.sleep(0.3)
        yield 7

    keeper, batches = Pulse(True, 8, 0), list[int | None]()
    source = prefetch(slow(), patience_s=0.02)

    def batch() -> Iterator[dict[str, Any]]:
        batches.append((yield from keeper.next_of(source)))

    events = [*batch()]
    assert batches == [7]
    assert {event["doing"] for event in events} == {"data"}
    assert keeper.data_s >= 0.2
    assert next(source, "end") == "end"


def test_work_on_batches_counts_in_whichever_threads_it_is_done() -> None:
    keeper = Pulse(True, 8, 0)
    assert [*keeper.making(iter([1, 2, 3]), lambda: 40.0)] == [1, 2, 3]
    assert keeper.made_s == 40.0

    def slow() -> Iterator[int]:
        time.sleep(0.05)
        yield 1

    keeper = Pulse(True, 8, 0)
    assert [*keeper.making(slow(), lambda: 0.0)] == [1]
    assert keeper.made_s >= 0.05


def test_a_stage_sends_pulses_where_they_are_wanted_and_the_same_other_events(tiny_run: Callable[..., Run],
                                                                              tmp_path: Path) -> None:
    run = tiny_run({"tick_images": 40})
    plain = list(loop.run_stage(run, 0, None, tmp_path / "plain"))
    watched = list(loop.run_stage(run, 0, None, tmp_path / "watched", pulses=True))
    pulses = [event for event in watched if event["event"] == "pulse"]
    assert not [event for event in plain if event["event"] == "pulse"]
    assert {event["event"] for event in plain} == {event["event"] for event in watched} - {"pulse"}
    assert [event["doing"] for event in pulses][:2] == ["setup", "step"]
    assert pulses[1]["images_seen"] == 8, "the first step is told at once"
    assert [event["images_seen"] for event in pulses] == sorted(event["images_seen"] for event in pulses)


def test_a_save_in_the_foreground_is_announced_for_nothing_is_heard_while_it_lasts(tiny_run: Callable[..., Run],
                                                                                    tmp_path: Path) -> None:
    run = tiny_run({"checkpoints.background": False})
    told = [(e["images_seen"], e["doing"]) for e in loop.run_stage(run, 0, None, tmp_path, pulses=True)
            if e["event"] == "pulse"]
    assert [seen for seen, doing in told if doing == "write"] == [32, 72]  # by the last step that was told


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpus_own_time_is_measured_without_waiting_for_it() -> None:
    keeper = Pulse(True, 8, 0, device=True)
    weights = torch.randn(4096, 4096, device="cuda")
    for step in range(1, 17):
        with keeper.step():
            for _ in range(10):
                weights = (weights @ weights).clamp(-1, 1)
        keeper.stepped(8 * step)
    torch.cuda.synchronize()
    (told,) = keeper.beat("step")
    ((end, compute_s, data_s, made_s),) = told["windows"]
    assert (end, data_s, made_s) == (128, 0.0, 0.0)
    assert 1e-4 < compute_s < 10
