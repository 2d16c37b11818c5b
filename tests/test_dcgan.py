"""Claims about the networks of one resolution (dcgan, encoder, mlp), against loops in numpy and numbers by hand."""

import dataclasses
import math
from typing import TypeVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradine.configs.schema import Layers, Network, Perceptron
from gradine.stages.dcgan import (
    BatchNorm,
    DcganDiscriminator,
    DcganGenerator,
    Encoder,
    InstanceNorm,
    VirtualBatchNorm,
)
from gradine.stages.families import running_statistics
from gradine.stages.mlp import MlpDiscriminator, MlpGenerator
from gradine.stages.networks import Differentiable, initialise
from gradine.stages.verdict import KERNELS, Discrimination

Array = NDArray[np.float64]
N = TypeVar("N", bound=nn.Module)
LATENTS, CLASSES, REFERENCES = 5, 3, 6


def dcgan(**layers: object) -> Network:
    """8 4 2 channels from 4 to 16 px."""
    return Network(kind="dcgan", latent_size=LATENTS, fmap_base=16, fmap_max=8, layers=Layers(**layers))


def mlp(minibatch: str = "none", **settings: object) -> Network:
    return Network(kind="mlp", latent_size=LATENTS, mlp=Perceptron(width=7, depth=3, minibatch=minibatch), **settings)


