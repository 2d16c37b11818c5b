"""The game on points: densities and draws against arithmetic, what counts as found, and that both players get there."""

from __future__ import annotations

import io
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gradine.configs.schema import Data, Points, Run, Training, UserError, load
from gradine.pipeline import figures
from gradine.stages import plane
from gradine.stages.commits import find
from gradine.stages.evaluate import Evaluated, evaluate
from gradine.stages.loop import run_stage
from gradine.stages.points import BLOCK, REALS, Mixture, PointSet
from gradine.stages.video import write_video

GAUSSIAN = Points(kind="gaussian", mean=[0.5, -0.3], deviations=[0.6, 0.3], correlation=0.6)
RING = Points(kind="ring", modes=8, radius=2.0, deviations=[0.1, 0.1])
GRID = Points(kind="grid", modes=9, radius=1.0, mean=[3.0, 0.0], deviations=[0.2, 0.1], correlation=-0.5)
# Covariances by hand: a mode's own; and between the modes radius**2 / 2 on a circle, the mean of -1, 0, 1 squared.
MOMENTS = [(GAUSSIAN, [0.5, -0.3], [[0.36, 0.108], [0.108, 0.09]]),
           (RING, [0.0, 0.0], [[2.01, 0.0], [0.0, 2.01]]),
           (GRID, [3.0, 0.0], [[2 / 3 + 0.04, -0.01], [-0.01, 2 / 3 + 0.01]])]


def set_of(points: Points) -> PointSet:
    return PointSet(Data(source="", shards="", channels=2, points=points))


@pytest.mark.parametrize(("points", "mean", "covariance"), MOMENTS)
def test_a_density_integrates_to_1_and_to_the_moments_of_its_settings(points: Points, mean: list[float],
                                                                      covariance: list[list[float]]) -> None:
    axis = torch.linspace(-6, 6, 601, dtype=torch.float64)
    xy = torch.cartesian_prod(axis, axis)
    mass = Mixture.of(points).density(xy) * 0.02**2
    torch.testing.assert_close(mass.sum(), torch.tensor(1.0, dtype=torch.float64), atol=1e-6, rtol=0)
    found = (xy * mass[:, None]).sum(dim=0)
    apart = xy - found
    torch.testing.assert_close(found.tolist(), mean, atol=1e-4, rtol=0)
    torch.testing.assert_close(((apart * mass[:, None]).T @ apart).tolist(), covariance, atol=1e-4, rtol=0)
    torch.testing.assert_close(Mixture.of(points).mean.tolist(), mean, atol=1e-9, rtol=0)
    torch.testing.assert_close(Mixture.of(points).whole_covariance.tolist(), covariance, atol=1e-9, rtol=0)


def test_a_density_at_a_place_is_the_textbooks() -> None:
    x, y = 0.8, -0.5
    u, v, r = (x - 0.5) / 0.6, (y + 0.3) / 0.3, 0.6
    by_hand = math.exp(-(u * u - 2 * r * u * v + v * v) / (2 * (1 - r * r))) / (
        2 * math.pi * 0.6 * 0.3 * math.sqrt(1 - r * r))
    assert Mixture.of(GAUSSIAN).density(torch.tensor([[x, y]])).item() == pytest.approx(by_hand, rel=1e-6)


def test_modes_lie_on_a_circle_and_in_a_square() -> None:
    ring, grid = Mixture.of(RING).modes, Mixture.of(GRID).modes
    np.testing.assert_allclose(ring[[0, 1, 2, 4]], [[2, 0], [2**0.5, 2**0.5], [0, 2], [-2, 0]], atol=1e-12)
    assert sorted(grid.tolist()) == [[3.0 + x, y] for x, y in itertools.product((-1.0, 0.0, 1.0), repeat=2)]


@pytest.mark.parametrize(("points", "mean", "covariance"), MOMENTS)
def test_reals_have_the_moments_of_their_settings_by_both_ways_to_draw_them(points: Points, mean: list[float],
                                                                            covariance: list[list[float]]) -> None:
    images = set_of(points)
    read = torch.from_numpy(images.pixels(images.sampler(0)(0, 200_000))).flatten(1)
    for xy in (read, images.mixture.draw(200_000, torch.Generator().manual_seed(0))):
        assert xy.dtype == torch.float32
        torch.testing.assert_close(xy.double().mean(dim=0).tolist(), mean, atol=0.015, rtol=0)  # 4 errors of the mean
        torch.testing.assert_close(torch.cov(xy.double().T).tolist(), covariance, atol=0.03, rtol=0)


