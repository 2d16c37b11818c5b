"""What a generator is given: [N, input_size] = noise | label, one-hot | code, one-hot | continuous codes.

The condition is a part of the latents, so whoever samples, averages or inverts a generator needs to know nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gradine.configs.schema import Network


@dataclass(frozen=True)
class Parts:
    """Where in the latents what lies."""

    noise: slice
    label: slice
    code: slice
    continuous: slice

    @staticmethod
    def of(network: Network) -> Parts:
        label = network.latent_size + network.classes
        code = label + network.codes
        return Parts(slice(0, network.latent_size), slice(network.latent_size, label), slice(label, code),
                     slice(code, network.input_size))


def noise(network: Network, count: int, source: torch.Generator) -> Tensor:
    """[count, latent_size]: N(0, 1); uniform in -1..1; or on the sphere of radius sqrt(latent_size)."""
    size = network.latent_size
    match network.latents:
        case "uniform":
            return torch.rand(count, size, generator=source) * 2 - 1
        case "sphere":
            return F.normalize(torch.randn(count, size, generator=source), dim=1) * size**0.5
        case _:
            return torch.randn(count, size, generator=source)


def draw(network: Network, count: int, source: torch.Generator, labels: Tensor | None = None) -> Tensor:
    """[count, input_size]. labels: int64 [count]; None: 0, 1, 2, ... in turn. Codes are drawn."""
    drawn = noise(network, count, source)
    if network.input_size == network.latent_size:
        return drawn
    labels = torch.arange(count) % max(1, network.classes) if labels is None else labels
    codes = torch.randint(max(1, network.codes), (count,), generator=source)
    continuous = torch.rand(count, network.continuous_codes, generator=source) * 2 - 1
    return torch.cat([drawn, one_hot(labels, network.classes), one_hot(codes, network.codes), continuous], dim=1)


def one_hot(numbers: Tensor, classes: int) -> Tensor:
    """int64 [N] -> float32 [N, classes]; [N, 0] for no classes."""
    return (numbers[:, None] == torch.arange(classes)).float()
