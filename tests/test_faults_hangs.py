"""Workers that stand still, lag or die among their batches, through the command line and Ray.

The run is that of test_faults_runs.py. Workers stop themselves, hold the interpreter's lock or block where a test says,
once; the ledger tells what became of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

# ruff: noqa: F811
from gradine.configs.schema import Run
from gradine.pipeline.run_dir import RunDir
from tests.injected import Injected
from tests.test_faults_runs import (  # noqa: F401 (fixtures)
    TWO_WORKERS,
    Here,
    bits,
    events,
    gradine,
    injected,
    settings_of,
    unbroken,
    unmeasured,
)

pytestmark = pytest.mark.fault
TIMEOUT_S = 15.0
SLACK_S = 30.0  # beyond the 5 s that are promised: this machine may be busy with other things
WATCHED = {**TWO_WORKERS, "ray.step_timeout_s": TIMEOUT_S, "data.cache_gb": 0, "checkpoints.keep": 9}


def found_in_time(folder: RunDir, injected: Injected, *names: str) -> list[dict[str, Any]]:
    """The retries, each of which came soon enough after its fault."""
    retries = events(folder, "retry")
    assert len(retries) == len(names), retries
    for name, retry in zip(names, retries, strict=True):
        seconds = retry["time"] - (injected.folder / f"{name}.reached").stat().st_mtime
        print(f"{name}: retry after {seconds:.1f} s: {retry['reason']}")
        assert seconds < TIMEOUT_S + 5 + SLACK_S
    return retries


# F17: frozen ---------------------------------------------------------------------------------------------------------


STOP = '''
import signal

def stop(name):
    if first(f"{name}-once"):
        reached(name)
        os.kill(os.getpid(), signal.SIGSTOP)

'''
STOP_IN_STEPS = STOP + '''
@before_steps
def in_steps(state, shares, seen):
    if (seen, rank()) in ((136, 1), (208, 0)):
        stop(f"step-{seen}")
'''
STOP_IN_SETUP_AND_SAVE = STOP + '''
def in_setup(loop):
    true_state = loop.initial_state
    def initial_state(run, stage, *rest):
        if stage == 1 and rank() == 1:
            stop("setup")
        return true_state(run, stage, *rest)
    loop.initial_state = initial_state
CHANGES["gradine.stages.loop"] = in_setup

def in_save(checkpoint):
    true_commit = checkpoint.commit
    def commit(location, name, files, term):
        def stopping():
            for number, file in enumerate(files):
                yield file
                if number == 1 and name.endswith("160"):
                    stop("save")
        return true_commit(location, name, stopping(), term)
    checkpoint.commit = commit
CHANGES["gradine.stages.checkpoint"] = in_save
'''


@pytest.mark.parametrize(("code", "names", "ranks", "stacks"), [
    (STOP_IN_STEPS, ("step-136", "step-208"), (1, 0), ("in_steps", "in_steps")),
    (STOP_IN_SETUP_AND_SAVE, ("setup", "save"), (1, 0), ("initial_state", "_work"))],
    ids=["fade-and-hold", "setup-and-save"])
def test_f17_a_frozen_rank_is_found_and_named_and_the_group_goes_on_to_the_same_bits(
        unbroken: RunDir, tiny_run: Callable[..., Run], injected: Injected, gradine: Here,
        unmeasured: None, code: str, names: tuple[str, ...], ranks: tuple[int, ...],
        stacks: tuple[str, ...]) -> None:
    """SIGSTOP to one of two Ray workers in a fade and a hold; while it grows and while it writes a checkpoint"""
    injected.add(code)
    run = tiny_run(WATCHED)
    config, folder = settings_of(run, injected.folder.parent)
    assert gradine("train", config) == 0
    for number, (rank, retry) in enumerate(zip(ranks, found_in_time(folder, injected, *names), strict=True), 1):
        pid = int((injected.folder / f"{names[number - 1]}.reached").read_text())
        assert f"rank {rank} (node " in retry["reason"]
        assert f"pid {pid}) is stopped (SIGSTOP" in retry["reason"]
        assert retry["reason"].endswith(f"stacks in crashes/hang/{number}")
        assert retry["failures"] == 1
        told = [(folder.path / "crashes" / "hang" / f"{number}" / f"rank-{each}.txt").read_text() for each in (0, 1)]
        assert "state T" in told[rank]
        assert "state T" not in told[1 - rank]
        assert f"in {stacks[number - 1]}\n" in told[rank]
        assert "waits for the others" in told[1 - rank]
        assert re.search("in (all_reduce|all_gather|agreed)\n", told[1 - rank])
    assert not list(folder.path.glob("crashes/[0-9]*")), "nothing failed three times"
    assert [one["images_seen"] for one in events(folder, "tick")][-1] == 240
    assert bits(folder) == bits(unbroken)


# F18: a decode thread ------------------------------------------------------------------------------------------------


IN_A_DECODE_THREAD = '''
import ctypes, json, signal, hashlib
asked = []

@before_steps
def log(state, shares, seen):
    asked.append(seen)
    line = [seen, rank(), os.getpid(), [hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()
                                        for share in shares for image in share.reals]]
    with (HERE / "shown.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\\n")

def change(data):
    true_decode = data.decode
    def decode(content, encoding, out):
        if rank() == 1 and asked[-1:] >= [128] and first("decode-once"):
            reached("decode")
            {fault}
        return true_decode(content, encoding, out)
    data.decode = decode
CHANGES["gradine.stages.data"] = change
'''


@pytest.mark.parametrize("fault", ["ctypes.PyDLL(None).sleep(600)", "time.sleep(600)", "os.kill(os.getpid(), 9)"],
                         ids=["holds-the-lock", "stuck", "killed"])
def test_f18_a_decode_thread_that_hangs_or_dies_is_named_with_its_shard_and_no_image_is_lost_or_shown_twice(
        unbroken: RunDir, tiny_run: Callable[..., Run], injected: Injected, gradine: Here,
        unmeasured: None, fault: str) -> None:
    """a decode thread of a Ray worker holds the interpreter's lock, blocks or kills it, while batches are prefetched"""
    injected.add(IN_A_DECODE_THREAD.replace("{fault}", fault))
    config, folder = settings_of(tiny_run(WATCHED), injected.folder.parent)
    assert gradine("train", config) == 0
    (retry,) = found_in_time(folder, injected, "decode")
    pid = int((injected.folder / "decode.reached").read_text())
    assert f"rank 1 (node {node_of(folder)}, pid {pid})" in retry["reason"]
    assert "decode_0: decode image " in retry["reason"]
    assert ".tar of " in retry["reason"]
    if "kill" not in fault:
        stack = (folder.path / "crashes/hang/1/rank-1.txt").read_text()
        assert "sitecustomize.py" in stack
        assert "in _decode" in stack
    assert bits(folder) == bits(unbroken)
    refuse_lost_images([json.loads(line) for line in (injected.folder / "shown.jsonl").read_text().splitlines()])


