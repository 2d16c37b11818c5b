"""Claims about distances on features: against other programs, plain versions written out here, values known by hand."""

import io
import json
import zipfile
from importlib.resources import files
from statistics import NormalDist

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from gradine.stages import distances
from gradine.stages.distances import (
    Confusion,
    CopyRate,
    FrechetDistance,
    InceptionScore,
    KernelDistance,
    Neighbors,
    PathLength,
    frechet_distance,
    slerp,
)
from gradine.stages.metrics import pixel_features
from tests.references.distances import RESULTS, pair

TWO_SETS = (FrechetDistance, KernelDistance, Neighbors)


def normals(seed: int, count: int, size: int = 6) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, size)))


def line(*points: float) -> Tensor:
    """Features of one number each."""
    return torch.tensor(points, dtype=torch.float64).view(-1, 1)


def between(kind, reals: Tensor, fakes: Tensor):
    metric = kind()
    metric.update(reals, real=True)
    metric.update(fakes, real=False)
    return metric


def copies(training: Tensor, fakes: Tensor, held_out: Tensor | None = None) -> CopyRate:
    metric = CopyRate()
    metric.update(training, "training")
    metric.update(fakes, "fakes")
    if held_out is not None:
        metric.update(held_out, "held_out")
    return metric


# ---- Against other programs (tests/references/distances.py)


@pytest.fixture(scope="module")
def found() -> dict:
    return json.loads(RESULTS.read_text())


def given(kind, name: str):
    return between(kind, *(torch.from_numpy(rows) for rows in pair(name)))


def test_frechet_distance_equals_torch_fidelity_and_pytorch_fid(found):
    value = given(FrechetDistance, "frechet").compute()
    assert value == pytest.approx(found["frechet"]["torch_fidelity"], rel=1e-9)
    assert value == pytest.approx(found["frechet"]["pytorch_fid"], rel=1e-9)


@pytest.mark.slow
def test_frechet_distance_of_inceptions_size_equals_both_too(found):
    value = given(FrechetDistance, "frechet_2048").compute()
    assert value == pytest.approx(found["frechet_2048"]["torch_fidelity"], rel=1e-6)
    assert value == pytest.approx(found["frechet_2048"]["pytorch_fid"], rel=1e-6)


def test_kernel_distance_equals_torch_fidelity_where_that_takes_one_subset_of_all(found):
    assert given(KernelDistance, "kernel").compute() == pytest.approx(found["kernel"]["mean"], abs=1e-12)


def test_kernel_distance_is_what_torch_fidelitys_hundred_subsets_scatter_about(found):
    """Within two standard errors of their mean."""
    mean, deviation = found["kernel_large"]["mean"], found["kernel_large"]["std"]
    assert abs(given(KernelDistance, "kernel_large").compute() - mean) < 2 * deviation / 10


def test_neighbors_equal_prdc_and_torch_fidelity(found):
    seen, of_prdc = given(Neighbors, "neighbors").compute(), found["neighbors"]
    for name in ("precision", "recall"):
        assert seen[name] == pytest.approx(of_prdc["prdc_k3"][name], abs=1e-12)
        assert seen[name] == pytest.approx(of_prdc["torch_fidelity_k3"][name], abs=1e-7)  # float32 there
    for name in ("density", "coverage"):
        assert seen[name] == pytest.approx(of_prdc["prdc_k5"][name], abs=1e-12)


def test_inception_score_equals_torch_fidelity_on_rows_in_hash_order(found):
    metric = InceptionScore()
    metric.update(torch.from_numpy(pair("scores")[1]))
    assert metric.compute() == pytest.approx(found["scores"]["mean"], rel=1e-9)
    low, high = metric.interval()
    # torch-fidelity's deviation divides by 10; Student's t with 9 degrees of freedom has 2.262 for 95 %.
    assert (high - low) / 2 == pytest.approx(2.262157 * found["scores"]["std"] / 9**0.5, rel=1e-6)


# ---- Frechet distance


def plain_frechet(reals: Tensor, fakes: Tensor) -> float:
    """By the eigenvalues of the product itself."""
    a, b = reals.double().numpy(), fakes.double().numpy()
    covariance_a, covariance_b = (np.atleast_2d(np.cov(rows, rowvar=False)) for rows in (a, b))
    roots = np.sqrt(np.linalg.eigvals(covariance_a @ covariance_b).astype(complex)).real
    means = np.square(a.mean(axis=0) - b.mean(axis=0)).sum()
    return means + np.trace(covariance_a) + np.trace(covariance_b) - 2 * roots.sum()


