"""The published recipe through all nine stages to 1024 px, with networks and phases a CPU can afford."""

from __future__ import annotations

import resource
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gradine.configs.schema import RECIPES, load
from gradine.pipeline import driver
from gradine.stages import commits


def mosaics(folder: Path, count: int) -> None:
    """Photographs of 1024 px, each of 256 of the demo's 64 px crops."""
    crops = []
    with zipfile.ZipFile(RECIPES / "demo_images.zip") as archive:
        for name in sorted(archive.namelist()):
            with archive.open(name) as file, Image.open(file) as image:
                crops.append(np.asarray(image.convert("RGB")))
    rng = np.random.default_rng(0)
    for number in range(count):
        tiles = np.stack(crops)[rng.integers(0, len(crops), 256)].reshape(16, 16, 64, 64, 3)
        Image.fromarray(tiles.transpose(0, 2, 1, 3, 4).reshape(1024, 1024, 3)).save(folder / f"{number:03d}.jpg")


@pytest.mark.slow
def test_the_published_recipe_runs_through_all_nine_stages(tmp_path: Path, ray_cluster: Any,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "images"
    images.mkdir()
    mosaics(images, 200)
    run = load("celebahq1024", [
        f"data.source={images}", f"data.shards={tmp_path}/shards", "data.shard_images=25", f"runs={tmp_path}/runs",
        f"data.cache_dir={tmp_path}/cache", "data.cache_gb=0.2",  # so that 1024 px streams and the others are mapped
        "network.fmap_base=512", "network.fmap_max=16", "network.latent_size=16", "stages.*.gpus=0",
        "stages.*.batch_size=4", "stages.*.fade_images=8", "stages.*.hold_images=8", "stages.*.threads=1",
        "training.channels_last=false", "evaluation.count=16", "evaluation.samples=4"])
    folder = driver.train(run, shard_if_needed=True)
    ends = [c for c in commits.find(folder.checkpoints)[0] if c.stage_end]
    assert [c.resolution for c in ends] == [4, 8, 16, 32, 64, 128, 256, 512, 1024]
    assert ends[-1].images_seen == 8 + 8 * 16
    rows = {(row["resolution"], row["metric"]): row for row in folder.lines("metrics.jsonl")}
    for size in (4, 8, 16, 32, 64, 128, 256, 512, 1024):
        assert rows[size, "swd"]["value"] > 0
        assert rows[size, "fd_pixels16"]["value"] > 0
        assert (rows[size, "ms_ssim"]["value"] is None) == (size < 64)
        with Image.open(next(folder.samples.glob(f"r{size:04d}-?????????.png"))) as grid:
            assert grid.size == (4 * size, size)
    assert set(rows[1024, "swd"]["parts"]) == {"16", "32", "64", "128", "256", "512", "1024"}
    peak = max(event["peak_memory_mb"] for event in folder.history() if event["event"] == "stage_end")
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with capsys.disabled():
        print(f"\nnine stages to 1024 px: peak memory {peak:,.0f} MB in the worker, {own:,.0f} MB in the driver; "
              f"report {folder.report.stat().st_size / 1e6:.1f} MB")
    assert peak < 4000
