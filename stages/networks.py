"""Generator and discriminator of Karras et al. 2018, one block per resolution.

Images are [N, image_channels, H, W] in [-1, 1], gray ones too pass `to_rgb` and `from_rgb`; latents are
[N, latent_size]. `alpha` is the weight of the newest block: 0 shows only the older blocks, 1 only the new one.
A network owns exactly the layers its stage uses, named by resolution (`blocks.16`, `to_rgb.16`), so that growing is
`load_state_dict(strict=False)`. The latents of a conditional generator end with the label, one-hot (latents.py).

Parameters are float32; a network computes in `dtype`, except for norms, stddev, blends, images and scores, which are
float32 throughout. Every part of D also writes out its own derivative: `linearised(x)` gives its output y and `pull`,
which turns d score / d y into d score / d x, for the LAST rows of x, as many as it is given. The gradient penalty needs
that derivative as a function of the weights. Written out it takes one ordinary backward, where autograd of autograd
would build what nobody asks for, and no compiler would follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from gradine.configs.schema import Network
from gradine.stages.growth import channels, group_size, random_seed, resolutions

ROOT2 = math.sqrt(2)
SLOPE = 0.2  # of the leaky relu
Pull = Callable[[Tensor], Tensor]


class Judgement(NamedTuple):
    """What a discriminator says of N images; float32."""

    scores: Tensor  # [N], raw
    features: Tensor  # [N, F], of the layer before the score
    heads: Tensor  # [N, H]: logits of the label (auxiliary conditioning), logits of the code, the continuous codes


def heads_size(network: Network) -> int:
    """H: what a discriminator tells beside its score."""
    classes = network.classes if network.conditioning == "auxiliary" else 0
    return classes + network.codes + network.continuous_codes


# Nearest upscale and a 3x3 convolution w are one transposed convolution of stride 2 with the 4x4 kernel
# DOUBLING @ w @ DOUBLING.T: 4 multiplications an output instead of 9. A 3x3 convolution and the mean of 2x2 outputs are
# one convolution of stride 2, its kernel the same turned around and divided by 4: 4 a pixel instead of 9.
DOUBLING = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])


class EqualizedConv(nn.Module):
    """k x k convolution, same size; the weight is N(0, 1) and scaled by gain / sqrt(fan_in) when used (section 4.1)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, gain: float = ROOT2) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.scale = gain / math.sqrt(kernel * kernel * inputs)
        self.padding = kernel // 2

    def scaled(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Weight and bias as they are used: once for all uses in a pass."""
        return (self.weight * self.scale).to(dtype), self.bias.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, *self.scaled(x.dtype), padding=self.padding)


class UpConv(EqualizedConv):
    """[N, inputs, H, W] -> [N, outputs, 2H, 2W]: nearest upscale and 3x3 convolution as one."""

    mixing: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3)
        self.register_buffer("mixing", torch.kron(DOUBLING, DOUBLING), persistent=False)  # [16, 9]

    def forward(self, x: Tensor) -> Tensor:
        outputs, inputs = self.weight.shape[:2]
        weight = (self.weight * self.scale).to(x.dtype).permute(1, 2, 3, 0).flatten(1, 2)
        kernel = self.mixing.to(x.dtype).expand(inputs, 16, 9).bmm(weight)
        kernel = kernel.view(inputs, 4, 4, outputs).permute(0, 3, 1, 2)
        return F.conv_transpose2d(x, kernel, self.bias.to(x.dtype), stride=2, padding=1)


class PooledConv(EqualizedConv):
    """[N, inputs, 2H, 2W] -> [N, outputs, H, W]: 3x3 convolution and 2x2 mean as one, of stride 2 and padding 1."""

    mixing: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3)
        turned = DOUBLING.flip(0)
        self.register_buffer("mixing", torch.kron(turned, turned), persistent=False)  # [16, 9]

    def scaled(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        outputs, inputs = self.weight.shape[:2]
        mixing = (self.mixing * (self.scale / 4)).expand(outputs, 16, 9)
        kernel = mixing.bmm(self.weight.permute(0, 2, 3, 1).flatten(1, 2)).to(dtype)
        return kernel.view(outputs, 4, 4, inputs).permute(0, 3, 1, 2), self.bias.to(dtype)


class EqualizedDense(nn.Module):
    """[N, inputs] -> [N, outputs], scaled like `EqualizedConv`; `bias_repeats` values share one bias."""

    def __init__(self, inputs: int, outputs: int, gain: float = ROOT2, bias_repeats: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs // bias_repeats))
        self.scale = gain / math.sqrt(inputs)
        self.bias_repeats = bias_repeats

    def scaled(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return (self.weight * self.scale).to(dtype), self.bias.repeat_interleave(self.bias_repeats).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.scaled(x.dtype))


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def activated(x: Tensor) -> Tensor:
    """Leaky relu, in the place of `x`: a convolution's output, which its own backward does not need."""
    return F.leaky_relu_(x, SLOPE)


def pull_activated(gradient: Tensor, result: Tensor) -> Tensor:
    """The gradient before a leaky relu, from that after it; `result` may hold more rows, of which it takes the last.

    The slope's own derivative is zero almost everywhere, hence `detach`.
    """
    own = result.detach()[len(result) - len(gradient):]
    return torch.ops.aten.leaky_relu_backward(gradient, own, SLOPE, True)


class _PixelNorm(torch.autograd.Function):
    """Keeps its output, not its input: half of what autograd would keep, and a third of the passes over it."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        inverse = torch.rsqrt(length.square() / x.shape[1] + 1e-8).to(x.dtype)
        return x * inverse, inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:  # noqa: ARG004
        ctx.save_for_backward(*output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @once_differentiable  # or it would be differentiated wrongly: `inverse` counts as a constant
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> Tensor:
        y, inverse = ctx.saved_tensors
        wide = torch.promote_types(y.dtype, torch.float32)
        along = (gradient * y).mean(dim=1, keepdim=True, dtype=wide).to(y.dtype)
        return (gradient - y * along) * inverse


def pixel_norm(x: Tensor) -> Tensor:
    """Each pixel's (or latent's) vector to unit mean square over channels; means are taken in float32."""
    return _PixelNorm.apply(x)[0]


def shows_older(alpha: float | Tensor) -> bool:
    """At alpha 1 the older branch adds nothing and gets no gradient; a tensor's value is not asked: it may be far."""
    return isinstance(alpha, Tensor) or alpha < 1