def test_frechet_distance_on_a_line_is_known_by_hand():
    """Variances 1 and 9 about 0 and 2, dividing by N - 1: 2^2 + (3 - 1)^2."""
    assert between(FrechetDistance, line(-1, 0, 1), line(-1, 2, 5)).compute() == pytest.approx(8, rel=1e-12)


def test_a_set_is_at_no_distance_from_itself():
    for rows in (normals(0, 50), normals(0, 5, 40), 1000 + normals(0, 50).float(), normals(0, 1).repeat(9, 1)):
        metric = between(FrechetDistance, rows, rows)
        assert metric.compute() == pytest.approx(0, abs=1e-10)


def test_features_far_from_zero_lose_nothing():
    """Mean 1,000, deviation 1, in float32: sums of squares would keep 10 digits of float64's 16, and of 4 none."""
    reals, fakes = (1000 + normals(seed, 300).float() * scale for seed, scale in ((0, 1), (1, 1.2)))
    value = between(FrechetDistance, reals, fakes).compute()
    assert value == pytest.approx(plain_frechet(reals.double() - 1000, fakes.double() - 1000), rel=1e-9)
    tiny = [1000 + (rows.double() - 1000) * 1e-5 for rows in (reals, fakes)]
    assert between(FrechetDistance, *tiny).compute() == pytest.approx(1e-10 * value, rel=1e-4)


@pytest.mark.parametrize("counts", [(7, 9), (40, 9), (9, 40)])
def test_frechet_distance_of_fewer_images_than_features_is_defined(counts):
    reals, fakes = normals(0, counts[0], 20), 0.5 + normals(1, counts[1], 20)
    assert between(FrechetDistance, reals, fakes).compute() == pytest.approx(plain_frechet(reals, fakes), rel=1e-6)


def test_a_feature_that_never_varies_is_no_obstacle():
    reals, fakes = (torch.cat([normals(seed, 30, 4), torch.ones(30, 1)], dim=1) for seed in (0, 1))
    value = between(FrechetDistance, reals, fakes).compute()
    assert value == pytest.approx(between(FrechetDistance, reals[:, :4], fakes[:, :4]).compute(), rel=1e-9)


def test_frechet_distance_of_few_rows_is_that_of_their_covariances():
    """By the rows where their features are there, by 60 x 60 covariances where only statistics are."""
    reals, fakes = normals(0, 40, 60) * torch.linspace(0.1, 2, 60) + 5, normals(1, 30, 60)
    rows, statistics = FrechetDistance(), FrechetDistance()
    feed(rows, reals, fakes)
    statistics.use_reals(rows.real_statistics())
    statistics.update(fakes, real=False)
    assert rows.compute() == pytest.approx(statistics.compute(), rel=1e-9)
    assert rows.interval() == pytest.approx(statistics.interval(), rel=1e-6)
    others = FrechetDistance()
    feed(others, 1 + reals, fakes)
    others.use_reals(rows.real_statistics())
    with pytest.raises(ValueError, match="not of these 40 reals"):
        others.compute()


def test_frechet_distance_of_known_gaussians():
    """Diagonal: sum of (sqrt a - sqrt b)^2. Turned by one rotation, the same."""
    a, b = torch.tensor([1.0, 4, 9, 0]).double(), torch.tensor([4.0, 4, 1, 1]).double()
    turn, _ = torch.linalg.qr(normals(0, 4, 4))
    mean = torch.zeros(4).double()
    seen = frechet_distance(mean, turn @ a.diag() @ turn.T, mean + 1, turn @ b.diag() @ turn.T)
    assert seen == pytest.approx(4 + 1 + 0 + 4 + 1, rel=1e-7)


def test_spread_is_the_ratio_of_total_variances():
    reals, fakes = normals(0, 50), 0.6 * normals(0, 50) + 3
    assert between(FrechetDistance, reals, fakes).spread() == pytest.approx(0.36, rel=1e-12)
    assert between(FrechetDistance, reals, fakes[:1].repeat(9, 1)).spread() == pytest.approx(0, abs=1e-20)
    for unknown in ((reals[:1], fakes), (reals, fakes[:1]), (0.1 + torch.zeros(9, 6), fakes)):
        assert between(FrechetDistance, *unknown).spread() is None


# ---- Kernel distance


