"""Claims about the clock: phases, alpha, learning rates, shares of a batch, and the sizes of the networks."""

import dataclasses
import math
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gradine.configs.schema import Layers, Network, Perceptron, Run, Stage, UserError, check_shares, from_dict, load
from gradine.stages import growth
from gradine.stages.families import new_generator
from gradine.stages.networks import Generator

RESOLUTIONS = [4, 8, 16, 32, 64, 128, 256, 512, 1024]
# batch by resolution, learning rates that are not 1e-3: the published settings for 1, 2, 4 and 8 GPUs
PUBLISHED = {
    1: ([128, 128, 128, 64, 32, 16, 8, 4, 4], {1024: 0.0015}),
    2: ([256, 256, 128, 64, 32, 16, 8, 8, 8], {512: 0.0015, 1024: 0.002}),
    4: ([512, 256, 128, 64, 32, 16, 16, 16, 16], {256: 0.0015, 512: 0.002, 1024: 0.003}),
    8: ([512, 256, 128, 64, 32, 32, 32, 32, 32], {128: 0.0015, 256: 0.002, 512: 0.003, 1024: 0.003}),
}


def run_of(stages: list[dict[str, Any]], **training: Any) -> Run:
    return from_dict({"name": "x", "data": {"source": "a", "shards": "b"}, "training": training, "stages": stages})


def published(gpus: int) -> Run:
    batches, rates = PUBLISHED[gpus]
    return run_of([{"resolution": size, "batch_size": batch, "learning_rate": rates.get(size, 0.001),
                    "hold_images": 2_400_000 if size == 1024 else 600_000}
                   for size, batch in zip(RESOLUTIONS, batches, strict=True)])


def small() -> growth.Schedule:
    """Worked by hand: 4 px holds 100 images in 13 batches of 8 = 104; 8 px fades 100 in 7 batches of 16 = 112, then
    holds 50 in 4 batches of 16 = 64; 16 px has no fade and holds 12 in one batch of 12."""
    return growth.schedule(run_of([
        {"resolution": 4, "fade_images": 999, "hold_images": 100, "batch_size": 8, "learning_rate": 0.001},
        {"resolution": 8, "fade_images": 100, "hold_images": 50, "batch_size": 16, "learning_rate": 0.002},
        {"resolution": 16, "fade_images": 0, "hold_images": 12, "batch_size": 12, "learning_rate": 0.003}]))


# ---- Phases


def test_the_published_schedule_of_1024_is_the_one_worked_by_hand() -> None:
    """600,000 = 4,687.5 batches of 128, so the five phases of 4, 8 and 16 px last 4,688 batches: 600,064 images."""
    ends = [600_064, 1_200_128, 1_800_192, 2_400_256, 3_000_320, 3_600_320, 4_200_320, 4_800_320, 5_400_320,
            6_000_320, 6_600_320, 7_200_320, 7_800_320, 8_400_320, 9_000_320, 9_600_320, 12_000_320]
    plan = growth.schedule(published(1))
    assert [p.end for p in plan.phases] == ends
    assert [p.start for p in plan.phases] == [0, *ends[:-1]]
    assert [(p.resolution, p.kind) for p in plan.phases] == [
        (4, "hold"), *((size, kind) for size in RESOLUTIONS[1:] for kind in ("fade", "hold"))]
    assert plan.end == 12_000_320
    assert plan.stage_span(0) == (0, 600_064)
    assert plan.stage_span(1) == (600_064, 1_800_192)
    assert plan.stage_span(8) == (9_000_320, 12_000_320)


@pytest.mark.parametrize("gpus", PUBLISHED)
def test_every_published_setting_shows_12_000_kimg_and_the_rounding(gpus: int) -> None:
    """Batches of 512 and 256 round 600,000 up to 600,064 just as 128 does: five phases of 64 more in each setting."""
    plan = growth.schedule(published(gpus))
    assert sum(p.images for p in plan.phases) == 12_000_000
    assert plan.end == 12_000_320
    for phase in plan.phases:
        assert (phase.end - phase.start) % phase.batch_size == 0
        assert 0 <= phase.end - phase.start - phase.images < phase.batch_size


