# SPDX-License-Identifier: Apache-2.0
"""What ``zsq demo`` quantizes: a small network trained on scikit-learn's handwritten digits."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from zsq.errors import UsageError
from zsq.runtime.files import atomic_write

# The 8x8 images are enlarged, so that feature maps stay larger than the kernels.
DIGITS_SHAPE = (1, 16, 16)
# Of all 1,797 images at that size, pixels in [0, 1].
DIGITS_MEAN = (0.3053,)
DIGITS_STD = (0.3186,)

_HELD_OUT = 540  # 30 %
_EPOCHS = 12
_BATCH = 64
_PEAK_LEARNING_RATE = 0.2


class DigitsNet(nn.Module):
    """A residual network in miniature: five convolutions with batch norm, one residual sum.

    Args:
        classes: number of outputs.

    Example:
        >>> DigitsNet()(torch.zeros(2, 1, 16, 16)).shape
        torch.Size([2, 10])
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = _conv_bn(1, 32)
        self.down = _conv_bn(32, 64, stride=2)
        self.unit1 = _conv_bn(64, 64)
        self.unit2 = _conv_bn(64, 64)
        self.head = _conv_bn(64, 64, stride=2)
        self.output = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images ``[N, 1, 16, 16]`` to logits ``[N, classes]``."""
        x = functional.relu(self.stem(x))
        x = functional.relu(self.down(x))
        x = functional.relu(x + self.unit2(functional.relu(self.unit1(x))))
        x = functional.relu(self.head(x))
        logits: Tensor = self.output(functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def train_digits(
    seed: int = 0, progress: Callable[[int, int, float], None] | None = None
) -> tuple[DigitsNet, Tensor, Tensor]:
    """Train `DigitsNet` on 70 % of scikit-learn's digits; a few seconds on two cores.

    Args:
        seed: of the split, the initial weights and the order of the images.
        progress: called after each step with the steps done, all steps and the loss.

    Returns:
        The network in eval mode, the held-out images (normalised, ``[540, 1, 16, 16]``) and their
        labels (int64, ``[540]``).

    Raises:
        UsageError: scikit-learn is not installed.
    """
    pixels, labels = _load_digits()
    images = (pixels.float() / 255 - DIGITS_MEAN[0]) / DIGITS_STD[0]
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=random)
    held_out, train = order[:_HELD_OUT], order[_HELD_OUT:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = DigitsNet()
    _fit(module, images[train], labels[train], random, progress)
    return module.eval(), images[held_out], labels[held_out]


def save_digits(module: nn.Module, path: Path | str) -> None:
    """Save the trained network as safetensors: ``zsq:digits`` with ``--weights PATH``."""
    with atomic_write(path) as temporary:
        save_file(module.state_dict(), temporary)


def write_image_folder(images: Tensor, labels: Tensor, folder: Path | str) -> None:
    """Write normalised digits as PNGs, one folder a class, so that reading them gives them back.

    Args:
        images: ``[N, 1, 16, 16]``, normalised as `train_digits` returns them.
        labels: ``[N]``, 0 to 9.
        folder: where the class folders go; created.
    """
    pixels = ((images * DIGITS_STD[0] + DIGITS_MEAN[0]) * 255).round().clamp(0, 255)
    for index, (picture, label) in enumerate(zip(pixels.byte(), labels.tolist(), strict=True)):
        target = Path(folder) / str(label) / f"{index:04d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture[0].numpy()).save(target)


def _conv_bn(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
    )


def _load_digits() -> tuple[Tensor, Tensor]:
    """Return the images as bytes, ``[1797, 1, 16, 16]``, and their labels."""
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise UsageError(
            "the demo's images come with scikit-learn, which is not installed: pip install "
            "'zsq[demo]'"
        ) from error
    digits = datasets.load_digits()
    images = torch.from_numpy(np.asarray(digits.images, dtype=np.float32))[:, None] / 16
    enlarged = functional.interpolate(images, DIGITS_SHAPE[1:], mode="bilinear", antialias=False)
    # Rounded to whole pixels before training, so that PNGs hold exactly what the network saw.
    return (enlarged * 255).round().byte(), torch.from_numpy(np.asarray(digits.target, np.int64))


def _fit(
    module: DigitsNet,
    images: Tensor,
    labels: Tensor,
    random: torch.Generator,
    progress: Callable[[int, int, float], None] | None,
) -> None:
    steps = _EPOCHS * (len(images) // _BATCH)
    optimizer = torch.optim.SGD(
        module.parameters(), lr=_PEAK_LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PEAK_LEARNING_RATE, steps)
    module.train()
    done = 0
    for _ in range(_EPOCHS):
        order = torch.randperm(len(images), generator=random)
        # The last, incomplete batch is left out; another order leaves other images out.
        for batch in torch.split(order, _BATCH)[: len(images) // _BATCH]:
            loss = functional.cross_entropy(module(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            done += 1
            if progress is not None:
                progress(done, steps, float(loss.detach()))
