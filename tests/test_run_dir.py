"""Claims about the run folder: one holder, a ledger and curves that outlive a kill and a full disk."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradine.configs.schema import EnvironmentFault, UserError
from gradine.pipeline import run_dir
from gradine.pipeline.display import Board
from gradine.pipeline.run_dir import RunDir

# ---- The lock

HOLD = """
import sys, time
from gradine.pipeline.run_dir import RunDir
with RunDir(sys.argv[1]).locked():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.fault
def test_a_lock_held_by_a_live_process_is_refused_naming_its_pid_and_free_at_once_when_it_is_killed(
        tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    with holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        began = time.monotonic()
        with pytest.raises(UserError) as caught, RunDir(tmp_path).locked():
            pass
        assert f"in use by pid {holder.pid} on " in str(caught.value)
        assert "name=" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert time.monotonic() - began < 5
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with RunDir(tmp_path).locked():
        assert f"pid {os.getpid()} on " in (tmp_path / "lock").read_text()


def test_a_lock_is_free_again_after_its_holder_left_even_by_an_exception(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunDir(tmp_path).locked():
        raise ZeroDivisionError
    with RunDir(tmp_path).locked(), pytest.raises(UserError, match=f"pid {os.getpid()} "), RunDir(tmp_path).locked():
        pass
    with RunDir(tmp_path).locked():
        assert (tmp_path / "lock").read_text().count("pid") == 1


def test_a_folder_without_a_config_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run folder.*config\.yaml"):
        RunDir.existing(tmp_path)
    (tmp_path / "config.yaml").write_text("name: x")
    assert RunDir.existing(tmp_path).path == tmp_path


# ---- The ledger


def test_the_ledger_keeps_every_whole_line_in_order(tmp_path: Path) -> None:
    folder = RunDir(tmp_path)
    before = time.time()
    folder.record("start", note="ünï\u2028code")
    folder.record("tick", images_seen=8)
    first, second = folder.lines("ledger.jsonl")
    assert (first["event"], first["note"]) == ("start", "ünï\u2028code")
    assert (second["event"], second["images_seen"]) == ("tick", 8)
    assert before - 1 <= first["time"] <= second["time"] <= time.time() + 1


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_torn_by_a_kill_is_left_out_and_the_next_one_is_not_lost(tmp_path: Path, cut: int) -> None:
    folder = RunDir(tmp_path)
    for seen in (8, 16, 24):
        folder.record("tick", images_seen=seen)
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes()[:-1 - cut])
    assert [line["images_seen"] for line in folder.lines("ledger.jsonl")] == [8, 16]
    folder.record("tick", images_seen=32)
    folder.record("tick", images_seen=40)
    assert [line["images_seen"] for line in folder.lines("ledger.jsonl")] == [8, 16, 32, 40]


def test_zeros_and_broken_characters_left_by_a_power_cut_cost_only_their_line(tmp_path: Path) -> None:
    folder = RunDir(tmp_path)
    folder.record("tick", images_seen=8)
    with (tmp_path / "ledger.jsonl").open("ab") as ledger:
        ledger.write(b"\0\0\0\0\xff\xfe{")
    folder.record("tick", images_seen=16)
    assert [line["images_seen"] for line in folder.lines("ledger.jsonl")] == [8, 16]


def test_a_ledger_not_yet_written_is_empty(tmp_path: Path) -> None:
    assert RunDir(tmp_path).lines("ledger.jsonl") == []
    assert RunDir(tmp_path).history() == []


def test_history_drops_what_a_resume_went_back_behind(tmp_path: Path) -> None:
    folder = RunDir(tmp_path)
    folder.record("start")
    folder.record("resume", images_seen=0)
    for seen in (10, 20, 30):
        folder.record("tick", images_seen=seen)
    folder.record("retry", reason="killed")
    folder.record("resume", images_seen=20)
    for seen in (30, 40):
        folder.record("tick", images_seen=seen, again=True)
    folder.record("resume", images_seen=40)
    folder.record("tick", images_seen=50)

    lineage = [(line["event"], line.get("images_seen"), line.get("again", False)) for line in folder.history()]
    assert lineage == [("start", None, False), ("resume", 0, False), ("tick", 10, False), ("tick", 20, False),
                       ("retry", None, False), ("resume", 20, False), ("tick", 30, True), ("tick", 40, True),
                       ("resume", 40, False), ("tick", 50, False)]


def test_history_after_a_branch_holds_one_lineage(tmp_path: Path) -> None:
    folder = RunDir(tmp_path)
    for event, seen in (("resume", 0), ("tick", 80), ("tick", 160), ("tick", 240), ("branch", 80), ("resume", 80),
                        ("tick", 100)):
        folder.record(event, images_seen=seen)
    assert [(line["event"], line["images_seen"]) for line in folder.history()] == [
        ("resume", 0), ("tick", 80), ("branch", 80), ("resume", 80), ("tick", 100)]


# ---- A full or failing disk


class SmallDisk:
    """A real tmpfs of 256 KB."""

    def __init__(self, path: Path) -> None:
        self.path, self.filler = path, path / "filler"

    def fill(self) -> None:
        """To the last byte."""
        for size in (4096, 1):
            with self.filler.open("ab", buffering=0) as filler, suppress(OSError):
                while filler.write(b"x" * size):
                    pass

    def free(self) -> None:
        self.filler.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder],
                                      capture_output=True).returncode:
        pytest.skip("needs root and the right to mount a tmpfs")
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", folder], check=True)