@pytest.mark.parametrize("gpus", PUBLISHED)
def test_the_bundled_1024_recipe_is_the_published_setting(gpus: int) -> None:
    try:
        run = load("celebahq1024", ["data.source=x", f"preset=gpus{gpus}"])
    except UserError as error:
        if "no configuration" in str(error):
            pytest.skip("the recipe does not ship")
        raise
    assert growth.schedule(run) == growth.schedule(published(gpus))
    assert run.training.penalty_at == "final"


@pytest.mark.parametrize(("images", "batch", "length"), [
    (600_000, 28, 600_012), (600_000, 36, 600_012), (600_000, 44, 600_028), (600_000, 16, 600_000), (1, 16, 16),
    (16, 16, 16), (17, 16, 32), (12_000_000, 512, 12_000_256), (400_000, 3, 400_002)])
def test_a_phase_lasts_whole_batches_rounded_up(images: int, batch: int, length: int) -> None:
    assert growth.schedule(run_of([{"resolution": 4, "hold_images": images, "batch_size": batch}])).end == length


def test_the_clock_stays_an_integer_beyond_what_a_float32_counts() -> None:
    plan = growth.schedule(run_of([{"resolution": 4, "hold_images": 2**40, "batch_size": 12}]))
    assert type(plan.end) is int
    assert plan.end == -(-(2**40) // 12) * 12


def test_a_phase_of_no_images_is_left_out() -> None:
    assert [(p.resolution, p.kind, p.start, p.end) for p in small().phases] == [
        (4, "hold", 0, 104), (8, "fade", 104, 216), (8, "hold", 216, 280), (16, "hold", 280, 292)]


def test_the_first_stage_never_fades() -> None:
    assert growth.at(small(), 0).phase.kind == "hold"
    assert growth.at(small(), 0).alpha == 1.0


# ---- Moments


def test_alpha_is_taken_before_the_step() -> None:
    """8 px fades over 100 images from 104 on: the first batch sees 0, the seventh and last 96 / 100."""
    alphas = [growth.at(small(), seen).alpha for seen in range(104, 216, 16)]
    assert alphas == [0.0, 0.16, 0.32, 0.48, 0.64, 0.80, 0.96]
    assert growth.at(small(), 216).alpha == 1.0
    assert growth.at(small(), 103).alpha == 1.0


def test_alpha_only_climbs_within_a_fade_and_is_one_outside() -> None:
    plan = growth.schedule(published(4))
    for phase in plan.phases:
        steps = range(phase.start, phase.end, phase.batch_size)
        alphas = [growth.at(plan, steps[step]).alpha for step in (0, 1, len(steps) // 2, -1)]
        if phase.kind == "hold":
            assert alphas == [1.0] * 4
        else:
            assert alphas[0] == 0.0
            assert all(a < b < 1 for a, b in pairwise(alphas))


def test_a_phase_starts_at_its_first_step_and_no_other() -> None:
    plan = small()
    steps = [*range(0, 104, 8), *range(104, 280, 16), 280]
    assert [seen for seen in steps if growth.at(plan, seen).starts_phase] == [0, 104, 216, 280]


def test_resolution_batch_and_learning_rate_change_together_when_the_fade_starts() -> None:
    def seen_at(images: int) -> tuple[int, int, float]:
        moment = growth.at(small(), images)
        assert moment.images_seen == images
        return moment.phase.resolution, moment.phase.batch_size, moment.learning_rate

    assert [seen_at(i) for i in (0, 96, 103)] == [(4, 8, 0.001)] * 3
    assert [seen_at(i) for i in (104, 215, 216, 279)] == [(8, 16, 0.002)] * 4
    assert [seen_at(i) for i in (280, 291)] == [(16, 12, 0.003)] * 2


def test_the_learning_rate_ramp_counts_from_the_start_of_the_run_only() -> None:
    stages = [{"resolution": 4, "hold_images": 30_000, "learning_rate": 0.001},
              {"resolution": 8, "fade_images": 8_000, "hold_images": 8_000, "learning_rate": 0.002}]
    plan = growth.schedule(run_of(stages, lr_ramp_images=40_000))
    expected = {0: 0.0, 16: 0.001 * 16 / 40_000, 10_000: 0.00025, 29_984: 0.001 * 0.7496, 30_000: 0.002 * 0.75,
                39_984: 0.002 * 0.9996, 40_000: 0.002, 45_984: 0.002}
    for seen, rate in expected.items():
        assert growth.at(plan, seen).learning_rate == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize("seen", [-1, 292, 1_000])
def test_a_moment_outside_the_schedule_names_it_and_the_schedule(seen: int) -> None:
    with pytest.raises(ValueError, match=rf"images_seen={seen} .*0\.\.292"):
        growth.at(small(), seen)


def test_images_between_counts_what_a_plain_loop_counts() -> None:
    plan = small()
    for stage in range(3):
        for start, end in ((0, 292), (0, 0), (50, 110), (103, 105), (104, 280), (200, 290), (290, 400), (120, 120)):
            slow = sum(start <= i < end and growth.at(plan, i).phase.stage == stage for i in range(plan.end))
            assert growth.images_between(plan.phases, start, end, stage) == slow


# ---- Shares


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 8, 12, 20, 36, 64])
def test_share_rows_are_those_whose_number_modulo_the_group_count_lies_in_the_share(batch: int) -> None:
    groups = batch // min(4, batch)
    for low in range(groups):
        for high in range(low + 1, groups + 1):
            slow = [n for n in range(batch) if low <= n % groups < high]  # sample n belongs to group n mod M
            assert growth.share_rows(batch, low, high) == slow


@pytest.mark.parametrize("batch", [8, 12, 24])
def test_the_strided_rule_applied_to_a_shares_rows_finds_the_same_groups(batch: int) -> None:
    groups = batch // 4
    for low in range(groups):
        for high in range(low + 1, groups + 1):
            rows = growth.share_rows(batch, low, high)
            again = [{row for place, row in enumerate(rows) if place % (high - low) == g} for g in range(high - low)]
            assert again == [{n for n in range(batch) if n % groups == g} for g in range(low, high)]


def test_the_micro_batches_of_all_ranks_partition_the_batch() -> None:
    tried = 0
    for batch in (1, 2, 3, 4, 8, 12, 16, 24, 32, 48, 64):
        for workers in (1, 2, 3, 4, 6, 8):
            for micro in (0, 2, 3, 4, 8, 12, 16):
                stage = Stage(resolution=4, batch_size=batch, workers=workers, micro_batch=micro)
                try:
                    check_shares(stage)
                except UserError:
                    continue
                groups = batch // min(4, batch)
                passes = [growth.micro_batches(stage, rank, workers) for rank in range(workers)]
                assert sorted(row for rank in passes for rows in rank for row in rows) == list(range(batch))
                assert {len(rows) for rank in passes for rows in rank} == {micro or batch // workers}
                for rows in (rows for rank in passes for rows in rank):  # a group is never cut
                    inside = {row % groups for row in rows}
                    assert set(rows) == {n for n in range(batch) if n % groups in inside}
                tried += 1
    assert tried > 60


def test_two_workers_pass_what_one_worker_with_half_the_micro_batch_passes() -> None:
    one = Stage(resolution=4, batch_size=32, micro_batch=16)
    two = Stage(resolution=4, batch_size=32, workers=2)
    assert growth.micro_batches(one, 0, 1) == growth.micro_batches(two, 0, 2) + growth.micro_batches(two, 1, 2)


def test_a_batch_of_less_than_four_is_one_group() -> None:
    assert [growth.group_size(n) for n in (1, 2, 3, 4, 5, 8, 100)] == [1, 2, 3, 4, 4, 4, 4]


# ---- Randomness


def test_a_seed_differs_with_each_of_its_three_ingredients() -> None:
    seeds = {growth.random_seed(seed, purpose, seen) for seed in range(5) for purpose in ("latents", "mirror", "mix")
             for seen in (0, 1, 16, 1_000_000)}
    assert len(seeds) == 5 * 3 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert growth.random_seed(1, "a") == growth.random_seed(1, "a", 0)


def test_a_seed_is_the_same_in_another_process() -> None:
    code = "from gradine.stages.growth import random_seed; print(random_seed(3, 'latents', 128))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                         env={"PYTHONHASHSEED": "77"}).stdout
    assert int(out) == growth.random_seed(3, "latents", 128)


# ---- Sizes


def test_channels_are_those_of_the_papers_table() -> None:
    assert [growth.channels(Network(), size) for size in RESOLUTIONS] == [512, 512, 512, 512, 256, 128, 64, 32, 16]
    cifar = Network(latent_size=128, fmap_base=4096, fmap_max=128)
    assert [growth.channels(cifar, size) for size in RESOLUTIONS[:4]] == [128] * 4
    ablation = Network(fmap_base=2048)
    assert [growth.channels(ablation, size) for size in RESOLUTIONS[:6]] == [512, 512, 256, 128, 64, 32]
    assert growth.channels(Network(fmap_base=100, fmap_max=64), 16) == 12  # int(100 / 2**3)


def test_resolutions_run_from_4_to_the_final_one() -> None:
    assert list(growth.resolutions(4)) == [4]
    assert list(growth.resolutions(1024)) == RESOLUTIONS


def test_macs_are_the_known_ones_of_the_full_width_networks() -> None:
    printed = [".042", ".344", "1.55", "6.39", "13.6", "20.9", "28.1", "35.4", "42.7"]
    for size, text in zip(RESOLUTIONS, printed, strict=True):
        digits = len(text.partition(".")[2])
        assert round(growth.macs_per_image(Network(), size) / 1e9, digits) == float(text), size


@pytest.mark.parametrize("image_channels", [1, 3])
@pytest.mark.parametrize("network", [Network(), Network(latent_size=8, fmap_base=64, fmap_max=8)])
def test_macs_and_parameters_are_those_of_the_real_generator(network: Network, image_channels: int) -> None:
    """Its upscaling convolutions take 4 products an output, not 9, and 16 * 9 to make each kernel."""
    for size in (4, 8, 16, 64):
        folded = [growth.channels(network, s // 2) * growth.channels(network, s) * (5 * s * s - 16 * 9)
                  for s in RESOLUTIONS if 8 <= s <= size]
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            generator = Generator(network, size, False, image_channels)
            generator(torch.empty(1, network.latent_size))
        assert counter.get_total_flops() == 2 * (growth.macs_per_image(network, size, image_channels) - sum(folded))
        assert growth.parameters(network, size, image_channels) == sum(p.numel() for p in generator.parameters())


def test_gray_images_leave_out_two_thirds_of_the_last_layer() -> None:
    """At 4 px: dense 512 * 8192 + 512, conv 9 * 512 * 512 + 512, to-RGB 512 + 1."""
    assert growth.parameters(Network(), 4, 1) == 4_194_816 + 2_359_808 + 513
    assert growth.macs_per_image(Network(), 4, 1) == 4_194_304 + 16 * (2_359_296 + 512)


@pytest.mark.parametrize(("network", "resolution", "image_channels"), [
    (Network(kind="dcgan", latent_size=5, fmap_base=64, fmap_max=12), 32, 1),
    (Network(kind="vae", latent_size=5, fmap_base=64, fmap_max=12, layers=Layers(upsampling="nearest")), 8, 3),
    (Network(kind="dcgan", latent_size=5, classes=3, conditioning="concatenated", fmap_base=64, fmap_max=12,
             layers=Layers(generator_norm="none")), 16, 3),
    (Network(kind="mlp", latent_size=5, codes=4, mlp=Perceptron(width=7, depth=3)), 1, 2),
], ids=lambda value: getattr(value, "kind", None))
def test_other_networks_have_the_work_and_the_parameters_of_the_very_generator(network: Network, resolution: int,
                                                                              image_channels: int) -> None:
    generator = new_generator(network, resolution, fades=False, image_channels=image_channels)
    with FlopCounterMode(display=False) as counter:
        generator(torch.zeros(2, network.input_size))
    assert counter.get_total_flops() == 2 * 2 * growth.macs_per_image(network, resolution, image_channels)
    assert growth.parameters(network, resolution, image_channels) == sum(p.numel() for p in generator.parameters())



def test_moments_and_schedules_are_plain_values() -> None:
    """Equal settings give equal schedules: a resumed run computes the clock it stopped at."""
    assert small() == small()
    moment = growth.at(small(), 120)
    assert moment == growth.at(small(), 120)
    with pytest.raises(dataclasses.FrozenInstanceError):
        moment.alpha = 1.0  # type: ignore[misc]
    assert math.isclose(moment.alpha, 0.16)
