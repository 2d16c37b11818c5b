"""Claims about `gradine explore`: on generators that are a line of algebra, then on a trained run by its command."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

from gradine.configs.schema import Network, Run, UserError, dump, from_dict
from gradine.pipeline import __main__ as command_line
from gradine.pipeline import explore as commands
from gradine.pipeline.commands import sample_run
from gradine.pipeline.explore import Opened
from gradine.stages import explore, loop
from gradine.stages.data import Images
from gradine.stages.dcgan import Encoder
from gradine.stages.generate import draw_latents

SIDE = 4  # px, of the images below


class Linear(nn.Module):
    """Images [N, 1, 4, 4] that are a matrix times the latents."""

    resolution = SIDE

    def __init__(self, latent_size: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(normal(SIDE * SIDE, latent_size, seed=1), requires_grad=False)

    def forward(self, latents: Tensor) -> Tensor:
        return (latents @ self.matrix.T).view(-1, 1, SIDE, SIDE)


class Curved(Linear):
    """The same, squeezed by a tanh."""

    def forward(self, latents: Tensor) -> Tensor:
        return (super().forward(latents) / 2).tanh()


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


# ---- Walks


def test_a_walk_between_gaussian_latents_keeps_to_their_sphere_in_equal_angles() -> None:
    network = Network(latent_size=16)
    a, b = normal(2, 16, seed=0).double().div(3).float()
    b = b * (a.norm() / b.norm())
    steps = explore.walk(a, b, 9, network).numpy().astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(steps, axis=1), float(a.norm()), rtol=1e-5)
    angles = [np.arccos(x @ y / np.linalg.norm(x) / np.linalg.norm(y)) for x, y in pairwise(steps)]
    whole = math.acos(cosine(a.double(), b.double()))
    np.testing.assert_allclose(angles, whole / 8, rtol=1e-4)
    assert (steps[[0, -1]] == torch.stack([a, b]).numpy()).all()  # to the last bit


def test_a_walk_between_latents_of_two_lengths_changes_its_length_evenly() -> None:
    a, b = torch.tensor([3.0, 0, 0]), torch.tensor([0, 1.0, 0])
    middle = explore.walk(a, b, 3, Network(latent_size=3))[1]
    torch.testing.assert_close(middle, torch.tensor([2.0, 2.0, 0]) / math.sqrt(2))


def test_a_walk_between_uniform_latents_is_straight() -> None:
    a, b = torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0])
    steps = explore.walk(a, b, 5, Network(latent_size=3, latents="uniform"))
    torch.testing.assert_close(steps[1], torch.tensor([0.75, 0.25, 0]))


def test_only_the_noise_walks_and_the_condition_stays_that_of_the_start() -> None:
    network = Network(latent_size=2, conditioning="projection", classes=3, codes=2, continuous_codes=1)
    start = torch.tensor([1.0, 0, 0, 1, 0, 1, 0, -0.5])
    end = torch.tensor([0, 1.0, 1, 0, 0, 0, 1, 0.9])
    steps = explore.walk(start, end, 4, network)
    assert (steps[:, 2:] == start[2:]).all()
    assert steps[-1, :2].tolist() == [0, 1]


# ---- Sums of means


def test_arithmetic_is_mean_minus_mean_plus_mean_at_the_length_of_latents() -> None:
    groups = [torch.tensor([[4.0, 0, 0, 0], [0, 4.0, 0, 0]]), torch.tensor([[0, 0, 2.0, 0]]),
              torch.tensor([[0, 0, 0, 1.0], [0, 0, 0, 3.0]])]
    means, result = explore.arithmetic(groups, Network(latent_size=4))
    # the means are (2, 2, 0, 0), (0, 0, 2, 0), (0, 0, 0, 2); A - B + C = (2, 2, -2, 2), of length 4; latents' is 2
    assert result.tolist() == [[1, 1, -1, 1]]
    torch.testing.assert_close(means, torch.tensor([[math.sqrt(2), math.sqrt(2), 0, 0], [0, 0, 2, 0], [0, 0, 0, 2]]))


def test_arithmetic_with_two_groups_is_their_difference_and_keeps_the_condition_of_the_first() -> None:
    network = Network(latent_size=2, latents="uniform", conditioning="projection", classes=2)
    plus, minus = torch.tensor([[0.9, 0.5, 0, 1]]), torch.tensor([[-0.8, 0.25, 1, 0]])
    _, result = explore.arithmetic([plus, minus], network)
    assert result.tolist() == [[1, 0.25, 0, 1]]  # 1.7 lies outside the cube of uniform latents


def test_arithmetic_that_leaves_nothing_is_refused() -> None:
    group = torch.tensor([[1.0, 2, 3, 4]])
    with pytest.raises(UserError, match="--plus and --minus name the same images"):
        explore.arithmetic([group, group], Network(latent_size=4))


# ---- Directions


def test_log_odds_are_those_of_the_softmax() -> None:
    logits = normal(5, 3, seed=0).double()
    p = torch.exp(logits) / torch.exp(logits).sum(dim=1, keepdim=True)
    torch.testing.assert_close(explore.log_odds(logits), torch.log(p / (1 - p)))
    assert explore.log_odds(torch.tensor([[100.0, 0], [0, 200.0]])).tolist() == [[100, -100], [-200, 200]]
    assert explore.log_odds(torch.tensor([[0.3]])).tolist() == [[pytest.approx(0.3)]]


@pytest.mark.parametrize("classes", [1, 2])
def test_following_a_linear_classifier_of_a_linear_generator_finds_its_gradient(classes: int) -> None:
    network, generator, rows = Network(latent_size=8), Linear(8), normal(classes, SIDE * SIDE, seed=2)

    def classify(images: Tensor) -> Tensor:
        return images.flatten(1) @ rows.T

    found = explore.follow(generator, classify, normal(40, 8, seed=3), classes - 1, 200, network)
    row = rows[0] if classes == 1 else rows[1] - rows[0]
    assert cosine(found.direction, generator.matrix.T @ row) > 1 - 1e-6
    assert float(found.direction.norm()) == pytest.approx(1)
    said_no = int((normal(40, 8, seed=3) @ generator.matrix.T @ row <= 0).sum())
    assert (found.walked, found.arrived) == (said_no, said_no)


def test_following_stops_at_the_yes_and_at_the_limit_and_leaves_alone_what_is_yes_already() -> None:
    """In a plane, along x, the yes beyond an angle of 45 degrees from it; a step is 0.02 of the radius."""
    class Plane(Linear):
        def forward(self, latents: Tensor) -> Tensor:
            return latents[:, :, None, None].expand(-1, -1, SIDE, SIDE)

    network, generator = Network(latent_size=2), Plane(2)

    def classify(images: Tensor) -> Tensor:
        return (images[:, 0, 0, 0] - math.cos(math.pi / 4) * math.sqrt(2))[:, None]

    yes, near = torch.tensor([math.sqrt(2), 0]), torch.tensor([math.cos(0.9), math.sin(0.9)]) * math.sqrt(2)
    far = torch.tensor([math.cos(2.5), math.sin(2.5)]) * math.sqrt(2)
    found = explore.follow(generator, classify, torch.stack([yes, near, far]), 0, 20, network)
    assert (found.walked, found.arrived) == (2, 1)
    # near the start a step of 0.02 turns by 0.02 * sin(0.9): (0.9 - 0.785) / 0.0150 = 7.6
    assert found.steps == 8
    with pytest.raises(UserError, match="all 1 samples are of class 0 already"):
        explore.follow(generator, classify, yes[None], 0, 20, network)


def test_a_classifier_without_a_gradient_is_refused() -> None:
    def detached(images: Tensor) -> Tensor:
        return images.detach().flatten(1)[:, :2]

    with pytest.raises(UserError, match="no gradient"):
        explore.follow(Linear(4), detached, normal(4, 4, seed=0), 0, 5, Network(latent_size=4))
    with pytest.raises(UserError, match="its gradient is 0"):
        explore.follow(Linear(4), lambda images: 0 * images.flatten(1)[:, :1] - 1, normal(4, 4, seed=0), 0, 5,
                       Network(latent_size=4))


def test_moving_along_a_found_direction_raises_the_score_of_nine_in_ten_samples_at_every_step() -> None:
    """Brighter above than below, through two tanh: no gradient is the same at two places."""
    def classify(images: Tensor) -> Tensor:
        bright = (images[:, :, :2].mean(dim=(1, 2, 3)) - images[:, :, 2:].mean(dim=(1, 2, 3))).mul(2).tanh()
        return torch.stack([-bright, bright], dim=1)

    network, generator = Network(latent_size=16), Curved(16)
    found = explore.follow(generator, classify, normal(64, 16, seed=3), 1, 100, network)
    others, amounts = normal(100, 16, seed=4), torch.linspace(-3, 3, 9).tolist()
    assert found.arrived == found.walked > 10

    def rising(direction: Tensor) -> float:
        return commands.rising(explore.odds_along(generator, classify, others, direction, amounts, network)[:, :, 1])

    across = normal(16, seed=5)
    across -= (across @ found.direction) * found.direction
    assert rising(found.direction) >= 0.9
    assert rising(across / across.norm()) < 0.5


def test_what_moves_keeps_its_length_and_its_condition_and_uniform_latents_stay_in_the_cube() -> None:
    network = Network(latent_size=2, conditioning="projection", classes=2)
    moved = explore.moved(torch.tensor([[3.0, 4, 0, 1], [0, -5, 1, 0]]), torch.tensor([1.0, 0]), 5.0, network)
    here = [[2, 1, 0, 1], [math.sqrt(2.5), -math.sqrt(2.5), 1, 0]]  # (8, 4) and (5, -5), of length 5 again
    torch.testing.assert_close(moved, torch.tensor(here) * torch.tensor([math.sqrt(5), math.sqrt(5), 1, 1]))
    cube = Network(latent_size=2, latents="uniform")
    assert explore.moved(torch.tensor([[0.5, -0.5]]), torch.tensor([1.0, 0]), 2.0, cube).tolist() == [[1, -0.5]]


def test_labelled_samples_give_the_direction_between_their_means() -> None:
    latents = torch.tensor([[1.0, 0], [3, 0], [-1, 1], [1, 3]])
    found = explore.between_means(latents, torch.tensor([7, 7, 0, 1]), 7, Network(latent_size=2))
    torch.testing.assert_close(found, torch.tensor([1.0, -1]) / math.sqrt(2))  # (2, 0) - (0, 2)
    with pytest.raises(UserError, match="none of the 4 samples are of class 5"):
        explore.between_means(latents, torch.tensor([7, 7, 0, 1]), 5, Network(latent_size=2))


def test_labels_are_read_from_csv_and_json_alike(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("seed,label\n0:5,3\n7,0\n")
    (tmp_path / "b.csv").write_text("0:5,3\n7,0\n")
    (tmp_path / "c.json").write_text('{"0:5": 3, "7": 0}')
    for name in ("a.csv", "b.csv", "c.json"):
        assert commands.labels_of(tmp_path / name) == {"0:5": 3, "7": 0}
    (tmp_path / "d.csv").write_text("0:5;3\n")
    for name in ("d.csv", "nowhere.csv"):
        with pytest.raises(UserError, match=r"cannot be read: .* Use lines SEED:INDEX,LABEL"):
            commands.labels_of(tmp_path / name)


# ---- Neighbours


def test_the_nearest_are_those_of_a_plain_search_and_a_copy_is_at_distance_0() -> None:
    others = normal(50, 6, seed=0)
    points = torch.cat([normal(5, 6, seed=1), others[37:38]])
    distances, places = explore.nearest(points, others.split(7), 4)
    table = np.linalg.norm(points.numpy()[:, None] - others.numpy()[None], axis=2)
    assert places.tolist() == np.argsort(table, axis=1)[:, :4].tolist()
    np.testing.assert_allclose(distances, np.sort(table, axis=1)[:, :4], rtol=1e-5)
    assert (places[5, 0], distances[5, 0]) == (37, 0)


def test_of_fewer_training_images_than_asked_for_all_are_neighbours() -> None:
    distances, places = explore.nearest(torch.zeros(1, 1), [torch.tensor([[2.0]]), torch.tensor([[1.0]])], 4)
    assert (distances.tolist(), places.tolist()) == ([[1, 2]], [[1, 0]])


# ---- Inversion


@pytest.mark.parametrize("latents", ["gaussian", "uniform", "sphere"])
def test_inversion_finds_the_latents_of_images_that_the_generator_made(latents: str) -> None:
    network, generator = Network(latent_size=4, latents=latents), Curved(4)
    hidden, starts = normal(4, seed=5), normal(8, 4, seed=6)
    hidden = {"uniform": hidden.clamp(-1, 1), "sphere": 2 * hidden / hidden.norm()}.get(latents, hidden)
    found, error = explore.inverted(generator, generator(hidden[None])[0], starts, 200, 0.1, network)
    assert error < 1e-5
    torch.testing.assert_close(found, hidden, atol=0.02, rtol=0)


def test_beyond_black_and_white_nothing_is_wrong() -> None:
    targets = torch.tensor([-1.0, -1, 1, 1, 0.5]).view(1, 1, 1, 5)
    shown = torch.tensor([-3.0, -0.5, 2, 0.5, 1.5]).view(1, 1, 1, 5)
    assert explore.squared_error(shown, targets).tolist() == [pytest.approx((0.25 + 0.25 + 1) / 5)]


def test_inversion_stays_where_latents_are_drawn() -> None:
    """A strong image of a faint generator asks for latents ten times as long as any."""
    class Faint(Linear):
        def forward(self, latents: Tensor) -> Tensor:
            return super().forward(latents) / 200

    generator, hidden = Faint(4), normal(4, seed=5) * 20
    for latents, longest in (("gaussian", 2 + 3 / math.sqrt(2)), ("sphere", 2), ("uniform", 2)):
        found, error = explore.inverted(generator, generator(hidden[None])[0], normal(2, 4, seed=6), 50, 0.1,
                                        Network(latent_size=4, latents=latents))
        assert float(found.norm()) <= longest + 1e-4
        assert error > 1e-3


def test_of_several_starts_the_best_end_counts_and_their_labels_are_tried() -> None:
    network = Network(latent_size=1, conditioning="projection", classes=2)

    class OfLabel(Linear):
        def forward(self, latents: Tensor) -> Tensor:
            return (latents[:, :1] * 0.1 + latents[:, 2:] * 0.8)[:, :, None, None].expand(-1, 1, SIDE, SIDE)

    starts = torch.tensor([[0.0, 1, 0], [0.0, 0, 1]])
    found, error = explore.inverted(OfLabel(1), torch.full((1, SIDE, SIDE), 0.85), starts, 100, 0.1, network)
    assert found[1:].tolist() == [0, 1]
    assert float(found[0]) == pytest.approx(0.5, abs=0.05)
    assert error < 1e-4


# ---- Codes


def test_a_traversal_changes_one_part_of_the_latents_through_all_its_values() -> None:
    network = Network(latent_size=2, conditioning="projection", classes=3, codes=2, continuous_codes=2)
    latents = torch.arange(18.0).view(2, 9)
    sheets = explore.traversals(latents, 5, network)
    assert list(sheets) == ["label", "code", "continuous-0", "continuous-1"]
    for name, part in zip(sheets, (slice(2, 5), slice(5, 7), slice(7, 8), slice(8, 9)), strict=True):
        others = [place for place in range(9) if place not in range(9)[part]]
        assert (sheets[name][:, :, others] == latents[:, None, others]).all()
    assert sheets["label"][1, :, 2:5].tolist() == np.eye(3).tolist()
    assert sheets["code"][0, :, 5:7].tolist() == np.eye(2).tolist()
    assert sheets["continuous-1"][0, :, 8].tolist() == [-2, -1, 0, 1, 2]


# ---- The command


def trained_run(run: Run) -> tuple[Run, Path]:
    """A run folder with a checkpoint, trained here, without a driver."""
    folder = Path(run.runs) / run.name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(run))
    list(loop.run_stage(run, 0, None, folder))
    return run, folder


@pytest.fixture(scope="module")
def trained(module_run: Callable[..., Run]) -> tuple[Run, Path]:
    """Of 4 px, progressive."""
    return trained_run(module_run({"name": "explored", "stages.0.hold_images": 40}, stages=1))


def of_kind(module_run: Callable[..., Run], name: str, **network: Any) -> tuple[Run, Path]:
    """Of 8 px, on a game or a likelihood that all kinds play."""
    return trained_run(module_run({
        "name": name, "stages": [{"resolution": 8, "hold_images": 40, "batch_size": 8, "threads": 1}],
        "network": {"latent_size": 8, "fmap_base": 64, "fmap_max": 8, **network},
        "training": {"loss": "non_saturating", "penalty": "none", "drift": 0, "precision": "float32",
                     "channels_last": False}}))


@pytest.fixture(scope="module")
def conditional(module_run: Callable[..., Run]) -> tuple[Run, Path]:
    """With labels, day and night, that D classifies, a code of three values and a continuous one."""
    return of_kind(module_run, "conditional", kind="dcgan", conditioning="auxiliary", classes=2, codes=3,
                   continuous_codes=1)


@pytest.fixture(scope="module")
def vae(module_run: Callable[..., Run]) -> tuple[Run, Path]:
    return of_kind(module_run, "vae", kind="vae")


def explored(*arguments: Any) -> str:
    result = CliRunner().invoke(command_line.app, ["explore", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def cells(path: Path, side: int = 4) -> np.ndarray:
    """[rows, columns, side, side, C]"""
    pixels = np.asarray(Image.open(path))
    return pixels.reshape(len(pixels) // side, side, pixels.shape[1] // side, side, -1).transpose(0, 2, 1, 3, 4)


@pytest.fixture(scope="module")
def samples(trained: tuple[Run, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What `gradine sample` writes, by SEED:INDEX."""
    out = tmp_path_factory.mktemp("samples")
    for seed in (0, 7):
        sample_run(trained[1], out, 64, seed, "")
    return {f"{seed}:{number}": np.asarray(Image.open(out / f"seed{seed}-{number:05d}.png"))
            for seed in (0, 7) for number in range(64)}