def node_of(folder: RunDir) -> str:
    import ray

    assert events(folder, "group")
    return str(ray.nodes()[0]["NodeManagerAddress"])


def refuse_lost_images(lines: list[tuple[int, int, int, list[str]]]) -> None:
    """lines: (images seen, rank, pid, digests of the images shown) of every step of every attempt."""
    shown: dict[tuple[int, int], list[str]] = {}
    for seen, rank, _, images in lines:
        assert shown.setdefault((seen, rank), images) == images, "another attempt was shown others"
    assert len({pid for *_, pid, _ in lines}) == 4, "two groups of two"
    assert sorted(shown) == [(seen, rank) for seen in range(0, 240, 8) for rank in (0, 1)]
    for epoch in range(0, 240, 48):  # 48 images; an epoch at 8 px begins inside the one that 4 px began
        if epoch + 48 <= 80 or epoch >= 96:
            of_epoch = [image for seen in range(epoch, epoch + 48, 8) for rank in (0, 1) for image in shown[seen, rank]]
            assert len(of_epoch) == len(set(of_epoch)) == 48


# F19: slow -----------------------------------------------------------------------------------------------------------


SLOW = '''
SLOW_COMPUTE, WELL, SLOW_DATA = 8000, 8480, 8960  # images seen
asked = []

def change(loop):
    true_step = loop.train_step
    def train_step(state, shares, moment, *rest):
        asked.append(moment.images_seen)
        began = time.monotonic()
        seen = true_step(state, shares, moment, *rest)
        if moment.images_seen >= SLOW_COMPUTE:
            time.sleep(0.02)
        if rank() == 1 and SLOW_COMPUTE <= moment.images_seen < WELL:
            time.sleep(4 * (time.monotonic() - began))
        return seen
    loop.train_step = train_step
CHANGES["gradine.stages.loop"] = change

def change_data(data):
    true_decode = data.decode
    def decode(*arguments):
        if asked[-1:] >= [SLOW_DATA]:
            time.sleep(0.05 if rank() == 1 else 0.01)
        return true_decode(*arguments)
    data.decode = decode
CHANGES["gradine.stages.data"] = change_data
'''


def test_f19_a_rank_five_times_slower_is_flagged_with_its_phase_within_50_steps_and_a_healthy_one_never(
        tiny_run: Callable[..., Run], injected: Injected, gradine: Here, unmeasured: None) -> None:
    """1,000 healthy steps; then sleeps in the steps of one of two Ray workers, and later in its decode thread"""
    injected.add(SLOW)
    run = tiny_run({**WATCHED, "stages.0.hold_images": 9600, "checkpoints.every_images": 4000, "tick_images": 800}, 1)
    config, folder = settings_of(run, injected.folder.parent)
    assert gradine("train", config) == 0
    found = [line for line in events(folder, "alarm") if line["alarm"] == "straggler"]
    for line in found:
        print(line["message"])
    assert [(line["rank"], line["phase"]) for line in found] == [(1, "compute"), (1, "data")]
    for line, began in zip(found, (8000, 8960), strict=True):
        assert began < line["images_seen"] <= began + 50 * 8
        assert line["node"] == node_of(folder)
        assert line["message"] in gradine.out.replace("\n", " ") or line["message"][:40] in gradine.out
    assert not events(folder, "retry")
    assert len(events(folder, "group")) == 1
    assert not events(folder, "pulse"), "they are the driver's alone"
