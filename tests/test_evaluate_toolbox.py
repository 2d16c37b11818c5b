"""Claims about evaluations of conditional runs and of autoencoders: whose class is asked for, and what is not there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from gradine.configs.schema import Run
from gradine.stages import checkpoint, commits, evaluate, generate, loop, subjects
from gradine.stages.data import Images
from gradine.stages.evaluate import Evaluated
from gradine.stages.families import new_generator, running_statistics
from gradine.stages.networks import Judgement

SIZE, NOISE = 8, 8
Rows = dict[str, dict[str, Any]]
LATER = {"name": "conditional", "stages": [{"resolution": SIZE, "hold_images": 16, "batch_size": 8, "threads": 1}],
         "network.kind": "dcgan", "network.conditioning": "auxiliary", "network.classes": 2,
         "training.loss": "non_saturating", "training.penalty": "none", "training.drift": 0.0}


def last_of(run: Run, out: Path) -> str:
    return [event["path"] for event in loop.run_stage(run, 0, None, out) if event["event"] == "checkpoint"][-1]


@pytest.fixture(scope="module")
def conditional(module_run: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str]:
    """A dcgan of two classes, 32 images of `day` and 16 of `night`."""
    run = module_run(LATER)
    return run, last_of(run, tmp_path_factory.mktemp("conditional"))


def measured(trained: tuple[Run, str], folder: Path, **changes: Any) -> Evaluated:
    run, path = trained
    return evaluate.evaluate(replace(run, data=replace(run.data, cache_dir=str(folder)),
                                     evaluation=replace(run.evaluation, **changes)), path)


def by_metric(found: Evaluated) -> Rows:
    return {row["metric"]: row for row in found.rows}


def in_order(run: Run) -> tuple[Tensor, np.ndarray]:
    """All 48 reals and their class numbers, in the order in which evaluations split them."""
    images, order = Images(run.data, SIZE), np.random.default_rng(0).permutation(48)
    return torch.from_numpy(images.pixels(order)), images.labels[order]


class OfItsClass(nn.Module):
    """A generator whose images are one brightness for each class, and a little noise."""

    resolution = SIZE

    def __init__(self, shades: list[float]) -> None:
        super().__init__()
        self.shades = nn.Parameter(torch.tensor(shades))

    def forward(self, latents: Tensor, alpha: float = 1.0) -> Tensor:
        shade = latents[:, NOISE:NOISE + 2] @ self.shades
        return (shade + 0.02 * latents[:, 0]).view(-1, 1, 1, 1).expand(-1, 3, SIZE, SIZE)


def plain_frechet(a: Tensor, b: Tensor) -> float:
    """By eigenvalues of the product of np.cov's, of pixels in [-1, 1]."""
    first, second = (images.flatten(1).double().numpy() / 127.5 - 1 for images in (a, b))
    covariances = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    shared = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex)).real.sum()
    return float(np.square(first.mean(0) - second.mean(0)).sum() + sum(map(np.trace, covariances)) - 2 * shared)


# Classes -----------------------------------------------------------------------------------------------------------


