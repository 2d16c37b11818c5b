"""Claims about generator and discriminator, against numpy arithmetic written out here and numbers known by hand."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradine.configs.schema import Network
from gradine.stages.growth import share_rows
from gradine.stages.networks import (
    Discriminator,
    DownBlock,
    EqualizedConv,
    EqualizedDense,
    FromRGB,
    Generator,
    SeedBlock,
    box_downscale,
    initialise,
    minibatch_stddev,
    pixel_norm,
    recompute,
    upscale,
)

NARROW = Network(latent_size=6, fmap_base=64, fmap_max=8)  # 8 8 8 8 4 2 1 channels from 4 to 256 px
DOUBLINGS = [(4, 8), (8, 16), (16, 32), (32, 64), (64, 128)]
Array = NDArray[np.float64]


def filled(net: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, biases too, so that a bias in the wrong place or scaled shows."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=source))
    return net


def generator(size: int, fades: bool, seed: int = 0, network: Network = NARROW) -> Generator:
    net = filled(Generator(network, size, fades), seed)
    assert isinstance(net, Generator)
    return net


def discriminator(size: int, fades: bool, seed: int = 0, network: Network = NARROW) -> Discriminator:
    net = filled(Discriminator(network, size, fades), seed)
    assert isinstance(net, Discriminator)
    return net


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- The networks written out in numpy


def conv(x: Array, weight: Array, bias: Array, gain: float = math.sqrt(2)) -> Array:
    """Same-size convolution, one kernel position after the other; the weight over sqrt(k * k * inputs)."""
    outputs, inputs, k, _ = weight.shape
    height, width = x.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), (k // 2, k // 2), (k // 2, k // 2)))
    out = np.zeros((len(x), outputs, height, width))
    for i in range(k):
        for j in range(k):
            out += np.einsum("nchw,oc->nohw", padded[:, :, i:i + height, j:j + width], weight[:, :, i, j])
    return out * gain / math.sqrt(k * k * inputs) + bias[None, :, None, None]


def dense(x: Array, weight: Array, bias: Array, gain: float = math.sqrt(2)) -> Array:
    return x @ weight.T * gain / math.sqrt(weight.shape[1]) + bias


def leaky(x: Array) -> Array:
    return np.where(x > 0, x, 0.2 * x)


def normed(x: Array) -> Array:
    return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-8)


def doubled(x: Array) -> Array:
    return x.repeat(2, axis=2).repeat(2, axis=3)


def halved(x: Array) -> Array:
    return (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4


def with_stddev(x: Array) -> Array:
    """Sample n belongs to group n mod M; sample by sample, channel last."""
    count, channels, height, width = x.shape
    groups = count // min(4, count)
    out = np.zeros((count, channels + 1, height, width))
    out[:, :channels] = x
    for n in range(count):
        mates = [x[m] for m in range(count) if m % groups == n % groups]
        mean = sum(mates) / len(mates)
        variance = sum((mate - mean) ** 2 for mate in mates) / len(mates)
        out[n, channels] = np.sqrt(variance + 1e-8).mean()
    return out


def weights_of(net: nn.Module) -> dict[str, Array]:
    return {name: p.detach().double().numpy() for name, p in net.named_parameters()}


def plain_generator(w: dict[str, Array], latents: Array, size: int, alpha: float) -> Array:
    def layer(x: Array, name: str) -> Array:
        return normed(leaky(conv(x, w[f"{name}.weight"], w[f"{name}.bias"])))

    def to_rgb(x: Array, at: int) -> Array:
        return conv(x, w[f"to_rgb.{at}.weight"], w[f"to_rgb.{at}.bias"], gain=1)

    z = normed(latents)
    channels = len(w["blocks.4.dense.bias"])
    x = dense(z, w["blocks.4.dense.weight"], np.zeros(16 * channels), gain=math.sqrt(2) / 4)
    x = x.reshape(len(z), channels, 4, 4) + w["blocks.4.dense.bias"][None, :, None, None]
    x = layer(normed(leaky(x)), "blocks.4.conv")
    older = x
    for at in [2**r for r in range(3, size.bit_length())]:
        older = x
        x = layer(layer(doubled(x), f"blocks.{at}.conv0"), f"blocks.{at}.conv1")
    images = to_rgb(x, size)
    return alpha * images + (1 - alpha) * doubled(to_rgb(older, size // 2)) if alpha < 1 else images


def plain_discriminator(w: dict[str, Array], images: Array, size: int, alpha: float, pool_first: bool = False) -> Array:
    def layer(x: Array, name: str) -> Array:
        return conv(x, w[f"{name}.weight"], w[f"{name}.bias"])

    x = leaky(layer(images, f"from_rgb.{size}.conv"))
    at = size
    while at > 4:
        x = layer(leaky(layer(x, f"blocks.{at}.conv0")), f"blocks.{at}.conv1")
        x = leaky(halved(x)) if pool_first else halved(leaky(x))
        if at == size and alpha < 1:
            older = leaky(layer(halved(images), f"from_rgb.{size // 2}.conv"))
            x = alpha * x + (1 - alpha) * older
        at //= 2
    x = leaky(layer(with_stddev(x), "blocks.4.conv"))
    x = leaky(dense(x.reshape(len(x), -1), w["blocks.4.dense0.weight"], w["blocks.4.dense0.bias"]))
    return dense(x, w["blocks.4.dense1.weight"], w["blocks.4.dense1.bias"], gain=1)[:, 0]


# size, alpha: 128 px brings the first narrowing of both networks
CASES = [(4, 1.0), (8, 0.3), (8, 1.0), (16, 0.7), (32, 0.25), (128, 0.5)]


@pytest.mark.parametrize(("size", "alpha"), CASES)
def test_the_generator_is_the_one_written_out(size: int, alpha: float) -> None:
    net = generator(size, fades=size > 4).double()
    latents = noise(3, 6).double()
    images = net(latents, alpha)
    assert images.shape == (3, 3, size, size)
    np.testing.assert_allclose(images.detach().numpy(), plain_generator(weights_of(net), latents.numpy(), size, alpha),
                               rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pool_first", [False, True])
@pytest.mark.parametrize(("size", "alpha"), CASES)
def test_the_discriminator_is_the_one_written_out(size: int, alpha: float, pool_first: bool) -> None:
    network = Network(latent_size=6, fmap_base=64, fmap_max=8, pool_before_activation=pool_first)
    net = discriminator(size, fades=size > 4, network=network).double()
    images = noise(8, 3, size, size).double()
    scores = net(images, alpha)
    assert scores.shape == (8,)
    plain = plain_discriminator(weights_of(net), images.numpy(), size, alpha, pool_first)
    np.testing.assert_allclose(scores.detach().numpy(), plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("size", "alpha"), [(4, 1.0), (8, 0.3), (16, 1.0)])
def test_gray_networks_are_those_written_out_too(size: int, alpha: float) -> None:
    g, d = (filled(kind(NARROW, size, size > 4, 1)).double() for kind in (Generator, Discriminator))
    latents, images = noise(4, 6).double(), noise(4, 1, size, size).double()
    made = g(latents, alpha)
    assert made.shape == (4, 1, size, size)
    np.testing.assert_allclose(made.detach().numpy(), plain_generator(weights_of(g), latents.numpy(), size, alpha),
                               rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(d(images, alpha).detach().numpy(),
                               plain_discriminator(weights_of(d), images.numpy(), size, alpha), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_a_gray_network_is_the_rgb_one_whose_three_channels_are_alike(alpha: float) -> None:
    """Three equal rows make three equal channels; a from-RGB sees three times the sum, scaled by 1 / sqrt(3)."""
    for kind, size in itertools.product((Generator, Discriminator), (8, 16)):
        gray, color = (kind(NARROW, size, True, c).double() for c in (1, 3))
        weights = filled(gray).state_dict()
        for name in weights:
            if name.startswith("to_rgb."):
                weights[name] = weights[name].repeat(3, *[1] * (weights[name].ndim - 1))
            elif name.startswith("from_rgb.") and name.endswith("weight"):
                weights[name] = weights[name].repeat(1, 3, 1, 1) / math.sqrt(3)
        color.load_state_dict(weights)
        if kind is Generator:
            latents = noise(4, 6).double()
            torch.testing.assert_close(color(latents, alpha), gray(latents, alpha).repeat(1, 3, 1, 1))
        else:
            images = noise(4, 1, size, size).double()
            torch.testing.assert_close(color(images.repeat(1, 3, 1, 1), alpha), gray(images, alpha))


# ---- Sizes


def union(kind: type[nn.Module], network: Network, final: int, image_channels: int = 3) -> int:
    """Parameters over the layer names of all stages up to `final`."""
    shapes: dict[str, torch.Size] = {}
    with torch.device("meta"):
        for size in (2**r for r in range(2, final.bit_length())):
            for name, parameter in kind(network, size, size > 4, image_channels).named_parameters():
                assert shapes.setdefault(name, parameter.shape) == parameter.shape
    return sum(shape.numel() for shape in shapes.values())


@pytest.mark.parametrize(("final", "g", "d"), [
    (4, 6_556_163, 6_561_793), (8, 11_277_318, 11_283_457), (16, 15_998_473, 16_005_121), (32, 20_719_628, 20_726_785),
    (64, 22_490_383, 22_498_049), (128, 22_933_394, 22_941_313), (256, 23_044_309, 23_052_353),
    (512, 23_072_120, 23_080_225), (1024, 23_079_115, 23_087_249)])
def test_full_width_parameters_over_all_stages_are_the_known_ones(final: int, g: int, d: int) -> None:
    assert union(Generator, Network(), final) == g
    assert union(Discriminator, Network(), final) == d


@pytest.mark.parametrize(("network", "final", "g", "d"), [
    (Network(latent_size=128, fmap_base=4096, fmap_max=128), 32, 1_296_908, 1_298_689),  # the paper's CIFAR-10 setting
    (Network(fmap_base=2048), 128, 13_629_810, 13_636_897)])  # and its ablation table's
def test_narrower_settings_have_the_known_parameters(network: Network, final: int, g: int, d: int) -> None:
    assert union(Generator, network, final) == g
    assert union(Discriminator, network, final) == d


def test_a_finished_1024_network_owns_only_its_last_rgb_layers() -> None:
    with torch.device("meta"):
        g, d = Generator(Network(), 1024, fades=False), Discriminator(Network(), 1024, fades=False)
    assert sum(p.numel() for p in g.parameters()) == 23_071_507
    assert sum(p.numel() for p in d.parameters()) == 23_077_137


@pytest.mark.parametrize(("final", "g", "d"), [(4, 6_555_137, 6_560_769), (1024, 23_074_009, 23_082_161)])
def test_full_width_gray_networks_have_the_parameters_counted_by_hand(final: int, g: int, d: int) -> None:
    """A to-RGB of width w has w + 1 instead of 3w + 3, a from-RGB w + w instead of 3w + w: to 1024 px, where the nine
    widths add up to 2,544, G has 2 * 2,553 less and D 2 * 2,544; at 4 px 2 * 513 and 2 * 512."""
    assert union(Generator, Network(), final, 1) == g
    assert union(Discriminator, Network(), final, 1) == d


def test_gray_networks_have_the_layers_of_rgb_ones_and_differ_in_the_shapes_at_the_image_alone() -> None:
    for kind, image_weight in ((Generator, "to_rgb.{}.weight"), (Discriminator, "from_rgb.{}.conv.weight")):
        gray, color = (dict(kind(NARROW, 128, True, c).named_parameters()) for c in (1, 3))
        assert list(gray) == list(color)
        changed = {name for name in gray if gray[name].shape != color[name].shape}
        biases = {"to_rgb.64.bias", "to_rgb.128.bias"} if kind is Generator else set()
        assert changed == {image_weight.format(64), image_weight.format(128)} | biases


def test_the_first_dense_layer_has_one_bias_per_channel() -> None:
    with torch.device("meta"):
        dense0 = SeedBlock(512, 512).dense
    assert dense0.weight.shape == (512 * 16, 512)
    assert dense0.bias.shape == (512,)


def test_the_first_score_layer_is_as_wide_as_a_layer_before_4_px_would_be() -> None:
    """nf(0) = min(base, max), which is twice the width at 4 px where the base is what limits."""
    with torch.device("meta"):
        dense0 = Discriminator(Network(fmap_base=8, fmap_max=100), 4, False).blocks["4"].dense0
    assert dense0.weight.shape == (8, 4 * 16)  # type: ignore[union-attr]


# ---- Growth


@pytest.mark.parametrize(("small", "large"), DOUBLINGS)
def test_a_fade_begins_exactly_at_the_upscaled_image_of_the_smaller_generator(small: int, large: int) -> None:
    older, grown = generator(small, fades=small > 4, seed=1), generator(large, fades=True, seed=2)
    result = grown.load_state_dict(older.state_dict(), strict=False)
    assert {name.rsplit(".", 1)[0] for name in result.missing_keys} == {
        f"blocks.{large}.conv0", f"blocks.{large}.conv1", f"to_rgb.{large}"}
    assert set(result.unexpected_keys) == ({f"to_rgb.{small // 2}.weight", f"to_rgb.{small // 2}.bias"} if small > 4
                                           else set())
    latents = noise(4, 6)
    with torch.no_grad():
        image = older(latents, 1.0)
        blocky = image.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        assert torch.equal(grown(latents, 0.0), blocky)
        assert not torch.equal(grown(latents, 0.01), blocky)


@pytest.mark.parametrize(("small", "large"), DOUBLINGS)
def test_a_fade_begins_exactly_at_the_smaller_discriminators_score_of_the_box_downscaled_image(small: int,
                                                                                            large: int) -> None:
    older, grown = discriminator(small, fades=small > 4, seed=1), discriminator(large, fades=True, seed=2)
    result = grown.load_state_dict(older.state_dict(), strict=False)
    assert {name.split(".conv")[0] for name in result.missing_keys} == {f"blocks.{large}", f"from_rgb.{large}"}
    images = noise(4, 3, large, large)
    with torch.no_grad():
        scores = older(box_downscale(images), 1.0)
        assert torch.equal(grown(images, 0.0), scores)
        assert not torch.equal(grown(images, 0.01), scores)


@pytest.mark.parametrize(("small", "large"), [(4, 8), (8, 16)])
def test_continuity_is_exact_in_bfloat16_too_and_what_comes_out_is_float32(small: int, large: int) -> None:
    g, grown_g = generator(small, fades=small > 4, seed=1), generator(large, fades=True, seed=2)
    d, grown_d = discriminator(small, fades=small > 4, seed=1), discriminator(large, fades=True, seed=2)
    grown_g.load_state_dict(g.state_dict(), strict=False)
    grown_d.load_state_dict(d.state_dict(), strict=False)
    images = noise(8, 3, large, large)
    half = torch.bfloat16
    with torch.no_grad():
        small_image, scores = g(noise(4, 6), dtype=half), d(box_downscale(images), dtype=half)
        assert torch.equal(grown_g(noise(4, 6), 0.0, half), upscale(small_image))
        assert torch.equal(grown_d(images, 0.0, half), scores)
    assert small_image.dtype == scores.dtype == torch.float32


@pytest.mark.parametrize("size", [8, 16, 64])
def test_a_finished_fade_is_the_network_without_the_older_rgb_layers(size: int) -> None:
    fading_g, fading_d = generator(size, fades=True), discriminator(size, fades=True)
    alone_g, alone_d = generator(size, fades=False, seed=5), discriminator(size, fades=False, seed=5)
    for fading, alone in ((fading_g, alone_g), (fading_d, alone_d)):
        assert not alone.load_state_dict(fading.state_dict(), strict=False).missing_keys
    latents, images = noise(4, 6), noise(4, 3, size, size)
    with torch.no_grad():
        assert torch.equal(fading_g(latents, 1.0), alone_g(latents))
        assert torch.equal(fading_d(images, 1.0), alone_d(images))


def test_the_generator_blends_images_linearly_in_alpha() -> None:
    net, latents = generator(16, fades=True).double(), noise(2, 6).double()
    start, end = net(latents, 0.0), net(latents, 1.0)
    for alpha in (0.125, 0.5, 0.9):
        torch.testing.assert_close(net(latents, alpha), (1 - alpha) * start + alpha * end)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("size", [4, 8, 32])
def test_every_layer_a_stage_owns_takes_part_until_the_older_branch_is_faded_out(size: int, alpha: float) -> None:
    g, d = generator(size, fades=size > 4), discriminator(size, fades=size > 4)
    d(g(noise(4, 6), alpha), alpha).sum().backward()
    for name, parameter in itertools.chain(g.named_parameters(), d.named_parameters()):
        faded_out = alpha == 1 and name.startswith((f"from_rgb.{size // 2}.", f"to_rgb.{size // 2}."))
        assert (parameter.grad is None) == faded_out, name
        if 0 < alpha < 1:
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("pool_first", [False, True])
@pytest.mark.parametrize("resolution", [8, 16, 32])
def test_recomputed_blocks_keep_less_and_give_the_same_gradients(resolution: int, pool_first: bool) -> None:
    network, found = dataclasses.replace(NARROW, pool_before_activation=pool_first), []
    for from_ in (0, resolution):
        g, d = generator(32, fades=True), discriminator(32, fades=True, network=network)
        for net in (g, d):
            recompute(net, from_)
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            (scores, *_), pull = d.linearised(torch.cat([g(noise(4, 6), 0.4), noise(4, 3, 32, 32)]), 0.4, sets=2)
            loss = scores.sum() + pull(torch.ones(4)).square().sum()
        loss.backward()
        found.append(([p.grad for net in (g, d) for p in net.parameters()], sum(kept.values())))
    (plain, all_kept), (again, less_kept) = found
    assert less_kept < 0.8 * all_kept
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)


# ---- Layers


def test_a_convolution_scales_its_weight_by_gain_over_root_fan_in_and_not_its_bias() -> None:
    """3x3 over 8 channels: sqrt(2 / 72) = 1/6; ones into ones: 72 / 6 inside, 32 / 6 in a corner, plus the bias."""
    layer = EqualizedConv(8, 1, 3)
    nn.init.ones_(layer.weight)
    nn.init.constant_(layer.bias, 3.0)
    out = layer(torch.ones(1, 8, 4, 4))[0, 0]
    torch.testing.assert_close(out[0:2, 0:2], torch.tensor([[32 / 6, 48 / 6], [48 / 6, 72 / 6]]) + 3)


def test_a_dense_layer_scales_its_weight_by_gain_over_root_inputs() -> None:
    """Gain sqrt(2)/4 over 8 inputs: 1/8; eight ones sum to 1, and two neighbours share one bias."""
    layer = EqualizedDense(8, 4, gain=math.sqrt(2) / 4, bias_repeats=2)
    nn.init.ones_(layer.weight)
    layer.bias.data.copy_(torch.tensor([10.0, 20.0]))
    torch.testing.assert_close(layer(torch.ones(1, 8)), torch.tensor([[11.0, 11.0, 21.0, 21.0]]))


@pytest.mark.parametrize(("layer", "gain"), [
    (lambda: SeedBlock(512, 32).dense, math.sqrt(2) / 4), (lambda: SeedBlock(16, 64).conv, math.sqrt(2)),
    (lambda: Discriminator(Network(fmap_max=64), 4, False).blocks["4"].dense0, math.sqrt(2)),
    (lambda: FromRGB(64).conv, math.sqrt(2)),
    (lambda: Discriminator(Network(), 4, False).blocks["4"].dense1, 1.0),
    (lambda: Generator(Network(), 4, False).to_rgb["4"], 1.0)])
def test_a_freshly_drawn_layer_multiplies_the_deviation_of_its_input_by_its_gain(layer, gain: float) -> None:
    module = layer()
    initialise(module, 0, "x")
    inputs = module.weight.shape[1]
    shape = (4000, inputs) if module.weight.ndim == 2 else (64, inputs, 10, 10)
    with torch.no_grad():
        out = module(noise(*shape))
    if out.ndim == 4 and module.weight.shape[2] == 3:
        out = out[:, :, 1:-1, 1:-1]
    assert out.std().item() == pytest.approx(gain, rel=0.15 if module.weight.numel() < 2000 else 0.03)


def test_to_rgb_is_linear_and_without_the_root_two() -> None:
    net = generator(4, fades=False)
    layer = net.to_rgb["4"]
    x = noise(2, 8, 4, 4)
    with torch.no_grad():
        nn.init.ones_(layer.weight)  # type: ignore[arg-type]
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        torch.testing.assert_close(layer(torch.ones(1, 8, 4, 4)), torch.full((1, 3, 4, 4), 8 / math.sqrt(8)))
        torch.testing.assert_close(layer(-3 * x), -3 * layer(x))


def test_from_rgb_has_a_leaky_relu_of_slope_one_fifth() -> None:
    layer = FromRGB(1)
    nn.init.ones_(layer.conv.weight)
    nn.init.zeros_(layer.conv.bias)
    images = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    torch.testing.assert_close(layer.linearised(images)[0].flatten(), torch.tensor([1.0, -0.2]) * math.sqrt(2 / 3) * 3)


def test_pixel_norm_gives_each_pixels_vector_unit_mean_square() -> None:
    x = noise(2, 5, 3, 3) * 7
    torch.testing.assert_close(pixel_norm(x).square().mean(dim=1), torch.ones(2, 3, 3))
    torch.testing.assert_close(pixel_norm(torch.tensor([[3.0, 4.0]])), torch.tensor([[3.0, 4.0]]) / math.sqrt(12.5))


def test_pixel_norm_has_its_epsilon_inside_the_root() -> None:
    """1e-4 in one channel: 1e-4 / sqrt(1e-8 + 1e-8) = 0.7071; outside the root it would be 0.9999."""
    torch.testing.assert_close(pixel_norm(torch.full((1, 1), 1e-4)), torch.full((1, 1), math.sqrt(0.5)))
    assert torch.equal(pixel_norm(torch.zeros(1, 4)), torch.zeros(1, 4))


@pytest.mark.parametrize("shape", [(3, 5), (2, 5, 3, 2)])
def test_pixel_norm_has_the_derivative_of_differences_and_refuses_a_second_one(shape: tuple[int, ...]) -> None:
    x = noise(*shape).double().requires_grad_()
    assert torch.autograd.gradcheck(pixel_norm, (x,))
    (gradient,) = torch.autograd.grad(pixel_norm(x).square().sum() * x.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_pixel_norm_squares_in_float32() -> None:
    """300**2 is infinite in float16."""
    x = torch.full((1, 4, 1, 1), 300.0, dtype=torch.float16)
    assert torch.equal(pixel_norm(x), torch.ones_like(x))


def test_the_length_of_a_latent_does_not_matter_to_the_generator() -> None:
    net, latents = generator(8, fades=True).double(), noise(3, 6).double()
    torch.testing.assert_close(net(latents * 40), net(latents), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8, 12, 20])
def test_minibatch_stddev_is_the_plain_loop_over_strided_groups(count: int) -> None:
    x = noise(count, 3, 4, 4).double() * torch.arange(1.0, count + 1).view(-1, 1, 1, 1)
    out = minibatch_stddev(x)[0]
    assert out.shape == (count, 4, 4, 4)
    np.testing.assert_allclose(out.numpy(), with_stddev(x.numpy()), rtol=1e-12)


def test_minibatch_stddev_worked_by_hand() -> None:
    """8 samples, groups {0, 2, 4, 6} and {1, 3, 5, 7}: 1 3 5 7 have biased deviation sqrt(5), four twos sqrt(1e-8)."""
    x = torch.tensor([1.0, 2, 3, 2, 5, 2, 7, 2]).view(8, 1, 1, 1).expand(8, 2, 4, 4)
    out = minibatch_stddev(x)[0]
    assert torch.equal(out[:, :2], x)
    expected = torch.tensor([math.sqrt(5), 1e-4] * 4).view(8, 1, 1).expand(8, 4, 4)
    torch.testing.assert_close(out[:, 2], expected)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1, 3), (2, 3), (0, 3)])
def test_a_share_of_whole_groups_finds_the_deviations_of_the_global_batch(low: int, high: int) -> None:
    x, rows = noise(12, 3, 4, 4), share_rows(12, low, high)
    assert torch.equal(minibatch_stddev(x[rows])[0], minibatch_stddev(x)[0][rows])
    net, images = discriminator(8, fades=True).double(), noise(12, 3, 8, 8).double()
    torch.testing.assert_close(net(images[rows], 0.5), net(images, 0.5)[rows])


def test_consecutive_samples_are_not_a_group() -> None:
    x = noise(8, 3, 4, 4)
    assert not torch.equal(minibatch_stddev(x[:4])[0], minibatch_stddev(x)[0][:4])


@pytest.mark.parametrize("count", [5, 6, 7, 10])
def test_a_batch_that_groups_do_not_divide_names_both_numbers(count: int) -> None:
    with pytest.raises(ValueError, match=rf"batch of {count} .* groups of 4"):
        discriminator(4, fades=False)(noise(count, 3, 4, 4))


def test_minibatch_stddev_squares_in_float32() -> None:
    """Deviations of 300: their squares are infinite in float16."""
    x = torch.tensor([300.0, -300, 300, -300], dtype=torch.float16).view(4, 1, 1, 1)
    out = minibatch_stddev(x)[0]
    assert out.dtype == torch.float16
    assert torch.equal(out[:, 1], torch.full((4, 1, 1), 300.0, dtype=torch.float16))


def test_minibatch_stddev_differentiates_where_all_samples_are_equal() -> None:
    x = torch.ones(4, 2, 4, 4, requires_grad=True)
    minibatch_stddev(x)[0][:, 2].sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros_like(x.grad))


def test_pooling_before_the_activation_is_another_function_of_the_same_weights() -> None:
    block, other = filled(DownBlock(2, 3, False)).double(), filled(DownBlock(2, 3, True)).double()
    x, w = noise(1, 2, 4, 4).double(), weights_of(block)
    before = conv(leaky(conv(x.numpy(), w["conv0.weight"], w["conv0.bias"])), w["conv1.weight"], w["conv1.bias"])
    paper, later = halved(leaky(before)), leaky(halved(before))
    np.testing.assert_allclose(block.linearised(x)[0].detach().numpy(), paper, atol=1e-12)
    np.testing.assert_allclose(other.linearised(x)[0].detach().numpy(), later, atol=1e-12)
    assert np.abs(paper - later).max() > 0.01
    assert Discriminator(Network(), 8, False).blocks["8"].pool_before_activation is False


def test_upscale_repeats_pixels_and_box_downscale_averages_them() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 6.0]]).view(1, 1, 2, 2)
    assert upscale(x)[0, 0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 6, 6], [3, 3, 6, 6]]
    assert box_downscale(x).item() == 3.0
    assert torch.equal(box_downscale(upscale(x)), x)


# ---- First weights


def test_weights_start_as_standard_normals_and_biases_at_zero() -> None:
    net = Generator(Network(latent_size=64, fmap_max=64), 16, fades=True)
    initialise(net, 0, "generator")
    weights = torch.cat([p.detach().flatten() for name, p in net.named_parameters() if name.endswith("weight")])
    count = len(weights)
    assert abs(weights.mean().item()) < 5 / math.sqrt(count)
    assert abs(weights.var().item() - 1) < 5 * math.sqrt(2 / count)
    assert abs((weights**4).mean().item() - 3) < 5 * math.sqrt(96 / count)
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            assert torch.equal(parameter, torch.zeros_like(parameter))


def test_a_layers_first_weights_do_not_depend_on_the_stage_it_enters_in_nor_on_torchs_own_randomness() -> None:
    for kind, role in ((Generator, "generator"), (Discriminator, "discriminator")):
        known: dict[str, Tensor] = {}
        for number, size in enumerate((4, 8, 16, 32)):
            torch.manual_seed(number)
            net = kind(NARROW, size, fades=size > 4)
            initialise(net, 7, role)
            for name, parameter in net.named_parameters():
                assert torch.equal(known.setdefault(name, parameter.detach().clone()), parameter)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    initialise(Generator(NARROW, 8, True), 7, "generator")
    assert torch.equal(torch.rand(3), expected)


def test_seed_role_and_name_each_change_the_first_weights() -> None:
    def first(seed: int, role: str, name: str) -> Tensor:
        net = Generator(NARROW, 8, fades=True)
        initialise(net, seed, role)
        return net.get_parameter(name).detach()

    base = first(0, "generator", "blocks.8.conv1.weight")
    for other in (first(1, "generator", "blocks.8.conv1.weight"), first(0, "average", "blocks.8.conv1.weight"),
                  first(0, "generator", "blocks.8.conv0.weight")):
        assert other.shape == base.shape
        assert abs(torch.corrcoef(torch.stack([base.flatten(), other.flatten()]))[0, 1]) < 0.2
