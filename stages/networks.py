"""Generator and discriminator of Karras et al. 2018, one block per resolution.

Images are [N, image_channels, H, W] in [-1, 1], gray ones too pass `to_rgb` and `from_rgb`; latents are
[N, latent_size]. `alpha` is the weight of the newest block: 0 shows only the older blocks, 1 only the new one.
A network owns exactly the layers its stage uses, named by resolution (`blocks.16`, `to_rgb.16`), so that growing is
`load_state_dict(strict=False)`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradine.configs.schema import Network
from gradine.stages.growth import channels, group_size, random_seed, resolutions

ROOT2 = math.sqrt(2)


class EqualizedConv(nn.Module):
    """k x k convolution, same size; the weight is N(0, 1) and scaled by gain / sqrt(fan_in) when used (section 4.1)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, gain: float = ROOT2) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.scale = gain / math.sqrt(kernel * kernel * inputs)
        self.padding = kernel // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.scale, self.bias, padding=self.padding)


class EqualizedDense(nn.Module):
    """[N, inputs] -> [N, outputs], scaled like `EqualizedConv`; `bias_repeats` values share one bias."""

    def __init__(self, inputs: int, outputs: int, gain: float = ROOT2, bias_repeats: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs // bias_repeats))
        self.scale = gain / math.sqrt(inputs)
        self.bias_repeats = bias_repeats

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias.repeat_interleave(self.bias_repeats))


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def pixel_norm(x: Tensor) -> Tensor:
    """Each pixel's (or latent's) vector to unit mean square over channels; the mean is taken in float32."""
    mean_square = at_least_float32(x).square().mean(dim=1, keepdim=True)
    return x * torch.rsqrt(mean_square + 1e-8).to(x.dtype)