def test_reals_are_independent_of_each_other_and_of_their_mode() -> None:
    images = set_of(RING)
    xy = torch.from_numpy(images.pixels(np.arange(3 * BLOCK))).flatten(1).double()
    nearest = images.mixture.distances(xy).argmin(dim=1)
    within = (xy - images.mixture.modes[nearest]) / 0.1
    everything = torch.stack([within[1:, 0], within[1:, 1], within[:-1, 0], within[:-1, 1], nearest[1:] - 3.5,
                              nearest[:-1] - 3.5])
    correlations = torch.corrcoef(everything) - torch.eye(6)
    assert correlations.abs().max() < 4.5 / math.sqrt(3 * BLOCK)
    assert torch.bincount(nearest).tolist() == pytest.approx([3 * BLOCK / 8] * 8, abs=4.5 * math.sqrt(3 * BLOCK / 8))


def test_a_real_is_a_function_of_its_number_alone() -> None:
    images, again = set_of(GAUSSIAN), set_of(GAUSSIAN)
    ids = np.array([5, REALS - 1, BLOCK, 0, BLOCK - 1, 5, 12 * BLOCK + 3])
    found = images.pixels(ids)
    assert found.shape == (7, 2, 1, 1)
    assert found.dtype == np.float32
    for number, one in zip(ids, found, strict=True):
        np.testing.assert_array_equal(again.decoding(np.array([number]))()[0], one)
    assert len({one.tobytes() for one in found}) == 6  # 5 is there twice


def test_a_seed_tells_where_training_begins_and_resuming_needs_no_replay() -> None:
    ids = set_of(GAUSSIAN).sampler(3)
    np.testing.assert_array_equal(ids(100, 50), ids(0, 150)[100:])
    assert set(ids(0, 1000)).isdisjoint(set_of(GAUSSIAN).sampler(4)(0, 1000))
    last = REALS - int(ids(0, 1)[0])
    assert ids(last - 1, 2).tolist() == [REALS - 1, 0]


def test_points_have_no_labels() -> None:
    with pytest.raises(UserError, match="data.points.kind=ring has no labels"):
        _ = set_of(RING).labels


# What is measured ----------------------------------------------------------------------------------------------------


def test_a_mode_is_found_by_one_fake_within_3_deviations_and_quality_is_the_share_of_such_fakes() -> None:
    places = [[2.0, 0.29], [2.0, -0.31], [0.0, 2.0], [0.05, 2.05], [-2.0, 0.0], [0.0, 0.0], [9.0, 9.0], [0.1, -2.1]]
    found = plane.errors(Mixture.of(RING), torch.tensor(places, dtype=torch.float64))
    assert found["modes"] == 4  # of 5 places near a mode, two are of one
    assert found["high_quality"] == 5 / 8


def test_nearness_follows_the_correlation() -> None:
    along, across = torch.tensor([[0.5 + 0.6 * 2, -0.3 + 0.3 * 2]]), torch.tensor([[0.5 + 0.6 * 2, -0.3 - 0.3 * 2]])
    mixture = Mixture.of(GAUSSIAN)  # 2 deviations in each: sqrt(8 / 1.6) with the correlation, sqrt(8 / 0.4) against it
    assert mixture.distances(along).item() == pytest.approx(math.sqrt(5))
    assert mixture.distances(across).item() == pytest.approx(math.sqrt(20))


def test_errors_of_moments_are_relative_to_the_targets() -> None:
    reals = Mixture.of(GAUSSIAN).draw(100_000, torch.Generator().manual_seed(0)).double()
    reals = (reals - reals.mean(dim=0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(reals.T))).T
    exact = reals @ torch.linalg.cholesky(torch.tensor([[0.36, 0.108], [0.108, 0.09]], dtype=torch.float64)).T
    exact += torch.tensor([0.5, -0.3])
    assert plane.errors(Mixture.of(GAUSSIAN), exact)["mean_error"] == pytest.approx(0, abs=1e-6)
    moved = exact + torch.tensor([0.06, 0.03])  # a tenth of a deviation each
    assert plane.errors(Mixture.of(GAUSSIAN), moved)["mean_error"] == pytest.approx(0.1 * 2**0.5, rel=1e-5)
    assert plane.errors(Mixture.of(GAUSSIAN), moved)["covariance_error"] == pytest.approx(0, abs=1e-6)
    assert plane.errors(Mixture.of(GAUSSIAN), exact * 1.1)["covariance_error"] == pytest.approx(0.21, rel=1e-5)


def test_the_best_discriminator_is_the_reals_share_of_both_densities() -> None:
    reals, fakes = torch.tensor([3.0, 1.0, 0.0, 2.0, 0.0]), torch.tensor([1.0, 1.0, 5.0, 0.0, 0.0])
    assert plane.optimal(reals, fakes, Training()).tolist() == [0.75, 0.5, 0.0, 1.0, 0.5]
    smoothed = plane.optimal(reals, fakes, Training(loss="minimax", real_labels=[0.8, 1.0], fake_labels=[0.1]))
    assert smoothed.tolist() == pytest.approx([0.75 * 0.9 + 0.25 * 0.1, 0.5, 0.1, 0.9, 0.5])
    flipped = plane.optimal(reals, fakes, Training(loss="minimax", flip_labels=0.2))
    assert flipped.tolist() == pytest.approx([0.75 * 0.8 + 0.25 * 0.2, 0.5, 0.2, 0.8, 0.5])