def recomputed(block: Callable[..., Any], *inputs: Tensor) -> Any:
    """block(*inputs), which keeps nothing for the backward but the inputs, and computes the rest once more there."""
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)


def recomputed_linearised(block: DownBlock, x: Tensor) -> tuple[Tensor, Pull]:
    def pull(gradient: Tensor, own: Tensor) -> Tensor:
        return block.linearised(own)[1](gradient)

    y = recomputed(lambda own: block.linearised(own)[0], x)
    return y, lambda gradient: recomputed(pull, gradient, x[len(x) - len(gradient):])


def upscale(images: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C, 2H, 2W], each pixel four times."""
    return F.interpolate(images, scale_factor=2, mode="nearest")


def box_downscale(images: Tensor) -> Tensor:
    """[N, C, 2H, 2W] -> [N, C, H, W], the mean of each 2x2 box."""
    return F.avg_pool2d(images, 2)


def with_label_maps(images: Tensor, labels: Tensor | None) -> Tensor:
    """[N, C, H, W] and one-hot [N, classes] -> [N, C + classes, H, W]: each class a channel of zeros or ones."""
    if labels is None:
        raise ValueError("this discriminator is conditional: give it the images' labels")
    return torch.cat([images, labels.to(images.dtype)[:, :, None, None].expand(-1, -1, *images.shape[2:])], dim=1)


def minibatch_stddev(x: Tensor, sets: int = 1) -> tuple[Tensor, Pull]:
    """[N, C, H, W] -> [N, C+1, H, W]: one scalar per strided group of 4, as the last channel (section 3); and its pull.

    sets: minibatches that lie one after the other in x, each with groups of its own; the pull is of as many of the last
    as it is given rows of.
    Raises ValueError where the group size does not divide a minibatch.
    """
    batch, _, height, width = x.shape
    batch //= sets
    size = group_size(batch)
    if batch % size:
        raise ValueError(f"minibatch stddev: a batch of {batch} does not split into groups of {size}.")
    grouped = at_least_float32(x).unflatten(0, (sets, size, batch // size))
    centred = grouped - grouped.mean(dim=1, keepdim=True)
    deviation = (centred.square().mean(dim=1, keepdim=True) + 1e-8).sqrt()
    extra = deviation.mean(dim=(3, 4, 5), keepdim=True).expand(-1, size, -1, 1, height, width)

    def pull(gradient: Tensor) -> Tensor:
        last = slice(sets - len(gradient) // batch, None)
        of_rows = at_least_float32(gradient[:, -1:]).unflatten(0, (-1, size, batch // size))
        of_groups = of_rows.sum(dim=(1, 4, 5), keepdim=True)
        slope = centred[last] / deviation[last] / (size * x[0].numel())  # of each group's scalar
        return gradient[:, :-1] + (of_groups * slope).flatten(0, 2).to(gradient.dtype)

    return torch.cat([x, extra.flatten(0, 2).to(x.dtype)], dim=1), pull


class SeedBlock(nn.Module):
    """[N, latent] -> [N, C, 4, 4]."""

    def __init__(self, latent_size: int, width: int) -> None:
        super().__init__()
        self.dense = EqualizedDense(latent_size, width * 16, gain=ROOT2 / 4, bias_repeats=16)
        self.conv = EqualizedConv(width, width, 3)
        self.recomputes = False

    def forward(self, latents: Tensor) -> Tensor:
        x = self.dense(latents).unflatten(1, (-1, 4, 4))
        return pixel_norm(activated(self.conv(pixel_norm(activated(x)))))


class UpBlock(nn.Module):
    """[N, in, H, W] -> [N, out, 2H, 2W]: nearest upscale, two 3x3 convolutions."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv0 = UpConv(inputs, outputs)
        self.conv1 = EqualizedConv(outputs, outputs, 3)
        self.recomputes = False

    def forward(self, x: Tensor) -> Tensor:
        return pixel_norm(activated(self.conv1(pixel_norm(activated(self.conv0(x))))))