def test_the_distance_class_by_class_holds_fakes_of_a_class_against_reals_of_it(
        conditional: tuple[Run, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = conditional
    monkeypatch.setattr(subjects, "load_average", lambda run, files: OfItsClass([-0.5, 0.5]))
    row = by_metric(measured(conditional, tmp_path, metrics=["classes"], floor=False, untrained=False)
                    )["class_fd_pixels16"]
    reals, labels = in_order(run)
    latents = generate.draw_latents(run, "evaluation", 48, labels=torch.from_numpy(labels))
    fakes = generate.to_uint8(OfItsClass([-0.5, 0.5])(latents))
    names = Images(run.data, SIZE).index["classes"]
    expected = {name: plain_frechet(reals[labels == number], fakes[labels == number])
                for number, name in enumerate(names)}
    assert sorted(names) == ["day", "night"]
    assert row["parts"] == pytest.approx(expected, rel=1e-4)
    assert row["value"] == pytest.approx(sum(expected.values()) / 2, rel=1e-4)
    assert row["count"] == 48


def test_a_class_of_fewer_than_ten_reals_has_no_distance_of_its_own(conditional: tuple[Run, str], tmp_path: Path
                                                                    ) -> None:
    run, _ = conditional
    row = by_metric(measured(conditional, tmp_path, metrics=["classes"]))["class_fd_pixels16"]
    counts = np.bincount(in_order(run)[1][:24])
    assert sorted(counts >= 10) == [False, True]
    names = Images(run.data, SIZE).index["classes"]
    assert [row["parts"][name] is not None for name in names] == (counts >= 10).tolist()
    assert row["value"] == row["parts"][names[int(counts.argmax())]]
    none = by_metric(measured(conditional, tmp_path, metrics=["classes"], count=9))["class_fd_pixels16"]
    assert (none["value"], none["reason"]) == (None, "no class has 10 of the 9 reals")


def test_the_discriminator_is_asked_with_the_class_of_each_image(conditional: tuple[Run, str], tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes for real what it is told to be of class 1, and calls bright images class 1."""
    run, _ = conditional
    asked: list[Tensor] = []

    class Told(nn.Module):
        def linearised(self, images: Tensor, labels: Tensor) -> tuple[Judgement, None]:
            bright = images.mean((1, 2, 3))
            asked.append(labels.argmax(1))
            return Judgement(labels[:, 1] - 0.5, bright[:, None], torch.stack([-bright, bright], dim=1)), None

    monkeypatch.setattr(subjects, "load_average", lambda run, files: OfItsClass([-0.5, 0.5]))
    monkeypatch.setattr(subjects.Subjects, "discriminator", Told())
    rows = by_metric(measured(conditional, tmp_path, metrics=["discriminator", "classes"], floor=False))
    images, order = Images(run.data, SIZE), np.random.default_rng(0).permutation(48)
    training, fakes = images.labels, images.labels[order]
    assert torch.cat(asked).tolist() == [*training, *fakes] * 2
    assert rows["class_accuracy"]["value"] == 1
    bright = images.pixels(np.arange(48)).mean((1, 2, 3)) > 127.5
    assert rows["class_accuracy"]["reals"] == pytest.approx((bright == training).mean())
    monkeypatch.setattr(subjects, "load_average", lambda run, files: OfItsClass([0.5, -0.5]))
    swapped = by_metric(measured(conditional, tmp_path, metrics=["classes"], floor=False))
    assert swapped["class_accuracy"]["value"] == 0


def test_grids_of_a_conditional_run_have_a_row_for_each_class(conditional: tuple[Run, str], tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = conditional
    monkeypatch.setattr(subjects, "load_average", lambda run, files: OfItsClass([-0.5, 0.5]))
    found = measured(conditional, tmp_path, metrics=[])
    grids = {name: np.asarray(Image.open(BytesIO(png))) for name, png in found.pictures.items()}
    fakes, beside = grids["r0008-000000016.png"], grids["r0008-reals.png"]
    assert fakes.shape == beside.shape == (2 * SIZE, 8 * SIZE, 3)
    assert fakes[:SIZE].max() < 100
    assert fakes[SIZE:].min() > 150
    assert len(np.unique(fakes[0, ::SIZE, 0])) > 4  # the noise differs
    reals, labels = in_order(run)
    for number in (0, 1):
        first = reals[labels == number][:8].permute(0, 2, 3, 1).numpy()
        assert np.array_equal(np.concatenate([*first], axis=1), beside[number * SIZE:(number + 1) * SIZE])


def test_steps_of_the_path_length_change_the_noise_and_not_the_class(conditional: tuple[Run, str], tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    class Watched(OfItsClass):
        def forward(self, latents: Tensor, alpha: float = 1.0) -> Tensor:
            seen.append(latents)
            return super().forward(latents, alpha)

    monkeypatch.setattr(subjects, "load_average", lambda run, files: Watched([-0.5, 0.5]))
    measured(conditional, tmp_path, metrics=["path_length"], untrained=False)
    asked = torch.cat(seen[:-1])[:, NOISE:]  # the last ones are those of the grid
    assert torch.equal(asked[::2], asked[1::2])
    assert set(asked.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(asked.sum(1), torch.ones(len(asked)))


def test_every_metric_of_a_conditional_run_comes_with_a_value_or_a_reason(conditional: tuple[Run, str], tmp_path: Path
                                                                          ) -> None:
    found = measured(conditional, tmp_path)
    assert not [row for row in found.rows if row["value"] is None and "Error" in row["reason"]]
    assert {"class_fd_pixels16", "class_accuracy", "discriminator"} <= {row["metric"] for row in found.rows}


def test_the_averaged_generator_normalises_by_what_the_generator_has_seen_of_late(conditional: tuple[Run, str]
                                                                                  ) -> None:
    """Not by an average from 0 and 1 on, as of weights: after two steps that would still be all of it."""
    run, path = conditional
    files = commits.read(path)
    generator = new_generator(run.network, SIZE, False)
    checkpoint.load_network(generator, "generator", files)
    average = generate.load_average(run, files)
    for own, seen in zip(running_statistics(average), running_statistics(generator), strict=True):
        assert torch.equal(own, seen)
    assert not torch.equal(next(average.parameters()), next(generator.parameters()))


# Autoencoders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["autoencoder", "vae"])
def test_an_autoencoder_has_a_reconstruction_error_and_no_discriminator(
        kind: str, module_run: Callable[..., Run], tmp_path: Path) -> None:
    run = module_run({**{key: value for key, value in LATER.items() if not key.startswith(("network.c", "training."))},
                      "name": kind, "network.kind": kind, "training.drift": 0.0, "training.penalty": "none"})
    trained = run, last_of(run, tmp_path / "run")
    rows = by_metric(measured(trained, tmp_path / "cache", metrics=["discriminator", "classes", "fd"]))
    assert set(rows) == {"discriminator", "fd_pixels16", "spread_pixels16", "reconstruction"}
    assert rows["discriminator"]["reason"] == "an autoencoder has no discriminator"
    assert rows["fd_pixels16"]["value"] > 0
    shown = rows["reconstruction"]
    assert shown["count"] == 24
    assert 0 < shown["value"] < 2


def test_the_reconstruction_error_is_the_mean_square_of_what_is_lost(conditional: tuple[Run, str], tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder that keeps the mean of each image, of held-back reals; a vae's second half is not looked at."""
    run, path = conditional

    class KeepsMean(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            mean = images.mean((1, 2, 3))[:, None].expand(-1, NOISE)
            return torch.cat([mean, torch.full_like(mean, 9.0)], dim=1)

    class Flat(OfItsClass):
        def forward(self, latents: Tensor, alpha: float = 1.0) -> Tensor:
            assert latents.shape[1] == NOISE
            return latents[:, :1, None, None].expand(-1, 3, SIZE, SIZE)

    monkeypatch.setattr(subjects, "load_average", lambda run, files: Flat([0.0, 0.0]))
    monkeypatch.setattr(subjects.Subjects, "discriminator", KeepsMean())
    own = replace(run, data=replace(run.data, cache_dir=str(tmp_path)))
    with ExitStack() as opened:
        it = subjects.Subjects(own, path, torch.device("cpu"), 1, opened)
        row = evaluate.reconstruction(it)["reconstruction"]
    second = in_order(run)[0][24:].double() / 127.5 - 1
    assert row["value"] == pytest.approx(float(second.flatten(1).var(1, unbiased=False).mean()), rel=1e-5)