def test_the_best_discriminator_is_the_minimum_of_the_loss_at_each_place() -> None:
    """p log D + q log(1 - D), and its least-squares companion, searched over a fine grid of D."""
    p, q, d = 0.7, 0.2, torch.linspace(0.001, 0.999, 9981, dtype=torch.float64)
    best = plane.optimal(torch.tensor([p]), torch.tensor([q]), Training()).item()
    assert d[(p * d.log() + q * (1 - d).log()).argmax()].item() == pytest.approx(best, abs=1e-3)
    assert d[(p * (d - 1).square() + q * d.square()).argmin()].item() == pytest.approx(best, abs=1e-3)


def test_a_smoothed_density_is_that_of_the_points_spread_by_the_kernel() -> None:
    edges = np.linspace(-4, 4, 161), np.linspace(-3, 5, 161)
    centre = torch.tensor([[0.025, 1.025]], dtype=torch.float64)  # of a cell
    found = plane.smoothed_density(centre.repeat(10, 1), edges, (0.3, 0.2))
    x, y = (torch.from_numpy((each[1:] + each[:-1]) / 2) for each in edges)
    by_hand = (torch.exp(-((x - 0.025) / 0.3).square() / 2)[:, None] * torch.exp(-((y - 1.025) / 0.2).square() / 2)
               / (2 * math.pi * 0.3 * 0.2))
    torch.testing.assert_close(found, by_hand, atol=2e-3 * float(by_hand.max()), rtol=0)


def test_only_a_loss_whose_scores_are_probabilities_has_its_discriminator_compared() -> None:
    scores = torch.tensor([0.0, math.log(3)])
    for loss in ("minimax", "non_saturating"):
        told = plane.probability(Training(loss=loss), scores)
        assert told is not None
        assert told.tolist() == pytest.approx([0.5, 0.75])
    assert plane.probability(Training(loss="least_squares"), scores) is scores
    for loss in ("wasserstein", "hinge", "relativistic"):
        assert plane.probability(Training(loss=loss), scores) is None


# Videos --------------------------------------------------------------------------------------------------------------


def test_a_video_read_back_has_all_frames_in_order_at_even_sizes(tmp_path: Path) -> None:
    import av

    grays = [0, 60, 120, 180, 240]
    path = write_video((np.full((41, 63, 3), gray, np.uint8) for gray in grays), tmp_path / "a" / "film.mp4", fps=5)
    with av.open(str(path)) as film:
        stream = film.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(stream)]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 5)
    assert [frame.shape for frame in frames] == [(42, 64, 3)] * 5
    assert [frame.mean() for frame in frames] == pytest.approx(grays, abs=3)
    assert [each.name for each in path.parent.iterdir()] == ["film.mp4"]


def test_a_video_keeps_red_red_and_left_left(tmp_path: Path) -> None:
    import av

    frame = np.zeros((64, 64, 3), np.uint8)
    frame[:, :32, 0] = 200
    with av.open(str(write_video([frame] * 3, tmp_path / "film.mp4"))) as film:
        back = next(film.decode(video=0)).to_ndarray(format="rgb24")
    assert back[32, 8].tolist() == pytest.approx([200, 0, 0], abs=12)
    assert back[32, 56].tolist() == pytest.approx([0, 0, 0], abs=12)


def test_a_video_of_nothing_or_of_frames_of_two_sizes_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="would have no frame"):
        write_video([], tmp_path / "film.mp4")
    with pytest.raises(UserError, match=r"a frame is \[8, 8, 3\], the first one \[16, 16, 3\]"):
        write_video([np.zeros((16, 16, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)], tmp_path / "film.mp4")
    assert not list(tmp_path.iterdir())


def test_without_pyav_a_video_tells_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"pip install 'gradine\[video\]'"):
        write_video([np.zeros((8, 8, 3), np.uint8)], tmp_path / "film.mp4")


# The game ------------------------------------------------------------------------------------------------------------


def played(run: Run, out: Path) -> str:
    """-> its last checkpoint."""
    assert [event["event"] for event in run_stage(run, 0, None, out)][-1] == "stage_end"
    return find(out / "checkpoints")[0][-1].path