def upscale(images: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C, 2H, 2W], each pixel four times."""
    return F.interpolate(images, scale_factor=2, mode="nearest")


def box_downscale(images: Tensor) -> Tensor:
    """[N, C, 2H, 2W] -> [N, C, H, W], the mean of each 2x2 box."""
    return F.avg_pool2d(images, 2)


def minibatch_stddev(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C+1, H, W]: one scalar per strided group of 4, as the last channel (section 3).

    Raises ValueError where the group size does not divide N.
    """
    batch, _, height, width = x.shape
    size = group_size(batch)
    if batch % size:
        raise ValueError(f"minibatch stddev: a batch of {batch} does not split into groups of {size}.")
    grouped = at_least_float32(x).view(size, batch // size, *x.shape[1:])
    deviation = (grouped.var(dim=0, correction=0) + 1e-8).sqrt().mean(dim=(1, 2, 3))
    extra = deviation.repeat(size).view(batch, 1, 1, 1).expand(batch, 1, height, width)
    return torch.cat([x, extra.to(x.dtype)], dim=1)


class SeedBlock(nn.Module):
    """[N, latent] -> [N, C, 4, 4]."""

    def __init__(self, latent_size: int, width: int) -> None:
        super().__init__()
        self.dense = EqualizedDense(latent_size, width * 16, gain=ROOT2 / 4, bias_repeats=16)
        self.conv = EqualizedConv(width, width, 3)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.dense(latents).unflatten(1, (-1, 4, 4))
        x = pixel_norm(F.leaky_relu(x, 0.2))
        return pixel_norm(F.leaky_relu(self.conv(x), 0.2))


class UpBlock(nn.Module):
    """[N, in, H, W] -> [N, out, 2H, 2W]: nearest upscale, two 3x3 convolutions."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv0 = EqualizedConv(inputs, outputs, 3)
        self.conv1 = EqualizedConv(outputs, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = pixel_norm(F.leaky_relu(self.conv0(upscale(x)), 0.2))
        return pixel_norm(F.leaky_relu(self.conv1(x), 0.2))


class DownBlock(nn.Module):
    """[N, in, 2H, 2W] -> [N, out, H, W]: two 3x3 convolutions, 2x2 mean."""

    def __init__(self, inputs: int, outputs: int, pool_before_activation: bool) -> None:
        super().__init__()
        self.conv0 = EqualizedConv(inputs, inputs, 3)
        self.conv1 = EqualizedConv(inputs, outputs, 3)
        self.pool_before_activation = pool_before_activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(F.leaky_relu(self.conv0(x), 0.2))
        if self.pool_before_activation:
            return F.leaky_relu(box_downscale(x), 0.2)
        return box_downscale(F.leaky_relu(x, 0.2))


class ScoreBlock(nn.Module):
    """[N, C, 4, 4] -> [N]: minibatch stddev, one convolution, two dense layers; the score is raw."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.conv = EqualizedConv(width + 1, width, 3)
        self.dense0 = EqualizedDense(width * 16, hidden)
        self.dense1 = EqualizedDense(hidden, 1, gain=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv(minibatch_stddev(x)), 0.2)
        x = F.leaky_relu(self.dense0(x.flatten(1)), 0.2)
        return at_least_float32(self.dense1(x).squeeze(1))


class FromRGB(nn.Module):
    """[N, image_channels, H, W] -> [N, C, H, W]."""

    def __init__(self, outputs: int, image_channels: int = 3) -> None:
        super().__init__()
        self.conv = EqualizedConv(image_channels, outputs, 1)

    def forward(self, images: Tensor) -> Tensor:
        return F.leaky_relu(self.conv(images), 0.2)


class Generator(nn.Module):
    """Latents [N, latent_size] -> images [N, image_channels, R, R], about [-1, 1] (the output is linear)."""

    def __init__(self, network: Network, resolution: int, fades: bool, image_channels: int = 3) -> None:
        """`fades`: the stage grew out of a smaller one, whose to-RGB it therefore blends with."""
        super().__init__()
        self.blocks = nn.ModuleDict()
        for size in resolutions(resolution):
            width = channels(network, size)
            self.blocks[str(size)] = (SeedBlock(network.latent_size, width) if size == 4
                                      else UpBlock(channels(network, size // 2), width))
        sizes = [resolution // 2, resolution] if fades else [resolution]
        self.to_rgb = nn.ModuleDict({str(s): EqualizedConv(channels(network, s), image_channels, 1, gain=1)
                                     for s in sizes})

    def forward(self, latents: Tensor, alpha: float = 1.0) -> Tensor:
        x = older = pixel_norm(latents)
        for block in self.blocks.values():
            older, x = x, block(x)
        *faded, newest = self.to_rgb.values()
        images = at_least_float32(newest(x))
        for to_rgb in faded:  # none, or the one older to-RGB
            images = torch.lerp(upscale(at_least_float32(to_rgb(older))), images, alpha)
        return images


class Discriminator(nn.Module):
    """Images [N, image_channels, R, R] -> raw scores [N]. Samples of a stddev group see each other, others do not."""

    def __init__(self, network: Network, resolution: int, fades: bool, image_channels: int = 3) -> None:
        super().__init__()
        sizes = [resolution // 2, resolution] if fades else [resolution]
        self.from_rgb = nn.ModuleDict({str(s): FromRGB(channels(network, s), image_channels) for s in sizes})
        self.blocks = nn.ModuleDict()
        for size in reversed(list(resolutions(resolution))):
            width = channels(network, size)
            if size == 4:
                self.blocks["4"] = ScoreBlock(width, min(network.fmap_base, network.fmap_max))
            else:
                self.blocks[str(size)] = DownBlock(width, channels(network, size // 2), network.pool_before_activation)

    def forward(self, images: Tensor, alpha: float = 1.0) -> Tensor:
        *faded, newest = self.from_rgb.values()
        first, *rest = self.blocks.values()
        x = first(newest(images))
        for from_rgb in faded:
            older = from_rgb(box_downscale(images))
            x = torch.lerp(at_least_float32(older), at_least_float32(x), alpha).to(x.dtype)
        for block in rest:
            x = block(x)
        return x


@torch.no_grad()
def initialise(network: nn.Module, seed: int, role: str) -> None:
    """Weights N(0, 1), biases 0; each a function of (seed, role, its name), whatever the stage it enters in."""
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        else:
            source = torch.Generator().manual_seed(random_seed(seed, f"init/{role}/{name}"))
            parameter.copy_(torch.randn(parameter.shape, generator=source))