def plain_kernel_distance(a, b) -> float:
    """Pair by pair."""
    def kernel(x, y) -> float:
        return (sum(u * v for u, v in zip(x, y, strict=True)) / len(x) + 1) ** 3

    n, m = len(a), len(b)
    own_a = sum(kernel(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    own_b = sum(kernel(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return own_a + own_b - 2 * sum(kernel(x, y) for x in a for y in b) / (n * m)


@pytest.mark.parametrize("block", [3, 2048])
@pytest.mark.parametrize("counts", [(2, 2), (23, 31)])
def test_kernel_distance_equals_its_definition_pair_by_pair(block, counts, monkeypatch):
    monkeypatch.setattr(distances, "BLOCK", block)
    reals, fakes = normals(0, counts[0]), 1 + normals(1, counts[1])
    expected = plain_kernel_distance(reals.tolist(), fakes.tolist())
    assert between(KernelDistance, reals, fakes).compute() == pytest.approx(expected, rel=1e-10)


# ---- Neighbors


def plain_neighbors(reals: Tensor, fakes: Tensor) -> dict[str, float]:
    """Both publications, point by point."""
    def distance(a, b) -> float:
        return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5

    def radius(points, i, k) -> float:
        return sorted(distance(points[i], point) for j, point in enumerate(points) if j != i)[k - 1]

    r, f = reals.double().tolist(), fakes.double().tolist()
    three, five, of_fakes = ([radius(points, i, k) for i in range(len(points))]
                             for points, k in ((r, 3), (r, 5), (f, 3)))
    limit = np.quantile([radius(r, i, 1) for i in range(len(r))], 0.01)
    return {
        "precision": np.mean([any(distance(x, y) <= three[i] for i, x in enumerate(r)) for y in f]),
        "recall": np.mean([any(distance(x, y) <= of_fakes[j] for j, y in enumerate(f)) for x in r]),
        "density": np.mean([sum(distance(x, y) <= five[i] for i, x in enumerate(r)) / 5 for y in f]),
        "coverage": np.mean([any(distance(x, y) <= five[i] for y in f) for i, x in enumerate(r)]),
        "duplicates": np.mean([radius(f, j, 1) <= limit for j in range(len(f))]),
    }


@pytest.mark.parametrize("block", [7, 16, 2048])
def test_neighbors_equal_the_publications_written_out_in_blocks_of_any_size(block, monkeypatch):
    monkeypatch.setattr(distances, "BLOCK", block)
    reals = normals(0, 48, 3)
    for fakes in (normals(1, 48, 3), 1 + normals(2, 48, 3), normals(1, 24, 3).repeat(2, 1)):
        expected = plain_neighbors(reals, fakes)
        assert between(Neighbors, reals, fakes).compute() == pytest.approx(expected, abs=1e-12)


def test_neighbors_of_points_on_a_line_are_known_by_hand():
    """0, 1, 2, 3, 4, 10 reach 3, 2, 2, 2, 3, 8 to the third and 10, 9, 8, 7, 6, 10 to the fifth."""
    reals, fakes = line(0, 1, 2, 3, 4, 10), line(2, 2, 2, 18, 18, 30)
    seen = between(Neighbors, reals, fakes).compute()
    assert seen["precision"] == pytest.approx(5 / 6)  # 18 lies on the edge of 10's ball
    assert seen["recall"] == 6 / 6  # 2's third neighbor is 16 away
    # All six balls hold 2; 18 is in that of 10 only.
    assert seen["density"] == pytest.approx((3 * 6 + 2 * 1) / 5 / 6)
    assert seen["coverage"] == 1
    assert seen["duplicates"] == 5 / 6


def test_copies_of_the_reals_count_however_rounding_falls():
    """Neighbors among the fakes lie on the edge of every ball; here far from 0, of unlike length, and repeated."""
    reals = torch.cat([normals(0, 60, 100) * 10.0**normals(1, 60, 1), normals(2, 2, 100).repeat(9, 1)]) + 1e4
    seen = between(Neighbors, reals, reals.flip(0)).compute()
    assert (seen["precision"], seen["recall"], seen["coverage"]) == (1, 1, 1)
    few = reals[:60]
    expected = plain_neighbors(few, few)
    assert between(Neighbors, few, few).compute()["density"] == pytest.approx(expected["density"], abs=1e-12)


def test_a_new_draw_covers_all_but_one_real_in_32_and_repeats_one_in_100():
    """Of a real's neighbors of either kind, the first 5 are all reals with probability 2^-5."""
    seen = [between(Neighbors, normals(seed, 400, 2), normals(seed + 100, 400, 2)).compute() for seed in range(10)]
    assert np.mean([figures["coverage"] for figures in seen]) == pytest.approx(1 - 2**-5, abs=0.015)
    assert np.mean([figures["duplicates"] for figures in seen]) == pytest.approx(0.01, abs=0.01)
    assert np.mean([figures["density"] for figures in seen]) == pytest.approx(1, abs=0.05)


def test_one_image_again_and_again_is_duplicates_even_where_reals_repeat():
    """Of these reals 18 in 78 have a copy, so only distances of 0 are as near; rounding leaves some 1e-10."""
    reals = 1e3 + torch.cat([normals(0, 60, 100), normals(1, 2, 100).repeat(9, 1)])
    seen = between(Neighbors, reals, 1e3 + 5 * normals(2, 3, 100).repeat(26, 1)).compute()
    assert seen["duplicates"] == 1
    assert between(Neighbors, reals, 1e3 + normals(2, 78, 100)).compute()["duplicates"] == 0


def test_duplicates_of_unequal_counts_are_unknown():
    metric = between(Neighbors, normals(0, 30), normals(1, 20))
    assert metric.compute()["duplicates"] is None
    assert metric.interval()["duplicates"] is None


# ---- Copies


def plain_copy_figures(points, training, own: bool) -> list[float]:
    figures = []
    for i, point in enumerate(points.tolist()):
        away = sorted(sum((x - y) ** 2 for x, y in zip(point, other, strict=True)) ** 0.5
                      for j, other in enumerate(training.tolist()) if not (own and i == j))[:5]
        figures.append(away[0] / (sum(away) / 5) if away[4] else 0.0)
    return figures


@pytest.mark.parametrize("held_out", [None, normals(3, 25)])
@pytest.mark.parametrize("block", [7, 2048])
def test_copy_rate_equals_its_definition_point_by_point(held_out, block, monkeypatch):
    monkeypatch.setattr(distances, "BLOCK", block)
    training = normals(0, 30)
    fakes = torch.cat([normals(1, 20), training[:5] + 0.3 * normals(2, 5)])
    metric = copies(training, fakes, held_out)
    others = plain_copy_figures(training, training, own=True) if held_out is None else plain_copy_figures(
        held_out, training, own=False)
    expected = plain_copy_figures(fakes, training, own=False)
    np.testing.assert_allclose(np.sort(metric.real_statistics()["figures"]), np.sort(others), rtol=1e-9)
    assert metric.compute() == np.mean(np.array(expected) <= np.quantile(others, 0.01)) > 0
    figures, places = metric.nearest()
    np.testing.assert_allclose(figures, expected, rtol=1e-9)
    assert places[20:].tolist() == [0, 1, 2, 3, 4]
    low, high = metric.interval()
    assert 0 <= low < metric.compute() < high <= 1


def test_a_copy_of_an_image_that_training_holds_many_times_is_one():
    training = 1e3 + torch.cat([normals(0, 40, 50), normals(1, 1, 50).repeat(9, 1)]).float()
    figures, _ = copies(training, training.flip(0)).nearest()
    assert figures.max() == 0


def test_the_stand_ins_for_held_out_images_are_limited(monkeypatch):
    monkeypatch.setattr(distances, "STAND_INS", 10)
    monkeypatch.setattr(distances, "BLOCK", 7)
    metric = copies(normals(0, 40), normals(1, 20))
    every = plain_copy_figures(normals(0, 40), normals(0, 40), own=True)
    kept = metric.real_statistics()["figures"]
    assert len(kept) == 10
    assert np.abs(kept.numpy()[:, None] - np.array(every)).min(axis=1).max() < 1e-9


# ---- Inception score, path length, slerp, confusion


def test_inception_score_is_one_for_like_images_and_the_number_of_classes_at_best():
    alike, unlike = InceptionScore(), InceptionScore()
    alike.update(normals(0, 1, 7).repeat(100, 1))
    assert alike.compute() == pytest.approx(1, rel=1e-12)
    sure = 100 * torch.eye(5).repeat(4000, 1)
    unlike.update(sure + 1e-3 * torch.rand(len(sure), 1, generator=torch.Generator().manual_seed(0)))
    assert unlike.compute() == pytest.approx(5, rel=0.01)  # the shares of 10 splits by hash are not quite equal
    assert unlike.compute() <= 5


def test_path_length_is_the_mean_between_the_percentiles():
    """1..300 in steps of eps: the 1st percentile, lower neighbor, is the third; the 99th, higher, the 298th."""
    steps = torch.arange(1, 301).double()
    metric = PathLength(eps=0.1)
    metric.update(torch.zeros(300, 2), torch.stack([0 * steps, 0.1 * steps], dim=1).flip(0))
    expected = np.square(np.arange(3.0, 299)).mean()
    assert metric.compute() == pytest.approx(expected, rel=1e-12)
    low, high = metric.interval()
    assert low < expected < high


@pytest.mark.parametrize("count", [1, 2, 99, 100, 101, 102, 250])
def test_path_lengths_percentiles_are_numpys(count):
    lengths = np.random.default_rng(count).exponential(size=count)
    low, high = np.percentile(lengths, 1, method="lower"), np.percentile(lengths, 99, method="higher")
    metric = PathLength(eps=1)
    metric.update(torch.zeros(count, 1), torch.from_numpy(np.sqrt(lengths))[:, None])
    assert metric.compute() == pytest.approx(lengths[(lengths >= low) & (lengths <= high)].mean(), rel=1e-12)


def test_slerp_walks_the_great_circle_evenly():
    a, b = torch.tensor([[2.0, 0, 0]]), torch.tensor([[0, 0.5, 0]])
    for share in (0.0, 0.25, 0.5, 1.0):
        angle = share * np.pi / 2
        np.testing.assert_allclose(slerp(a, b, share), [[np.cos(angle), np.sin(angle), 0]], atol=1e-7)
    a, b, shares = normals(0, 9), normals(1, 9), torch.rand(9, dtype=torch.float64)
    between_them = slerp(a, b, shares)
    np.testing.assert_allclose(between_them.norm(dim=1), 1, rtol=1e-12)

    def angle_of(x, y):
        return torch.nn.functional.cosine_similarity(x, y).acos()

    np.testing.assert_allclose(angle_of(a, between_them), shares * angle_of(a, b), rtol=1e-6)
    np.testing.assert_allclose(slerp(a, 3 * a, 0.4), torch.nn.functional.normalize(a), atol=1e-7)


def test_slerp_in_float32_keeps_a_step_of_a_ten_thousandth():
    a, b = normals(0, 50, 512).float(), normals(1, 50, 512).float()
    steps = (slerp(a, b, 0.5 + 1e-4) - slerp(a, b, 0.5)).norm(dim=1)
    angles = torch.nn.functional.cosine_similarity(a, b).acos()
    np.testing.assert_allclose(steps, 1e-4 * angles, rtol=0.01)


def scored(training, fakes, held_out=None) -> dict:
    metric = Confusion()
    for kind, scores in (("training", training), ("fakes", fakes), ("held_out", held_out or [])):
        metric.update(torch.tensor(scores, dtype=torch.float32), kind)
    return metric.compute()


def test_the_table_of_the_discriminator_is_known_by_hand():
    """The threshold is half-way between 4 and 0."""
    seen = scored([3, 5], [0, 0, 0, 0], held_out=[1, 1.5, 2.5, 3])
    assert seen == {"real_as_real": 2, "real_as_fake": 2, "fake_as_fake": 2, "fake_as_real": 0, "threshold": 2,
                    "overfit": 0.5, "accuracy": 0.75}
    alone = scored([3, 5], [0, 0, 0, 0])
    assert (alone["real_as_real"], alone["overfit"], alone["accuracy"]) == (2, None, 1)


def test_a_discriminator_that_cannot_tell_is_half_right_and_not_called_overfit():
    same = list(range(1000))
    seen = scored(same, same, held_out=same)
    assert seen["accuracy"] == pytest.approx(0.5, abs=0.05)
    assert seen["overfit"] is None
    assert seen["fake_as_fake"] + seen["fake_as_real"] == 500


# ---- All of them: any order, batches, workers


def feed(metric, a: Tensor, b: Tensor) -> None:
    if isinstance(metric, (CopyRate, Confusion)):
        rows = (lambda x: x[:, 0]) if isinstance(metric, Confusion) else (lambda x: x)
        metric.update(rows(a), "training")
        metric.update(rows(b), "fakes")
        metric.update(rows(a + b), "held_out")
    elif isinstance(metric, InceptionScore):
        metric.update(b)
    elif isinstance(metric, PathLength):
        metric.update(a, b)
    else:
        metric.update(a, real=True)
        metric.update(b, real=False)


def answers(metric) -> list:
    """Value and interval, None where unknown."""
    interval = metric.interval() if hasattr(metric, "interval") else None
    return [metric.compute(), interval]


@pytest.fixture(params=[*TWO_SETS, CopyRate, InceptionScore, PathLength, Confusion], ids=lambda kind: kind.__name__)
def case(request):
    """A kind of metric, two sets, and the answers of feeding them in one batch."""
    kind, a, b = request.param, normals(0, 60), normals(1, 60) * 1.2 + 0.1
    whole = kind()
    feed(whole, a, b)
    return kind, a, b, answers(whole)


def test_order_and_batch_size_change_no_bit(case):
    kind, a, b, expected = case
    metric = kind()
    for share in torch.randperm(60, generator=torch.Generator().manual_seed(0)).split(7):
        feed(metric, a[share], b[share])
    assert answers(metric) == expected


def test_two_shares_merged_and_fed_further_equal_the_whole(case):
    kind, a, b, expected = case
    first, second = kind(), kind()
    feed(first, a[:20], b[:20])
    feed(second, a[20:45], b[20:45])
    first.merge_state(second)
    feed(first, a[45:], b[45:])
    assert answers(first) == expected


def test_states_gathered_over_workers_equal_the_whole(case):
    kind, a, b, _ = case
    worker, alone = kind(), kind()
    feed(worker, a, b)
    feed(alone, torch.cat([a, a]), torch.cat([b, b]))
    worker.distributed_available_fn = lambda: True
    worker.dist_sync_fn = lambda state, **_: [state, state]  # two workers that saw the same
    assert answers(worker) == answers(alone)


def test_reset_forgets_everything(case):
    kind, a, b, expected = case
    metric = kind()
    feed(metric, b, b)
    metric.reset()
    feed(metric, a, b)
    assert answers(metric) == expected


@pytest.mark.parametrize("kind", [*TWO_SETS, CopyRate])
def test_statistics_of_reals_given_again_change_no_bit_and_are_not_computed_anew(kind):
    a, b = normals(0, 60), normals(1, 60) * 1.2
    first, second = kind(), kind()
    feed(first, a, b)
    feed(second, a.flip(0), b.flip(0))
    kept = first.real_statistics()
    assert all(isinstance(value, Tensor) for value in kept.values())
    second.use_reals({name: value.clone() for name, value in kept.items()})
    assert answers(second) == answers(first)
    third = kind()
    feed(third, a, b)
    third.use_reals(kept)
    spoilt = {name: value * 2 if value.is_floating_point() else value for name, value in kept.items()}
    third.use_reals(spoilt)
    assert answers(third) != answers(first)


def test_rows_after_a_first_result_count_too(case):
    kind, a, b, expected = case
    metric = kind()
    feed(metric, a[:30], b[:30])
    assert answers(metric) != expected
    feed(metric, a[30:], b[30:])
    assert answers(metric) == expected


@pytest.mark.parametrize("kind", [*TWO_SETS, CopyRate])
def test_statistics_of_other_reals_are_refused(kind):
    first, second = kind(), kind()
    feed(first, normals(0, 60), normals(1, 60))
    feed(second, normals(2, 60), normals(1, 60))
    second.use_reals(first.real_statistics())
    with pytest.raises(ValueError, match=r"statistics given are not of these \d+ reals. Compute them anew"):
        second.compute()
    second.reset()
    feed(second, normals(2, 60), normals(1, 60))
    second.compute()


def test_frechet_distance_needs_no_features_of_reals_whose_statistics_it_has():
    whole = between(FrechetDistance, normals(0, 60), 1 + normals(1, 60))
    metric = FrechetDistance()
    metric.use_reals(whole.real_statistics())
    metric.update(1 + normals(1, 60), real=False)
    assert (metric.compute(), metric.interval(), metric.spread()) == (whole.compute(), whole.interval(), whole.spread())


def test_training_mode_and_half_precision_are_no_obstacle():
    """torch's modules have a `training` of their own; and features may come in bfloat16."""
    metric = copies(normals(0, 40).bfloat16(), normals(1, 40).bfloat16())
    assert metric.training is True
    assert 0 <= metric.eval().compute() <= 1


# ---- Intervals


def share_that_contains(truth: float, intervals) -> float:
    return float(np.mean([low <= truth <= high for low, high in intervals]))


@pytest.mark.parametrize(("kind", "shift"), [(FrechetDistance, 0.0), (FrechetDistance, 0.3), (KernelDistance, 0.3)])
def test_intervals_contain_the_mean_of_draws(kind, shift):
    """In 90 % or more of 60 draws of either side; not by being too wide: they are 2 to 3 times as wide as 4 deviations
    of the draws at most."""
    metrics = [between(kind, normals(seed, 200, 8), shift + normals(1000 + seed, 200, 8)) for seed in range(60)]
    values, intervals = [metric.compute() for metric in metrics], [metric.interval() for metric in metrics]
    assert share_that_contains(np.mean(values), intervals) >= 0.9
    assert np.mean([high - low for low, high in intervals]) < (2.5 if shift == 0 else 1.5) * 4 * np.std(values)


def test_the_kernel_distance_of_two_halves_is_zero_within_its_interval():
    metrics = [between(KernelDistance, normals(seed, 100, 8), normals(1000 + seed, 100, 8)) for seed in range(60)]
    values = [metric.compute() for metric in metrics]
    assert share_that_contains(0, [metric.interval() for metric in metrics]) >= 0.93
    assert abs(np.mean(values)) < 3 * np.std(values) / 60**0.5


def test_the_kernel_distances_interval_holds_the_known_distance():
    """In one dimension, from moments: E k(x, y) with E x, E x^2, E x^3 of both sides."""
    def mean_kernel(x, y) -> float:
        return 1 + 3 * x[0] * y[0] + 3 * x[1] * y[1] + x[2] * y[2]

    a, b = (0, 1, 0), (0.5, 1.25, 3 * 0.5 + 0.125)  # of N(0, 1) and N(0.5, 1)
    truth = mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b)
    metrics = [between(KernelDistance, normals(seed, 300, 1), 0.5 + normals(100 + seed, 300, 1)) for seed in range(40)]
    assert share_that_contains(truth, [metric.interval() for metric in metrics]) >= 0.85


def test_wilsons_interval_holds_its_two_ends():
    """Its ends are the shares p whose distance from the share seen is 1.96 standard errors of p's own."""
    for hits, count in ((3, 40), (0, 10), (10, 10), (250, 500)):
        low, high = distances._wilson(torch.tensor([1.0] * hits + [0.0] * (count - hits)).double())
        z = NormalDist().inv_cdf(0.975)
        for end in (low, high):
            if 1e-9 < end < 1 - 1e-9:
                assert abs(hits / count - end) == pytest.approx(z * (end * (1 - end) / count) ** 0.5, rel=1e-5)
        assert -1e-12 <= low < high <= 1 + 1e-12


def test_intervals_of_neighbors_are_wilsons_and_densitys_the_normal_one():
    reals, fakes = normals(0, 60, 3), 0.3 + normals(1, 60, 3)
    metric = between(Neighbors, reals, fakes)
    values, intervals = metric.compute(), metric.interval()
    own = torch.cdist(reals, reals).sort(dim=1).values[:, 5:6]
    counts = (torch.cdist(reals, fakes) <= own).sum(dim=0).numpy() / 5
    half = NormalDist().inv_cdf(0.975) * np.std(counts, ddof=1) / 60**0.5
    assert intervals.pop("density") == pytest.approx((counts.mean() - half, counts.mean() + half), rel=1e-6)
    for name, (low, high) in intervals.items():
        hits = round(60 * values[name])
        assert (low, high) == distances._wilson(torch.tensor([1.0] * hits + [0.0] * (60 - hits)).double())


def test_path_lengths_interval_contains_the_mean_of_draws():
    def drawn(seed):
        metric = PathLength(eps=1)
        metric.update(torch.zeros(400, 3), normals(seed, 400, 3))
        return metric

    metrics = [drawn(seed) for seed in range(100)]
    mean = np.mean([metric.compute() for metric in metrics])
    assert 0.88 <= share_that_contains(mean, [metric.interval() for metric in metrics]) <= 1


def test_too_few_rows_have_no_interval():
    for kind in (FrechetDistance, KernelDistance):
        assert between(kind, normals(0, 19), normals(1, 40)).interval() is None
        assert between(kind, normals(0, 20), normals(1, 20)).interval() is not None


# ---- Real photographs


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    """Sets of [N, 64, 64, 3] crops; those of one photograph are all in the same set: two of 200, one of the rest."""
    archive = zipfile.ZipFile(io.BytesIO((files("gradine.configs") / "demo_images.zip").read_bytes()))
    names = sorted(name for name in archive.namelist() if name.endswith(".webp"))
    photographs: dict[str, list] = {}
    for name in names:
        image = np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB"))
        photographs.setdefault(name.rsplit("-", 1)[0], []).append(image)
    order = np.random.default_rng(0).permutation(sorted(photographs))
    crops = np.stack([crop for name in order for crop in photographs[name]])
    return [crops[:201], crops[201:402], crops[402:]]


def of_pixels(images) -> Tensor:
    bytes_of = np.clip(np.round(images), 0, 255).astype(np.uint8)
    return pixel_features(torch.from_numpy(bytes_of).permute(0, 3, 1, 2)).float()


def blurred(images: np.ndarray, sigma: float) -> np.ndarray:
    return np.stack([np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma))) for image in images])


