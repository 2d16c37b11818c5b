"""Claims about the run folder: one holder, a ledger that outlives a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gradine.configs.schema import UserError
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