class DownBlock(nn.Module):
    """[N, in, 2H, 2W] -> [N, out, H, W]: two 3x3 convolutions, 2x2 mean."""

    def __init__(self, inputs: int, outputs: int, pool_before_activation: bool) -> None:
        super().__init__()
        self.conv0 = EqualizedConv(inputs, inputs, 3)
        self.conv1 = PooledConv(inputs, outputs) if pool_before_activation else EqualizedConv(inputs, outputs, 3)
        self.pool_before_activation = pool_before_activation
        self.recomputes = False

    def linearised(self, x: Tensor) -> tuple[Tensor, Pull]:
        kernel0, bias0 = self.conv0.scaled(x.dtype)
        kernel1, bias1 = self.conv1.scaled(x.dtype)
        stride = 2 if self.pool_before_activation else 1
        first = activated(F.conv2d(x, kernel0, bias0, padding=1))
        second = activated(F.conv2d(first, kernel1, bias1, stride=stride, padding=1))

        def pull(gradient: Tensor) -> Tensor:
            if not self.pool_before_activation:
                gradient = upscale(gradient / 4)
            gradient = F.conv_transpose2d(pull_activated(gradient, second), kernel1, stride=stride, padding=1)
            return F.conv_transpose2d(pull_activated(gradient, first), kernel0, padding=1)

        return second if self.pool_before_activation else box_downscale(second), pull


class ScoreBlock(nn.Module):
    """[N, C, 4, 4] -> Judgement: minibatch stddev, one convolution, two dense layers; the score is raw.

    Projection (Miyato and Koyama 2018) adds to the score the product of the features and a vector of the label's own.
    """

    def __init__(self, width: int, hidden: int, heads: int = 0, projected: int = 0) -> None:
        """heads: outputs beside the score. projected: classes whose labels are projected."""
        super().__init__()
        self.conv = EqualizedConv(width + 1, width, 3)
        self.dense0 = EqualizedDense(width * 16, hidden)
        self.dense1 = EqualizedDense(hidden, 1, gain=1)
        self.heads = EqualizedDense(hidden, heads, gain=1) if heads else None
        self.labels = EqualizedDense(hidden, projected, gain=1) if projected else None  # [classes, hidden], and a bias

    def linearised(self, x: Tensor, sets: int = 1, labels: Tensor | None = None) -> tuple[Judgement, Pull]:
        kernel, bias = self.conv.scaled(x.dtype)
        matrix0, bias0 = self.dense0.scaled(x.dtype)
        matrix1, bias1 = self.dense1.scaled(x.dtype)
        with_stddev, pull_stddev = minibatch_stddev(x, sets)
        first = activated(F.conv2d(with_stddev, kernel, bias, padding=1))
        second = activated(F.linear(first.flatten(1), matrix0, bias0))
        scores = F.linear(second, matrix1, bias1).squeeze(1)
        rows = matrix1  # the derivative of each score by its features
        if self.labels:
            if labels is None:
                raise ValueError("this discriminator is conditional: give it the images' labels")
            vectors, offsets = self.labels.scaled(x.dtype)
            chosen = labels.to(x.dtype)
            rows = rows + chosen @ vectors
            scores = scores + (second * (chosen @ vectors)).sum(1) + chosen @ offsets
        heads = F.linear(second, *self.heads.scaled(x.dtype)) if self.heads else second[:, :0]

        def pull(gradient: Tensor) -> Tensor:
            """gradient: [n], of the sum whose gradient is asked for by each score."""
            gradient = pull_activated(gradient[:, None].to(x.dtype) * rows[-len(gradient):], second)
            gradient = pull_activated((gradient @ matrix0).view(-1, *first.shape[1:]), first)
            return pull_stddev(F.conv_transpose2d(gradient, kernel, padding=1))

        return Judgement(*map(at_least_float32, (scores, second, heads))), pull


