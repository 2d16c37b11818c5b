"""One worker or two, interrupted or not: the same bits."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from gradine.configs.schema import Run, dump

SCRIPT = Path(__file__).with_name("stage_process.py")
TENSORS = ("generator", "discriminator", "average", "optimizers")
# 200 steps of 8: 50 at 4 px, 80 fading to 8 px, 70 held there
SCHEDULE = {"stages.0.hold_images": 400, "stages.1.fade_images": 640, "stages.1.hold_images": 560,
            "stages.*.micro_batch": 4, "tick_images": 8, "checkpoints.every_images": 200, "checkpoints.keep": 99}


def start(run: Run, folder: Path, rank: int = 0, workers: int = 1, port: int = 0) -> subprocess.Popen[str]:
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / f"config-{rank}.yaml"
    config.write_text(dump(run))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if workers > 1:
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers),
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen([sys.executable, "-W", "error::UserWarning", str(SCRIPT), str(config), str(folder)],
                            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return [json.loads(line) for line in out.splitlines()]


def finish_all(run: Run, folder: Path, workers: int) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [start(run, folder, rank, workers, port) for rank in range(workers)]
    first, *_ = [finish(process) for process in ranks]
    return first


def assert_same_checkpoints(ours: Path, theirs: Path, at_least: int) -> None:
    """Every file of tensors equal to the byte, and the same clock, phase and counts."""
    names = sorted(p.name for p in (theirs / "checkpoints").iterdir())
    assert names == sorted(p.name for p in (ours / "checkpoints").iterdir())
    assert len(names) >= at_least
    for name in names:
        a, b = ours / "checkpoints" / name, theirs / "checkpoints" / name
        for part in TENSORS:
            assert (a / f"{part}.safetensors").read_bytes() == (b / f"{part}.safetensors").read_bytes(), (name, part)
        states = [json.loads((folder / "state.json").read_text()) for folder in (a, b)]
        for key in ("images_seen", "phase", "resolution", "stage_end", "masked", "skipped", "data"):
            assert states[0][key] == states[1][key]


def test_two_workers_equal_one_that_accumulates_to_the_bit_after_200_steps(tiny_run: Callable[..., Run],
                                                                          tmp_path: Path) -> None:
    events = finish_all(tiny_run(SCHEDULE), tmp_path / "one", 1)
    events_of_two = finish_all(tiny_run({**SCHEDULE, "stages.*.workers": 2}), tmp_path / "two", 2)
    assert sum(event["event"] == "tick" for event in events) == 200
    assert_same_checkpoints(tmp_path / "two", tmp_path / "one", at_least=8)
    ticks, ticks_of_two = ([e for e in them if e["event"] == "tick"] for them in (events, events_of_two))
    for one, two in zip(ticks, ticks_of_two, strict=True):
        for figure in ("loss_d", "loss_g", "score_real", "penalty", "gradient_norm"):
            assert one[figure] == pytest.approx(two[figure], rel=1e-5, abs=1e-6), figure
    # and it did train: weights moved, penalty and drift were on
    first, last = (safetensors.torch.load_file(tmp_path / "one/checkpoints" / name / "generator.safetensors")
                   for name in ("r0004-hold-000000200", "r0008-hold-000001600"))
    assert not torch.equal(first["blocks.4.conv.weight"], last["blocks.4.conv.weight"])
    assert all(event["penalty"] > 0 for event in events if event["event"] == "tick")


def test_workers_that_start_from_different_weights_are_refused(tiny_run: Callable[..., Run], tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    runs = [tiny_run({**SCHEDULE, "stages.*.workers": 2, "training.seed": seed}) for seed in (0, 1)]
    ranks = [start(run, tmp_path / "out", rank, 2, port) for rank, run in enumerate(runs)]
    for process in ranks:
        _, err = process.communicate(timeout=120)
        assert process.returncode != 0
        assert "start from different weights" in err


def test_other_splits_follow_the_same_path_at_first(tiny_run: Callable[..., Run], tmp_path: Path) -> None:
    short = {**SCHEDULE, "stages.0.hold_images": 8, "stages.0.micro_batch": 0}
    events = [next(e for e in finish_all(tiny_run({**short, **split}), tmp_path / name, 1) if e["event"] == "tick")
              for name, split in (("whole", {}), ("split", {"stages.0.micro_batch": 4}))]
    for figure in ("loss_d", "loss_g", "penalty", "score_real", "gradient_norm"):
        assert events[0][figure] == pytest.approx(events[1][figure], rel=1e-5)


@pytest.mark.fault
def test_f13_four_workers_killed_in_a_hold_resume_to_the_bits_of_the_unbroken_run(tiny_run: Callable[..., Run],
                                                                                 tmp_path: Path) -> None:
    """SIGKILL of all four at once from outside, in processes started as torchrun starts them."""
    run = tiny_run({**SCHEDULE, "stages.*.workers": 4, "stages.*.batch_size": 16})
    finish_all(run, tmp_path / "unbroken", 4)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [start(run, tmp_path / "killed", rank, 4, port) for rank in range(4)]
    assert ranks[0].stdout
    for line in ranks[0].stdout:
        event = json.loads(line)
        inside = event["event"] == "tick" and event["resolution"] == 8 and event.get("phase") == "hold"
        if inside and event["images_seen"] % 200 > 100:  # after a checkpoint of this phase, before the next
            break
    for process in ranks:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    events = finish_all(run, tmp_path / "killed", 4)
    assert len([event for event in events if event["event"] == "tick"]) < 100, "it started over instead of resuming"
    assert_same_checkpoints(tmp_path / "killed", tmp_path / "unbroken", at_least=8)
