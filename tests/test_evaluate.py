"""Claims about an evaluation of a stored checkpoint: what is looked at, how often, and that its rows say so."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from gradine.configs.schema import Data, Run, from_dict
from gradine.pipeline.shards import shard
from gradine.stages import commits, evaluate, features, generate, loop, subjects
from gradine.stages.data import Images, data_digest
from gradine.stages.evaluate import Evaluated
from gradine.stages.networks import Generator

SIZE = 16
Rows = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def trained(module_run: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str]:
    """A run of one stage, 16 px, 48 reals, and its last checkpoint."""
    run = module_run({"name": "measured", "stages": [{"resolution": SIZE, "hold_images": 80, "batch_size": 8,
                                                      "threads": 1}]})
    events = list(loop.run_stage(run, 0, None, tmp_path_factory.mktemp("measured")))
    return run, [event["path"] for event in events if event["event"] == "checkpoint"][-1]


@pytest.fixture
def measure(trained: tuple[Run, str], tmp_path: Path) -> Callable[..., Evaluated]:
    """Evaluates the checkpoint with other settings, and a cache of the test's own."""
    run, path = trained

    def made(**changes: Any) -> Evaluated:
        own = replace(run, data=replace(run.data, cache_dir=str(tmp_path / "cache")),
                      evaluation=replace(run.evaluation, **changes))
        return evaluate.evaluate(own, path)

    return made


def by_metric(found: Evaluated) -> Rows:
    return {row["metric"]: row for row in found.rows}


def reals_of(run: Run) -> Tensor:
    """All 48, in the order in which evaluations split them."""
    return torch.from_numpy(Images(run.data, SIZE).pixels(np.random.default_rng(0).permutation(48)))


def fakes_of(run: Run, path: str, count: int) -> Tensor:
    average = subjects.load_average(run, commits.read(path))
    latents = torch.randn(count, 8, generator=torch.Generator().manual_seed(
        evaluate.random_seed(run.training.seed, "evaluation")))
    return ((average(latents) * 127.5 + 127.5).round().clamp(0, 255)).byte()


def plain_frechet(a: Tensor, b: Tensor) -> float:
    """By eigenvalues of the product of np.cov's, of pixels in [-1, 1]."""
    first, second = (images.flatten(1).double().numpy() / 127.5 - 1 for images in (a, b))
    covariances = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    shared = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex)).real.sum()
    return float(np.square(first.mean(0) - second.mean(0)).sum() + sum(map(np.trace, covariances)) - 2 * shared)


def test_the_first_half_of_the_reals_is_held_against_fakes_and_against_the_second_half(
        trained: tuple[Run, str], measure: Callable[..., Evaluated]) -> None:
    run, path = trained
    row = by_metric(measure(metrics=["fd"], untrained=False))["fd_pixels16"]
    reals, fakes = reals_of(run), fakes_of(run, path, 24)
    assert row["value"] == pytest.approx(plain_frechet(reals[:24], fakes), rel=1e-4)
    assert row["floor"] == pytest.approx(plain_frechet(reals[:24], reals[24:]), rel=1e-4)
    assert (row["count"], row["untrained"]) == (24, None)


def test_without_a_floor_all_reals_are_one_set_as_in_published_distances(
        trained: tuple[Run, str], measure: Callable[..., Evaluated]) -> None:
    run, path = trained
    rows = by_metric(measure(metrics=["swd", "fd", "copies"], floor=False, untrained=False))
    row = rows["fd_pixels16"]
    assert row["value"] == pytest.approx(plain_frechet(reals_of(run), fakes_of(run, path, 48)), rel=1e-4)
    assert {(each["count"], each["floor"]) for each in rows.values()} == {(48, None)}
    assert rows["copy_rate_pixels16"]["parts"] == {"searched": 48, "training": 48, "held_out": 0,
                                                   "held_out_data": None}


