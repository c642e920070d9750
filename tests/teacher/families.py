# SPDX-License-Identifier: Apache-2.0
"""Small networks of pytorchcv's families: the real blocks, a few of each, few channels."""

from functools import partial
from importlib import import_module

import torch
from torch import nn

CLASSES = 5


def _build(module, name, *args, **kwargs):
    network = getattr(import_module(f"pytorchcv.models.{module}"), name)(
        *args, num_classes=CLASSES, **kwargs
    )
    for part in network.modules():
        for child_name, child in part.named_children():
            if isinstance(child, nn.AvgPool2d) and child.kernel_size >= 7:  # for 224x224 images
                setattr(part, child_name, nn.AdaptiveAvgPool2d(1))
    return network


#: family -> (how to build it, side of its images)
FAMILIES = {
    "resnet": (
        partial(_build, "resnet", "ResNet", [[8], [12, 12]], 8, bottleneck=False, conv1_stride=False),
        32,
    ),
    "preresnet": (
        partial(_build, "preresnet", "PreResNet", [[8], [16]], 8, bottleneck=True, conv1_stride=False),
        32,
    ),
    "densenet": (partial(_build, "densenet", "DenseNet", [[12, 16], [14, 18]], 8), 32),
    "mobilenet": (
        partial(_build, "mobilenet", "MobileNet", [[8], [12], [16, 16]], first_stage_stride=False),
        32,
    ),
    "mobilenetv2": (
        partial(
            _build, "mobilenetv2", "MobileNetV2", [[8], [12, 12], [16, 16]], 8, 24,
            remove_exp_conv=False,
        ),
        32,
    ),
    "mobilenetv3": (
        partial(
            _build, "mobilenetv3", "MobileNetV3", [[8], [12, 12], [16, 16]],
            [[8], [24, 36], [48, 48]], 8, 24, 32, [[1], [0, 1], [0, 0]], [[1], [1, 0], [0, 0]],
            [[1], [0, 1], [1, 1]], True, False,
        ),
        32,
    ),
    "shufflenet": (partial(_build, "shufflenet", "ShuffleNet", [[24, 24], [48, 48]], 12, groups=3), 64),
    "shufflenetv2": (partial(_build, "shufflenetv2", "ShuffleNetV2", [[16, 16], [32, 32]], 8, 24), 64),
    "squeezenet": (
        partial(_build, "squeezenet", "SqueezeNet", [[16, 16], [32]], [[0, 1], [0]], 3, 16), 64,
    ),
    "efficientnet": (
        partial(
            _build, "efficientnet", "EfficientNet", [[8], [12, 12], [16]], 8, 24,
            [[3], [3, 3], [5]], [1, 2, 2], [[1], [6, 6], [6]],
        ),
        32,
    ),
    "seresnet": (
        partial(_build, "seresnet", "SEResNet", [[16], [32]], 16, bottleneck=False, conv1_stride=False),
        32,
    ),
    "bninception": (
        partial(
            _build, "bninception", "BNInception", [[32], [40, 32]], [8, 12], [[[8, 8]], [[8, 8], [8, 8]]],
            [[[8, 8, 8, 8]], [[0, 4, 4, 0], [8, 8, 8, 8]]],
        ),
        32,
    ),
    "dpn": (
        partial(_build, "dpn", "DPN", [[28, 32], [52]], 8, 3, 1, [8, 16], [16, 32], [4, 5], 2, False, False, True),
        32,
    ),
    "xception": (partial(_build, "xception", "Xception", [[16], [24, 1024]]), 48),
    "mnasnet": (
        partial(
            _build, "mnasnet", "MnasNet", [[12, 12], [16]], [8, 8], [16, 24], [[1, 1], [0]],
            [[3, 3], [6]], [[0, 0], [4]], False, False,
        ),
        32,
    ),
    "resnext": (
        partial(_build, "resnext", "ResNeXt", [[64], [64]], 8, cardinality=4, bottleneck_width=4), 32,
    ),
    "ghostnet": (
        partial(
            _build, "ghostnet", "GhostNet", [[8], [12, 12]], 8, 24, 32, [[1], [1, 0]],
            [[1], [3, 3]], [[0], [0, 1]], False,
        ),
        32,
    ),
    "vovnet": (partial(_build, "vovnet", "VoVNet", [[16], [32]], [[8], [12]], 3), 64),
    "peleenet": (partial(_build, "peleenet", "PeleeNet", [[16, 24], [32]], 8, [1, 2]), 64),
    "igcv3": (partial(_build, "igcv3", "IGCV3", [[8], [12, 12]], 8, 24), 32),
    "diracnetv2": (partial(_build, "diracnetv2", "DiracNetV2", [[8, 8], [16]], 8), 32),
}  # fmt: skip


def build(family):
    """Return a family's network, with random weights and statistics, and its image shape."""
    make, side = FAMILIES[family]
    torch.manual_seed(0)
    return randomise(make()), (3, side, side)


def randomise(module):
    """Give batch norms statistics and affine maps that differ between channels, some negative."""
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is not None:
            channels = part.num_features
            part.running_mean.copy_(torch.randn(channels, generator=generator) * 0.3)
            part.running_var.copy_(torch.rand(channels, generator=generator) + 0.5)
            if part.weight is not None:
                signs = torch.randint(0, 8, (channels,), generator=generator).clamp(max=1) * 2 - 1
                with torch.no_grad():
                    part.weight.copy_(signs * (torch.rand(channels, generator=generator) + 0.5))
                    part.bias.copy_(torch.randn(channels, generator=generator) * 0.3)
    return module.eval()
