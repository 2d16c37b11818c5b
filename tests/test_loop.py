"""What the stage loop refuses and counts; that it trains right is claimed by test_parity."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gradine.configs.schema import EnvironmentFault, Run
from gradine.stages import loop


def test_twenty_masked_updates_in_a_row_stop_the_stage_and_one_that_counts_starts_over() -> None:
    watch = loop.Watch(batch_size=8, images_seen=0, skipped=[0, 0])
    watch.look(19 * 8, [19, 0])  # 19 of D's in a row
    watch.look(21 * 8, [20, 0])  # one of the last two went through
    watch.look(40 * 8, [20, 19])
    with pytest.raises(EnvironmentFault, match="last 20 updates were all masked"):
        watch.look(41 * 8, [20, 20])


def test_a_stage_whose_gradients_are_never_finite_ends_with_the_way_out(tiny_run: Callable[..., Run],
                                                                        tmp_path: Path) -> None:
    run = tiny_run({"training.penalty_target": 1e-30, "tick_images": 8, "stages.0.hold_images": 800})
    with pytest.raises(EnvironmentFault, match=r"resume=RESOLUTION branch=new"):
        list(loop.run_stage(run, 0, None, tmp_path))


def test_a_stage_that_asks_for_a_gpu_where_there_is_none_is_refused(tiny_run: Callable[..., Run],
                                                                    tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(EnvironmentFault, match="torch sees no CUDA device"):
        list(loop.run_stage(tiny_run({"stages.*.gpus": 1}), 0, None, tmp_path))


def test_more_workers_than_accelerate_sees_are_refused(tiny_run: Callable[..., Run], tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="Accelerate sees 1 processes, the stage has 2 workers"):
        list(loop.run_stage(tiny_run({"stages.*.workers": 2}), 0, None, tmp_path))
