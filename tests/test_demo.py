"""The demo keeps its promise: landscapes, from the recipe as it ships."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gradine.configs.schema import load
from gradine.pipeline import driver


@pytest.mark.slow
def test_the_demo_halves_the_untrained_distance_and_shows_sky_above_ground(
        tmp_path: Path, ray_cluster: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = load("demo", [f"runs={tmp_path}/runs", f"data.shards={tmp_path}/shards", f"data.cache_dir={tmp_path}/cache"])
    folder = driver.train(run, shard_if_needed=True)
    (row,) = (row for row in folder.lines("metrics.jsonl") if row["metric"] == "swd" and row["resolution"] == 32)
    with Image.open(next(folder.samples.glob("r0032-?????????.png"))) as grid:
        light = np.asarray(grid.convert("L"), np.float64)
    samples = light.reshape(8, 32, 8, 32).transpose(0, 2, 1, 3).reshape(64, 32, 32)
    sky_is_lighter = float((samples[:, :11].mean((1, 2)) > samples[:, 21:].mean((1, 2))).mean())
    with capsys.disabled():
        print(f"\ndemo at 32 px: SWD {row['value']:.1f}, untrained {row['untrained']:.1f}, noise floor "
              f"{row['floor']:.1f} ({row['count']} images); upper third lighter in {sky_is_lighter:.0%} of samples")
    assert row["value"] <= row["untrained"] / 2
    assert row["value"] > row["floor"]
    assert sky_is_lighter > 0.7
