"""Convolutional networks of one resolution: DCGAN (Radford et al. 2016), and the two halves of an autoencoder.

Images are [N, C, R, R] in [-1, 1]; latents [N, input_size], the label and codes among them. The block of size s ends in
maps of s x s with `growth.channels(network, s)` channels; a generator's go from 4 to R/2, a discriminator's back. No
layer is fully connected: latents enter by a transposed convolution, scores leave by one of 4x4 (verdict.py).

As in the paper no norm follows G's last layer or D's first. Maps may be bfloat16, norms and their statistics never are.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradine.configs.schema import Layers, Network
from gradine.stages.growth import channels, resolutions
from gradine.stages.networks import (
    SLOPE,
    Differentiable,
    Judgement,
    at_least_float32,
    computed_in,
    pixel_norm,
    with_label_maps,
)
from gradine.stages.verdict import Discrimination, Verdict, inputs_of

EPSILON = 1e-5  # added to variances
DEVIATION = 0.02  # of weights at the start (section 3 of the paper)


class Norm(nn.Module):
    """A scale and a shift for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def scaled(self, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """float32 maps to mean 0 and variance 1, scaled and shifted."""
        inverse = torch.rsqrt(variance + EPSILON)
        return (x - mean) * inverse * self.weight[:, None, None] + self.bias[:, None, None]


class BatchNorm(Norm):
    """By the batch's mean and variance in training, else by their running means: torch's, without its int64 counter."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias,  # sums in their float32
                            training=self.training, momentum=0.1, eps=EPSILON)


class InstanceNorm(Norm):
    """By the mean and variance of each sample's own map."""

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(at_least_float32(x), dim=(2, 3), correction=0, keepdim=True)
        return self.scaled(at_least_float32(x), mean, variance).to(x.dtype)


class VirtualBatchNorm(Norm):
    """By a fixed batch joined with the sample itself, as one of n + 1 (Salimans et al. 2016).

    [n + N, C, H, W] of which the first n are the fixed batch, normalised by itself: no sample depends on its batch.
    """

    def __init__(self, width: int, reference_count: int) -> None:
        super().__init__(width)
        self.reference_count = reference_count

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(x)
        reference, own = wide.split([self.reference_count, len(x) - self.reference_count])
        variance, mean = torch.var_mean(reference, dim=(0, 2, 3), correction=0, keepdim=True)
        own_variance, own_mean = torch.var_mean(own, dim=(2, 3), correction=0, keepdim=True)
        share = 1 / (self.reference_count + 1)
        # variances of parts add up with that of the parts' means; squares minus a squared mean would cancel
        joined_variance = (torch.lerp(variance, own_variance, share)
                           + share * (1 - share) * (own_mean - mean).square())
        joined_mean = torch.lerp(mean, own_mean, share)
        return torch.cat([self.scaled(reference, mean, variance),
                          self.scaled(own, joined_mean, joined_variance)]).to(x.dtype)


class PixelNorm(nn.Module):
    """By the length of each pixel's vector over channels; nothing to learn."""

    def forward(self, x: Tensor) -> Tensor:
        return pixel_norm(x)


def norm(kind: str, width: int, reference_count: int = 0) -> nn.Module:
    match kind:
        case "batch":
            return BatchNorm(width)
        case "instance":
            return InstanceNorm(width)
        case "virtual":
            return VirtualBatchNorm(width, reference_count)
        case "pixel":
            return PixelNorm()
        case _:
            return nn.Identity()


def takes_off_mean(kind: str) -> bool:
    """Of a channel: then a bias before the norm would change nothing, and be moved by nothing but rounding."""
    return kind not in ("pixel", "none")


def growing(upsampling: str, inputs: int, outputs: int, bias: bool) -> nn.Module:
    """[N, inputs, H, W] -> [N, outputs, 2H, 2W]."""
    match upsampling:
        case "transposed":
            return nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1, bias=bias)
        case "nearest":
            return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias))
        case _:
            return nn.Sequential(nn.Conv2d(inputs, 4 * outputs, 3, padding=1, bias=bias), nn.PixelShuffle(2))


def shrinking(pooling: str, inputs: int, outputs: int, bias: bool) -> nn.Module:
    """[N, inputs, 2H, 2W] -> [N, outputs, H, W]."""
    if pooling == "stride":
        return nn.Conv2d(inputs, outputs, 4, stride=2, padding=1, bias=bias)
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias), nn.AvgPool2d(2))