@pytest.mark.parametrize("kind", [FrechetDistance, KernelDistance])
def test_distances_grow_as_photographs_are_spoilt(kind, photographs):
    """From the photographs themselves; at 16 px, where features are the pixels and no block mean hides the noise."""
    clean = np.round(photographs[0].reshape(-1, 16, 4, 16, 4, 3).mean(axis=(2, 4))).astype(np.uint8)
    noise = np.random.default_rng(1).normal(size=clean.shape)
    ways = {
        "noise": [clean + sigma * noise for sigma in (0, 10, 20, 40, 80)],
        "blur": [clean, *(blurred(clean, sigma) for sigma in (0.5, 1, 2, 4, 8))],
        "dropped": [np.resize(clean[:kept], clean.shape) for kept in (201, 60, 12, 3)],
        "repeated": [np.concatenate([clean[times:], np.repeat(clean[-1:], times, axis=0)])
                     for times in (0, 40, 80, 120, 200)],
    }
    for way, sets in ways.items():
        values = [between(kind, of_pixels(clean), of_pixels(images)).compute() for images in sets]
        assert values == sorted(set(values)), way


def test_a_generator_of_ten_images_shows_in_coverage_and_duplicates_a_blurred_one_in_neither(photographs):
    reals, new, _ = photographs
    healthy, ten, blur = (between(Neighbors, of_pixels(reals), of_pixels(fakes)).compute()
                          for fakes in (new, np.resize(new[:10], new.shape), blurred(new, 1.5)))
    assert ten["coverage"] < 0.3 * healthy["coverage"] < 0.7 * blur["coverage"]
    assert ten["duplicates"] == 1
    assert max(healthy["duplicates"], blur["duplicates"]) < 0.1