def test_both_sets_of_reals_are_drawn_from_all_shards_and_are_those_of_every_run() -> None:
    """Shards may be sorted by class: here 20 classes of 500 in a row, 50 of each expected, deviation 6.7."""
    class Sorted:
        resolution = 4

        def __len__(self) -> int:
            return 10_000

    drawn = []
    for seed in (0, 1):
        run = from_dict({"name": "x", "data": {"source": "a", "shards": "b"}, "stages": [{"resolution": 4}],
                         "training": {"seed": seed}, "evaluation": {"count": 1_000}})
        sets = subjects.RealSets(run, Sorted(), 2)  # type: ignore[arg-type]
        first, second = sets.ids(0), sets.ids(1)
        assert not {*first} & {*second}
        for ids in (first, second):
            counts = np.bincount(ids // 500, minlength=20)
            assert counts.min() >= 25
            assert counts.max() <= 75
        drawn.append((first.tolist(), second.tolist()))
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(("resolution", "expected"), [(4, 32), (128, 32), (256, 8), (512, 4), (1024, 4)])
def test_images_come_in_whole_groups_and_pairs_at_every_resolution(resolution: int, expected: int) -> None:
    assert generate.images_at_once(resolution) == expected


def test_every_row_says_what_it_was_made_of(trained: tuple[Run, str], measure: Callable[..., Evaluated]) -> None:
    run, path = trained
    found = measure()
    assert json.loads(json.dumps(found.rows, allow_nan=False)) == json.loads(json.dumps(found.rows))
    assert {frozenset(row) for row in found.rows} == {frozenset({
        "metric", "value", "reason", "interval", "floor", "untrained", "reals", "parts", "features", "features_digest",
        "count", "resolution", "checkpoint", "images_seen", "seed", "data", "seconds"})}
    for row in found.rows:
        assert (row["resolution"], row["images_seen"], row["checkpoint"]) == (SIZE, 80, Path(path).name)
        assert (row["seed"], row["data"]) == (run.training.seed, data_digest(run.data, SIZE))
        if row["value"] is not None:
            assert row["reason"] is None
            low, high = row["interval"] or (row["value"], row["value"])
            assert low <= row["value"] <= high
    assert len(by_metric(found)) == len(found.rows)


def test_images_are_generated_once_for_all_metrics_and_reals_are_looked_at_once_for_all_checkpoints(
        measure: Callable[..., Evaluated], monkeypatch: pytest.MonkeyPatch) -> None:
    """24 a side. A generator makes them once, both ends of 24 steps, 24 for the discriminator, 8 samples, 8 copies."""
    seen: Counter[str] = Counter()
    forward, look = Generator.forward, features.Network.__call__

    def counted(self: Generator, latents: Tensor, alpha: float = 1.0) -> Tensor:
        seen["generated"] += len(latents)
        return forward(self, latents, alpha)

    def looked(self: features.Network, images: Tensor) -> features.Outputs:
        seen["looked at"] += len(images)
        return look(self, images)

    monkeypatch.setattr(Generator, "forward", counted)
    monkeypatch.setattr(features.Network, "__call__", looked)
    first = measure()
    assert seen == {"generated": 24 + 24 + 2 * 24 + 24 + 8 + 8, "looked at": 4 * 24}
    seen.clear()
    second = measure()
    assert seen == {"generated": 24 + 24 + 2 * 24 + 24 + 8 + 8, "looked at": 2 * 24}
    without_time = [[{**row, "seconds": 0} for row in found.rows] for found in (first, second)]
    assert without_time[0] == without_time[1]
    assert first.pictures == second.pictures


class Returns(Generator):
    """A generator that returns images of a list, by its latents."""

    def __init__(self, run: Run, images: Tensor) -> None:
        super().__init__(run.network, SIZE, fades=False)
        self.images = images / 127.5 - 1

    def forward(self, latents: Tensor, alpha: float = 1.0) -> Tensor:
        return self.images[(latents[:, 0].abs() * 1e6).long() % len(self.images)]


def returning(monkeypatch: pytest.MonkeyPatch, run: Run, images: Tensor) -> None:
    monkeypatch.setattr(subjects, "load_average", lambda run, files: Returns(run, images))


def test_a_generator_of_training_images_copies_and_the_gallery_shows_of_what(
        trained: tuple[Run, str], measure: Callable[..., Evaluated], monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = trained
    reals = reals_of(run)
    returning(monkeypatch, run, reals[20:40])  # of both sets
    found = measure(metrics=["copies"])
    assert by_metric(found)["copy_rate_pixels16"]["value"] == 1
    gallery = np.asarray(Image.open(BytesIO(found.pictures["r0016-000000080-neighbors.png"])))
    assert gallery.shape == (2 * SIZE, 8 * SIZE, 3)
    np.testing.assert_array_equal(gallery[:SIZE], gallery[SIZE:])


def test_new_images_are_no_copies_and_the_gallery_shows_their_nearest_training_images(
        trained: tuple[Run, str], measure: Callable[..., Evaluated], monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = trained
    reals = reals_of(run)
    new = torch.rand(64, 3, 2, 2, generator=torch.Generator().manual_seed(7)).mul(255)
    returning(monkeypatch, run, torch.nn.functional.interpolate(new, SIZE, mode="bilinear", align_corners=True).round())
    found = measure(metrics=["copies"])
    assert by_metric(found)["copy_rate_pixels16"]["value"] < 0.2
    gallery = torch.from_numpy(np.array(Image.open(BytesIO(found.pictures["r0016-000000080-neighbors.png"]))))
    tiles = gallery.view(2, SIZE, 8, SIZE, 3).permute(0, 2, 4, 1, 3).double()  # row, column, channel, y, x
    for fake, nearest in zip(*tiles, strict=True):
        distances = (reals.double() - fake).square().sum(dim=(1, 2, 3))
        assert torch.equal(reals[distances.argmin()].double(), nearest)


def test_held_out_images_are_what_copies_and_the_discriminator_are_judged_by(
        measure: Callable[..., Evaluated], image_folder: Path, ray_cluster: Any, tmp_path: Path) -> None:
    few = tmp_path / "few"
    (few / "images").mkdir(parents=True)
    for path in sorted(image_folder.rglob("*.png"))[:12]:
        (few / "images" / path.name).write_bytes(path.read_bytes())
    shard(Data(source=str(few / "images"), shards=str(few / "shards")), SIZE)
    rows = by_metric(measure(metrics=["copies", "discriminator"], held_out=str(few / "shards")))
    digest = data_digest(Data(source="", shards=str(few / "shards")), SIZE)
    assert rows["copy_rate_pixels16"]["parts"] == {"searched": 48, "training": 48, "held_out": 12,
                                                   "held_out_data": digest}
    table = rows["discriminator"]["parts"]
    assert table["real_as_real"] + table["real_as_fake"] == 12
    assert math.isfinite(table["overfit"])
    missing = by_metric(measure(metrics=["copies", "swd"], held_out=str(tmp_path / "none")))
    assert "have no 16px level" in missing["copy_rate_pixels16"]["reason"]
    assert missing["swd"]["value"] is not None


def test_a_generator_that_ignores_its_latents_has_paths_of_length_zero(
        trained: tuple[Run, str], measure: Callable[..., Evaluated], monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = trained
    returning(monkeypatch, run, reals_of(run)[:1])
    assert by_metric(measure(metrics=["path_length"]))["path_length_pixels16"]["value"] == 0


def test_steps_too_small_for_bytes_still_have_a_length(measure: Callable[..., Evaluated]) -> None:
    """A step of 1e-4 changes no byte of these images: on rounded ones every length would be 0."""
    assert by_metric(measure(metrics=["path_length"]))["path_length_pixels16"]["value"] > 0


def test_a_metric_that_is_not_finite_or_not_defined_is_null_and_says_why(
        measure: Callable[..., Evaluated], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate.FrechetDistance, "compute", lambda self: math.nan)
    monkeypatch.setattr(evaluate.KernelDistance, "compute", lambda self: 1 / 0)
    rows = by_metric(measure(metrics=["fd", "kid", "ms_ssim", "neighbors"], features=["pixels", "nowhere:features"]))
    assert {name: row["reason"] for name, row in rows.items() if row["value"] is None and "pixels" in name} == {
        "fd_pixels16": "not finite", "kid_pixels16": "ZeroDivisionError: division by zero"}
    assert "64 px" in rows["ms_ssim"]["reason"]
    others = {name: row["reason"] for name, row in rows.items() if name.endswith("_features")}
    assert len(others) == 8
    assert all("nowhere" in reason for reason in others.values())
    assert rows["coverage_pixels16"]["value"] is not None
    json.dumps([*rows.values()], allow_nan=False)