class DcganGenerator(nn.Module):
    """Latents [N, input_size] -> images [N, C, R, R]; also the decoder of an autoencoder."""

    def __init__(self, network: Network, resolution: int, image_channels: int) -> None:
        super().__init__()
        layers = network.layers
        self.resolution, self.bounded = resolution, network.bounded
        self.normed = layers.generator_norm != "none"
        self.blocks = nn.ModuleDict()
        bias = not takes_off_mean(layers.generator_norm)
        for size in resolutions(resolution // 2):
            width = channels(network, size)
            # of 1x1: its stride shows nowhere, but tells `inputs_of` that each output meets a latent once
            enlarged = (nn.ConvTranspose2d(network.input_size, width, 4, stride=4, bias=bias) if size == 4
                        else growing(layers.upsampling, channels(network, size // 2), width, bias))
            self.blocks[str(size)] = nn.Sequential(
                enlarged, norm(layers.generator_norm, width),
                nn.ReLU() if layers.generator_activation == "relu" else nn.LeakyReLU(SLOPE),
                nn.Dropout2d(layers.dropout))  # whole maps, by torch's own generator
        self.output = growing(layers.upsampling, channels(network, resolution // 2), image_channels, bias=True)

    def forward(self, latents: Tensor, alpha: float | Tensor = 1.0, dtype: torch.dtype | None = None) -> Tensor:  # noqa: ARG002
        """dtype: what the convolutions compute in; None: what the latents are in."""
        x = latents[:, :, None, None]
        with computed_in(dtype, latents):
            for block in self.blocks.values():
                x = block(x)
            images = at_least_float32(self.output(x))
        return images.tanh() if self.bounded else images

    def initial(self, name: str, parameter: Tensor) -> tuple[float, float]:
        return initial(self, name, parameter, self.normed)


def down_blocks(network: Network, resolution: int, inputs: int, reference_count: int = 0) -> nn.Sequential:
    """Images [N, inputs, R, R] -> maps [N, channels(network, 4), 4, 4]."""
    layers: Layers = network.layers
    blocks = nn.Sequential()
    for size in reversed(list(resolutions(resolution // 2))):
        width = channels(network, size)
        kind = "none" if size == resolution // 2 else layers.discriminator_norm
        blocks.add_module(str(size), nn.Sequential(
            shrinking(layers.pooling, inputs, width, bias=not takes_off_mean(kind)),
            norm(kind, width, reference_count), nn.LeakyReLU(SLOPE)))
        inputs = width
    return blocks


class DcganDiscriminator(Differentiable):
    """Images [N, C, R, R] -> Judgement, of features [N, F]: the last maps, flattened, with what the minibatch tells.

    With virtual batch norm it holds the fixed batch, which every pass sends through the layers beside the images: give
    it reals once (`set_reference`). It is saved and loaded like a weight.
    """

    reference: Tensor | None

    def __init__(self, network: Network, resolution: int, image_channels: int, reference_count: int = 64) -> None:
        super().__init__()
        self.joined = network.classes if network.conditioning == "concatenated" else 0
        self.normed = network.layers.discriminator_norm != "none"
        virtual = network.layers.discriminator_norm == "virtual"
        inputs = image_channels + self.joined
        self.register_buffer("reference", torch.zeros(reference_count, inputs, resolution, resolution)
                             if virtual else None)
        self.blocks = down_blocks(network, resolution, inputs, reference_count)
        self.verdict = Verdict(network, channels(network, 4), 4, network.layers.minibatch)

    def set_reference(self, images: Tensor, labels: Tensor | None = None) -> None:
        """The fixed batch of virtual batch norm, [reference_count, C, R, R], as many as there are places for."""
        if self.reference is None or len(images) != len(self.reference):
            raise ValueError(f"virtual batch norm: {len(images)} images are not as many as the reference has places.")
        self.reference.copy_(self.with_labels(images, labels))

    def with_labels(self, images: Tensor, labels: Tensor | None) -> Tensor:
        return with_label_maps(images, labels) if self.joined else images

    def judged(self, images: Tensor, labels: Tensor | None) -> Judgement:
        x = self.with_labels(images, labels)
        if self.reference is None:
            maps = self.blocks(x)
        else:
            maps = self.blocks(torch.cat([self.reference.to(x.dtype), x]))[len(self.reference):]
        judgement: Judgement = self.verdict(maps, labels)
        return judgement

    def initial(self, name: str, parameter: Tensor) -> tuple[float, float]:
        return initial(self, name, parameter, self.normed)


class Encoder(nn.Module):
    """Images [N, C, R, R] -> [N, latent_size]; of a vae [N, 2 * latent_size], means and then log variances."""

    def __init__(self, network: Network, resolution: int, image_channels: int) -> None:
        super().__init__()
        self.normed = network.layers.discriminator_norm != "none"
        self.blocks = down_blocks(network, resolution, image_channels)
        outputs = network.latent_size * (2 if network.kind == "vae" else 1)
        self.output = nn.Conv2d(channels(network, 4), outputs, 4)

    def forward(self, images: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        with computed_in(dtype, images):
            return at_least_float32(self.output(self.blocks(images)).flatten(1))

    def initial(self, name: str, parameter: Tensor) -> tuple[float, float]:
        return initial(self, name, parameter, self.normed)


def initial(network: nn.Module, name: str, parameter: Tensor, normed: bool) -> tuple[float, float]:  # noqa: ARG001
    """Mean and deviation a parameter starts with: N(0, 0.02) for weights, N(1, 0.02) for those of norms, biases 0.

    Where no norms follow, 0.02 would let narrow networks fade out: there it is He's, which keeps the mean square.
    """
    if name.endswith("bias"):
        return 0.0, 0.0
    layer = network.get_submodule(name.rpartition(".")[0])
    if isinstance(layer, Norm):
        return 1.0, DEVIATION
    if isinstance(layer, Discrimination):  # distances of about 1 whatever the width: exp(-10) would tell nothing
        return 0.0, 1 / math.sqrt(inputs_of(layer))
    if normed:
        return 0.0, DEVIATION
    return 0.0, math.sqrt((2 if name.startswith("blocks") else 1) / inputs_of(layer))
