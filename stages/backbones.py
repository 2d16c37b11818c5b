"""The two pretrained networks that features come from: EfficientNet-Lite0 and the Inception-v3 of published FIDs.

Both take [N, 3, H, W] float32, normalised by stages/features.py, and give ([N, D] features, [N, K] logits): the mean
over positions of the last layer, and the classifier's answer to it. They are for reading only: their batch norms are
folded into the convolutions when the weights are loaded, and nothing in them trains.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Side = int | tuple[int, int]
Step = tuple[int, Side]  # a convolution's output channels and kernel
NORM_EPSILON = 1e-3  # of the batch norms, in both


class Conv(nn.Module):
    """Convolution, batch norm, activation. `padding` is that of torch, or `same`: TensorFlow's, where a stride of 2 on
    an even side pads one more behind than before."""

    def __init__(self, inputs: int, outputs: int, kernel: Side, stride: int = 1, padding: Side | str = "same",
                 groups: int = 1, activation: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.before: tuple[int, ...] = ()
        if padding == "same" and stride == 2:
            assert isinstance(kernel, int)
            self.before, padding = ((kernel - 2) // 2, (kernel - 1) // 2) * 2, 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.bn: nn.BatchNorm2d | nn.Identity = nn.BatchNorm2d(outputs, eps=NORM_EPSILON)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.bn(self.conv(F.pad(x, self.before) if self.before else x)))


def loaded(network: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """The network with these weights, ready to be read. RuntimeError for layers that are missing, unknown or of
    another shape."""
    network.load_state_dict(dict(weights))  # a plain dict: it may lack the batch norms' counters, as old files do
    network.eval().double()  # folding in float64 keeps the features' last digits
    for layer in network.modules():
        if isinstance(layer, Conv) and isinstance(layer.bn, nn.BatchNorm2d):
            layer.conv = torch.nn.utils.fuse_conv_bn_eval(layer.conv, layer.bn)
            layer.bn = nn.Identity()
    return network.float().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


# ---- EfficientNet-Lite0: Tan and Le 2019 (table 1), without squeeze-and-excitation and with ReLU6

PARTS = ("expand", "depthwise", "project")  # of a block, as its batch norms are numbered
LITE0_BLOCKS = (  # kernel, stride of the first, expansion, channels, repeats
    (3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3), (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1))


class InvertedBlock(nn.Module):
    """Expand, convolve each channel by itself, project; added to its input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = Conv(inputs, wide, 1, activation=F.relu6) if expansion > 1 else nn.Identity()
        self.depthwise = Conv(wide, wide, kernel, stride, groups=wide, activation=F.relu6)
        self.project = Conv(wide, outputs, 1, activation=nn.Identity())
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.adds else y


class EfficientNetLite0(nn.Module):
    """1,280 features and 1,000 logits (ImageNet-1k) of images whose sides are multiples of 32."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Conv(3, 32, 3, 2, activation=F.relu6)
        blocks, inputs = [], 32
        for kernel, first_stride, expansion, outputs, repeats in LITE0_BLOCKS:
            for stride in (first_stride, *[1] * (repeats - 1)):
                blocks.append(InvertedBlock(inputs, outputs, kernel, stride, expansion))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = Conv(inputs, 1280, 1, activation=F.relu6)
        self.fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.head(self.blocks(self.stem(x))).mean(dim=(2, 3))
        return features, self.fc(features)


def lite0(weights: Mapping[str, Tensor]) -> nn.Module:
    """From the names of the package's file, such as `_blocks.3._depthwise_conv.weight` and `_blocks.3._bn1.weight`."""
    def renamed(name: str) -> str:
        name = re.sub(r"^_conv_(stem|head)\.", r"\1.conv.", name)
        name = re.sub(r"^_bn([01])\.", lambda found: f"{('stem', 'head')[int(found[1])]}.bn.", name)
        name = re.sub(r"^_blocks\.(\d+)\._(\w+)_conv\.", r"blocks.\1.\2.conv.", name)
        return re.sub(r"^_blocks\.(\d+)\._bn([012])\.", lambda found: f"blocks.{found[1]}.{PARTS[int(found[2])]}.bn.",
                      name).replace("_fc.", "fc.")

    return loaded(EfficientNetLite0(), {renamed(name): tensor for name, tensor in weights.items()})


# ---- Inception-v3 as TensorFlow published it in 2015 (Szegedy et al. 2016), with which FIDs are taken