def test_the_ends_of_a_strip_are_the_samples_of_their_seeds(trained: tuple[Run, Path], tmp_path: Path,
                                                            samples: dict[str, np.ndarray]) -> None:
    explored(trained[1], "interpolate", "--seeds", "3,7:2,0:61", "--steps", 5, "--no-video", "--out", tmp_path)
    strip = cells(tmp_path / "interpolation.png")
    assert strip.shape[:2] == (2, 5)
    for (row, column), name in {(0, 0): "0:3", (0, 4): "7:2", (1, 0): "7:2", (1, 4): "0:61"}.items():
        assert (strip[row, column] == samples[name]).all(), name


def test_the_video_shows_every_seed_and_passes_between_them(trained: tuple[Run, Path], tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    explored(trained[1], "interpolate", "--seeds", "3,7:2,4", "--out", tmp_path)
    with av.open(str(tmp_path / "interpolation.mp4")) as video:
        shown = [frame.to_ndarray(format="rgb24").astype(int) for frame in video.decode(video=0)]
    assert len(shown) == 2 * commands.FRAMES + 1
    assert shown[0].shape == (256, 256, 3)
    steps = [abs(b - a).mean() for a, b in pairwise(shown)]
    assert max(steps) < abs(shown[-1] - shown[0]).mean() / 4  # no jump


def test_the_sheet_of_a_sum_shows_the_groups_their_means_and_the_result(trained: tuple[Run, Path], tmp_path: Path,
                                                                        samples: dict[str, np.ndarray]) -> None:
    explored(trained[1], "arithmetic", "--plus", "1,4,9", "--minus", "2,3", "--plus-too", "7:5", "--out", tmp_path)
    sheet = cells(tmp_path / "arithmetic.png")
    assert sheet.shape[:2] == (4, 4)
    for (row, column), name in {(0, 0): "0:1", (0, 2): "0:9", (1, 1): "0:3", (2, 0): "7:5"}.items():
        assert (sheet[row, column] == samples[name]).all(), name
    assert not sheet[2, 2:].any()  # the third group is one image and its mean
    kept = load_file(tmp_path / "arithmetic.safetensors")
    np.testing.assert_allclose(kept["result"].norm(), math.sqrt(8), rtol=1e-6)


def test_a_direction_is_found_shown_and_told_with_what_it_does_to_other_classes(
        trained: tuple[Run, Path], samples: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
        ) -> None:
    """The classes are redder, greener and bluer than the mean; what turns images red makes them less of the others."""
    mean = (np.mean([*samples.values()], axis=(0, 1, 2)) / 127.5 - 1).tolist()
    (tmp_path / "colours.py").write_text(
        f"import torch\ndef build():\n    return lambda images: 8 * (images.mean(dim=(2, 3)) - torch.tensor({mean}))\n")
    monkeypatch.syspath_prepend(tmp_path)
    told = explored(trained[1], "direction", "--classifier", "colours:build", "--class", "0,2", "--reach", 1, "--out",
                    tmp_path)
    sys.modules.pop("colours")
    figures = json.loads((tmp_path / "direction.json").read_text())
    directions = load_file(tmp_path / "direction.safetensors")["directions"]
    np.testing.assert_allclose(figures["cosines"], directions @ directions.T, atol=1e-6)
    assert "rising" in told
    assert np.shape(figures["changes"]) == (2, 3)
    for row, own in zip(figures["changes"], (0, 2), strict=True):
        assert row[own] == max(row) > 0 > min(row)
    others, generator = draw_latents(trained[0], "direction", 100, 0), Opened.at(trained[1], "", None, "").generator
    for direction, share, own in zip(directions, figures["monotone"], (0, 2), strict=True):
        odds = []
        for amount in np.linspace(-1, 1, 7):
            there = others + float(amount) * direction
            there = there / there.norm(dim=1, keepdim=True) * others.norm(dim=1, keepdim=True)
            p = torch.softmax(8 * (generator(there).mean(dim=(2, 3)) - torch.tensor(mean)), dim=1)[:, own]
            odds.append(torch.log(p / (1 - p)).numpy())
        assert share == pytest.approx((np.diff(odds, axis=0) > 0).all(axis=0).mean(), abs=0.02)
    strips = [cells(tmp_path / f"direction-{k}.png").astype(int) for k in (0, 2)]
    assert strips[0].shape[:2] == (8, 7)
    redness = strips[0][:, :, :, :, 0].mean((2, 3)) - strips[0][:, :, :, :, 1:].mean((2, 3, 4))
    assert (redness[:, -1] > redness[:, 0]).mean() >= 0.75


def test_a_direction_of_labelled_samples_needs_no_classifier(trained: tuple[Run, Path], tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("seed,label\n0:1,1\n0:2,0\n7:3,1\n7:4,0\n")
    explored(trained[1], "direction", "--labels", tmp_path / "labels.csv", "--class", "1", "--out", tmp_path)
    it = Opened.at(trained[1], "", None, "direction")
    a, b, c, d = (it.latents(name)[0].numpy() for name in ("0:1", "0:2", "7:3", "7:4"))
    between = (a + c) / 2 - (b + d) / 2
    (found,) = load_file(tmp_path / "direction.safetensors")["directions"]
    np.testing.assert_allclose(found, between / np.linalg.norm(between), rtol=1e-5)


def test_neighbours_are_those_of_a_plain_search_through_the_training_images(
        trained: tuple[Run, Path], tmp_path: Path, samples: dict[str, np.ndarray]) -> None:
    run, folder = trained
    explored(folder, "neighbours", "--count", 3, "--seed", 7, "--out", tmp_path)
    reals = Images(run.data, 4).pixels(np.arange(48)).transpose(0, 2, 3, 1)
    sheet, told = cells(tmp_path / "neighbours.png"), json.loads((tmp_path / "neighbours.json").read_text())
    assert sheet.shape[:2] == (3, 5)
    for number in range(3):
        sample = samples[f"7:{number}"].astype(float)
        distances = np.sqrt(((reals / 127.5 - sample / 127.5) ** 2).sum(axis=(1, 2, 3)))
        order = np.argsort(distances, kind="stable")[:4]
        found = told["neighbours"][f"7:{number}"]
        np.testing.assert_allclose([each["distance"] for each in found], distances[order], rtol=1e-4)
        assert (sheet[number, 0] == samples[f"7:{number}"]).all()
        for place, each in enumerate(found, start=1):
            assert (sheet[number, place] == reals[each["image"]]).all()


def test_inverting_a_sample_shows_it_again(trained: tuple[Run, Path], tmp_path: Path,
                                           samples: dict[str, np.ndarray]) -> None:
    Image.fromarray(samples["7:3"]).save(tmp_path / "a.png")
    Image.fromarray(samples["0:5"]).resize((40, 32), Image.Resampling.NEAREST).save(tmp_path / "b.png")
    explored(trained[1], "invert", tmp_path / "a.png", tmp_path / "b.png", "--steps", 150, "--out", tmp_path)
    sheet, errors = cells(tmp_path / "inversion.png"), json.loads((tmp_path / "inversion.json").read_text())
    assert (sheet[0, 0] == samples["7:3"]).all()
    assert abs(sheet[0, 1].astype(int) - samples["7:3"]).mean() < 2
    assert errors["mean_squared_errors"][str(tmp_path / "a.png")] < 1e-3
    latents = load_file(tmp_path / "inversion.safetensors")["latents"]
    it = Opened.at(trained[1], "", None, "invert")
    assert (it.images(latents)[0].permute(1, 2, 0).numpy() == sheet[0, 1]).all()


def test_traversals_are_sheets_of_what_the_generator_makes_of_each_value(conditional: tuple[Run, Path], tmp_path: Path
                                                                         ) -> None:
    explored(conditional[1], "traverse", "--rows", 3, "--columns", 5, "--out", tmp_path)
    shapes = {path.name: cells(path, side=8).shape[:2] for path in tmp_path.iterdir()}
    assert shapes == {"traverse-label.png": (3, 2), "traverse-code.png": (3, 3), "traverse-continuous-0.png": (3, 5)}
    it = Opened.at(conditional[1], "", None, "")
    latents = it.latents("2")
    latents[:, 8:10] = torch.tensor([0, 1])
    expected = it.images(latents)[0].permute(1, 2, 0).numpy()
    assert (cells(tmp_path / "traverse-label.png", side=8)[2, 1] == expected).all()


def test_the_auxiliary_head_of_the_discriminator_is_a_classifier(conditional: tuple[Run, Path], tmp_path: Path) -> None:
    explored(conditional[1], "direction", "--classifier", "discriminator", "--class", "1", "--out", tmp_path)
    (day, night), = json.loads((tmp_path / "direction.json").read_text())["changes"]
    assert night > 0
    assert day == pytest.approx(-night, rel=1e-3)  # of two classes, what makes it night makes it less a day


def test_a_game_of_points_is_a_frame_for_each_checkpoint_and_has_no_other_pictures(tmp_path: Path) -> None:
    _, folder = trained_run(from_dict({
        "name": "points", "runs": str(tmp_path), "network": {"kind": "mlp", "latent_size": 2},
        "data": {"source": "", "shards": "", "channels": 2, "points": {"kind": "ring"}},
        "training": {"mirror": False, "precision": "float32", "channels_last": False},
        "stages": [{"resolution": 1, "hold_images": 64, "batch_size": 32, "threads": 1}],
        "checkpoints": {"every_images": 32, "keep": 10}}))
    explored(folder, "game")
    written = sorted(path.name for path in (folder / "explore" / "game").iterdir())
    assert written == ["game.mp4", "r0001-000000032.png", "r0001-000000064.png"]
    with pytest.raises(UserError, match="makes points, which have no pictures to invert. Use .* game"):
        explored(folder, "invert", "a.png")


def test_an_encoder_inverts_at_once_by_its_mean(vae: tuple[Run, Path], tmp_path: Path) -> None:
    run, folder = vae
    image = Images(run.data, 8).pixels(np.arange(1))[0]
    Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / "real.png")
    explored(folder, "invert", tmp_path / "real.png", "--out", tmp_path)
    sheet = cells(tmp_path / "inversion.png", side=8)
    assert (sheet[0, 0] == image.transpose(1, 2, 0)).all()
    encoder = Encoder(run.network, 8, 3)
    (weights,) = (folder / "checkpoints").glob("*-000000040/discriminator.safetensors")
    encoder.load_state_dict(load_file(weights))
    with torch.no_grad():
        mean = encoder.eval()(torch.from_numpy(image)[None] / 127.5 - 1)[:, :8]
    torch.testing.assert_close(load_file(tmp_path / "inversion.safetensors")["latents"], mean)
    error = json.loads((tmp_path / "inversion.json").read_text())["mean_squared_errors"][str(tmp_path / "real.png")]
    shown = sheet[0, 1] / 127.5 - sheet[0, 0] / 127.5
    assert error == pytest.approx(np.square(shown).mean(), rel=0.02)


@pytest.mark.parametrize(("arguments", "says"), [
    (["interpolate", "--seeds", "1"], "is one image"),
    (["interpolate", "--seeds", "1,x"], "'x' names no image. Use SEED:INDEX"),
    (["direction", "--class", "1"], "wants --classifier module:function"),
    (["direction", "--class", "a", "--classifier", "a:b"], "is no number of a class"),
    (["direction", "--class", "1", "--classifier", "nowhere:b"], "cannot be used: ModuleNotFoundError"),
    (["direction", "--class", "1", "--classifier", "discriminator"], "it tells no classes"),
    (["direction", "--class", "3", "--classifier", "tests.test_explore:three_colours"], "knows classes 0 to 2"),
    (["direction", "--class", "0", "--classifier", "tests.test_explore:flat"], r"gave \[4\] for 4 images"),
    (["neighbours", "--features", "inception"], "no weights are given"),
    (["invert", "nowhere.png"], "nowhere.png cannot be read"),
    (["invert", __file__], "is no image"),
    (["traverse"], "neither labels nor codes"),
    (["game"], "its game cannot be drawn"),
])
def test_what_cannot_be_explored_is_one_clear_line(trained: tuple[Run, Path], arguments: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        explored(trained[1], *arguments)
    assert len(str(caught.value).splitlines()) == 1


def three_colours() -> Callable[[Tensor], Tensor]:
    return lambda images: images.mean(dim=(2, 3))


def flat() -> Callable[[Tensor], Tensor]:
    return lambda images: images.mean(dim=(1, 2, 3))