@pytest.mark.parametrize("known", [True, False])
def test_copies_of_training_images_raise_the_copy_rate_and_new_or_blurred_ones_do_not(photographs, known):
    training, new, others = photographs
    held_out = of_pixels(others) if known else None
    rng = np.random.default_rng(2)
    copied = {"as they are": training, "in noise": training + rng.normal(size=training.shape) * 12,
              "brighter": training + 8.0, "half of them": np.concatenate([training[:100], new[100:]])}
    for way, fakes in copied.items():
        assert copies(of_pixels(training), of_pixels(fakes), held_out).compute() > 0.25, way
    mixtures = (training + training[rng.permutation(201)] + training[rng.permutation(201)].astype(float)) / 3
    fine = {"new": new, "blurred": blurred(new, 2), "of low contrast": 128 + (new - 128.0) / 2, "mixtures": mixtures,
            "gray": np.full_like(new, 128) + rng.normal(size=new.shape)}
    for way, fakes in fine.items():
        assert copies(of_pixels(training), of_pixels(fakes), held_out).compute() < 0.125, way


# ---- Errors


def test_rows_that_are_no_features_are_refused_with_the_way_out():
    for wrong, rule in ((torch.zeros(3), r"must be floats \[N, D\]"), (torch.zeros(3, 2).int(), "must be floats"),
                        (torch.tensor([[float("nan")]]), "must be finite")):
        with pytest.raises(ValueError, match=rule):
            FrechetDistance().update(wrong, real=True)
    with pytest.raises(ValueError, match=r"must have 6 numbers a row.*Use one feature network"):
        between(KernelDistance, normals(0, 9), normals(0, 9, 5))
    with pytest.raises(ValueError, match="kind='train' is none of training, held_out, fakes"):
        CopyRate().update(normals(0, 9), "train")
    with pytest.raises(ValueError, match=r"scores are \[3, 1\], must be \[N\]. Use scores.flatten"):
        Confusion().update(torch.zeros(3, 1), "fakes")
    with pytest.raises(ValueError, match=r"must be \[N, D\] both"):
        PathLength().update(normals(0, 3), normals(0, 4))
    with pytest.raises(ValueError, match="must be finite"):
        PathLength().update(normals(0, 3), normals(0, 3) / 0)
    with pytest.raises(ValueError, match="eps=0, must be above 0. Use 1e-4"):
        PathLength(eps=0)


@pytest.mark.parametrize(("kind", "few", "rule"), [
    (FrechetDistance, 1, "1 reals, must be at least 2"), (KernelDistance, 1, "1 reals, must be at least 2"),
    (Neighbors, 5, "5 reals, must be at least 6"), (CopyRate, 5, "5 training, must be at least 6"),
    (InceptionScore, 9, "9 logits, must be at least 10"), (PathLength, 0, "0 pairs, must be at least 1"),
    (Confusion, 0, "0 training, must be at least 1"),
])
def test_too_few_rows_are_refused_with_their_count(kind, few, rule):
    metric = kind()
    feed(metric, normals(0, few), normals(1, few))
    with pytest.raises(ValueError, match=rule + r". Call update\(\) with"):
        metric.compute()