def mean_pool(x: Tensor) -> Tensor:
    """3x3 means of as many values as lie inside the image."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


max_pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)  # in the last block only, unlike later Inceptions
halving_pool = partial(F.max_pool2d, kernel_size=3, stride=2)


class Mixed(nn.Module):
    """Branches side by side, their channels one after the other; `branch_pool` pools first.

    A branch is a chain of steps, named `_1`, `_2`, ... where there are several; a step that is a list is that many
    convolutions of the same input, named `a`, `b`. Halving blocks have stride 2 at each branch's end, without padding,
    and end with the pooled input itself.
    """

    def __init__(self, inputs: int, branches: dict[str, list[Step | list[Step]]],
                 pool: Callable[[Tensor], Tensor] = mean_pool) -> None:
        super().__init__()
        self.pool, self.halves = pool, pool is halving_pool
        self.branches: dict[str, list[list[str]]] = {}  # names of the layers, as they follow one another
        for branch, steps in branches.items():
            self.branches[branch], channels = [], inputs
            for number, step in enumerate(steps, start=1):
                name = f"{branch}_{number}" if len(steps) > 1 else branch
                layers = {f"{name}{letter}": one for letter, one in zip("ab", step, strict=True)} \
                    if isinstance(step, list) else {name: step}
                stride, padding = (2, 0) if self.halves and number == len(steps) else (1, "same")
                for layer, (outputs, kernel) in layers.items():
                    self.add_module(layer, Conv(channels, outputs, kernel, stride, padding))
                self.branches[branch].append([*layers])
                channels = sum(outputs for outputs, _ in layers.values())

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch, steps in self.branches.items():
            y = self.pool(x) if branch == "branch_pool" else x
            for step in steps:
                y = torch.cat([self.get_submodule(layer)(y) for layer in step], dim=1)
            outputs.append(y)
        return torch.cat([*outputs, self.pool(x)] if self.halves else outputs, dim=1)


def block_35(inputs: int, pooled: int) -> Mixed:
    return Mixed(inputs, {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)],
                          "branch3x3dbl": [(64, 1), (96, 3), (96, 3)], "branch_pool": [(pooled, 1)]})


def block_17(narrow: int) -> Mixed:
    """7x7 kernels as 1x7 and 7x1."""
    row, column = (1, 7), (7, 1)
    return Mixed(768, {
        "branch1x1": [(192, 1)],
        "branch7x7": [(narrow, 1), (narrow, row), (192, column)],
        "branch7x7dbl": [(narrow, 1), (narrow, column), (narrow, row), (narrow, column), (192, row)],
        "branch_pool": [(192, 1)]})


def block_8(inputs: int, pool: Callable[[Tensor], Tensor]) -> Mixed:
    pair: list[Step] = [(384, (1, 3)), (384, (3, 1))]
    return Mixed(inputs, {"branch1x1": [(320, 1)], "branch3x3": [(384, 1), pair],
                          "branch3x3dbl": [(448, 1), (384, 3), pair], "branch_pool": [(192, 1)]}, pool)


class InceptionV3(nn.Module):
    """2,048 features (`pool3`) and 1,008 logits of images of 299 px.

    Layers are named as in the file of weights that torch-fidelity and pytorch-fid use. The logits leave the bias out:
    so did the original Inception score, and all those compared with it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2, padding=0)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding=0)
        self.Mixed_5b = block_35(192, pooled=32)
        self.Mixed_5c = block_35(256, pooled=64)
        self.Mixed_5d = block_35(288, pooled=64)
        self.Mixed_6a = Mixed(288, {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}, halving_pool)
        self.Mixed_6b = block_17(narrow=128)
        self.Mixed_6c = block_17(narrow=160)
        self.Mixed_6d = block_17(narrow=160)
        self.Mixed_6e = block_17(narrow=192)
        self.Mixed_7a = Mixed(768, {"branch3x3": [(192, 1), (320, 3)],
                                    "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)]}, halving_pool)
        self.Mixed_7b = block_8(1280, mean_pool)
        self.Mixed_7c = block_8(2048, max_pool)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = halving_pool(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = halving_pool(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        for block in (self.Mixed_5b, self.Mixed_5c, self.Mixed_5d, self.Mixed_6a, self.Mixed_6b, self.Mixed_6c,
                      self.Mixed_6d, self.Mixed_6e, self.Mixed_7a, self.Mixed_7b, self.Mixed_7c):
            x = block(x)
        features = x.mean(dim=(2, 3))
        return features, F.linear(features, self.fc.weight)


def inception(weights: Mapping[str, Tensor]) -> nn.Module:
    return loaded(InceptionV3(), weights)