def values(found: Evaluated) -> dict[str, Any]:
    return {row["metric"]: row["value"] for row in found.rows}


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A game of 12 steps with 3 checkpoints."""
    run = load("ring8", ["stages.0.hold_images=768", "stages.0.batch_size=64", "checkpoints.every_images=256",
                         "evaluation.count=500", "network.mlp.width=16"])
    out = tmp_path_factory.mktemp("ring")
    played(run, out)
    return run, out


def test_a_game_is_evaluated_in_rows_like_those_of_images(short: tuple[Run, Path]) -> None:
    run, out = short
    found = evaluate(run, find(out / "checkpoints")[0][-1].path)
    assert [row["metric"] for row in found.rows] == [*plane.KINDS]
    assert {row["reason"] for row in found.rows if row["metric"] != "optimal_discriminator"} == {None}
    assert {(row["resolution"], row["images_seen"], row["checkpoint"]) for row in found.rows} == {
        (1, 768, "r0001-hold-000000768")}
    json.dumps(found.rows, allow_nan=False)
    assert all(figures.label(kind) != kind for kind in plane.KINDS)
    by_kind = {row["metric"]: row for row in found.rows}
    assert by_kind["modes"]["parts"] == {"of": 8}
    assert by_kind["modes"]["reals"] == 8
    assert by_kind["high_quality"]["reals"] == pytest.approx(1 - math.exp(-4.5), abs=0.02)  # of 2-D normals, within 3
    (name, picture), = found.pictures.items()
    assert name == "r0001-000000768.png"
    assert len(picture) < 150_000
    assert Image.open(io.BytesIO(picture)).size == (960, 500)


def test_a_loss_without_a_probability_leaves_a_reason(short: tuple[Run, Path]) -> None:
    _, out = short
    run = load("ring8", ["network.mlp.width=16", "evaluation.count=500", "training.loss=hinge"])
    row = next(row for row in evaluate(run, find(out / "checkpoints")[0][0].path).rows
               if row["metric"] == "optimal_discriminator")
    assert (row["value"], row["reason"]) == (None, "scores of training.loss=hinge are no probability")


def test_a_film_of_a_game_has_a_frame_of_each_checkpoint_the_oldest_first(short: tuple[Run, Path], tmp_path: Path
                                                                          ) -> None:
    import av

    run, out = short
    paths = [each.path for each in find(out / "checkpoints")[0]]
    *frames, film = plane.game(run, reversed(paths), tmp_path / "game")
    assert [each.name for each in frames] == ["r0001-000000256.png", "r0001-000000512.png", "r0001-000000768.png"]
    with av.open(str(film)) as opened:
        assert sum(1 for _ in opened.decode(video=0)) == 3


def test_a_film_of_a_run_of_images_is_refused() -> None:
    with pytest.raises(UserError, match="is of images: its densities are not known"):
        plane.game(load("smoke"), [], Path("unused"))


@pytest.mark.slow
def test_against_a_generator_that_stands_still_the_discriminator_becomes_the_best_one_within_a_tenth(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fakes of an untrained generator lie close together: their density is taken finer than usual."""
    run = load("gaussian2d", ["stages.0.hold_images=5_120_000", "stages.0.learning_rate=1e-9", "stages.0.threads=1",
                              "training.discriminator_rate=150_000", "training.penalty=none", "training.beta1=0.9",
                              "training.beta2=0.999", "checkpoints.every_images=512_000"])
    monkeypatch.setattr(plane, "BANDWIDTH", 0.05)
    it = plane.Plane(run, played(run, tmp_path), torch.device("cpu"), density_fakes=4_000_000)
    found = plane.of_best(it)["optimal_discriminator"]
    assert found["floor"] > 0.4  # it is far from 1/2
    assert found["value"] < 0.1
    assert found["parts"]["mean"] < 0.02


@pytest.mark.slow
def test_a_normal_distribution_is_learnt_within_5_percent_and_the_discriminator_is_the_best_one_within_a_tenth(
        tmp_path: Path) -> None:
    run = load("gaussian2d", ["stages.0.threads=1"])
    found = values(evaluate(run, played(run, tmp_path)))
    assert found["mean_error"] < 0.05
    assert found["covariance_error"] < 0.05
    assert found["optimal_discriminator"] < 0.1


@pytest.mark.slow
def test_all_8_modes_of_the_ring_are_found_by_the_game_that_is_held_together(tmp_path: Path) -> None:
    run = load("ring8", ["stages.0.threads=1"])
    found = values(evaluate(run, played(run, tmp_path)))
    assert found["modes"] == 8
    assert found["high_quality"] > 0.6


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_modes_of_the_ring_are_lost_by_the_game_that_is_not(seed: int, tmp_path: Path) -> None:
    run = load("lectures/collapse", ["stages.0.threads=1", f"training.seed={seed}"])
    assert values(evaluate(run, played(run, tmp_path)))["modes"] < 8