def filled(net: N, seed: int = 0) -> N:
    """In float64, every parameter random, so that a bias or a norm's weight in the wrong place shows."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.double().parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.5)
    return net


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def discriminator(network: Network, size: int = 16, channels: int = 3) -> Differentiable:
    """Of either kind; a virtual batch norm gets its reference."""
    if network.kind == "mlp":
        return filled(MlpDiscriminator(network, size, channels))
    net = filled(DcganDiscriminator(network, size, channels, reference_count=REFERENCES))
    if net.reference is not None:
        net.set_reference(noise(REFERENCES, channels, size, size, seed=7), one_hot(REFERENCES))
    return net


def one_hot(count: int) -> Tensor:
    return torch.eye(CLASSES, dtype=torch.float64)[torch.arange(count) % CLASSES]


# ---- The networks written out in numpy


def conv(x: Array, weight: Array, bias: Array | float, stride: int, padding: int) -> Array:
    """One output pixel after the other."""
    k = weight.shape[2]
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    size = (x.shape[2] - k) // stride + 1
    out = np.zeros((len(x), len(weight), size, size))
    for i in range(size):
        for j in range(size):
            window = x[:, :, i * stride:i * stride + k, j * stride:j * stride + k]
            out[:, :, i, j] = np.einsum("nckl,ockl->no", window, weight)
    return out + np.reshape(bias, (1, -1, 1, 1))


def transposed(x: Array, weight: Array, bias: Array | float, stride: int, padding: int) -> Array:
    """Every input pixel stamps the kernel, times its values, onto the output."""
    k, size = weight.shape[2], x.shape[2]
    out = np.zeros((len(x), weight.shape[1], (size - 1) * stride + k, (size - 1) * stride + k))
    for i in range(size):
        for j in range(size):
            stamp = np.einsum("nc,cokl->nokl", x[:, :, i, j], weight)
            out[:, :, i * stride:i * stride + k, j * stride:j * stride + k] += stamp
    inner = slice(padding, out.shape[2] - padding)
    return out[:, :, inner, inner] + np.reshape(bias, (1, -1, 1, 1))


def shuffled(x: Array) -> Array:
    """Of 4 channels each, the first goes to the upper left pixels, then upper right, lower left, lower right."""
    out = np.zeros((len(x), x.shape[1] // 4, 2 * x.shape[2], 2 * x.shape[3]))
    for channel in range(out.shape[1]):
        for row, column in np.ndindex(2, 2):
            out[:, channel, row::2, column::2] = x[:, 4 * channel + 2 * row + column]
    return out


def standardised(x: Array, over: tuple[int, ...], weight: Array, bias: Array) -> Array:
    mean, variance = x.mean(axis=over, keepdims=True), x.var(axis=over, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * weight[None, :, None, None] + bias[None, :, None, None]


def normed(x: Array, kind: str, weights: dict[str, Array], name: str) -> Array:
    match kind:
        case "batch":
            return standardised(x, (0, 2, 3), weights[f"{name}.weight"], weights[f"{name}.bias"])
        case "instance":
            return standardised(x, (2, 3), weights[f"{name}.weight"], weights[f"{name}.bias"])
        case "pixel":
            return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-8)
        case _:
            return x


def weights_of(net: nn.Module) -> dict[str, Array]:
    return {name: value.detach().numpy() for name, value in net.state_dict().items()}


def grown(x: Array, kind: str, weights: dict[str, Array], name: str) -> Array:
    at = name if kind == "transposed" else f"{name}.1" if kind == "nearest" else f"{name}.0"
    kernel, bias = weights[f"{at}.weight"], weights.get(f"{at}.bias", 0.0)
    match kind:
        case "transposed":
            return transposed(x, kernel, bias, 2, 1)
        case "nearest":
            return conv(x.repeat(2, axis=2).repeat(2, axis=3), kernel, bias, 1, 1)
        case _:
            return shuffled(conv(x, kernel, bias, 1, 1))


def generated_by_hand(net: nn.Module, layers: Layers, latents: Array, size: int) -> Array:
    weights, slope = weights_of(net), 0.0 if layers.generator_activation == "relu" else 0.2
    x = latents[:, :, None, None]
    for at in (4, 8, 16, 32)[:int(math.log2(size)) - 2]:
        name = f"blocks.{at}.0"
        x = (transposed(x, weights[f"{name}.weight"], weights.get(f"{name}.bias", 0.0), 1, 0) if at == 4
             else grown(x, layers.upsampling, weights, name))
        x = normed(x, layers.generator_norm, weights, f"blocks.{at}.1")
        x = np.where(x > 0, x, slope * x)
    return np.tanh(grown(x, layers.upsampling, weights, "output"))


def maps_by_hand(net: nn.Module, layers: Layers, images: Array) -> Array:
    """[N, C, 4, 4], what a discriminator or encoder has before its last layer."""
    weights, x, size = weights_of(net), images, images.shape[2] // 2
    first = size
    while size >= 4:
        name = f"blocks.{size}.0"
        if layers.pooling == "mean":
            x = conv(x, weights[f"{name}.0.weight"], weights.get(f"{name}.0.bias", 0.0), 1, 1)
            x = (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
        else:
            x = conv(x, weights[f"{name}.weight"], weights.get(f"{name}.bias", 0.0), 2, 1)
        x = normed(x, "none" if size == first else layers.discriminator_norm, weights, f"blocks.{size}.1")
        x, size = np.where(x > 0, x, 0.2 * x), size // 2
    return x


# ---- DCGAN


@pytest.mark.parametrize("upsampling", ["transposed", "nearest", "shuffle"])
@pytest.mark.parametrize(("norm", "activation"), [("batch", "relu"), ("instance", "leaky_relu"),
                                                  ("pixel", "leaky_relu"), ("none", "relu")])
def test_a_generator_is_what_loops_make_of_its_weights(upsampling, norm, activation):
    network = dcgan(upsampling=upsampling, generator_norm=norm, generator_activation=activation)
    net, latents = filled(DcganGenerator(network, 16, 3)), noise(4, LATENTS)
    expected = generated_by_hand(net, network.layers, latents.numpy(), 16)
    np.testing.assert_allclose(net(latents).detach().numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("pooling", ["stride", "mean"])
@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
def test_a_discriminator_is_what_loops_make_of_its_weights(pooling, norm):
    network = dcgan(pooling=pooling, discriminator_norm=norm)
    net, images = discriminator(network), noise(4, 3, 16, 16)
    maps, weights = maps_by_hand(net, network.layers, images.numpy()), weights_of(net)
    judgement = net.judged(images, None)
    np.testing.assert_allclose(judgement.features.detach().numpy(), maps.reshape(4, -1), atol=1e-9)
    scores = (maps * weights["verdict.score.weight"]).sum(axis=(1, 2, 3)) + weights["verdict.score.bias"]
    np.testing.assert_allclose(judgement.scores.detach().numpy(), scores, atol=1e-9)
    assert judgement.heads.shape == (4, 0)


@pytest.mark.parametrize(("kind", "outputs"), [("autoencoder", LATENTS), ("vae", 2 * LATENTS)])
def test_an_encoder_is_what_loops_make_of_its_weights(kind, outputs):
    network = dataclasses.replace(dcgan(), kind=kind)
    net, images = filled(Encoder(network, 16, 3)), noise(4, 3, 16, 16)
    maps, weights = maps_by_hand(net, network.layers, images.numpy()), weights_of(net)
    expected = np.einsum("nckl,ockl->no", maps, weights["output.weight"]) + weights["output.bias"]
    assert expected.shape == (4, outputs)
    np.testing.assert_allclose(net(images).detach().numpy(), expected, atol=1e-9)


def test_the_networks_of_the_paper_have_its_layers():
    """Radford et al. 2016, figure 1 and section 3, at 64 px."""
    network = Network(kind="dcgan", latent_size=100, fmap_base=2048, fmap_max=1024)
    generator, judge = DcganGenerator(network, 64, 3), DcganDiscriminator(network, 64, 3)
    ups = [module for module in generator.modules() if isinstance(module, nn.ConvTranspose2d)]
    downs = [module for module in judge.modules() if isinstance(module, nn.Conv2d)]
    assert [up.in_channels for up in ups] == [100, 1024, 512, 256, 128]
    assert [up.out_channels for up in ups] == [1024, 512, 256, 128, 3]
    assert [down.in_channels for down in downs] == [3, 128, 256, 512, 1024]
    assert [down.out_channels for down in downs] == [128, 256, 512, 1024, 1]
    norms = [[len(module.weight) for module in net.modules() if isinstance(module, BatchNorm)]
             for net in (generator, judge)]
    assert norms == [[1024, 512, 256, 128], [256, 512, 1024]]
    assert sum(isinstance(module, nn.ReLU) for module in generator.modules()) == 4
    assert [module.negative_slope for module in judge.modules() if isinstance(module, nn.LeakyReLU)] == [0.2] * 4
    assert network.bounded


@pytest.mark.parametrize("layers", [{}, {"minibatch": "discrimination", "pooling": "mean", "upsampling": "nearest"},
                                    {"minibatch": "stddev", "discriminator_norm": "virtual", "upsampling": "shuffle"}])
def test_no_layer_of_a_dcgan_is_fully_connected_or_pools_by_maximum(layers):
    network = dataclasses.replace(dcgan(**layers), conditioning="projection", classes=CLASSES, codes=2)
    for net in (DcganGenerator(network, 32, 3), DcganDiscriminator(network, 32, 3), Encoder(network, 32, 3)):
        assert not any(isinstance(module, nn.Linear | nn.MaxPool2d) for module in net.modules())


@pytest.mark.parametrize("size", [8, 16, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_have_the_size_and_channels_that_are_asked_for(size, channels):
    network = dataclasses.replace(dcgan(), fmap_base=64)
    generator, judge = DcganGenerator(network, size, channels), DcganDiscriminator(network, size, channels)
    images = generator(torch.randn(2, LATENTS))
    assert images.shape == (2, channels, size, size)
    assert generator.resolution == size
    assert judge(images).shape == (2,)


@pytest.mark.parametrize("make", [lambda n: DcganGenerator(n, 8, 3), lambda n: MlpGenerator(n, 8, 3)])
def test_tanh_bounds_what_a_linear_output_leaves_free(make):
    linear, bounded = (filled(make(dataclasses.replace(dcgan(), output=output))) for output in ("linear", "tanh"))
    latents = 4 * noise(8, LATENTS)
    assert linear(latents).abs().max() > 2
    torch.testing.assert_close(bounded(latents), torch.tanh(linear(latents)))
    assert bounded(latents).abs().max() <= 1


def test_a_dcgan_is_bounded_and_points_are_not_unless_said_otherwise():
    assert DcganGenerator(dcgan(), 8, 3).bounded
    assert not DcganGenerator(dataclasses.replace(dcgan(), output="linear"), 8, 3).bounded
    assert not MlpGenerator(mlp(), 1, 2).bounded


# ---- Norms


def test_batch_norm_remembers_what_it_saw_and_samples_by_that():
    net, first, second = BatchNorm(2), torch.randn(8, 2, 4, 4) * 3 + 1, torch.randn(8, 2, 4, 4) - 5
    for batch in (first, second):
        net(batch)
    means = [batch.mean(dim=(0, 2, 3)) for batch in (first, second)]
    variances = [batch.var(dim=(0, 2, 3), correction=1) for batch in (first, second)]
    torch.testing.assert_close(net.running_mean, 0.9 * (0.1 * means[0]) + 0.1 * means[1])
    torch.testing.assert_close(net.running_var, 0.9 * (0.9 + 0.1 * variances[0]) + 0.1 * variances[1])
    sampled = net.eval()(first)
    expected = (first - net.running_mean[:, None, None]) / (net.running_var[:, None, None] + 1e-5).sqrt()
    torch.testing.assert_close(sampled, expected)
    torch.testing.assert_close(net(first[:1]), sampled[:1])


def test_statistics_stay_float32_when_maps_are_bfloat16():
    generator = DcganGenerator(dcgan(), 16, 3)
    initialise(generator, 0, "generator")
    judge = DcganDiscriminator(dcgan(), 16, 3)
    initialise(judge, 0, "discriminator")
    images = generator(torch.randn(4, LATENTS), dtype=torch.bfloat16)
    judgement, _ = judge.linearised(images, dtype=torch.bfloat16)
    assert {images.dtype, *(part.dtype for part in judgement)} == {torch.float32}
    for net in (generator, judge):
        assert {tensor.dtype for tensor in net.state_dict().values()} == {torch.float32}
    # two blocks of G; in D, whose first has none, one: a mean and a variance each, and all have moved
    assert [len(running_statistics(net)) for net in (generator, judge)] == [4, 2]
    assert all((statistic != statistic.round()).any() for statistic in running_statistics(generator))


def test_norms_of_bfloat16_maps_take_their_statistics_in_float32():
    """1000 +- 10 has steps of 4 there: a variance made of squares, or a mean, would be off by as much."""
    maps = (1000 + 10 * torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(0))).bfloat16()
    exact, one, zero = maps.double().numpy(), np.ones(2), np.zeros(2)
    virtual = np.concatenate([standardised(exact[:4], (0, 2, 3), one, zero), *(
        standardised(exact[[0, 1, 2, 3, row]], (0, 2, 3), one, zero)[4:] for row in range(4, 8))])
    for net, expected in ((BatchNorm(2), standardised(exact, (0, 2, 3), one, zero)),
                          (InstanceNorm(2), standardised(exact, (2, 3), one, zero)), (VirtualBatchNorm(2, 4), virtual)):
        result = net(maps)
        assert result.dtype == torch.bfloat16
        np.testing.assert_allclose(result.detach().double().numpy(), expected, rtol=2**-8, atol=1e-3)


def test_virtual_batch_norm_has_the_statistics_of_the_reference_with_the_sample_as_one_more():
    net = filled(VirtualBatchNorm(2, 5))
    reference, own = 3 * noise(5, 2, 4, 4) + 2, noise(3, 2, 4, 4, seed=2) - 4
    got = net(torch.cat([reference, own])).detach().numpy()
    weight, bias = net.weight.detach().numpy(), net.bias.detach().numpy()
    np.testing.assert_allclose(got[:5], standardised(reference.numpy(), (0, 2, 3), weight, bias), atol=1e-9)
    for row, sample in enumerate(own.numpy()):
        joined = standardised(np.concatenate([reference.numpy(), sample[None]]), (0, 2, 3), weight, bias)
        np.testing.assert_allclose(got[5 + row], joined[5], atol=1e-9)


def test_a_discriminator_of_virtual_batch_norm_judges_a_batch_as_its_samples_one_by_one():
    net, images = discriminator(dcgan(discriminator_norm="virtual")), noise(5, 3, 16, 16)
    torch.testing.assert_close(net(images), torch.cat([net(image[None]) for image in images]))
    torch.testing.assert_close(net(images[[3, 3, 0]]), net(images)[[3, 3, 0]])


def test_every_block_sees_the_reference_as_the_blocks_before_left_it():
    network = dcgan(discriminator_norm="virtual")
    net, images, reference = discriminator(network, 32), noise(2, 3, 32, 32), noise(REFERENCES, 3, 32, 32, seed=7)
    for row in range(2):  # for a sample, the reference with itself at the end, all through ordinary batch norms: but
        weights = weights_of(net)  # the reference's rows are normalised without it, hence two sets of maps
        alone, own = reference.numpy(), images[row:row + 1].numpy()
        for size in (16, 8, 4):
            alone, own = (conv(x, weights[f"blocks.{size}.0.weight"], weights.get(f"blocks.{size}.0.bias", 0.0), 2, 1)
                          for x in (alone, own))
            if size < 16:
                scale, shift = weights[f"blocks.{size}.1.weight"], weights[f"blocks.{size}.1.bias"]
                own = standardised(np.concatenate([alone, own]), (0, 2, 3), scale, shift)[-1:]
                alone = standardised(alone, (0, 2, 3), scale, shift)
            alone, own = (np.where(x > 0, x, 0.2 * x) for x in (alone, own))
        score = (own * weights["verdict.score.weight"]).sum() + weights["verdict.score.bias"][0]
        assert net(images)[row].item() == pytest.approx(score, abs=1e-9)


def test_the_reference_is_saved_with_the_weights_and_comes_back():
    net, other = (DcganDiscriminator(dcgan(discriminator_norm="virtual"), 16, 3, REFERENCES) for _ in range(2))
    initialise(net, 0, "discriminator")
    net.set_reference(torch.randn(REFERENCES, 3, 16, 16))
    assert net.state_dict()["reference"].dtype == torch.float32
    other.load_state_dict(net.state_dict())
    images = torch.randn(4, 3, 16, 16)
    assert torch.equal(net(images), other(images))
    with pytest.raises(ValueError, match="virtual batch norm: 2 images"):
        net.set_reference(torch.randn(2, 3, 16, 16))


def cross_gradients(net: Differentiable, images: Tensor, labels: Tensor | None = None) -> Tensor:
    """[N, N]: how much each image (column) moves each score (row)."""
    images = images.requires_grad_()
    scores = net.judged(images, labels).scores
    return torch.stack([torch.autograd.grad(score, images, retain_graph=True)[0].abs().sum(dim=(1, 2, 3))
                        for score in scores])


@pytest.mark.parametrize("norm", ["instance", "virtual", "none"])
def test_without_batch_norm_a_score_depends_on_its_own_image_alone(norm):
    moved = cross_gradients(discriminator(dcgan(discriminator_norm=norm)), noise(4, 3, 16, 16))
    assert (moved.diagonal() > 0).all()
    assert torch.equal(moved, moved.diagonal().diag())


@pytest.mark.parametrize("network", [
    dcgan(discriminator_norm="batch"), dcgan(discriminator_norm="none", minibatch="stddev"),
    dcgan(discriminator_norm="instance", minibatch="discrimination"), mlp("stddev"), mlp("discrimination")])
def test_a_score_depends_on_its_batch_where_that_is_asked_for(network):
    net = discriminator(network)
    images = noise(4, 3, 16, 16) * 0.01  # near enough for a kernel of discrimination to tell them apart
    assert (cross_gradients(net, images) > 0).all()


@pytest.mark.parametrize("network", [mlp(), dcgan(discriminator_norm="batch")])
def test_sampling_and_perceptrons_keep_samples_apart(network):
    net = discriminator(network).eval()
    moved = cross_gradients(net, noise(4, 3, 16, 16))
    assert torch.equal(moved, moved.diagonal().diag())


@pytest.mark.parametrize("norm", ["batch", "instance", "pixel", "none"])
def test_only_batch_norm_lets_generated_images_depend_on_each_other(norm):
    net, latents = filled(DcganGenerator(dcgan(generator_norm=norm), 16, 3)), noise(4, LATENTS)
    together, alone = net(latents), torch.cat([net(latents[:2]), net(latents[2:])])
    assert torch.allclose(together, alone) == (norm != "batch")
    net.eval()
    torch.testing.assert_close(net(latents), torch.cat([net(row[None]) for row in latents]))


def test_reals_and_fakes_meet_batch_norm_apart():
    net = discriminator(dcgan(discriminator_norm="batch"))
    reals, fakes = noise(4, 3, 16, 16), 3 + 5 * noise(4, 3, 16, 16, seed=2)
    judgement, _ = net.linearised(torch.cat([reals, fakes]), sets=2)
    apart = torch.cat([net(reals), net(fakes)])
    torch.testing.assert_close(judgement.scores, apart)
    assert not torch.allclose(net(torch.cat([reals, fakes])), apart, rtol=0.1)


# ---- The gradient that penalties need


CONDITIONS = [{}, *({"conditioning": kind, "classes": CLASSES} for kind in ("concatenated", "projection"))]


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("network", [
    dcgan(discriminator_norm="none", minibatch="stddev"), dcgan(discriminator_norm="instance", pooling="mean"),
    dcgan(discriminator_norm="virtual", minibatch="stddev"), mlp("stddev")])
def test_pull_is_the_slope_of_the_scores(network, condition):
    net, images = discriminator(dataclasses.replace(network, **condition)), noise(8, 3, 16, 16)
    weights, labels = noise(4, seed=3), one_hot(8) if condition else None
    _, pull = net.linearised(images, sets=2, labels=labels)
    gradient, way, step = pull(weights), noise(4, 3, 16, 16, seed=4), 1e-6
    with torch.no_grad():
        ahead, behind = (net(images[4:] + sign * step * way, labels=labels[4:] if labels is not None else None)
                         for sign in (1, -1))
    slope = ((ahead - behind) * weights).sum() / (2 * step)
    torch.testing.assert_close((gradient * way).sum(), slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("network", [dcgan(discriminator_norm="none"), dcgan(discriminator_norm="instance"),
                                     dcgan(discriminator_norm="virtual"), dcgan(minibatch="stddev", pooling="mean",
                                     discriminator_norm="none"), mlp("stddev")])
def test_a_penalty_on_the_slope_has_a_gradient_by_the_weights(network):
    """Against its own finite differences along a random way through all weights."""
    net, images = discriminator(network), noise(4, 3, 16, 16)
    parameters = list(net.parameters())
    way = [noise(*parameter.shape, seed=10 + index) for index, parameter in enumerate(parameters)]

    def penalty() -> Tensor:
        return net.linearised(images)[1](torch.ones(4, dtype=torch.float64)).square().sum()

    gradients = torch.autograd.grad(penalty(), parameters, allow_unused=True)
    expected = sum(float((gradient * step).sum()) for gradient, step in zip(gradients, way, strict=True)
                   if gradient is not None)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, step in zip(parameters, way, strict=True):
                parameter.add_(sign * 1e-6 * step)
        values.append(penalty().item())
        with torch.no_grad():
            for parameter, step in zip(parameters, way, strict=True):
                parameter.sub_(sign * 1e-6 * step)
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(expected, rel=1e-4)


# ---- Several samples at once


def test_discrimination_counts_how_near_the_others_are_in_each_kernel():
    net, x = filled(Discrimination(4)), 0.3 * noise(5, 4)
    tensor = net.weight.detach().numpy()
    expected = np.zeros((5, KERNELS))
    for row in range(5):
        for other in range(5):
            for kernel in range(KERNELS):
                distance = sum(abs(x[row].numpy() @ tensor[:, kernel, c] - x[other].numpy() @ tensor[:, kernel, c])
                               for c in range(tensor.shape[2]))
                expected[row, kernel] += math.exp(-distance)
    np.testing.assert_allclose(net(x).detach().numpy(), expected, atol=1e-9)


def test_discrimination_of_a_collapsed_batch_is_its_size_and_of_a_scattered_one_is_one():
    net = filled(Discrimination(4))
    torch.testing.assert_close(net(noise(1, 4).expand(6, 4)), torch.full((6, KERNELS), 6.0, dtype=torch.float64))
    torch.testing.assert_close(net(1e4 * noise(6, 4)), torch.ones(6, KERNELS, dtype=torch.float64))


@pytest.mark.parametrize(("make", "kind"), [(dcgan, "dcgan"), (mlp, "mlp")])
def test_what_the_minibatch_tells_stands_behind_the_features(make, kind):
    images = noise(4, 3, 16, 16)
    without, stddev, discrimination = (discriminator(make(minibatch=minibatch)).judged(images, None).features
                                       for minibatch in ("none", "stddev", "discrimination"))
    places = without.shape[1] // {"dcgan": 8, "mlp": 7}[kind]  # a map has 4x4 of them, a perceptron's feature one
    assert stddev.shape[1] == without.shape[1] + places
    assert discrimination.shape[1] == without.shape[1] + KERNELS * places
    torch.testing.assert_close(stddev[:, :without.shape[1]], without)
    deviations = np.sqrt(without.detach().numpy().var(axis=0) + 1e-8).mean()  # one group of four
    np.testing.assert_allclose(stddev[:, without.shape[1]:].detach().numpy(), deviations)


@pytest.mark.parametrize("make", [dcgan, mlp])
def test_what_discrimination_tells_weighs_as_much_in_maps_as_among_single_features(make):
    net, images = discriminator(make(minibatch="discrimination")), 0.01 * noise(4, 3, 16, 16)
    features = net.judged(images, None).features
    before = features.shape[1] * (8 if make is dcgan else 7) // ((8 if make is dcgan else 7) + KERNELS)
    own = Discrimination(before).double()
    own.load_state_dict({"weight": net.state_dict()["verdict.discrimination.weight"]})
    told = features[:, before:].unflatten(1, (KERNELS, -1)).sum(dim=2)
    torch.testing.assert_close(told, own(features[:, :before]))


# ---- Dropout


def test_dropout_leaves_out_whole_maps_in_training_keeps_their_mean_and_rests_when_sampling():
    net = filled(DcganGenerator(dcgan(dropout=0.25, generator_norm="none"), 16, 3))
    maps: list[Tensor] = []
    block = net.blocks["4"]
    block[2].register_forward_hook(lambda module, inputs, output: maps.append(output))  # before dropout
    block.register_forward_hook(lambda module, inputs, output: maps.append(output))
    torch.manual_seed(0)
    net(noise(1, LATENTS).expand(2000, LATENTS))
    before, after = maps
    left = (after / before).nan_to_num(nan=-1)  # relu leaves zeros of its own
    assert {round(value, 9) for value in left.unique().tolist()} <= {-1, 0, round(4 / 3, 9)}
    alive = before.abs().sum(dim=(2, 3)) > 0
    out = (after.abs().sum(dim=(2, 3)) == 0)[alive].double().mean()
    assert out.item() == pytest.approx(0.25, abs=0.02)
    torch.testing.assert_close(after.mean(dim=0), before.mean(dim=0), rtol=0.1, atol=0.02)
    # all of a map or nothing: where a live map is kept, each of its live pixels is
    kept = (after != 0).sum(dim=(2, 3))[alive]
    assert ((kept == 0) | (kept == (before != 0).sum(dim=(2, 3))[alive])).all()

    net.eval()
    without = filled(DcganGenerator(dcgan(generator_norm="none"), 16, 3))
    torch.testing.assert_close(net(noise(3, LATENTS)), without(noise(3, LATENTS)))


# ---- Labels and codes


@pytest.mark.parametrize("make", [dcgan, mlp])
def test_concatenated_labels_are_further_channels_of_the_image(make):
    network = dataclasses.replace(make(), conditioning="concatenated", classes=CLASSES)
    plain = dataclasses.replace(network, conditioning="none", classes=0)
    size = 1 if network.kind == "mlp" else 16  # of one pixel, a channel is one further number
    net, wider = discriminator(network, size, 2), discriminator(plain, size, 2 + CLASSES)
    images, labels = noise(4, 2, size, size), one_hot(4)
    maps = torch.zeros(4, CLASSES, size, size, dtype=torch.float64)
    for row in range(4):
        maps[row, row % CLASSES] = 1
    torch.testing.assert_close(net(images, labels=labels), wider(torch.cat([images, maps], dim=1)))
    with pytest.raises(ValueError, match="give it the images' labels"):
        net(images)


@pytest.mark.parametrize("make", [dcgan, mlp])
def test_projection_adds_the_product_of_the_features_and_the_labels_own_vector(make):
    network = dataclasses.replace(make(), conditioning="projection", classes=CLASSES)
    net, images = discriminator(network), noise(4, 3, 16, 16)
    judgement = net.judged(images, one_hot(4))
    features, weights = judgement.features.detach().numpy(), weights_of(net)
    for row in range(4):
        own = features[row] @ weights["verdict.score.weight"].reshape(-1) + weights["verdict.score.bias"][0]
        own += features[row] @ weights["verdict.labels.weight"][row % CLASSES].reshape(-1)
        assert judgement.scores[row].item() == pytest.approx(own)
    with pytest.raises(ValueError, match="give it the images' labels"):
        net(images)


@pytest.mark.parametrize("make", [dcgan, mlp])
def test_an_auxiliary_classifier_and_codes_are_told_beside_the_score_and_read_no_label(make):
    network = dataclasses.replace(make(), conditioning="auxiliary", classes=CLASSES, codes=4, continuous_codes=2)
    net, images = discriminator(network), noise(4, 3, 16, 16)
    judgement, weights = net.judged(images, one_hot(4)), weights_of(net)
    kernel = weights["verdict.heads.weight"].reshape(CLASSES + 4 + 2, -1)
    expected = judgement.features.detach().numpy() @ kernel.T + weights["verdict.heads.bias"]
    np.testing.assert_allclose(judgement.heads.detach().numpy(), expected)
    torch.testing.assert_close(judgement.scores, net(images))


@pytest.mark.parametrize("make", [lambda n: DcganGenerator(n, 8, 3), lambda n: MlpGenerator(n, 1, 2)])
def test_labels_and_codes_enter_the_generator_with_the_latents(make):
    network = dataclasses.replace(mlp(), conditioning="auxiliary", classes=CLASSES, codes=4, continuous_codes=2)
    net, latents = filled(make(network)).eval(), noise(1, LATENTS + CLASSES + 4 + 2).requires_grad_()
    (gradient,) = torch.autograd.grad(net(latents).square().sum(), latents)
    assert (gradient != 0).all()


def test_the_reference_has_label_channels_too():
    plain = dcgan(discriminator_norm="virtual")
    net = discriminator(dataclasses.replace(plain, conditioning="concatenated", classes=CLASSES), 16, 2)
    wider = discriminator(plain, 16, 2 + CLASSES)
    images, reference = noise(CLASSES, 2, 16, 16), noise(REFERENCES, 2, 16, 16, seed=7)
    maps = [torch.stack([torch.full((16, 16), float(row % CLASSES == label), dtype=torch.float64)
                         for label in range(CLASSES)]) for row in range(REFERENCES)]
    assert isinstance(wider, DcganDiscriminator)
    wider.set_reference(torch.cat([reference, torch.stack(maps)], dim=1))
    torch.testing.assert_close(net(images, labels=one_hot(CLASSES)),
                               wider(torch.cat([images, torch.stack(maps[:CLASSES])], dim=1)))


# ---- Perceptrons


def test_a_perceptron_is_what_numpy_makes_of_its_weights():
    generator, judge = filled(MlpGenerator(mlp(), 1, 2)), discriminator(mlp(), 1, 2)
    latents = noise(4, LATENTS)

    def hidden(net: nn.Module, x: Array) -> Array:
        weights = weights_of(net)
        for layer in range(3):
            x = x @ weights[f"hidden.layers.{layer}.weight"].T + weights[f"hidden.layers.{layer}.bias"]
            x = np.where(x > 0, x, 0.2 * x)
        return x

    weights = weights_of(generator)
    points = hidden(generator, latents.numpy()) @ weights["output.weight"].T + weights["output.bias"]
    assert generator(latents).shape == (4, 2, 1, 1)
    np.testing.assert_allclose(generator(latents).detach().numpy()[:, :, 0, 0], points)
    weights = weights_of(judge)
    features = hidden(judge, points)
    scores = features @ weights["verdict.score.weight"].reshape(-1) + weights["verdict.score.bias"]
    judgement = judge.judged(generator(latents), None)
    np.testing.assert_allclose(judgement.features.detach().numpy(), features)
    np.testing.assert_allclose(judgement.scores.detach().numpy(), scores)


def test_points_are_not_rounded_to_bfloat16():
    """Its eight bits leave 0.7 steps of 0.004; a mode is 0.05 wide, and the density is looked at more closely yet."""
    net = MlpGenerator(mlp(), 1, 2)
    initialise(net, 0, "generator")
    points = net(torch.randn(64, LATENTS), dtype=torch.bfloat16)
    assert points.dtype == torch.float32
    assert (points != points.bfloat16().float()).float().mean() > 0.9


@pytest.mark.parametrize("size", [8, 16])
def test_a_perceptron_makes_and_judges_images_too(size):
    images = MlpGenerator(mlp(), size, 3)(torch.randn(4, LATENTS))
    assert images.shape == (4, 3, size, size)
    assert MlpDiscriminator(mlp(), size, 3)(images).shape == (4,)


# ---- The start


def test_the_weights_of_a_normed_dcgan_start_as_the_paper_has_them():
    network = Network(kind="dcgan", latent_size=100, fmap_base=512, fmap_max=128)
    for net in (DcganGenerator(network, 32, 3), DcganDiscriminator(network, 32, 3)):
        initialise(net, 0, "either")
        norms = {name for name, module in net.named_modules() if isinstance(module, BatchNorm)}
        for name, parameter in net.named_parameters():
            owner, _, kind = name.rpartition(".")
            if kind == "bias":
                assert not parameter.any()
            else:
                assert parameter.mean().item() == pytest.approx(1 if owner in norms else 0, abs=0.01)
                assert parameter.std().item() == pytest.approx(0.02, rel=0.25)


@pytest.mark.parametrize("width", [8, 64])
@pytest.mark.parametrize("layers", [{"upsampling": "transposed", "pooling": "stride"}, {"upsampling": "nearest"},
                                    {"upsampling": "shuffle", "pooling": "mean"}])
def test_without_norms_signals_neither_fade_nor_explode_whatever_the_width(width, layers):
    network = Network(kind="dcgan", latent_size=64, fmap_base=10**6, fmap_max=width, output="linear",
                      layers=Layers(generator_norm="none", discriminator_norm="none", **layers))
    generator, judge = DcganGenerator(network, 64, 3), DcganDiscriminator(network, 64, 3)
    initialise(generator, 0, "generator")
    initialise(judge, 0, "discriminator")
    images = generator(torch.randn(16, 64, generator=torch.Generator().manual_seed(0)))
    assert 0.1 < images.std().item() < 3
    features = judge.judged(torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(1)), None).features
    assert 0.05 < features.square().mean().sqrt().item() < 3


@pytest.mark.parametrize("depth", [1, 8])
def test_a_deep_perceptron_starts_with_signals_as_large_as_a_shallow_one(depth):
    network = Network(kind="mlp", latent_size=128, mlp=Perceptron(width=256, depth=depth))
    net = MlpGenerator(network, 1, 2)
    initialise(net, 0, "generator")
    points = net(torch.randn(512, 128, generator=torch.Generator().manual_seed(0)))
    assert 0.5 < points.square().mean().sqrt().item() < 2


@pytest.mark.parametrize("network", [dcgan(), dcgan(generator_norm="pixel", upsampling="shuffle"), mlp()])
def test_a_generator_can_be_exported_for_any_number_of_latents(network):
    net = (MlpGenerator(network, 1, 2) if network.kind == "mlp" else DcganGenerator(network, 16, 3)).eval()
    initialise(net, 0, "generator")
    program = torch.export.export(net.requires_grad_(False), (torch.zeros(2, LATENTS),),
                                  dynamic_shapes={"latents": {0: torch.export.Dim("batch", min=1)}})
    latents = torch.randn(7, LATENTS)
    torch.testing.assert_close(program.module()(latents), net(latents))
