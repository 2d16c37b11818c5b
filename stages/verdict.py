"""The last layer of a discriminator of one resolution: what it says of images, from feature maps [N, C, k, k].

Each output weighs every feature: a k x k convolution without padding, so that none of these networks is asked to be
fully connected only because of its score. k is 4 for convolutional networks, 1 for a perceptron's features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gradine.configs.schema import Network
from gradine.stages.networks import Judgement, at_least_float32, heads_size, minibatch_stddev

KERNELS, KERNEL_SIZE = 32, 5  # of minibatch discrimination: B numbers a sample, each from distances in C dimensions


class Discrimination(nn.Module):
    """[N, A] -> [N, B]: how close each sample is to its batch, by B learned measures (Salimans et al. 2016).

    M = x T, [N, B, C]; o(x_i)_b = sum over j of exp(-|M_ib - M_jb|_1). Its own term, j = i, is 1 for every sample.
    """

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, KERNELS, KERNEL_SIZE))  # T

    def forward(self, x: Tensor) -> Tensor:
        projected = at_least_float32(x @ self.weight.flatten(1)).unflatten(1, (KERNELS, KERNEL_SIZE))
        distances = (projected[:, None] - projected).abs().sum(dim=3)  # [N, N, B]
        return (-distances).exp().sum(dim=1)


class Verdict(nn.Module):
    """[N, width, k, k] -> Judgement: what the minibatch tells is joined as further maps, then score and heads."""

    def __init__(self, network: Network, width: int, size: int, minibatch: str) -> None:
        """size: k. minibatch: `stddev`, `discrimination` or `none`."""
        super().__init__()
        self.discrimination = Discrimination(width * size * size) if minibatch == "discrimination" else None
        self.stddev = minibatch == "stddev"
        inputs = width + self.stddev + (KERNELS if self.discrimination else 0)
        heads = heads_size(network)
        self.score = nn.Conv2d(inputs, 1, size)
        self.heads = nn.Conv2d(inputs, heads, size) if heads else None
        self.labels = (nn.Conv2d(inputs, network.classes, size, bias=False) if network.conditioning == "projection"
                       else None)  # projection: a vector for each label, whose product with the features it adds

    def forward(self, maps: Tensor, labels: Tensor | None) -> Judgement:
        if self.stddev:
            maps = minibatch_stddev(maps)[0]
        if self.discrimination:
            # shared out to a map's places, or 16 weights would learn from each number 16 times as fast as one
            extra = self.discrimination(maps.flatten(1)).to(maps.dtype) / maps[0, 0].numel()
            maps = torch.cat([maps, extra[:, :, None, None].expand(-1, -1, *maps.shape[2:])], dim=1)
        scores = at_least_float32(self.score(maps).flatten())
        if self.labels:
            if labels is None:
                raise ValueError("this discriminator is conditional: give it the images' labels")
            scores = scores + (at_least_float32(self.labels(maps).flatten(1)) * labels).sum(dim=1)
        features = maps.flatten(1)
        heads = self.heads(maps).flatten(1) if self.heads else features[:, :0]
        return Judgement(scores, at_least_float32(features), at_least_float32(heads))


def inputs_of(layer: nn.Module) -> float:
    """Numbers that each output of a layer is summed from."""
    match layer:
        case Discrimination():
            return layer.weight.shape[0]
        case nn.Linear():
            return layer.in_features
        case nn.ConvTranspose2d():  # a kernel's places meet an output in turn
            return layer.in_channels * math.prod(layer.kernel_size) / math.prod(layer.stride)
        case nn.Conv2d():
            return layer.in_channels * math.prod(layer.kernel_size)
        case _:
            raise TypeError(f"{type(layer).__name__} sums nothing")
