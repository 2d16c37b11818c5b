"""Which networks a run has: those of its `network.kind`.

A generator maps latents [N, input_size] to images; a discriminator images to a `Judgement`. Autoencoders have their
encoder in the discriminator's place: it too looks at images, learns by its own optimizer and is saved under that name.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from gradine.configs.schema import Network
from gradine.stages.dcgan import BatchNorm, DcganDiscriminator, DcganGenerator, Encoder
from gradine.stages.mlp import MlpDiscriminator, MlpGenerator
from gradine.stages.networks import Differentiable, Discriminator, Generator

AnyGenerator = Generator | MlpGenerator | DcganGenerator
AnyDiscriminator = Discriminator | Differentiable


def new_generator(network: Network, resolution: int, fades: bool, image_channels: int = 3) -> AnyGenerator:
    """`fades`: the stage grew out of a smaller one."""
    match network.kind:
        case "progressive":
            return Generator(network, resolution, fades, image_channels)
        case "mlp":
            return MlpGenerator(network, resolution, image_channels)
        case _:
            return DcganGenerator(network, resolution, image_channels)


def new_discriminator(network: Network, resolution: int, fades: bool, image_channels: int = 3) -> AnyDiscriminator:
    match network.kind:
        case "progressive":
            return Discriminator(network, resolution, fades, image_channels)
        case "mlp":
            return MlpDiscriminator(network, resolution, image_channels)
        case "dcgan":
            return DcganDiscriminator(network, resolution, image_channels)
        case _:
            return cast("AnyDiscriminator", Encoder(network, resolution, image_channels))  # in its place


def running_statistics(network: nn.Module) -> list[Tensor]:
    """What batch norms have seen so far, which belongs to the function that a network is when it is sampled."""
    return [statistic for module in network.modules() if isinstance(module, BatchNorm)
            for statistic in (module.running_mean, module.running_var)]
