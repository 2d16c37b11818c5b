"""What the stage loop refuses and counts; that it trains right is claimed by test_parity."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gradine.configs.schema import EnvironmentFault, Run
from gradine.stages import loop, stopping
from gradine.stages.watch import NonFinite


def test_a_stage_whose_gradients_are_never_finite_ends_saying_so_and_saves_nothing(tiny_run: Callable[..., Run],
                                                                                   tmp_path: Path) -> None:
    run = tiny_run({"training.penalty_target": 1e-30, "tick_images": 8, "stages.0.hold_images": 800})
    with pytest.raises(NonFinite, match="masked") as caught:
        list(loop.run_stage(run, 0, None, tmp_path))
    assert caught.value.images_seen == 160  # 20 updates of 8


def test_a_stage_that_asks_for_a_gpu_where_there_is_none_is_refused(tiny_run: Callable[..., Run],
                                                                    tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(EnvironmentFault, match="torch sees no CUDA device"):
        list(loop.run_stage(tiny_run({"stages.*.gpus": 1}), 0, None, tmp_path))


def test_more_workers_than_accelerate_sees_are_refused(tiny_run: Callable[..., Run], tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="Accelerate sees 1 processes, the stage has 2 workers"):
        list(loop.run_stage(tiny_run({"stages.*.workers": 2}), 0, None, tmp_path))


def test_a_stage_asked_to_stop_ends_with_a_checkpoint_and_gives_sigterm_back(tiny_run: Callable[..., Run],
                                                                            monkeypatch: pytest.MonkeyPatch,
                                                                            tmp_path: Path) -> None:
    monkeypatch.setattr(stopping, "_asked", threading.Event())
    before = signal.getsignal(signal.SIGTERM)
    kinds = []
    for event in loop.run_stage(tiny_run({"tick_images": 8}), 0, None, tmp_path):
        kinds.append((event["event"], event["images_seen"]))
        if kinds == [("tick", 8)]:
            signal.raise_signal(signal.SIGTERM)
    assert kinds == [("tick", 8), ("checkpoint", 8), ("stopped", 8)]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_stage_outside_the_main_thread_leaves_sigterm_as_it_is(tiny_run: Callable[..., Run], tmp_path: Path) -> None:
    before, during = signal.getsignal(signal.SIGTERM), []

    def train() -> None:
        for event in loop.run_stage(tiny_run(), 0, None, tmp_path):
            during.append((event["event"], signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert during[-1] == ("stage_end", before)
    assert {handler for _, handler in during} == {before}


def test_ticks_tell_the_newest_of_a_figure_that_not_every_step_has(tiny_run: Callable[..., Run], tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """With training.penalty_every=3 two of three steps have no penalty; here the very first steps have none either."""
    real, norms = loop.train_step, list[float | None]()

    def lazy(*arguments: Any) -> dict[str, Any]:
        seen = real(*arguments)
        norms.append(seen["gradient_norm"].item() if len(norms) % 3 == 2 else None)
        return seen if norms[-1] is not None else {
            name: figure for name, figure in seen.items() if name not in ("penalty", "gradient_norm")}

    monkeypatch.setattr(loop, "train_step", lazy)
    ticks = [event for event in loop.run_stage(tiny_run({"tick_images": 8}), 0, None, tmp_path)
             if event["event"] == "tick"]
    told = [tick.get("gradient_norm") for tick in ticks]
    assert len(told) == 10
    assert told[:2] == [None, None]
    assert [*dict.fromkeys(told[2:])] == pytest.approx([norms[2], norms[5], norms[8]])
    assert told[2:] == sorted(told[2:], key=[*dict.fromkeys(told[2:])].index)  # each until the next one
    assert all("penalty" in tick and "loss_d" in tick for tick in ticks[2:])