class FromRGB(nn.Module):
    """[N, image_channels, H, W] -> [N, C, H, W]."""

    def __init__(self, outputs: int, image_channels: int = 3) -> None:
        super().__init__()
        self.conv = EqualizedConv(image_channels, outputs, 1)

    def linearised(self, images: Tensor) -> tuple[Tensor, Pull]:
        kernel, bias = self.conv.scaled(images.dtype)
        y = activated(F.conv2d(images, kernel, bias))
        return y, lambda gradient: F.conv_transpose2d(pull_activated(gradient, y), kernel)


class Generator(nn.Module):
    """Latents [N, input_size] -> images [N, image_channels, R, R], about [-1, 1] (the output is linear, or tanh)."""

    def __init__(self, network: Network, resolution: int, fades: bool, image_channels: int = 3) -> None:
        """`fades`: the stage grew out of a smaller one, whose to-RGB it therefore blends with."""
        super().__init__()
        self.resolution, self.bounded = resolution, network.bounded
        self.blocks = nn.ModuleDict()
        for size in resolutions(resolution):
            width = channels(network, size)
            self.blocks[str(size)] = (SeedBlock(network.input_size, width) if size == 4
                                      else UpBlock(channels(network, size // 2), width))
        sizes = [resolution // 2, resolution] if fades else [resolution]
        self.to_rgb = nn.ModuleDict({str(s): EqualizedConv(channels(network, s), image_channels, 1, gain=1)
                                     for s in sizes})

    def forward(self, latents: Tensor, alpha: float | Tensor = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """dtype: what the convolutions compute in; None: what the latents are in."""
        x = older = pixel_norm(latents).to(dtype or latents.dtype)
        for block in self.blocks.values():
            older, x = x, recomputed(block, x) if block.recomputes else block(x)
        *faded, newest = self.to_rgb.values()
        images = at_least_float32(newest(x))
        if faded and shows_older(alpha):
            images = torch.lerp(upscale(at_least_float32(faded[0](older))), images, alpha)
        return images.tanh() if self.bounded else images


class Discriminator(nn.Module):
    """Images [N, image_channels, R, R] -> raw scores [N]. Samples of a stddev group see each other, others do not."""

    def __init__(self, network: Network, resolution: int, fades: bool, image_channels: int = 3) -> None:
        super().__init__()
        sizes = [resolution // 2, resolution] if fades else [resolution]
        self.joined = network.classes if network.conditioning == "concatenated" else 0
        self.from_rgb = nn.ModuleDict({str(s): FromRGB(channels(network, s), image_channels + self.joined)
                                       for s in sizes})
        self.blocks = nn.ModuleDict()
        for size in reversed(list(resolutions(resolution))):
            width = channels(network, size)
            if size == 4:
                projected = network.classes if network.conditioning == "projection" else 0
                self.blocks["4"] = ScoreBlock(width, min(network.fmap_base, network.fmap_max), heads_size(network),
                                              projected)
            else:
                self.blocks[str(size)] = DownBlock(width, channels(network, size // 2), network.pool_before_activation)

    def forward(self, images: Tensor, alpha: float | Tensor = 1.0, dtype: torch.dtype | None = None,
                labels: Tensor | None = None) -> Tensor:
        """dtype: what the convolutions compute in; None: what the images are in. labels: one-hot [N, classes]."""
        return self.linearised(images, alpha, dtype, labels=labels)[0].scores

    def linearised(self, images: Tensor, alpha: float | Tensor = 1.0, dtype: torch.dtype | None = None,
                   sets: int = 1, labels: Tensor | None = None) -> tuple[Judgement, Pull]:
        """The judgement; and what turns n weights into the gradient, by image, of the last n scores' weighted sum.

        sets: minibatches that lie one after the other in `images`, each with stddev groups of its own.
        """
        colours = images.shape[1]
        if self.joined:
            images = with_label_maps(images, labels)
        *older, newest = cast("list[FromRGB]", [*self.from_rgb.values()])
        *down, score = cast("Any", self.blocks.values())
        faded = older if shows_older(alpha) else []
        x, pull_newest = newest.linearised(images.to(dtype or images.dtype))
        pulls: list[Pull] = []
        for block in down:
            x, pull_block = recomputed_linearised(block, x) if block.recomputes else block.linearised(x)
            pulls.append(pull_block)
            if faded and len(pulls) == 1:
                of_older, pull_older = faded[0].linearised(box_downscale(images).to(x.dtype))
                x = torch.lerp(at_least_float32(of_older), at_least_float32(x), alpha).to(x.dtype)
        judgement, pull_scores = score.linearised(x, sets, labels)

        def pull(weights: Tensor) -> Tensor:
            gradient = pull_scores(weights)
            for pull_block in reversed(pulls[1:]):
                gradient = pull_block(gradient)
            if not faded:
                return at_least_float32(pull_newest(pulls[0](gradient) if pulls else gradient))[:, :colours]
            by_newest = at_least_float32(pull_newest(pulls[0](gradient * alpha)))
            return (by_newest + upscale(at_least_float32(pull_older(gradient * (1 - alpha))) / 4))[:, :colours]

        return judgement, pull


class Differentiable(nn.Module):
    """A discriminator that has but to say how it judges one minibatch: autograd writes its derivative.

    Reals and fakes are judged apart, so that statistics of a batch are those of one kind.
    """

    def judged(self, images: Tensor, labels: Tensor | None) -> Judgement:
        raise NotImplementedError

    def forward(self, images: Tensor, alpha: float | Tensor = 1.0, dtype: torch.dtype | None = None,  # noqa: ARG002
                labels: Tensor | None = None) -> Tensor:
        with computed_in(dtype, images):
            return self.judged(images, labels).scores

    def linearised(self, images: Tensor, alpha: float | Tensor = 1.0, dtype: torch.dtype | None = None,  # noqa: ARG002
                   sets: int = 1, labels: Tensor | None = None) -> tuple[Judgement, Pull]:
        """As the progressive discriminator's; images that need a gradient keep it."""
        parts = [part if part.requires_grad else part.detach().requires_grad_() for part in images.chunk(sets)]
        of_parts = labels.chunk(sets) if labels is not None else [None] * sets
        with computed_in(dtype, images):
            judgements = [self.judged(part, own) for part, own in zip(parts, of_parts, strict=True)]

        def pull(weights: Tensor) -> Tensor:
            last = sets - len(weights) // len(parts[0])
            scores = torch.cat([each.scores for each in judgements[last:]])
            return torch.cat(torch.autograd.grad(scores, parts[last:], weights, create_graph=True))

        return Judgement(*map(torch.cat, zip(*judgements, strict=True))), pull


def computed_in(dtype: torch.dtype | None, like: Tensor) -> torch.autocast:
    """Autocast to bfloat16 where that is asked for."""
    return torch.autocast(like.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


@torch.no_grad()
def initialise(network: nn.Module, seed: int, role: str) -> None:
    """Weights N(0, 1) and biases 0, or as the network's own `initial` has it.

    Each is a function of (seed, role, its name), whatever the stage it enters in.
    """
    drawn_with = getattr(network, "initial", equalized)
    for name, parameter in network.named_parameters():
        mean, deviation = drawn_with(name, parameter)
        if deviation:
            source = torch.Generator().manual_seed(random_seed(seed, f"init/{role}/{name}"))
            parameter.copy_(torch.randn(parameter.shape, generator=source) * deviation + mean)
        else:
            parameter.fill_(mean)


def equalized(name: str, parameter: Tensor) -> tuple[float, float]:  # noqa: ARG001
    """Mean and deviation of an equalized layer's parameter."""
    return 0.0, 0.0 if name.endswith("bias") else 1.0


def recompute(network: nn.Module, resolution: int) -> None:
    """Has the blocks from `resolution` on recompute their feature maps in the backward; 0: none."""
    for size, block in network.blocks.items():  # type: ignore[operator, union-attr]
        block.recomputes = 0 < resolution <= int(size)