def on(path: Path) -> tuple[RunDir, list[str]]:
    """A run folder, and what it tells."""
    folder, told = RunDir(path), []
    folder.tell = told.append
    return folder, told


def seen(folder: RunDir, file: str = "ledger.jsonl") -> list[int]:
    return [line["images_seen"] for line in folder.lines(file)]


def on_disk(folder: RunDir, file: str = "ledger.jsonl") -> list[int]:
    """As a reader after a kill would find it; every line there must be whole."""
    content = (folder.path / file).read_text()
    assert content.endswith("\n") or not content
    return seen(RunDir(folder.path), file)


@pytest.mark.fault
def test_f05_ledger_and_metrics_wait_for_a_full_disk_and_come_back_whole_and_in_order(disk: SmallDisk) -> None:
    """A tmpfs filled to its last byte while a run writes its ledger and its metrics; then space returns."""
    folder, told = on(disk.path)
    folder.record("tick", images_seen=0)
    disk.fill()
    for number in range(1, 41):  # the first ones still fit behind the line that is there; one of them only by half
        folder.record("tick", images_seen=number, reason="x" * 300)
        folder.append("metrics.jsonl", {"images_seen": number, "value": 0.5})
    reached = on_disk(folder)
    assert reached == list(range(len(reached)))
    assert 0 < len(reached) < 41
    assert seen(folder) == list(range(41))  # who asks the run itself sees all of them
    assert seen(folder, "metrics.jsonl") == list(range(1, 41))
    for file, line in zip(("metrics.jsonl", "ledger.jsonl"), told, strict=True):
        assert re.search(rf"{disk.path}/{file} cannot be written: No space left on device\. It needs \d+ bytes, 0 are "
                         r"free\. Its lines wait in memory", line)
    disk.free()
    folder.record("tick", images_seen=41)
    assert on_disk(folder) == list(range(42))
    assert told[2:] == [f"{disk.path}/ledger.jsonl is written again, no line is lost"]
    folder.close()
    assert on_disk(folder, "metrics.jsonl") == list(range(1, 41))
    assert told[3:] == [f"{disk.path}/metrics.jsonl is written again, no line is lost"]
    disk.fill()
    for _ in range(20):
        folder.record("tick", images_seen=42, reason="x" * 300)
    assert len(told) == 5  # another episode is told again
    disk.free()


