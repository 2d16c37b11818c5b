"""The benches' own arithmetic: what a phase is charged, what a convolution counts, whose steps a process trains."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.bench.step import Calls, Process, own_seconds, plain_step, ratio

ROOT = Path(__file__).parents[1]


def test_a_phase_is_not_charged_for_the_phases_inside_it() -> None:
    marks = [("penalty", 2.0, 7.0), ("rest", 0.0, 10.0), ("backward", 3.0, 4.5), ("backward", 4.5, 5.0),
             ("average", 7.0, 8.0)]
    assert own_seconds(marks) == {"rest": 10 - 5 - 1, "penalty": 5 - 2, "backward": 2, "average": 1}


def test_a_ratio_is_of_the_medians_and_its_range_of_the_rounds() -> None:
    assert ratio({"old": [2.0, 3.0, 9.0], "new": [1.0, 2.0, 3.0]}, "old", "new") == " 1.50 (1.50 to 3.00)"


def test_convolutions_count_two_operations_a_product_in_every_backward() -> None:
    images, weight = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(5, 3, 3, 3, requires_grad=True)
    once = 2 * (2 * 5 * 8 * 8) * (3 * 3 * 3)  # an output is a sum of 27 products
    with Calls() as calls:
        out = F.conv2d(images, weight, padding=1)
    assert calls.flops == once
    with Calls() as calls:
        (slope,) = torch.autograd.grad(out.square().sum(), images, create_graph=True)
    assert calls.flops == once  # to the images, not to the weight
    with Calls() as calls:
        torch.autograd.grad(slope.square().sum(), weight)
    # From `slope`: to the cotangent of `out`, and to the weight; then through `out` to the weight again.
    assert calls.flops == 3 * once


def test_a_transposed_convolution_counts_its_taps_at_the_small_side() -> None:
    with Calls() as calls:
        F.conv_transpose2d(torch.randn(2, 3, 8, 8), torch.randn(3, 5, 4, 4), stride=2, padding=1)
    assert calls.flops == 2 * (2 * 5 * 16 * 16) * (3 * 2 * 2)  # of 4x4 taps, 2x2 meet a pixel at each output


def test_the_plain_step_at_4_px_has_the_arithmetic_of_its_layers() -> None:
    with Calls() as calls:
        plain_step(4, 4, all_gradients=False)()
    pixels, rgb = 4 * 16, 3 * 512
    generator, discriminator = 512 * 512 * 9, 513 * 512 * 9
    # G runs in both phases, backward in its own; D on reals, fakes, mixed images and, in G's phase, on fakes again.
    forward = 2 * (generator + rgb) + 4 * (discriminator + rgb)
    to_weights = (generator + rgb) + 3 * (discriminator + rgb)
    # D: thrice in its phase, for the slope, and to G, the 3x3; from-RGB only the last two.
    to_inputs = (generator + rgb) + 5 * discriminator + 2 * rgb
    # The penalty's slope goes back through both layers of D: to the slope above it, and once more to the weight.
    twice = 2 * (discriminator + rgb)
    assert calls.flops == 2 * pixels * (forward + to_weights + to_inputs + twice)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_bare_convolutions_are_those_of_the_step_in_shape_layout_and_number(layout: torch.memory_format) -> None:
    images = torch.randn(2, 4, 8, 8).to(memory_format=layout)
    weight = torch.randn(6, 4, 3, 3, requires_grad=True)

    def step() -> None:
        F.linear(F.conv2d(images, weight, padding=1).mean((2, 3)), torch.randn(3, 6)).sum().backward()

    with Calls() as calls:
        step()
    with Calls() as again:
        calls.bare()()
    assert again.seen == calls.seen
    assert again.flops == calls.flops > 0


def test_a_process_trains_the_gradine_of_its_checkout(tmp_path: Path) -> None:
    (tmp_path / "gradine").mkdir()
    (tmp_path / "gradine" / "__init__.py").touch()
    for folder in ("configs", "stages"):
        (tmp_path / "gradine" / folder).symlink_to(ROOT / folder)
    with closing(Process(tmp_path)) as process:
        file = process.ask(make="a", resolution=4, batch=4, network={"latent_size": 4, "fmap_base": 16, "fmap_max": 8},
                           training={"precision": "float32"})
        assert file == str(tmp_path / "gradine" / "stages" / "step.py")
        assert process.ask(step="a") > 0
