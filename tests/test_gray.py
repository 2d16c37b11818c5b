"""Claims about a run with `data.channels: 1`: it trains, is scored, sampled and exported with one channel."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from gradine.configs.schema import Run, from_dict
from gradine.pipeline import driver
from gradine.pipeline.shards import shard
from gradine.stages import commits, evaluate, loop, subjects
from gradine.stages.generate import export, generate, grid, load_average, picture

Trained = tuple[Run, Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """uint8 [40, 64, 64]: the source images, smooth."""
    rng = np.random.default_rng(0)
    corners = [Image.fromarray(rng.integers(0, 256, (2, 2), dtype=np.uint8)) for _ in range(40)]
    return np.stack([np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR)) for image in corners])


@pytest.fixture(scope="module")
def trained(pixels: np.ndarray, ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run of 32 and 64 px from a folder of gray PNGs, its last checkpoint, and that one's metrics."""
    folder = tmp_path_factory.mktemp("gray")
    (folder / "images").mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / "images" / f"{number:02d}.png")
    run = from_dict({
        "name": "gray", "data": {"source": str(folder / "images"), "shards": str(folder / "shards"), "channels": 1,
                                 "cache_dir": str(folder / "cache")},
        "network": {"latent_size": 8, "fmap_base": 128, "fmap_max": 8}, "evaluation": {"samples": 10},
        "stages": [{"resolution": size, "fade_images": 16, "hold_images": 16, "batch_size": 8, "threads": 1}
                   for size in (32, 64)]})
    shard(run.data, 64)
    first = [e["path"] for e in loop.run_stage(run, 0, None, folder) if e["event"] == "checkpoint"]
    last = [e["path"] for e in loop.run_stage(run, 1, first[-1], folder) if e["event"] == "checkpoint"]
    measured = evaluate.evaluate(run, last[-1])
    driver.run_folder(replace(run, runs=str(folder.parent), name=folder.name)).keep_pictures(measured.pictures)
    return run, Path(last[-1]), measured.rows


def test_every_weight_at_the_image_has_one_channel(trained: Trained) -> None:
    _, path, _ = trained
    files = commits.read(path)
    generator, discriminator = (safetensors.torch.load(files[f"{part}.safetensors"])
                                for part in ("average", "discriminator"))
    assert {name: tuple(t.shape) for name, t in generator.items() if "rgb" in name} == {
        "to_rgb.32.weight": (1, 8, 1, 1), "to_rgb.32.bias": (1,),
        "to_rgb.64.weight": (1, 4, 1, 1), "to_rgb.64.bias": (1,)}
    assert {tuple(t.shape[:2]) for name, t in discriminator.items() if "rgb" in name and "weight" in name} == {
        (8, 1), (4, 1)}


def test_every_metric_has_a_value_and_a_floor_where_it_has_one(trained: Trained) -> None:
    rows = {row["metric"]: row for row in trained[2]}
    assert {row["reason"] for row in rows.values()} == {None}
    assert len(rows) == 13
    for name in ("swd", "fd_pixels16"):
        assert 0 < rows[name]["floor"] < rows[name]["value"]
        assert np.isfinite(rows[name]["untrained"])
    assert 0 < rows["ms_ssim"]["reals"] < 1
    assert (rows["swd"]["count"], rows["ms_ssim"]["count"]) == (20, 40)


def test_sample_and_real_grids_are_gray_pictures_of_the_very_pixels(trained: Trained,
                                                                    pixels: np.ndarray) -> None:
    _, path, _ = trained
    samples, reals = (path.parent.parent / "samples" / name for name in ("r0064-000000048.png", "r0064-reals.png"))
    for file in (samples, reals):
        with Image.open(file) as image:
            assert (image.mode, image.size) == ("L", (512, 128))
    with Image.open(reals) as image:
        shown = np.asarray(image)
    tiles = [shown[row:row + 64, column:column + 64] for row in (0, 64) for column in range(0, 512, 64)]
    found = [[n for n, source in enumerate(pixels) if np.array_equal(tile, source)] for tile in tiles[:10]]
    assert len(set(map(tuple, found))) == 10
    assert all(len(one) == 1 for one in found)
    assert not np.any(tiles[10:])  # empty places are black


def test_the_exported_program_and_its_description_give_one_channel(trained: Trained,
                                                                   tmp_path: Path) -> None:
    run, path, _ = trained
    files = commits.read(path)
    weights, program, description = export(run, files, tmp_path)
    latents = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    images = torch.export.load(program).module()(latents)
    assert images.shape == (5, 1, 64, 64)
    torch.testing.assert_close(images, load_average(run, files)(latents))
    told = json.loads(description.read_text())
    assert (told["channels"], told["images"]) == (1, "[N, 1, R, R] in [-1, 1]")
    assert safetensors.torch.load_file(weights)["to_rgb.64.weight"].shape == (1, 4, 1, 1)


def test_an_untouched_pixel_is_an_untouched_pixel_in_a_picture_of_one_or_three_channels() -> None:
    pixels = torch.arange(2 * 3 * 4, dtype=torch.uint8).view(2, 3, 2, 2)
    color, gray = picture(pixels[0]), picture(pixels[0, 1:2])
    assert (color.mode, color.getpixel((1, 0))) == ("RGB", (1, 5, 9))
    assert (gray.mode, gray.size, gray.getpixel((1, 0))) == ("L", (2, 2), 5)
    assert (grid(pixels).mode, grid(pixels).size, grid(pixels).getpixel((2, 1))) == ("RGB", (4, 2), (14, 18, 22))
    assert (grid(pixels[:, :1]).mode, grid(pixels[:, :1]).getpixel((2, 1))) == ("L", 14)


def test_memory_for_an_evaluation_holds_three_times_as_many_gray_images() -> None:
    """64 px: two sets of one channel are 8,192 bytes an image."""
    gray = {"source": "a", "shards": "b", "channels": 1}
    for data, counted in ((gray, 12), ({**gray, "channels": 3}, 4)):
        run = from_dict({"name": "x", "data": data, "stages": [{"resolution": 64}],
                         "evaluation": {"memory_gb": 12.5 * 8192 / 1e9}})
        assert subjects.images_that_fit(run, 64) == counted


def test_generated_gray_images_are_bytes_of_one_channel(trained: Trained) -> None:
    run, path, _ = trained
    (images,) = generate(load_average(run, commits.read(path)), torch.zeros(3, 8))
    assert (images.shape, images.dtype) == ((3, 1, 64, 64), torch.uint8)