@pytest.mark.fault
def test_f05_a_run_that_ends_on_a_full_disk_says_what_its_ledger_lacks(disk: SmallDisk) -> None:
    """A tmpfs that is still full when the run ends, by itself and by an error of its own."""
    folder, told = on(disk.path)
    with pytest.raises(EnvironmentFault) as caught, folder.locked():  # noqa: PT012
        folder.record("tick", images_seen=0)
        disk.fill()
        for number in range(20):
            folder.record("tick", images_seen=number, reason="x" * 300)
        lacking = sum(len(line) for line in folder.journals["ledger.jsonl"].waiting)
    for part in ("lines of", f"{disk.path}/ledger.jsonl are lost: No space left",
                 f"needs {lacking:,} bytes, 0 are free", "make room"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    folder, told = on(disk.path)
    with pytest.raises(ZeroDivisionError), folder.locked():  # noqa: PT012
        for _ in range(20):
            folder.record("tick", images_seen=1, reason="x" * 300)
        raise ZeroDivisionError
    assert "cannot be written" in told[0]
    assert "are lost: No space left" in told[1]
    disk.free()
    with folder.locked():  # what waits is not forgotten while the process lives
        folder.record("tick", images_seen=2)
    assert len(on_disk(folder)) > 20


def test_when_too_many_lines_wait_the_oldest_stay_and_it_is_told(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_dir, "MOST_WAITING", 3)
    folder, told = on(tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr(os, "write", failing(errno.EDQUOT))
        for number in range(7):
            folder.record("tick", images_seen=number)
    assert len(told) == 2
    assert "Disk quota exceeded" in told[0]
    assert told[1] == f"{tmp_path}/ledger.jsonl: 3 lines wait for its disk, later ones are dropped"
    folder.record("tick", images_seen=7)
    assert told[2:] == [f"{tmp_path}/ledger.jsonl is written again; 5 lines were dropped"]
    assert on_disk(folder) == [0, 1, 2]
    folder.record("tick", images_seen=8)
    assert on_disk(folder) == [0, 1, 2, 8]


def failing(number: int, real: Any = os.write) -> Any:
    """An os.write that puts half of it on the disk and fails."""
    def write(file: int, content: bytes) -> int:
        real(file, content[:len(content) // 2])
        raise OSError(number, os.strerror(number))

    return write


@pytest.mark.fault
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("truncates", [True, False])
def test_f05_a_disk_that_fails_now_and_then_costs_no_line_and_tears_none(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, truncates: bool) -> None:
    """EIO, ESTALE or ENOSPC from half of all writes and closes, half lines left; also where these cannot be cut off."""
    random, folder = np.random.default_rng(seed), on(tmp_path)[0]
    write, close = os.write, os.close

    def moody(real: Any) -> Any:
        def call(*arguments: Any) -> Any:
            if random.random() < 0.5:
                return real(*arguments)
            number = random.choice([errno.EIO, errno.ESTALE, errno.ENOSPC])
            if real is close:
                close(*arguments)
                raise OSError(number, os.strerror(number))
            return failing(number, write)(*arguments)

        return call

    with monkeypatch.context() as broken:
        broken.setattr(os, "write", moody(write))
        if truncates:
            broken.setattr(os, "close", moody(close))
        else:
            broken.setattr(os, "truncate", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "")))
        for number in range(60):
            folder.record("tick", images_seen=number)
    folder.close()
    assert on_disk(folder) == list(range(60))


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES])
def test_a_disk_that_cannot_be_written_from_the_start_ends_the_run(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    folder, told = on(tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr(os, "write", failing(error))
        with pytest.raises(OSError, match=os.strerror(error)):
            folder.record("tick", images_seen=1)
    folder.record("tick", images_seen=2)
    assert (on_disk(folder), told) == ([2], [])


@pytest.mark.fault
def test_f06_ledger_and_metrics_wait_for_a_disk_that_turned_read_only(disk: SmallDisk) -> None:
    """A tmpfs remounted read-only after the first line of a run, and writable again before its end or not."""
    folder, told = on(disk.path)
    folder.record("tick", images_seen=0)
    for again in (True, False):
        told.clear()
        subprocess.run(["mount", "-o", "remount,ro", disk.path], check=True)
        for number in (1, 2):
            folder.record("tick", images_seen=number)
            folder.append("metrics.jsonl", {"images_seen": number})
        assert len(told) == 2  # each file once
        assert told[0].startswith(f"{disk.path}/ledger.jsonl cannot be written: Read-only file system. ")
        assert f"give uid {os.geteuid()} the right to write there" in told[0]
        assert seen(folder)[-2:] == [1, 2]
        if again:
            subprocess.run(["mount", "-o", "remount,rw", disk.path], check=True)
        else:
            with pytest.raises(EnvironmentFault, match=r"2 lines of .*/ledger\.jsonl are lost: Read-only file system"):
                folder.close()
            subprocess.run(["mount", "-o", "remount,rw", disk.path], check=True)
        folder.close()
    assert on_disk(folder) == [0, 1, 2, 1, 2]
    assert on_disk(folder, "metrics.jsonl") == [1, 2, 1, 2]


@pytest.mark.fault
@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES])
def test_f06_a_right_to_write_that_is_taken_away_holds_the_ledger_up(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """EROFS and EACCES from the writes of a ledger that has lines."""
    folder, told = on(tmp_path)
    folder.record("tick", images_seen=0)
    with monkeypatch.context() as broken:
        broken.setattr(os, "write", failing(error))
        for number in (1, 2):
            folder.record("tick", images_seen=number)
    folder.record("tick", images_seen=3)
    assert on_disk(folder) == [0, 1, 2, 3]
    assert told[1:] == [f"{tmp_path}/ledger.jsonl is written again, no line is lost"]


def test_a_folder_that_is_gone_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        RunDir(tmp_path / "gone").record("tick", images_seen=1)


# ---- Curves


def drawn(folder: Path) -> list[tuple[str, int, float]]:
    """(tag, step, value) as TensorBoard's own reader finds them."""
    from tensorboard.backend.event_processing.directory_loader import DirectoryLoader
    from tensorboard.backend.event_processing.event_file_loader import TimestampedEventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    events = DirectoryLoader(str(folder), TimestampedEventFileLoader).Load()
    points = [(value, event.step) for event in events for value in event.summary.value]
    assert {value.metadata.plugin_data.plugin_name for value, _ in points} <= {"scalars"}
    return [(value.tag, step, float(make_ndarray(value.tensor))) for value, step in points]


def tick(images_seen: int) -> dict[str, Any]:
    return {"event": "tick", "images_seen": images_seen, "loss_d": images_seen / 4, "phase": "fade", "masked": [0, 0]}


def test_tensorboard_reads_the_curves(tmp_path: Path) -> None:
    board = Board(tmp_path / "session-1")
    board.tick({**tick(8), "alpha": 0.5})
    board.metric({"metric": "swd", "value": 12.5, "images_seen": 8})
    board.metric({"metric": "ms_ssim", "value": None, "images_seen": 8})
    assert drawn(tmp_path / "session-1") == [
        ("train/loss_d", 8, 2.0), ("train/alpha", 8, 0.5), ("metrics/swd", 8, 12.5)]


@pytest.mark.fault
def test_f05_curves_miss_only_what_a_full_disk_did_not_take(disk: SmallDisk) -> None:
    """A tmpfs filled to its last byte while curves are drawn, before the first and after some; then space returns."""
    told: list[str] = []
    board, threads = Board(disk.path / "curves", told.append), threading.active_count()
    disk.fill()
    for number in range(100):
        board.tick(tick(number))
    disk.free()
    for number in range(100, 120):
        board.tick(tick(number))
    disk.fill()
    for number in range(120, 300):
        board.tick(tick(number))
    disk.free()
    board.tick(tick(300))
    steps = [step for _, step, _ in drawn(disk.path / "curves")]
    assert steps == sorted(set(steps))
    assert set(range(100, 120)) | {300} <= set(steps)
    assert 250 not in steps
    assert len(told) == 4
    for line in told[::2]:
        assert line.startswith(f"curves in {disk.path}/curves cannot be written: No space left on device. Training ")
    dropped = [int(re.findall(r"lack (\d+) points", line)[0]) for line in told[1::2]]
    assert sum(dropped) == 301 - len(steps)
    assert threading.active_count() <= threads  # of an earlier test some may have ended meanwhile
