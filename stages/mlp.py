"""Fully connected generator and discriminator, for images and for points, which are images of 1x1 px with two channels.

Images are [N, C, R, R]; latents [N, input_size], the label and codes among them. Both have `depth` hidden layers of
`width` with leaky relu and, where nothing else is said, a linear output: points may lie anywhere.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradine.configs.schema import Network
from gradine.stages.networks import SLOPE, Differentiable, Judgement, at_least_float32, computed_in
from gradine.stages.verdict import Verdict, inputs_of


class Hidden(nn.Module):
    """[N, inputs] -> [N, width]."""

    def __init__(self, network: Network, inputs: int) -> None:
        super().__init__()
        widths = [inputs] + [network.mlp.width] * network.mlp.depth
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.leaky_relu(layer(x), SLOPE)
        return x


class MlpGenerator(nn.Module):
    """Latents [N, input_size] -> images [N, C, R, R]."""

    def __init__(self, network: Network, resolution: int, image_channels: int) -> None:
        super().__init__()
        self.resolution, self.bounded = resolution, network.bounded
        self.hidden = Hidden(network, network.input_size)
        self.output = nn.Linear(network.mlp.width, image_channels * resolution**2)

    def forward(self, latents: Tensor, alpha: float | Tensor = 1.0, dtype: torch.dtype | None = None) -> Tensor:  # noqa: ARG002
        with computed_in(dtype, latents):
            x = self.hidden(latents)
        images = self.output(at_least_float32(x))  # never in bfloat16, which would round points to three digits
        images = images.unflatten(1, (-1, self.resolution, self.resolution))
        return images.tanh() if self.bounded else images

    def initial(self, name: str, parameter: Tensor) -> tuple[float, float]:
        return he_normal(self, name, parameter)


class MlpDiscriminator(Differentiable):
    """Images [N, C, R, R] -> Judgement. Its features are the last hidden layer and what the minibatch tells."""

    def __init__(self, network: Network, resolution: int, image_channels: int) -> None:
        super().__init__()
        self.joined = network.classes if network.conditioning == "concatenated" else 0
        self.hidden = Hidden(network, image_channels * resolution**2 + self.joined)
        self.verdict = Verdict(network, network.mlp.width, 1, network.mlp.minibatch)

    def judged(self, images: Tensor, labels: Tensor | None) -> Judgement:
        x = images.flatten(1)
        if self.joined:
            if labels is None:
                raise ValueError("this discriminator is conditional: give it the images' labels")
            x = torch.cat([x, labels.to(x.dtype)], dim=1)
        judgement: Judgement = self.verdict(self.hidden(x)[:, :, None, None], labels)
        return judgement

    def initial(self, name: str, parameter: Tensor) -> tuple[float, float]:
        return he_normal(self, name, parameter)


def he_normal(network: nn.Module, name: str, parameter: Tensor) -> tuple[float, float]:  # noqa: ARG001
    """Mean and deviation a parameter starts with: a hidden layer keeps its inputs' mean square, biases are 0."""
    if name.endswith("bias"):
        return 0.0, 0.0
    gain = math.sqrt(2 / (1 + SLOPE**2)) if name.startswith("hidden") else 1.0
    return 0.0, gain / math.sqrt(inputs_of(network.get_submodule(name.rpartition(".")[0])))
