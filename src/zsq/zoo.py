# SPDX-License-Identifier: Apache-2.0
"""Our own small networks: ``zsq:NAME``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources

import torch
from torch import Tensor, nn

from zsq.demo import DIGITS_MEAN, DIGITS_SHAPE, DIGITS_STD, DigitsNet
from zsq.errors import UsageError
from zsq.teacher.checkpoints import load_checkpoint


class ConvBlock(nn.Module):
    """Convolution without bias, batch norm and, where asked for, a ReLU.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: side of the kernel; odd, the padding keeps the size.
        stride: of the convolution.
        activation: whether a ReLU follows.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        activation: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels)
        self.activ = nn.ReLU() if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, in, H, W]`` to ``[N, out, H / stride, W / stride]``."""
        out: Tensor = self.activ(self.bn(self.conv(x)))
        return out


class ResidualUnit(nn.Module):
    """Two 3x3 convolutions around which the input is carried, by a 1x1 one where shapes differ."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential()
        self.body.add_module("conv1", ConvBlock(in_channels, out_channels, stride=stride))
        self.body.add_module("conv2", ConvBlock(out_channels, out_channels, activation=False))
        self.identity_conv: nn.Module = nn.Identity()
        if in_channels != out_channels or stride != 1:
            self.identity_conv = ConvBlock(
                in_channels, out_channels, kernel_size=1, stride=stride, activation=False
            )
        self.activ = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, in, H, W]`` to ``[N, out, H / stride, W / stride]``."""
        out: Tensor = self.activ(self.body(x) + self.identity_conv(x))
        return out


class CifarResNet(nn.Module):
    """The residual network for 32x32 images of He et al., arXiv 1512.03385, section 4.2.

    Depth is 6 * ``units`` + 2. Where the size halves, the shortcut is a 1x1 convolution with batch
    norm (the paper's option B). State-dict keys are those of the packaged checkpoints.

    Args:
        units: residual units in each of the three stages.
        classes: number of outputs.
    """

    def __init__(self, units: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential()
        self.features.add_module("init_block", ConvBlock(3, 16))
        in_channels = 16
        for index, width in enumerate((16, 32, 64), start=1):
            stage = nn.Sequential()
            for unit in range(1, units + 1):
                stride = 2 if index > 1 and unit == 1 else 1
                stage.add_module(f"unit{unit}", ResidualUnit(in_channels, width, stride))
                in_channels = width
            self.features.add_module(f"stage{index}", stage)
        self.features.add_module("final_pool", nn.AdaptiveAvgPool2d(1))
        self.output = nn.Linear(in_channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images ``[N, 3, 32, 32]`` to logits ``[N, classes]``."""
        logits: Tensor = self.output(self.features(x).flatten(1))
        return logits


@dataclass(frozen=True)
class ZooEntry:
    """One network of the zoo.

    Attributes:
        builder: builds the network with random weights.
        input_shape: channels, height, width of one image.
        mean: of each channel, for pixels in [0, 1].
        std: of each channel, for pixels in [0, 1].
        weights: file of the packaged weights; None: the user brings them.
    """

    builder: Callable[[], nn.Module]
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    weights: str | None = None


ZOO: dict[str, ZooEntry] = {
    "resnet20_cifar10": ZooEntry(
        builder=CifarResNet,
        input_shape=(3, 32, 32),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        weights="resnet20_cifar10.safetensors",
    ),
    "digits": ZooEntry(
        builder=DigitsNet, input_shape=DIGITS_SHAPE, mean=DIGITS_MEAN, std=DIGITS_STD
    ),
}


def build(name: str, *, pretrained: bool = True) -> nn.Module:
    """Build a network of the zoo, in eval mode.

    Args:
        name: a key of ``ZOO``.
        pretrained: load the packaged weights.

    Raises:
        UsageError: no weights are packaged for it.

    Example:
        >>> sum(p.numel() for p in build("resnet20_cifar10").parameters())
        272474
    """
    entry = ZOO[name]
    if not pretrained:
        return entry.builder().eval()
    if entry.weights is None:
        raise UsageError(
            f"zsq:{name} comes without weights: pass them with --weights FILE ('zsq demo' trains "
            "and saves some), or --weights random to look at the architecture alone."
        )
    with torch.random.fork_rng(devices=[]):  # what is overwritten draws nothing from the caller
        module = entry.builder().eval()
    packaged = resources.files("zsq") / "weights" / entry.weights
    with resources.as_file(packaged) as path:
        load_checkpoint(module, path)
    return module
